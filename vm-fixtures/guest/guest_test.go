// SPDX-License-Identifier: MIT

package guest

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseChange(t *testing.T) {
	for _, tt := range []struct {
		line string
		want Change
		ok   bool
		bad  bool
	}{
		{line: `attack: {"object":"idt","cpu":-1,"entry":14,"old":"0xffffffff91c00be0","new":"0xffffffffc03fa000"}`, ok: true,
			want: Change{Object: "idt", CPU: -1, Entry: 14, Old: 0xffffffff91c00be0, New: 0xffffffffc03fa000}},
		{line: `idt_redirect: attack: {"object":"cr0","cpu":1,"entry":-1,"old":"0x80050033","new":"0x80040033"}`, ok: true,
			want: Change{Object: "cr0", CPU: 1, Entry: -1, Old: 0x80050033, New: 0x80040033}},
		{line: "idt_redirect: loading out-of-tree module taints kernel."},
		{line: "attack: {", ok: true, bad: true},
		{line: `attack: {"object":"idt","old":"zero","new":"0x1"}`, ok: true, bad: true},
	} {
		got, ok, err := parseChange(tt.line)
		if ok != tt.ok || (err != nil) != tt.bad {
			t.Errorf("%s: ok %t, error %v", tt.line, ok, err)
		}
		if !tt.bad {
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("%s: %s", tt.line, diff)
			}
		}
	}
}

func TestBytes(t *testing.T) {
	var b Bytes
	if err := b.UnmarshalText([]byte("00ff10")); err != nil || !cmp.Equal(b, Bytes{0, 0xff, 0x10}) {
		t.Errorf("%x, %v", b, err)
	}
	if err := b.UnmarshalText([]byte("0")); err == nil {
		t.Error("half a byte is no error")
	}
}

func TestArguments(t *testing.T) {
	line := strings.Join(arguments("/payload", "/dir", Config{Name: "web1", UUID: "1f0c7e52-6f0a-4b6e-9d25-3c1f5ad9a001", CPUs: 2, Append: "pti=on"}), " ")
	for _, want := range []string{
		"-name guest=web1,debug-threads=on", "-uuid 1f0c7e52-6f0a-4b6e-9d25-3c1f5ad9a001",
		"-accel kvm", "-smp 2", "-m 256", "rdinit=/agent pti=on",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("no %q in %s", want, line)
		}
	}
	for kernel, want := range map[string]string{
		"":    "-kernel /payload/guest/vmlinuz -initrd /payload/guest/initramfs.cpio",
		"6.1": "-kernel /payload/guests/6.1/vmlinuz -initrd /payload/guests/6.1/initramfs.cpio",
	} {
		if line := strings.Join(arguments("/payload", "/dir", Config{Kernel: kernel}), " "); !strings.Contains(line, want) {
			t.Errorf("kernel %q: no %q in %s", kernel, want, line)
		}
	}
}
