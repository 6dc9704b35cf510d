// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIdentify(t *testing.T) {
	const stat = "99 (qemu) (x) S 1 99 99 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 4 0 123456 1 2 3\n"
	for _, tt := range []struct {
		name string
		args []string
		stat string
		want VMM
		err  string
	}{
		{name: "short name", args: []string{"qemu", "-name", "web", "-m", "64"}, want: VMM{Name: "web"}},
		{name: "libvirt", args: []string{"/usr/bin/qemu-system-x86_64", "-name", "guest=web1,debug-threads=on", "-S", "-uuid", "0C6A6B7E-0B1D-4C3A-9C7F-2D0E5B8A1F00"},
			want: VMM{Name: "web1", UUID: "0c6a6b7e-0b1d-4c3a-9c7f-2d0e5b8a1f00"}},
		{name: "two dashes, and options after", args: []string{"qemu", "--uuid", "u", "--name", "debug-threads=on,guest=a"}, want: VMM{Name: "a", UUID: "u"}},
		{name: "doubled commas", args: []string{"qemu", "-name", "a,,b,process=p,,q"}, want: VMM{Name: "a,b"}},
		{name: "equals sign in a name", args: []string{"qemu", "-name", "guest=a=b"}, want: VMM{Name: "a=b"}},
		{name: "the last counts", args: []string{"qemu", "-name", "a", "-name", "b"}, want: VMM{Name: "b"}},
		{name: "no name", args: []string{"qemu", "-name", "process=p,debug-threads=on"}},
		{name: "another VMM", args: []string{"firecracker"}},
		{name: "option without a value", args: []string{"qemu", "-name"}},
		{name: "kernel thread"},
		{name: "short stat", args: []string{"q"}, stat: "99 (q) S 1", err: "stat has 4 fields"},
		{name: "no stat", args: []string{"q"}, stat: "99", err: "no command name"},
		{name: "start is no number", args: []string{"q"}, stat: strings.Replace(stat, "123456", "x", 1), err: "invalid syntax"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proc := t.TempDir()
			dir := filepath.Join(proc, "99")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			cmdline := ""
			if tt.args != nil {
				cmdline = strings.Join(tt.args, "\x00") + "\x00"
			}
			if tt.stat == "" {
				tt.stat = stat
			}
			for name, content := range map[string]string{"cmdline": cmdline, "comm": "qemu) (x\n", "stat": tt.stat} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := identify(proc, 99)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			tt.want.Comm, tt.want.Start = "qemu) (x", 123456
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	if _, err := Identify(1 << 30); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such process: %v", err)
	}
	self, err := Identify(os.Getpid())
	if err != nil || self.Start == 0 || self.Comm == "" {
		t.Errorf("this process: %+v, %v", self, err)
	}
}
