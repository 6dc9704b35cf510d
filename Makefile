# SPDX-License-Identifier: MIT
# "make help" says what there is.

export CGO_ENABLED := 0

SUITE   ?= bookworm
VENDOR  ?= svm
KERNEL  ?= $(shell uname -r)
KDIR    ?= /lib/modules/$(KERNEL)/build
PREFIX  ?= /usr/local
DESTDIR ?=
UNITS   := $(PREFIX)/lib/systemd/system
# systemd looks there whatever PREFIX is.
BOOT    := /usr/lib/modules-load.d/kvmaccess.conf

BIN      := bin
PROGRAMS := kvmaccess kvmaccessd
FIXTURE  := $(BIN)/vmfixture
MODULE   := $(BIN)/$(KERNEL)/kvmaccess.ko

# Debian packages that the emulated hosts need here, by a file of each. Their
# emulators come out of the cache.
PACKAGES := mmdebstrap:/usr/bin/mmdebstrap \
	    squashfs-tools:/usr/bin/mksquashfs \
	    debian-archive-keyring:/usr/share/keyrings/debian-archive-keyring.gpg \
	    ca-certificates:/etc/ssl/certs/ca-certificates.crt

# Emulated hosts, VENDOR-SUITE: all there are, and those that "make test" has
# the time for.
SUITES    := bookworm trixie sid
ALL_HOSTS := $(foreach v,svm vmx,$(SUITES:%=$(v)-%))
# Tests of the programs, and of guests that boot, lie or are none, most of the
# time that there is. Which kernel or vendor the host has makes no difference to
# them: "make test" runs them on one host.
PROGRAM_TESTS := ^Test(AttackedBeforeFirstSight|CLI.*|Restart|SecondDaemon|FullDisk|Daemon.*|GuestsComeAndGo|Periods|Attach(WhileBooting|Infected|Liar|Strangers)|BulkInPIDNamespace|WatchMode.*)$$
# Kernels of guests beside the hosts' own.
GUESTS := 5.10,6.1,6.12,6.12-full,7.2
# The suite that was asked for, or all of them.
EACH_SUITE := $(if $(filter file,$(origin SUITE)),$(SUITES),$(SUITE))

ifeq ($(HOST),here)
ON_HOST := $(FIXTURE) here --suite $(SUITE) --module $(abspath $(MODULE))
HOST_DEPS := kmod
PACKAGES += qemu-system-x86:/usr/bin/qemu-system-x86_64
TEST_HOSTS := here
else ifeq ($(HOST),)
ON_HOST := $(FIXTURE) run --vendor $(VENDOR) --suite $(SUITE)
HOST_DEPS :=
ifeq ($(origin SUITE)$(origin VENDOR),filefile)
TEST_HOSTS := $(SUITES:%=svm-%) vmx-bookworm
test: SKIP := $(PROGRAM_TESTS)
else
TEST_HOSTS := $(VENDOR)-$(SUITE)
endif
else
$(error HOST=$(HOST): either HOST=here, or none for an emulated host)
endif
WITH_PROGRAMS := $(foreach p,$(PROGRAMS),--file $(abspath $(BIN)/$(p)))

.PHONY: all
all: build kmod ## build the programs, and the module for the running kernel

.PHONY: help
help: ## say what there is
	@echo 'make TARGET [VARIABLE=value]...'
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS="$$(printf '\t')" read -r target text; do printf '  %-14s %s\n' "$$target" "$$text"; done
	@echo
	@echo 'HOST=here       test, demo: on this machine; it must load modules and have working KVM'
	@echo 'SUITE, VENDOR   test, demo: on that emulated host alone: bookworm, trixie or sid; svm or vmx'
	@echo 'SAMPLES         test: captures of each known guest under each kind of stress; test-all: 1400'
	@echo 'QUICK=1         bench, bench-watch, bench-scale, bench-peers: a few minutes each'
	@echo 'DKMS=1          install: the module by DKMS, for this kernel and each that comes'
	@echo 'KERNEL, KDIR    kmod, install: for that kernel ($(KERNEL)), by that build directory'
	@echo 'PREFIX, DESTDIR install: below $$DESTDIR$$PREFIX ($(PREFIX)), by default of this machine'
	@echo
	@echo 'Fixtures are cached in $${XDG_CACHE_HOME:-~/.cache}/kvmaccess.'

.PHONY: deps
deps: ## install the Debian packages that emulated hosts need here, if any is missing
	@missing=; for p in $(PACKAGES); do [ -e "$${p#*:}" ] || missing="$$missing $${p%%:*}"; done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" != 0 ]; then echo "deps: run as root, or install:$$missing" >&2; exit 1; fi; \
	echo "deps: installing$$missing"; \
	apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends $$missing

.PHONY: build
build: ## build the programs, static, into bin/
	go build -trimpath -o $(BIN)/ $(foreach p,$(PROGRAMS),./userspace/cmd/$(p))

.PHONY: fixture
fixture: deps
	@go build -trimpath -o $(BIN)/ ./vm-fixtures/cmd/...

.PHONY: check-config
check-config: ## name the options that the running kernel lacks, and what they are for
	@kmod/check-config.sh '$(KERNEL)' '$(KDIR)'

.PHONY: kmod
kmod: check-config ## build the module for the running kernel into bin/
	@[ -e $(KDIR)/Makefile ] || { \
		echo "kmod: no headers of kernel $(KERNEL) in $(KDIR): install linux-headers-$(KERNEL)" >&2; exit 1; }
	@mkdir -p $(dir $(MODULE))src
	@cp -a -u Kbuild kmod $(dir $(MODULE))src/
	$(MAKE) -C $(KDIR) M=$(abspath $(dir $(MODULE))src) modules
	@cp $(dir $(MODULE))src/kvmaccess.ko $(MODULE)

.PHONY: kmod-fixture
kmod-fixture: fixture ## build the module for the emulated host's kernel into bin/
	$(FIXTURE) module --suite $(SUITE) --out $(BIN)

.PHONY: test
test: test-static test-unit $(TEST_HOSTS:%=test-on-%) $(if $(filter svm-%,$(TEST_HOSTS)),test-la57) ## test on 6.1, 6.12 and 7.2 (AMD) and 6.1 (Intel), all emulated

# 72 programs and kinds of stress: more than 100,000 captures.
test-all: SAMPLES ?= 1400
.PHONY: test-all
test-all: test-static test-unit $(ALL_HOSTS:%=test-on-%) test-la57 test-guests test-dkms ## test everything on 6.1, 6.12 and 7.2, AMD and Intel each; guests of all kernels; DKMS

.PHONY: test-static
test-static:
	@echo '== format and vet'
	@unformatted=$$(gofmt -l bench userspace vm-fixtures); \
		[ -z "$$unformatted" ] || { echo "gofmt wants: $$unformatted" >&2; exit 1; }
	go vet ./...
	go vet -tags kvmhost,la57,guests ./...
	go vet -tags packaging ./vm-fixtures/packaging

.PHONY: test-unit
test-unit:
	@echo '== unit tests'
	go test ./...

# $(call test_on,NAME OF HOST,OPTIONS OF GO TEST,VMFIXTURE COMMAND)
define test_on
	@echo '== tests on a KVM host: $1'
	go test -v -count=1 -timeout 120m -tags kvmhost $2 \
		-exec '$(abspath $(FIXTURE)) $3 $(WITH_PROGRAMS) --timeout 120m --' ./vm-fixtures/tests \
		$(if $(SAMPLES),-args -samples $(SAMPLES))
endef

# $(call run_on,NAME OF HOST): options of vmfixture
run_on = run --vendor $(firstword $(subst -, ,$1)) --suite $(lastword $(subst -, ,$1))

HOSTS := $(sort $(ALL_HOSTS) $(filter-out here,$(TEST_HOSTS)))
.PHONY: $(HOSTS:%=test-on-%)
$(filter test-on-svm-%,$(HOSTS:%=test-on-%)): test-on-%: build fixture
	$(FIXTURE) module --suite $(lastword $(subst -, ,$*)) --out $(BIN)
	$(call test_on,$*,$(if $(filter-out svm-bookworm,$*),$(SKIP:%=-skip '%')),$(call run_on,$*))

# Bochs is a tenth as fast as QEMU: on Intel hosts, what concerns the
# processor. With two CPUs it now and then delivers a guest's page fault twice,
# which Linux does not survive, and 6.12 stood still in "HLT and IPI". Of a
# guest that KVM enters with interrupts off it takes no interrupt of the host's
# until the guest has had them on, so system management mode is left out.
VMX_GUESTS := ^Test(Info|VMs|MemslotAddresses|Memory|MemoryBeyondLimits|RangesPartlyBad|Tables|RegistersAgainstQEMU|RegistersAgainstGuest|MSRs|HaltedVCPU|BadRequests|ClientErrors|NotRoot)$$
VMX_TINY := ^Test(RegistersAgainstKVM|Condition.*|Methods|CPUOffline|Invariants|Modes|PageTableIsolation|VCPUsAddedWhileRead|Watch(Items|Registers|HaltedVCPU|MemoryGoes|DestroyedVM|Reset|CPUOffline|Churn))$$
VMX_SKIP := ^TestInvariants$$/(page_faults|HLT_and_IPI)
VMX_SAMPLES := 40

$(filter test-on-vmx-%,$(HOSTS:%=test-on-%)): SAMPLES ?= $(VMX_SAMPLES)
$(filter test-on-vmx-%,$(HOSTS:%=test-on-%)): test-on-%: build fixture
	$(FIXTURE) module --suite $(lastword $(subst -, ,$*)) --out $(BIN)
	$(call test_on,$* (one CPU),-run '$(VMX_GUESTS)',$(call run_on,$*) --smp 1)
	$(call test_on,$* (two CPUs),-run '$(VMX_TINY)' -skip '$(VMX_SKIP)',$(call run_on,$*) --smp 2)

.PHONY: test-guests
test-guests: build fixture ## test attaching to guests of 5.10, 6.1, 6.12 (cloud and full) and 7.2, with page tables of 4 and 5 levels
	go test -v -count=1 -timeout 120m -tags kvmhost,guests -run '^TestAttachKernels$$' \
		-exec '$(abspath $(FIXTURE)) run --cpu max --guest $(GUESTS) --suite $(SUITE) --timeout 120m --' ./vm-fixtures/tests

.PHONY: test-on-here
test-on-here: build fixture $(HOST_DEPS)
	$(call test_on,here,,$(wordlist 2,99,$(ON_HOST)))

.PHONY: test-la57
test-la57: build fixture ## test guests with 5-level paging, and watches, on a processor that has it
	go test -v -count=1 -timeout 10m -tags kvmhost,la57 -run '^Test(Mode5Level|Watch(Items|Backings|LeavesPagesAlone))$$' \
		-exec '$(abspath $(FIXTURE)) run --cpu max --suite $(SUITE) --timeout 10m --' ./vm-fixtures/tests

# Its kernel has no /dev/mem. The stress takes SEED=N to send again what a run of
# that seed sent.
.PHONY: test-sanitizers
test-sanitizers: build fixture ## test on a kernel with KASAN, lockdep, kmemleak, failing allocations; then loads no sane program causes
	$(call test_on,sanitizers,-skip '^Test(Stress|WatchDeviceMemory)$$',run --suite sanitizers)
	@echo '== stress'
	$(FIXTURE) run --suite sanitizers --timeout 180m -- $(BIN)/stress $(SEED:%=--seed %) $(STRESS)

.PHONY: test-dkms
test-dkms: $(EACH_SUITE:%=test-dkms-on-%) ## test "make install" and DKMS in a root of each suite, and load what DKMS built

.PHONY: $(EACH_SUITE:%=test-dkms-on-%)
$(EACH_SUITE:%=test-dkms-on-%): test-dkms-on-%: build fixture
	@echo '== DKMS of $*'
	go test -v -count=1 -timeout 30m -tags packaging ./vm-fixtures/packaging -run '^TestDKMS$$' \
		-suite $* -out $(abspath $(BIN)/dkms)
	go test -v -count=1 -timeout 20m -tags kvmhost -run '^TestInstalled$$' \
		-exec '$(abspath $(FIXTURE)) run --suite $* --module $(abspath $(BIN)/dkms/$*/kvmaccess.ko) $(WITH_PROGRAMS) --timeout 20m --' ./vm-fixtures/tests

.PHONY: demo
demo: build fixture $(HOST_DEPS) ## show the whole chain on running guests; leaves results/demo
	$(ON_HOST) $(WITH_PROGRAMS) --out results/demo --timeout 15m -- $(BIN)/demo
	go run ./bench/cmd/bench -demo -out results/demo/overhead

.PHONY: bench
bench: build fixture ## measure what monitoring costs; leaves results/overhead
	go run ./bench/cmd/bench $(if $(QUICK),-quick)

.PHONY: bench-capture
bench-capture: deps ## measure what one capture of a vCPU costs; leaves results/capture
	go run ./bench/cmd/benchcapture

.PHONY: snapshots
snapshots: PACKAGES += xz-utils:/usr/bin/xz
snapshots: fixture ## record anew the guests that unit tests read (golden files change with them: go test -update)
	vm-fixtures/snapshots.sh $(abspath $(FIXTURE))

.PHONY: bench-attach
bench-attach: deps ## measure what it takes to attach to guests of each kernel, and what drgn takes; leaves results/attach
	go run ./bench/cmd/benchattach

.PHONY: bench-watch
bench-watch: deps ## measure what watches in the kernel cost, and how soon they find a change; leaves results/watch
	go run ./bench/cmd/benchwatch $(if $(QUICK),-quick)

.PHONY: bench-scale
bench-scale: deps ## measure what watching up to 1,000 VMs costs; leaves results/scale
	go run ./bench/cmd/benchscale $(if $(QUICK),-quick)

.PHONY: bench-peers
bench-peers: deps ## measure what other ways to look at a guest cost; leaves results/peers
	go run ./bench/cmd/benchpeers $(if $(QUICK),-quick)

.PHONY: install
install: built $(if $(DKMS),dkms-install,module-install) ## install what "make" built: module, programs, completions, service
	install -D -t $(DESTDIR)$(PREFIX)/bin $(BIN)/kvmaccess
	install -D -t $(DESTDIR)$(PREFIX)/sbin $(BIN)/kvmaccessd
	@mkdir -p $(DESTDIR)$(UNITS)
	sed 's#/usr/local/#$(PREFIX)/#' userspace/cmd/kvmaccessd/kvmaccessd.service > $(DESTDIR)$(UNITS)/kvmaccessd.service
	@mkdir -p $(addprefix $(DESTDIR)$(PREFIX)/share/,bash-completion/completions zsh/site-functions fish/vendor_completions.d)
	$(BIN)/kvmaccess completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/kvmaccess
	$(BIN)/kvmaccess completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_kvmaccess
	$(BIN)/kvmaccess completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/kvmaccess.fish
	$(if $(DESTDIR),,! [ -d /run/systemd/system ] || systemctl daemon-reload)

.PHONY: built
built:
	@for f in $(if $(DKMS),,$(MODULE)) $(addprefix $(BIN)/,$(PROGRAMS)); do \
		[ -e $$f ] || { echo "install: $$f is not built: run 'make' first" >&2; exit 1; }; done

.PHONY: module-install
module-install: built
	@for f in $(DESTDIR)/usr/src/kvmaccess-*; do [ ! -e $$f ] || { \
		echo "install: DKMS has the module ($$f): run 'make install DKMS=1', or 'make dkms-uninstall' first" >&2; exit 1; }; done
	install -D -m 644 $(MODULE) $(DESTDIR)/lib/modules/$(KERNEL)/updates/kvmaccess.ko
	install -D -m 644 kmod/modules-load.conf $(DESTDIR)$(BOOT)
	$(if $(DESTDIR),,depmod $(KERNEL))

.PHONY: dkms-install
dkms-install: $(if $(DESTDIR),,check-config) ## install the module by DKMS: for this kernel, and each that comes
	kmod/dkms.sh install "$$(sed -n 's/^.define KVMACCESS_VERSION "\(.*\)"/\1/p' kmod/version.h)" \
		$(KERNEL) $(if $(filter-out file,$(origin KDIR)),$(KDIR))
	install -D -m 644 kmod/modules-load.conf $(DESTDIR)$(BOOT)

.PHONY: dkms-uninstall
dkms-uninstall: ## remove the module that "make dkms-install" installed; one that is loaded stays so
	kmod/dkms.sh remove
	rm -f $(DESTDIR)$(BOOT)

.PHONY: uninstall
uninstall: ## stop the service, unload the module, remove what "make install" installed
	$(if $(DESTDIR),,! [ -e $(UNITS)/kvmaccessd.service ] || ! [ -d /run/systemd/system ] || systemctl disable --now kvmaccessd)
	$(if $(DESTDIR),,! grep -q '^kvmaccess ' /proc/modules || rmmod kvmaccess)
	kmod/dkms.sh remove
	rm -f $(DESTDIR)/lib/modules/$(KERNEL)/updates/kvmaccess.ko $(DESTDIR)$(BOOT)
	$(if $(DESTDIR),,depmod $(KERNEL))
	rm -f $(DESTDIR)$(PREFIX)/bin/kvmaccess $(DESTDIR)$(PREFIX)/sbin/kvmaccessd \
		$(DESTDIR)$(UNITS)/kvmaccessd.service \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/kvmaccess \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_kvmaccess \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/kvmaccess.fish
	$(if $(DESTDIR),,! [ -d /run/systemd/system ] || systemctl daemon-reload)

.PHONY: check
check: fixture ## run sparse over the module's sources, for each suite's kernel (installs it)
	@command -v sparse >/dev/null || { apt-get -q update && apt-get -q -y install --no-install-recommends sparse; }
	@set -e; for s in $(EACH_SUITE); do echo "$(FIXTURE) check --suite $$s"; $(FIXTURE) check --suite $$s; done

.PHONY: style
style: ## run checkpatch over the module's sources (installs the kernel's source)
	vm-fixtures/style.sh

.PHONY: clean
clean: ## remove what was built; the cache stays
	rm -rf $(BIN)
