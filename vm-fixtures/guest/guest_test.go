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

func TestInterruptsOff(t *testing.T) {
	// As QEMU says it of a KVM guest.
	const text = "\r\nCPU#0\r\n" +
		"RAX=0000000000000000 RBX=0000000000000000 RCX=0000000000000000 RDX=0000000000000000\r\n" +
		"RIP=ffffffff81e0b1aa RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n" +
		"ES =0000 0000000000000000 ffffffff 00c00000\r\n" +
		"\r\nCPU#1\r\n" +
		"RIP=ffffffff810f5a12 RFL=00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0\r\n"
	for _, tt := range []struct {
		name, old, new string
		want           map[int]bool
	}{
		{"as it was", "", "", map[int]bool{1: true}},
		{"interrupts on", "00000046", "00000246", map[int]bool{}},
		{"both", "00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1", "00000046 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=0", map[int]bool{0: true, 1: true}},
		{"halted for good", "HLT=0", "HLT=1", map[int]bool{}},
		{"not in the kernel", "RIP=ffffffff810f5a12", "RIP=0000000000100000", map[int]bool{}},
		{"in 32-bit mode", "RIP=ffffffff810f5a12 RFL", "EIP=810f5a12 EFL", map[int]bool{}},
	} {
		if diff := cmp.Diff(tt.want, interruptsOff(strings.Replace(text, tt.old, tt.new, 1))); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}
