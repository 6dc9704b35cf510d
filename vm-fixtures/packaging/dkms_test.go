// SPDX-License-Identifier: MIT

//go:build packaging

package packaging

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	suite = flag.String("suite", "bookworm", "Debian suite to install into")
	out   = flag.String("out", "", "directory that gets SUITE/kvmaccess.ko, as DKMS built it")
)

// module is the file that modprobe would load.
func (m *machine) module(t *testing.T) string {
	t.Helper()
	return m.must(t, "modinfo -k "+m.kernel+" -F filename kvmaccess")
}

// The steps build upon each other: the first that fails is the last.
func TestDKMS(t *testing.T) {
	m := newMachine(t, *suite)
	t.Log("kernel", m.kernel)
	var before []string
	for _, step := range []struct {
		name string
		do   func(t *testing.T)
	}{
		{"packages", func(t *testing.T) {
			t.Log(lastLine(m.must(t, "apt-get -q update && apt-get -q -y install --no-install-recommends dkms systemd")))
			t.Log("DKMS", m.must(t, "dkms --version"), "-", m.must(t, "systemctl --version | head -n 1"))
			before = m.files(t)
		}},
		{"without DKMS", func(t *testing.T) {
			m.mustMake(t, "kmod")
			m.must(t, "cp /mnt/bin/kvmaccess /mnt/bin/kvmaccessd "+built)
			m.mustMake(t, "install")
			if got, want := m.module(t), "/lib/modules/"+m.kernel+"/updates/kvmaccess.ko"; got != want {
				t.Errorf("the module is %s, want %s", got, want)
			}
			m.modinfo(t)
			m.service(t)
			m.mustMake(t, "uninstall")
			if diff := cmp.Diff(before, m.files(t)); diff != "" {
				t.Errorf("before (-), after uninstallation (+):\n%s", diff)
			}
		}},
		{"install", func(t *testing.T) {
			m.mustMake(t, "dkms-install")
			want := added(t) + ", " + m.kernel + ", x86_64: installed"
			if got := m.must(t, "dkms status"); got != want {
				t.Errorf("DKMS has %q, want %q", got, want)
			}
			if got := m.module(t); !strings.HasPrefix(got, "/lib/modules/"+m.kernel+"/updates/dkms/kvmaccess.ko") {
				t.Errorf("the module is %s", got)
			}
			m.modinfo(t)
		}},
		{"beside", func(t *testing.T) {
			if out, code := m.make(t, "install"); code == 0 || !strings.Contains(out, "make install DKMS=1") {
				t.Errorf("exit code %d, want an error that says what to do:\n%s", code, out)
			}
		}},
		{"again, with all", func(t *testing.T) {
			m.mustMake(t, "install", "DKMS=1")
			m.service(t)
		}},
		{"take along", func(t *testing.T) {
			if *out != "" {
				m.takeOut(t, filepath.Join(*out, *suite, "kvmaccess.ko"))
			}
		}},
		{"another kernel", m.anotherKernel},
		{"exclusions", m.exclusions},
		{"replaces", func(t *testing.T) {
			// A module of "make install" must not come back when DKMS's goes.
			m.mustMake(t, "dkms-uninstall")
			m.mustMake(t, "install")
			m.mustMake(t, "install", "DKMS=1")
			m.modinfo(t)
			if out := m.must(t, "dkms status"); strings.Contains(out, "riginal") {
				t.Errorf("DKMS keeps the module that was there before: %s", out)
			}
		}},
		{"uninstall", func(t *testing.T) {
			m.mustMake(t, "uninstall")
			if diff := cmp.Diff(before, m.files(t)); diff != "" {
				t.Errorf("before (-), after uninstallation (+):\n%s", diff)
			}
			if got := m.must(t, "dkms status"); got != "" {
				t.Errorf("DKMS still has %q", got)
			}
		}},
		{"uninstall of nothing", func(t *testing.T) { m.mustMake(t, "uninstall") }},
	} {
		if !t.Run(step.name, step.do) {
			return
		}
	}
}

// service checks what systemd makes of the installed files.
func (m *machine) service(t *testing.T) {
	if out := m.must(t, "systemd-analyze verify --man=no /usr/local/lib/systemd/system/kvmaccessd.service"); out != "" {
		t.Errorf("systemd on the service:\n%s", out)
	}
	if out := m.must(t, "systemd-analyze cat-config modules-load.d"); !strings.Contains(out+"\n", "\nkvmaccess\n") {
		t.Errorf("systemd does not find the module among those to load at boot:\n%s", out)
	}
	// The unit wants this one of systemd's.
	m.must(t, "grep -q modprobe /usr/lib/systemd/system/modprobe@.service")
}

func version(t *testing.T) string {
	return find(t, "kmod/version.h", `#define KVMACCESS_VERSION "(.+)"`)
}

// added is what DKMS calls the sources.
func added(t *testing.T) string { return "kvmaccess/" + version(t) }

// What modinfo and modprobe make of the installed module.
func (m *machine) modinfo(t *testing.T) {
	for field, want := range map[string]string{
		"name":    "kvmaccess",
		"license": "GPL",
		"depends": "kvm",
		"alias":   "net-pf-16-proto-16-family-kvmaccess",
		"version": version(t),
	} {
		if got := m.must(t, "modinfo -k "+m.kernel+" -F "+field+" kvmaccess"); got != want {
			t.Errorf("modinfo's %s is %q, want %q", field, got, want)
		}
	}
	if got := m.must(t, "modinfo -k "+m.kernel+" -F vermagic kvmaccess"); !strings.HasPrefix(got, m.kernel+" ") {
		t.Errorf("it is built for %q, want %s", got, m.kernel)
	}
	// By its name, and by the alias that the kernel asks for.
	for _, name := range []string{"kvmaccess", "net-pf-16-proto-16-family-kvmaccess"} {
		got := m.must(t, "modprobe -S "+m.kernel+" --show-depends "+name)
		if !strings.Contains(got, "/kvm.ko") || !strings.HasSuffix(strings.Fields(got)[len(strings.Fields(got))-1], strings.TrimPrefix(m.module(t), "/lib/modules/")) {
			t.Errorf("modprobe %s would do\n%s", name, got)
		}
	}
}

// takeOut copies the module, unpacked, to a file out here.
func (m *machine) takeOut(t *testing.T, name string) {
	m.must(t, `file=`+m.module(t)+`
		case $file in
		*.ko) cat $file ;;
		*.xz) xz -dc $file ;;
		*.zst) zstd -dc $file ;;
		*.gz) gzip -dc $file ;;
		esac > /var/kvmaccess.ko`)
	text, err := os.ReadFile(filepath.Join(m.dir, "upper/var/kvmaccess.ko"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, text, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Log("the module is", name)
}

// A kernel that is installed later gets the module by itself; one that is too
// old, or lacks what is needed, is passed over, and that is no failure.
func (m *machine) anotherKernel(t *testing.T) {
	add := func(release string) {
		m.must(t, `mkdir /lib/modules/`+release+`
			ln -s "$(readlink -f /lib/modules/`+m.kernel+`/build)" /lib/modules/`+release+`/build
			touch /lib/modules/`+release+`/modules.order /lib/modules/`+release+`/modules.builtin`)
	}
	status := func(release string) string {
		return m.must(t, "dkms status kvmaccess -k "+release)
	}
	const newer = "99.1.0-1-amd64"
	add(newer)
	m.must(t, "dkms autoinstall -k "+newer)
	if got := status(newer); !strings.HasSuffix(got, ": installed") {
		t.Errorf("kernel %s: DKMS has %q, want it installed", newer, got)
	}
	m.must(t, "ls /lib/modules/"+newer+"/updates/dkms/kvmaccess.ko*")
	m.must(t, "dkms remove "+added(t)+" -k "+newer+"; rm -r /lib/modules/"+newer)

	const older = "6.0.0-1-amd64"
	add(older)
	// The DKMS of Debian 12 does not tell an exclusion from a failure here.
	passed := 0
	if strings.HasSuffix(m.must(t, "dkms --version"), "-3.0.10") {
		passed = 11
	}
	if out, code := m.run(t, "dkms", "autoinstall", "-k", older); code != passed {
		t.Errorf("kernel %s: exit code %d of autoinstall, want %d:\n%s", older, code, passed, out)
	}
	if got := status(older); strings.Contains(got, "installed") {
		t.Errorf("kernel %s: DKMS has %q, want it passed over", older, got)
	}
	if out, code := m.run(t, "dkms", "build", added(t), "-k", older); code != excluded || !strings.Contains(out, "BUILD_EXCLUSIVE") {
		t.Errorf("kernel %s: exit code %d, want %d for an exclusion:\n%s", older, code, excluded, out)
	}
	m.must(t, "rm -r /lib/modules/"+older)
}

// excluded is DKMS's exit code for a kernel that a module is not for.
const excluded = 77

// A kernel without KVM, or without what the module stands on, is refused, and
// check-config says why, before DKMS is asked.
func (m *machine) exclusions(t *testing.T) {
	m.must(t, "dkms remove "+added(t)+" --all; dkms add "+added(t))
	build := m.must(t, "readlink -f /lib/modules/"+m.kernel+"/build")
	files := build + "/.config " + build + "/include/config/auto.conf"
	options := strings.Fields(find(t, "kmod/dkms.conf", `BUILD_EXCLUSIVE_CONFIG="(.+)"`))
	if len(options) == 0 {
		t.Fatal("dkms.conf excludes nothing")
	}
	for _, option := range options {
		m.must(t, "for f in "+files+"; do cp -a $f $f.whole; sed -i '/^"+option+"=/d' $f; done")
		out, code := m.run(t, "dkms", "build", added(t), "-k", m.kernel)
		if code != excluded || !strings.Contains(out, "BUILD_EXCLUSIVE") {
			t.Errorf("without %s: exit code %d, want %d for an exclusion:\n%s", option, code, excluded, out)
		}
		out, code = m.make(t, "dkms-install")
		if code == 0 || !strings.Contains(out, "required  "+option+" ") {
			t.Errorf("without %s: exit code %d, want an error that names it:\n%s", option, code, out)
		}
		m.must(t, "for f in "+files+"; do mv $f.whole $f; done")
	}
	m.mustMake(t, "dkms-install")
	m.module(t)
}

func lastLine(text string) string {
	return text[strings.LastIndex(text, "\n")+1:]
}
