// SPDX-License-Identifier: MIT

//go:build packaging

package packaging

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// machine is a copy of a suite's root that a test may change; commands run in
// it by chroot. The checkout is at /mnt, read-only.
type machine struct {
	kernel string // release
	tree   string // unpacked root, not changed
	dir    string // what is changed of it
}

func newMachine(t *testing.T, name string) *machine {
	t.Helper()
	suite, err := cache.SuiteNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	root, err := cache.Open(t.Context(), suite, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := root.Close(); err != nil {
			t.Error(err)
		}
	})
	tree, err := root.Tree(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{kernel: root.Kernel, tree: tree, dir: t.TempDir()}
	resolver, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		os.MkdirAll(filepath.Join(m.dir, "upper/etc"), 0o755),
		os.Mkdir(filepath.Join(m.dir, "work"), 0o755),
		os.Mkdir(filepath.Join(m.dir, "root"), 0o755),
		os.WriteFile(filepath.Join(m.dir, "upper/etc/resolv.conf"), resolver, 0o644),
	); err != nil {
		t.Fatal(err)
	}
	return m
}

// enter mounts all of a machine, seen by the command alone, and runs it there.
const enter = `
set -e
tree=$1 dir=$2 checkout=$3 root=$2/root
shift 3
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount --bind "$checkout" "$root/mnt"
mount -o remount,bind,ro "$root/mnt"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
	DEBIAN_FRONTEND=noninteractive "$@"
`

// run runs a command in the machine and returns what it said and its exit code.
func (m *machine) run(t *testing.T, args ...string) (output string, code int) {
	t.Helper()
	checkout, err := filepath.Abs(top)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "unshare", append([]string{
		"--mount", "--pid", "--fork", "--kill-child", "--propagation", "private",
		"sh", "-c", enter, "sh", m.tree, m.dir, checkout,
	}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return strings.TrimSpace(out.String()), cmd.ProcessState.ExitCode()
}

// must runs a shell's command line, which must succeed.
func (m *machine) must(t *testing.T, line string) (output string) {
	t.Helper()
	out, code := m.run(t, "sh", "-ec", line)
	if code != 0 {
		t.Fatalf("%s\nexit code %d:\n%s", line, code, out)
	}
	return out
}

// built is where make leaves and takes what it builds in a machine.
const built = "/var/built"

// make runs make in the checkout for the machine's kernel.
func (m *machine) make(t *testing.T, args ...string) (output string, code int) {
	t.Helper()
	return m.run(t, append([]string{"make", "-C", "/mnt", "--no-print-directory", "KERNEL=" + m.kernel, "BIN=" + built}, args...)...)
}

func (m *machine) mustMake(t *testing.T, args ...string) (output string) {
	t.Helper()
	out, code := m.make(t, args...)
	if code != 0 {
		log, _ := m.run(t, "sh", "-c", "cat /var/lib/dkms/kvmaccess/*/build/make.log")
		t.Fatalf("make %s: exit code %d:\n%s\nwhat DKMS's build said:\n%s", strings.Join(args, " "), code, out, log)
	}
	return out
}

// files lists all that could be there because KvmAccess is installed, but no
// directories. That DKMS makes itself a key to sign with is its own affair.
func (m *machine) files(t *testing.T) []string {
	t.Helper()
	return strings.Split(m.must(t, `find /lib/modules/ /usr/lib/modules-load.d/ /usr/lib/modprobe.d/ /etc/modprobe.d/ /etc/modules-load.d/ \
		/usr/src/ /usr/local/ /usr/lib/systemd/system/ /var/lib/dkms/ -not -type d -not -path '/var/lib/dkms/mok.*' 2>/dev/null | sort`), "\n")
}
