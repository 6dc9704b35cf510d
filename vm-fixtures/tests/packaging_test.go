// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// installed installs KvmAccess on this host as a user does, until the test
// ends. The module is not loaded then; it is again when the test has ended.
func installed(t *testing.T, release string) {
	t.Helper()
	for _, pattern := range []string{"/lib/modules/*/updates/kvmaccess.ko*", "/usr/src/kvmaccess-*", "/usr/local/sbin/kvmaccessd"} {
		if files, err := filepath.Glob(pattern); err != nil || len(files) > 0 {
			t.Fatalf("KvmAccess is installed on this host already: %v (%v)", files, err)
		}
	}
	fewModules(t, release)
	// What "make" leaves in a checkout.
	dir := t.TempDir()
	copyAll := func(to, from string) {
		must(t, "cp", "-R", payload(from), filepath.Join(dir, to))
	}
	copyAll("checkout", host.InstallDir)
	bin := filepath.Join("checkout", "bin")
	if err := os.MkdirAll(filepath.Join(dir, bin, release), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"kvmaccess", "kvmaccessd"} {
		copyAll(filepath.Join(bin, program), filepath.Join("bin", program))
	}
	copyAll(filepath.Join(bin, release, host.ModuleFile), host.ModuleFile)

	if err := unloadModule(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := loadModule(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		must(t, "make", "-C", filepath.Join(dir, "checkout"), "uninstall")
		if names := loaded(t); slices.Contains(names, "kvmaccess") {
			t.Error("the module is loaded after its uninstallation")
		}
		if out, err := exec.Command("modprobe", "-n", "kvmaccess").CombinedOutput(); err == nil {
			t.Errorf("modprobe still finds the module: %s", out)
		}
	})
	must(t, "make", "-C", filepath.Join(dir, "checkout"), "install")
}

// fewModules leaves this kernel with the modules of KVM, until the test ends:
// depmod, which reads them all, takes minutes under Bochs.
func fewModules(t *testing.T, release string) {
	t.Helper()
	top := filepath.Join("/lib/modules", release)
	files, err := filepath.Glob(filepath.Join(top, "modules.[bo]*")) // those not of depmod
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(must(t, "modprobe", "--all", "--show-depends", "kvm_amd", "kvm_intel")) {
		if fields := strings.Fields(line); fields[0] == "insmod" {
			files = append(files, fields[1])
		}
	}
	few := t.TempDir()
	for _, f := range files {
		name, err := filepath.Rel(top, f)
		if err != nil {
			t.Fatal(err)
		}
		if err := host.CopyFile(filepath.Join(few, name), f); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(few, top, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(top, 0); err != nil {
			t.Error(err)
		}
	})
}

// must runs a command, which must succeed, and returns what it said.
func must(t *testing.T, args ...string) string {
	t.Helper()
	// Not the test's own context: it has ended when the test cleans up.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v:\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loaded lists the modules of this host.
func loaded(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("/proc/modules")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	return names
}

// mustBeLoaded checks for each module named whether it is loaded: "!" before a
// name says that it must not be.
func mustBeLoaded(t *testing.T, names ...string) {
	t.Helper()
	all := loaded(t)
	for _, n := range names {
		name, not := strings.CutPrefix(n, "!")
		if slices.Contains(all, name) == not {
			t.Errorf("module %s is loaded: %v", name, not)
		}
	}
}

// captures starts a VM and takes its vCPU's state.
func captures(t *testing.T, vendor kvmaccess.Vendor) {
	t.Helper()
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	if s := capture(t, c, vm.ID, 0); s.Registers.RIP == 0 {
		t.Errorf("captured %+v", s)
	}
	info, err := c.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.Vendor != vendor || info.Caps&kvmaccess.CapVCPU == 0 {
		t.Errorf("INFO says %+v, want vendor %v and vCPUs", info, vendor)
	}
}

// The installed module is found by modprobe, at boot, by the kernel when a
// program asks for it; and it does not matter which comes first, it or the
// processor's KVM.
func TestInstalled(t *testing.T) {
	release := must(t, "uname", "-r")
	kvm, vendor := "kvm_amd", kvmaccess.VendorSVM
	if slices.Contains(loaded(t), "kvm_intel") {
		kvm, vendor = "kvm_intel", kvmaccess.VendorVMX
	}
	// KVM can only be unloaded while it has no guests.
	if err := stopShared(); err != nil {
		t.Fatal(err)
	}
	installed(t, release)

	t.Run("by name", func(t *testing.T) {
		mustBeLoaded(t, "!kvmaccess")
		must(t, "modprobe", "kvmaccess")
		mustBeLoaded(t, "kvmaccess", "kvm", kvm)
		captures(t, vendor)
	})
	t.Run("removed alone", func(t *testing.T) {
		must(t, "modprobe", "-r", "kvmaccess")
		mustBeLoaded(t, "!kvmaccess", "kvm", kvm)
	})
	t.Run("by a program", func(t *testing.T) {
		// The kernel asks modprobe for the netlink family's alias.
		info, err := newClient(t).Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		mustBeLoaded(t, "kvmaccess")
		if info.Caps&kvmaccess.CapMemory == 0 {
			t.Errorf("INFO says %+v", info)
		}
		must(t, "modprobe", "-r", "kvmaccess")
	})
	t.Run("at boot, before KVM", func(t *testing.T) {
		must(t, "modprobe", "-r", kvm)
		mustBeLoaded(t, "!kvmaccess", "!kvm", "!"+kvm)
		// What systemd-modules-load does with the file.
		must(t, "sh", "-ec", "grep -v '^#' /usr/lib/modules-load.d/kvmaccess.conf | xargs modprobe -ab")
		mustBeLoaded(t, "kvmaccess", "kvm", "!"+kvm)
		info, err := newClient(t).Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if info.Vendor != kvmaccess.VendorNone || info.Caps&kvmaccess.CapVCPU != 0 {
			t.Errorf("without %s INFO says %+v", kvm, info)
		}
		if vms, err := newClient(t).VMs(t.Context()); err != nil || len(vms) > 0 {
			t.Errorf("without %s there are the VMs %+v (%v)", kvm, vms, err)
		}
		must(t, "modprobe", kvm)
		captures(t, vendor)
	})
	t.Run("KVM loaded again under it", func(t *testing.T) {
		must(t, "modprobe", "-r", kvm)
		mustBeLoaded(t, "kvmaccess", "kvm", "!"+kvm)
		must(t, "modprobe", kvm)
		captures(t, vendor)
		must(t, "modprobe", "-r", "kvmaccess")
	})
	t.Run("without type information", func(t *testing.T) {
		// As on a kernel without CONFIG_DEBUG_INFO_BTF: no registers, but memory.
		if err := unix.Mount("none", "/sys/kernel/btf", "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount("/sys/kernel/btf", 0); err != nil {
				t.Error(err)
			}
		})
		must(t, "modprobe", "kvmaccess")
		c, k := newClient(t), openKVM(t)
		code := tinyvm.Spin(tinyvm.Long)
		g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: code})
		started(t, g)
		info, err := c.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if info.Caps&kvmaccess.CapVCPU != 0 || info.Caps&kvmaccess.CapMemory == 0 || len(info.Missing) == 0 {
			t.Errorf("INFO says %+v", info)
		}
		if _, err := c.VCPU(t.Context(), vm.ID, 0); !errors.Is(err, kvmaccess.ErrUnsupported) {
			t.Errorf("a vCPU's state: %v, want %v", err, kvmaccess.ErrUnsupported)
		}
		if _, err := c.Table(t.Context(), vm.ID, 0, kvmaccess.TableIDT); !errors.Is(err, kvmaccess.ErrUnsupported) {
			t.Errorf("a table: %v, want %v", err, kvmaccess.ErrUnsupported)
		}
		data, err := c.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: tinyvm.Code, Length: uint32(len(code))})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(code, data[0].Data); diff != "" {
			t.Errorf("the guest's code (-want +got):\n%s", diff)
		}
	})
}
