// SPDX-License-Identifier: MIT

package packaging

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// top is the checkout, from where this package's tests run.
const top = "../.."

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(top, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// find returns the first group of the only match in a file.
func find(t *testing.T, name, expression string) string {
	t.Helper()
	m := regexp.MustCompile(expression).FindAllStringSubmatch(read(t, name), -1)
	if len(m) != 1 {
		t.Fatalf("%s: %d matches of %s, want one", name, len(m), expression)
	}
	return m[0][1]
}

// What DKMS and the module's sources both say must be the same.
func TestDKMSAgrees(t *testing.T) {
	version := find(t, "kmod/version.h", `#define KVMACCESS_VERSION "(.+)"`)
	if got := find(t, "kmod/dkms.conf", `(?m)^PACKAGE_VERSION="(.+)"$`); got != version {
		t.Errorf("dkms.conf has version %s, version.h %s", got, version)
	}
	module := find(t, "Kbuild", `(?m)^obj-m := (.+)\.o$`)
	for _, name := range []string{`PACKAGE_NAME`, `BUILT_MODULE_NAME\[0\]`} {
		if got := find(t, "kmod/dkms.conf", `(?m)^`+name+`="(.+)"$`); got != module {
			t.Errorf("dkms.conf has %s %s, Kbuild %s", name, got, module)
		}
	}
	var boot []string
	for line := range strings.Lines(read(t, "kmod/modules-load.conf")) {
		if line = strings.TrimSpace(line); !strings.HasPrefix(line, "#") {
			boot = append(boot, line)
		}
	}
	if diff := cmp.Diff([]string{module}, boot); diff != "" {
		t.Errorf("modules-load.conf (-want +got):\n%s", diff)
	}

	lowest := find(t, "kmod/compat.h", `LINUX_VERSION_CODE < KERNEL_VERSION\((\d+, \d+), 0\)\n#error`)
	lowest = strings.ReplaceAll(lowest, ", ", ".")
	if got := find(t, "kmod/dkms.conf", `BUILD_EXCLUSIVE_KERNEL_MIN="(.+)"`); got != lowest {
		t.Errorf("dkms.conf begins with Linux %s, compat.h with %s", got, lowest)
	}
	kernels := regexp.MustCompile(find(t, "kmod/dkms.conf", `BUILD_EXCLUSIVE_KERNEL="(.+)"`))
	for release, want := range map[string]bool{
		"5.10.0-30-amd64": false, "5.19.1": false, "6.0.12": false,
		"6.1.0-56-cloud-amd64": true, "6.1.192": true, "6.12.107+deb13-cloud-amd64": true,
		"7.0.1": true, "7.2.13+deb14-cloud-amd64": true, "10.0": true,
	} {
		if got := kernels.MatchString(release); got != want {
			t.Errorf("dkms.conf takes Linux %s: %v, want %v", release, got, want)
		}
	}
}

// complete is a configuration that lacks nothing, by option.
var complete = []string{
	"X86_64=y", "MODULES=y", "MODULE_UNLOAD=y", "NET=y", "SYSFS=y",
	"KVM=m", "KVM_AMD=m", "KVM_INTEL=m",
	"KPROBES=y", "KRETPROBES=y", "KALLSYMS=y", "KALLSYMS_ALL=y",
	"DEBUG_INFO_BTF=y", "DEBUG_INFO_BTF_MODULES=y",
	"DYNAMIC_FTRACE_WITH_ARGS=y", "HIGH_RES_TIMERS=y",
}

// checkConfig runs check-config.sh on a configuration of these options.
func checkConfig(t *testing.T, options []string) (output string, code int) {
	t.Helper()
	dir := t.TempDir()
	var text strings.Builder
	for _, o := range options {
		text.WriteString("CONFIG_" + o + "\n")
	}
	if err := os.WriteFile(filepath.Join(dir, ".config"), []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return runCheckConfig(t, "6.1.0-doctored", dir)
}

func runCheckConfig(t *testing.T, args ...string) (output string, code int) {
	t.Helper()
	out, err := exec.Command(filepath.Join(top, "kmod/check-config.sh"), args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return string(out), code
}

func TestCheckConfig(t *testing.T) {
	type test struct {
		name    string
		without []string // options, out of complete
		with    []string // lines added to it
		code    int
		named   []string // CLASS OPTION, each on a line of its own, and no others
	}
	tests := []test{
		{name: "complete"},
		{name: "built in", without: []string{"KVM", "KVM_AMD", "KVM_INTEL", "DEBUG_INFO_BTF_MODULES"},
			with: []string{"KVM=y", "KVM_AMD=y", "KVM_INTEL=y"}},
		{name: "one vendor", without: []string{"KVM_INTEL"}},
		{name: "one vendor built in", without: []string{"KVM_AMD", "DEBUG_INFO_BTF_MODULES"}, with: []string{"KVM_AMD=y"},
			named: []string{"wanted CONFIG_DEBUG_INFO_BTF_MODULES"}},
		{name: "no vendor", without: []string{"KVM_AMD", "KVM_INTEL"}, code: 1,
			named: []string{"required CONFIG_KVM_AMD"}},
		{name: "said not to be set", without: []string{"KVM"}, with: []string{"KVM_MMIO=y", "KVM_GUEST=y", "KVM_MAX_NR_VCPUS=4096"},
			code: 1, named: []string{"required CONFIG_KVM"}},
		{name: "no BTF at all", without: []string{"DEBUG_INFO_BTF", "DEBUG_INFO_BTF_MODULES"},
			named: []string{"wanted CONFIG_DEBUG_INFO_BTF"}},
		{name: "no probes at all", without: []string{"KPROBES", "KRETPROBES"}, code: 1,
			named: []string{"required CONFIG_KPROBES"}},
		{name: "signatures", with: []string{"MODULE_SIG_FORCE=y"},
			named: []string{"beware CONFIG_MODULE_SIG_FORCE"}},
		{name: "locked down", with: []string{"LOCK_DOWN_KERNEL_FORCE_INTEGRITY=y"},
			named: []string{"beware CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY"}},
		{name: "trimmed", with: []string{"TRIM_UNUSED_KSYMS=y"},
			named: []string{"beware CONFIG_TRIM_UNUSED_KSYMS"}},
		{name: "several", without: []string{"NET", "KALLSYMS_ALL", "MODULE_UNLOAD"}, code: 1,
			named: []string{"required CONFIG_NET", "required CONFIG_KALLSYMS_ALL", "wanted CONFIG_MODULE_UNLOAD"}},
	}
	for _, o := range []string{"X86_64", "MODULES", "NET", "KVM", "KPROBES", "KALLSYMS", "KALLSYMS_ALL"} {
		tests = append(tests, test{name: "no " + o, without: []string{o}, code: 1, named: []string{"required CONFIG_" + o}})
	}
	for _, o := range []string{"KRETPROBES", "SYSFS", "DEBUG_INFO_BTF", "DEBUG_INFO_BTF_MODULES", "MODULE_UNLOAD",
		"DYNAMIC_FTRACE_WITH_ARGS", "HIGH_RES_TIMERS"} {
		tests = append(tests, test{name: "no " + o, without: []string{o}, named: []string{"wanted CONFIG_" + o}})
	}
	row := regexp.MustCompile(`(?m)^check-config: (required|wanted|beware) +(CONFIG_\w+)`)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			options := slices.DeleteFunc(slices.Clone(complete), func(o string) bool {
				name, _, _ := strings.Cut(o, "=")
				return slices.Contains(test.without, name)
			})
			out, code := checkConfig(t, append(options, test.with...))
			if code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			var named []string
			for _, m := range row.FindAllStringSubmatch(out, -1) {
				named = append(named, m[1]+" "+m[2])
			}
			if diff := cmp.Diff(test.named, named); diff != "" {
				t.Errorf("named (-want +got):\n%s\nof:\n%s", diff, out)
			}
		})
	}
}

// DKMS leaves out the very kernels that check-config calls unfit. That one of
// two options is needed cannot be said to it.
func TestExclusions(t *testing.T) {
	excluded := strings.Fields(find(t, "kmod/dkms.conf", `BUILD_EXCLUSIVE_CONFIG="(.+)"`))
	out, code := checkConfig(t, nil)
	if code != 1 {
		t.Errorf("exit code %d on an empty configuration, want 1", code)
	}
	var required []string
	for _, m := range regexp.MustCompile(`(?m)^check-config: required +(CONFIG_\w+) (or )?`).FindAllStringSubmatch(out, -1) {
		if m[2] == "" {
			required = append(required, m[1])
		}
	}
	slices.Sort(excluded)
	slices.Sort(required)
	if len(required) == 0 {
		t.Fatalf("nothing is required:\n%s", out)
	}
	if diff := cmp.Diff(required, excluded); diff != "" {
		t.Errorf("check-config requires (-), DKMS excludes by (+):\n%s", diff)
	}
}

func TestCheckConfigFindsNone(t *testing.T) {
	out, code := runCheckConfig(t, "6.1.0-nonexistent", t.TempDir())
	if code != 2 || !strings.Contains(out, "linux-headers-6.1.0-nonexistent") {
		t.Errorf("exit code %d, want 2, and what to install:\n%s", code, out)
	}
	if out, code := runCheckConfig(t); code != 2 || !strings.Contains(out, "usage:") {
		t.Errorf("exit code %d, want 2, and the usage:\n%s", code, out)
	}
}
