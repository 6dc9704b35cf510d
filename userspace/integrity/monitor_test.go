// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

var entryRange = []MemoryRange{{Symbol: "entry_SYSCALL_64", Length: 64}}

// TestHonest: an honest guest gives no finding, seen in any way.
func TestHonest(t *testing.T) {
	for _, tt := range []struct {
		name  string
		world func() *world
	}{
		{"Debian 12", func() *world { return recorded(t, "debian12") }},
		{"Debian 12, isolated, 5-level paging", func() *world { return debian(t) }},
		{"Debian 12 in user mode, isolated", func() *world {
			w := debian(t)
			for i := range w.CPUs {
				c := &w.CPUs[i]
				c.CR3 |= 0x1000
				c.CPL, c.KernelGSBase, c.GS.Base = 3, c.GS.Base, 0
			}
			return w
		}},
		{"made", func() *world { return made(t, true, 0, 1) }},
		{"made, moved, 3 vCPUs", func() *world { return made(t, true, 0x1fe00000, 3) }},
		{"made, 32-bit", func() *world { return made(t, false, 0, 1) }},
		{"made, 32-bit, moved, 2 vCPUs", func() *world { return made(t, false, 0x400000, 2) }},
	} {
		for _, symbols := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, symbols %t", tt.name, symbols), func(t *testing.T) {
				w := tt.world()
				w.t = t
				opts := Options{Settle: -1, Ranges: []MemoryRange{{Name: "text", Address: Hex(w.at("_stext")) + 0x80, Length: 64}}}
				if w.CPUs[0].LSTAR != 0 {
					opts.Ranges[0] = entryRange[0]
				}
				if symbols {
					opts.Symbols = w.symbols
				}
				m := w.monitor(opts)
				w.quiet(m)
				w.watching(m)
				s := m.Status()
				if s.VCPUs != len(w.CPUs) || s.Waiting != 0 || s.Unread != 0 || s.Slow != 0 || s.Open != 0 || (s.Symbols != 0) != symbols {
					t.Errorf("%+v", s)
				}
				if symbols && len(s.Problems) != 0 {
					t.Errorf("%q", s.Problems)
				}
				if symbols && uint64(s.Slide) != w.image.Slide {
					t.Errorf("slide %v, want %#x", s.Slide, w.image.Slide)
				}
			})
		}
	}
}

// attack changes a guest and gives what undoes it.
type attack struct {
	name string
	do   func(w *world) (undo func())
	// changed is what a Monitor that saw the guest before says, first what
	// one that did not says, both with symbols.
	changed, first []string
	// blind and blindFirst are the same without symbols.
	blind, blindFirst []string
}

func poke(gva func(w *world) uint64, value uint64) func(w *world) func() {
	return func(w *world) func() {
		at := gva(w)
		old := w.put(at, value)
		return func() { w.put(at, old) }
	}
}

func register(cpu int, change func(v *kvmaccess.VCPU)) func(w *world) func() {
	return func(w *world) func() {
		old := w.CPUs[cpu]
		change(&w.CPUs[cpu])
		return func() { w.CPUs[cpu] = old }
	}
}

func call(nr uint64) func(w *world) uint64 {
	return func(w *world) uint64 { return w.at("sys_call_table") + nr*8 }
}
func gate(vector uint64) func(w *world) uint64 {
	return func(w *world) uint64 { return w.CPUs[0].IDTR.Base + vector*16 }
}
func descriptor(cpu int, index uint64) func(w *world) uint64 {
	return func(w *world) uint64 { return w.CPUs[cpu].GDTR.Base + index*8 }
}

// attacks are made on the recorded guest; its addresses are always the same.
var attacks = []attack{
	{
		name:    "system call to a module",
		do:      poke(call(59), 0xffffffffc0123450),
		changed: []string{"changed: system call 59 (execve) of guest web1 now points to 0xffffffffc0123450 (outside kernel text), was 0xffffffffa1558250 __x64_sys_execve"},
		first:   []string{"invariant: system call 59 (execve) of guest web1 points to 0xffffffffc0123450 (outside kernel text)"},
	},
	{
		name: "system call to another one",
		do: func(w *world) func() {
			return poke(call(60), w.at("__x64_sys_kill"))(w)
		},
		changed: []string{"changed: system call 60 (exit) of guest web1 now points to 0xffffffffa12abba0 __x64_sys_kill (not the entry point of exit), was 0xffffffffa129b2c0 __x64_sys_exit"},
		first:   []string{"invariant: system call 60 (exit) of guest web1 points to 0xffffffffa12abba0 __x64_sys_kill (not the entry point of exit)"},
	},
	{
		name: "system call into a function",
		do: func(w *world) func() {
			return poke(call(4), w.at("__x64_sys_newstat")+4)(w)
		},
		changed: []string{"changed: system call 4 (stat) of guest web1 now points to 0xffffffffa1554dd4 __x64_sys_newstat+0x4 (not the start of a function), was 0xffffffffa1554dd0 __x64_sys_newstat"},
		first:   []string{"invariant: system call 4 (stat) of guest web1 points to 0xffffffffa1554dd4 __x64_sys_newstat+0x4 (not the start of a function)"},
	},
	{
		name: "system call switched off",
		do: func(w *world) func() {
			return poke(call(1), w.at("__x64_sys_ni_syscall"))(w)
		},
		// Not implemented is what an honest kernel may have.
		changed: []string{"changed: system call 1 (write) of guest web1 now points to 0xffffffffa12045c0 __x64_sys_ni_syscall, was 0xffffffffa154d9e0 __x64_sys_write"},
	},
	{
		name:       "page fault gate",
		do:         poke(gate(14), 0xc0128e0000103450),
		changed:    []string{"changed: IDT gate 14 (page fault) of guest web1 now points to 0xffffffffc0123450 (outside kernel text), was 0xffffffffa1e00be0 asm_exc_page_fault"},
		first:      []string{"invariant: IDT gate 14 (page fault) of guest web1 points to 0xffffffffc0123450 (interrupt gate selector 0x10 DPL 0 IST 0) (outside kernel text)"},
		blind:      []string{"changed: IDT gate 14 (page fault) of guest web1 now points to 0xffffffffc0123450 (outside kernel text), was 0xffffffffa1e00be0"},
		blindFirst: []string{"invariant: IDT gate 14 (page fault) of guest web1 points to 0xffffffffc0123450 (interrupt gate selector 0x10 DPL 0 IST 0) (outside kernel text)"},
	},
	{
		name: "gate to another handler",
		do: func(w *world) func() {
			h := w.at("asm_exc_page_fault")
			return poke(gate(13), h&0xffff|0x8e0000100000|h>>16<<48)(w)
		},
		changed: []string{"changed: IDT gate 13 (general protection) of guest web1 now points to 0xffffffffa1e00be0 asm_exc_page_fault (not asm_exc_general_protection), was 0xffffffffa1e00b20 asm_exc_general_protection"},
		first:   []string{"invariant: IDT gate 13 (general protection) of guest web1 points to 0xffffffffa1e00be0 asm_exc_page_fault (interrupt gate selector 0x10 DPL 0 IST 0) (not asm_exc_general_protection)"},
		blind:   []string{"changed: IDT gate 13 (general protection) of guest web1 now points to 0xffffffffa1e00be0, was 0xffffffffa1e00b20"},
	},
	{
		name: "gate for programs",
		do: func(w *world) func() {
			h := w.at("asm_exc_general_protection")
			return poke(gate(13), h&0xffff|0xee0000100000|h>>16<<48)(w)
		},
		changed:    []string{"changed: IDT gate 13 (general protection) of guest web1 now points to 0xffffffffa1e00b20 asm_exc_general_protection (interrupt gate selector 0x10 DPL 3 IST 0) (programs may use it: DPL 3), was 0xffffffffa1e00b20 asm_exc_general_protection (interrupt gate selector 0x10 DPL 0 IST 0)"},
		first:      []string{"invariant: IDT gate 13 (general protection) of guest web1 points to 0xffffffffa1e00b20 asm_exc_general_protection (interrupt gate selector 0x10 DPL 3 IST 0) (programs may use it: DPL 3)"},
		blind:      []string{"changed: IDT gate 13 (general protection) of guest web1 now points to 0xffffffffa1e00b20 (interrupt gate selector 0x10 DPL 3 IST 0) (programs may use it: DPL 3), was 0xffffffffa1e00b20 (interrupt gate selector 0x10 DPL 0 IST 0)"},
		blindFirst: []string{"invariant: IDT gate 13 (general protection) of guest web1 points to 0xffffffffa1e00b20 (interrupt gate selector 0x10 DPL 3 IST 0) (programs may use it: DPL 3)"},
	},
	{
		name: "interrupt to another one's stub",
		do: func(w *world) func() {
			h := w.at("irq_entries_start") + 8
			return poke(gate(0x30), h&0xffff|0x8e0000100000|h>>16<<48)(w)
		},
		changed: []string{"changed: IDT gate 48 (interrupt 48) of guest web1 now points to 0xffffffffa1e00298 irq_entries_start+0x8 (not a handler of this interrupt), was 0xffffffffa1e00310 irq_entries_start+0x80"},
		first:   []string{"invariant: IDT gate 48 (interrupt 48) of guest web1 points to 0xffffffffa1e00298 irq_entries_start+0x8 (interrupt gate selector 0x10 DPL 0 IST 0) (not a handler of this interrupt)"},
		blind:   []string{"changed: IDT gate 48 (interrupt 48) of guest web1 now points to 0xffffffffa1e00298, was 0xffffffffa1e00310"},
	},
	{
		name:       "call gate",
		do:         poke(descriptor(1, 13), 0xa012ec0000103450),
		changed:    []string{"changed: GDT entry 13 (TLS) of vCPU 1 of guest web1 is now call gate to 0x10:0xa0123450 DPL 3 (Linux has no call gates), was as programs set it"},
		first:      []string{"invariant: GDT entry 13 (TLS) of vCPU 1 of guest web1 is call gate to 0x10:0xa0123450 DPL 3 (Linux has no call gates)"},
		blind:      []string{"changed: GDT entry 13 (TLS) of vCPU 1 of guest web1 is now call gate to 0x10:0xa0123450 DPL 3 (Linux has no call gates), was as programs set it"},
		blindFirst: []string{"invariant: GDT entry 13 (TLS) of vCPU 1 of guest web1 is call gate to 0x10:0xa0123450 DPL 3 (Linux has no call gates)"},
	},
	{
		name:       "kernel code for programs",
		do:         poke(descriptor(0, 2), 0x00affb000000ffff),
		changed:    []string{"changed: GDT entry 2 (kernel code) of vCPU 0 of guest web1 is now code64 base 0x0 limit 0xffffffff DPL 3 (not Linux's segment, code64 base 0x0 limit 0xffffffff DPL 0), was code64 base 0x0 limit 0xffffffff DPL 0"},
		first:      []string{"invariant: GDT entry 2 (kernel code) of vCPU 0 of guest web1 is code64 base 0x0 limit 0xffffffff DPL 3 (not Linux's segment, code64 base 0x0 limit 0xffffffff DPL 0)"},
		blind:      []string{"changed: GDT entry 2 (kernel code) of vCPU 0 of guest web1 is now code64 base 0x0 limit 0xffffffff DPL 3 (not Linux's segment, code64 base 0x0 limit 0xffffffff DPL 0), was code64 base 0x0 limit 0xffffffff DPL 0"},
		blindFirst: []string{"invariant: GDT entry 2 (kernel code) of vCPU 0 of guest web1 is code64 base 0x0 limit 0xffffffff DPL 3 (not Linux's segment, code64 base 0x0 limit 0xffffffff DPL 0)"},
	},
	{
		name:       "segment where there is none",
		do:         poke(descriptor(0, 7), 0x00af9b000000ffff),
		changed:    []string{"changed: GDT entry 7 of vCPU 0 of guest web1 is now code64 base 0x0 limit 0xffffffff DPL 0 (Linux does not use this entry), was unused"},
		first:      []string{"invariant: GDT entry 7 of vCPU 0 of guest web1 is code64 base 0x0 limit 0xffffffff DPL 0 (Linux does not use this entry)"},
		blind:      []string{"changed: GDT entry 7 of vCPU 0 of guest web1 is now code64 base 0x0 limit 0xffffffff DPL 0 (Linux does not use this entry), was unused"},
		blindFirst: []string{"invariant: GDT entry 7 of vCPU 0 of guest web1 is code64 base 0x0 limit 0xffffffff DPL 0 (Linux does not use this entry)"},
	},
	{
		name:       "LSTAR",
		do:         register(1, func(v *kvmaccess.VCPU) { v.LSTAR = 0xffffffffc0123450 }),
		changed:    []string{"changed: LSTAR of vCPU 1 of guest web1 now points to 0xffffffffc0123450 (outside kernel text), was 0xffffffffa1e00080 entry_SYSCALL_64"},
		first:      []string{"invariant: LSTAR of vCPU 1 of guest web1 points to 0xffffffffc0123450 (outside kernel text)"},
		blind:      []string{"changed: LSTAR of vCPU 1 of guest web1 now points to 0xffffffffc0123450 (outside kernel text), was 0xffffffffa1e00080"},
		blindFirst: []string{"invariant: LSTAR of vCPU 1 of guest web1 points to 0xffffffffc0123450 (outside kernel text)"},
	},
	{
		name:    "LSTAR of the first vCPU, within kernel text",
		do:      register(0, func(v *kvmaccess.VCPU) { v.LSTAR += 0x40 }),
		changed: []string{"changed: LSTAR of vCPU 0 of guest web1 now points to 0xffffffffa1e000c0 entry_SYSCALL_64_after_hwframe+0x8 (not entry_SYSCALL_64), was 0xffffffffa1e00080 entry_SYSCALL_64"},
		first:   []string{"invariant: LSTAR of vCPU 0 of guest web1 points to 0xffffffffa1e000c0 entry_SYSCALL_64_after_hwframe+0x8 (not entry_SYSCALL_64)"},
		blind:   []string{"changed: LSTAR of vCPU 0 of guest web1 now points to 0xffffffffa1e000c0, was 0xffffffffa1e00080"},
	},
	{
		name:       "STAR",
		do:         register(0, func(v *kvmaccess.VCPU) { v.STAR = 0x33<<48 | 0x10<<32 }),
		changed:    []string{"changed: STAR of vCPU 0 of guest web1 is now 0x33001000000000 (not Linux's selectors, 0x23001000000000), was 0x23001000000000"},
		first:      []string{"invariant: STAR of vCPU 0 of guest web1 is 0x33001000000000 (not Linux's selectors, 0x23001000000000)"},
		blind:      []string{"changed: STAR of vCPU 0 of guest web1 is now 0x33001000000000 (not Linux's selectors, 0x23001000000000), was 0x23001000000000"},
		blindFirst: []string{"invariant: STAR of vCPU 0 of guest web1 is 0x33001000000000 (not Linux's selectors, 0x23001000000000)"},
	},
	{
		name:       "SFMASK without IF",
		do:         register(0, func(v *kvmaccess.VCPU) { v.SFMASK &^= 0x200 }),
		changed:    []string{"changed: SFMASK of vCPU 0 of guest web1 is now 0x257dd5 (system calls keep the flags 0x200 of the program), was 0x257fd5"},
		first:      []string{"invariant: SFMASK of vCPU 0 of guest web1 is 0x257dd5 (system calls keep the flags 0x200 of the program)"},
		blind:      []string{"changed: SFMASK of vCPU 0 of guest web1 is now 0x257dd5 (system calls keep the flags 0x200 of the program), was 0x257fd5"},
		blindFirst: []string{"invariant: SFMASK of vCPU 0 of guest web1 is 0x257dd5 (system calls keep the flags 0x200 of the program)"},
	},
	{
		name:    "SYSENTER_EIP",
		do:      register(0, func(v *kvmaccess.VCPU) { v.SysenterEIP = v.LSTAR }),
		changed: []string{"changed: SYSENTER_EIP of vCPU 0 of guest web1 now points to 0xffffffffa1e00080 entry_SYSCALL_64 (not entry_SYSENTER_compat), was 0xffffffffa1e017b0 entry_SYSENTER_compat"},
		first:   []string{"invariant: SYSENTER_EIP of vCPU 0 of guest web1 points to 0xffffffffa1e00080 entry_SYSCALL_64 (not entry_SYSENTER_compat)"},
		blind:   []string{"changed: SYSENTER_EIP of vCPU 0 of guest web1 now points to 0xffffffffa1e00080, was 0xffffffffa1e017b0"},
	},
	{
		name:       "write protection",
		do:         register(0, func(v *kvmaccess.VCPU) { v.CR0 &^= guest.CR0WP }),
		changed:    []string{"changed: CR0.WP of vCPU 0 of guest web1 is now clear (the kernel can write its read-only memory), was set"},
		first:      []string{"invariant: CR0.WP of vCPU 0 of guest web1 is clear (the kernel can write its read-only memory)"},
		blind:      []string{"changed: CR0.WP of vCPU 0 of guest web1 is now clear (the kernel can write its read-only memory), was set"},
		blindFirst: []string{"invariant: CR0.WP of vCPU 0 of guest web1 is clear (the kernel can write its read-only memory)"},
	},
	{
		name: "SMEP and SMAP",
		do:   register(1, func(v *kvmaccess.VCPU) { v.CR4 &^= guest.CR4SMEP | guest.CR4SMAP }),
		changed: []string{
			"changed: CR4.SMEP of vCPU 1 of guest web1 is now clear (the guest's kernel pinned it), was set",
			"changed: CR4.SMAP of vCPU 1 of guest web1 is now clear (the guest's kernel pinned it), was set",
		},
		first: []string{
			"invariant: CR4.SMEP of vCPU 1 of guest web1 is clear (the guest's kernel pinned it)",
			"invariant: CR4.SMAP of vCPU 1 of guest web1 is clear (the guest's kernel pinned it)",
		},
		blind: []string{
			"changed: CR4.SMEP of vCPU 1 of guest web1 is now clear (other vCPUs have it set), was set",
			"changed: CR4.SMAP of vCPU 1 of guest web1 is now clear (other vCPUs have it set), was set",
		},
		blindFirst: []string{
			"invariant: CR4.SMEP of vCPU 1 of guest web1 is clear (other vCPUs have it set)",
			"invariant: CR4.SMAP of vCPU 1 of guest web1 is clear (other vCPUs have it set)",
		},
	},
	{
		name: "what the kernel pinned",
		do: func(w *world) func() {
			return poke(func(w *world) uint64 { return w.at("cr4_pinned_bits") }, guest.CR4SMEP|guest.CR4UMIP|guest.CR4FSGSBASE)(w)
		},
		changed: []string{"changed: cr4_pinned_bits.SMAP of guest web1 is now clear, was set"},
	},
	{
		name: "task register",
		do: register(0, func(v *kvmaccess.VCPU) {
			v.TR.Base = 0xffffffffc0200000
		}),
		changed: []string{
			"changed: TR of vCPU 0 of guest web1 is now 0xffffffffc0200000 (not in the kernel's CPU entry area), was 0xfffffe0000003000",
			"invariant: GDT entry 8 (TSS) of vCPU 0 of guest web1 is TSS (busy) base 0xfffffe0000003000 limit 0x4087 DPL 0 (not the TSS that the task register holds, at 0xffffffffc0200000)",
		},
		first: []string{
			"invariant: TR of vCPU 0 of guest web1 is 0xffffffffc0200000 (selector 0x40) (not in the kernel's CPU entry area)",
			"invariant: GDT entry 8 (TSS) of vCPU 0 of guest web1 is TSS (busy) base 0xfffffe0000003000 limit 0x4087 DPL 0 (not the TSS that the task register holds, at 0xffffffffc0200000)",
		},
		blind: []string{
			"changed: TR of vCPU 0 of guest web1 is now 0xffffffffc0200000 (not in the kernel's CPU entry area), was 0xfffffe0000003000",
			"invariant: GDT entry 8 (TSS) of vCPU 0 of guest web1 is TSS (busy) base 0xfffffe0000003000 limit 0x4087 DPL 0 (not the TSS that the task register holds, at 0xffffffffc0200000)",
		},
		blindFirst: []string{
			"invariant: TR of vCPU 0 of guest web1 is 0xffffffffc0200000 (selector 0x40) (not in the kernel's CPU entry area)",
			"invariant: GDT entry 8 (TSS) of vCPU 0 of guest web1 is TSS (busy) base 0xfffffe0000003000 limit 0x4087 DPL 0 (not the TSS that the task register holds, at 0xffffffffc0200000)",
		},
	},
	{
		name: "text",
		do: func(w *world) func() {
			at := w.at("entry_SYSCALL_64")
			old := w.put(at+16, 0x1122334455667788)
			return func() { w.put(at+16, old) }
		},
		changed: []string{"changed: memory entry_SYSCALL_64 of guest web1: 8 of 64 bytes differ, from 0xffffffffa1e00090 on: now 8877665544332211e4ffe7ffff0f22dc, was dc0f1f4400004881e4ffe7ffff0f22dc"},
		blind:   []string{"changed: memory entry_SYSCALL_64 of guest web1: 8 of 64 bytes differ, from 0xffffffffa1e00090 on: now 8877665544332211e4ffe7ffff0f22dc, was dc0f1f4400004881e4ffe7ffff0f22dc"},
	},
}

func TestAttacks(t *testing.T) {
	for _, a := range attacks {
		for _, symbols := range []bool{true, false} {
			changed, first := a.changed, a.first
			if !symbols {
				changed, first = a.blind, a.blindFirst
			}
			w := debian(t)
			opts := Options{Settle: -1, Ranges: entryRange}
			if symbols {
				opts.Symbols = w.symbols
			}
			t.Run(fmt.Sprintf("%s, seen before, symbols %t", a.name, symbols), func(t *testing.T) {
				w.t = t
				m := w.monitor(opts)
				w.quiet(m)
				undo := a.do(w)
				found := w.tick(m)
				if diff := cmp.Diff(changed, texts(found), cmp.Transformer("", emptyNil)); diff != "" {
					t.Errorf("(-want +got)\n%s", diff)
				}
				for _, f := range found {
					checkFinding(t, f)
				}
				if diff := cmp.Diff(keys(found), keys(m.Findings())); diff != "" {
					t.Errorf("open (-returned +open)\n%s", diff)
				}
				w.quiet(m) // once is enough
				undo()
				cleared := w.tick(m)
				var want, got []string
				for _, f := range found {
					want = append(want, f.Key())
				}
				for _, f := range cleared {
					got = append(got, f.Key())
					if f.Kind != KindCleared {
						t.Errorf("not cleared: %s %s", f.Kind, f.Message)
					}
				}
				if diff := cmp.Diff(want, got, cmp.Transformer("sort", sorted)); diff != "" {
					t.Errorf("cleared (-want +got)\n%s", diff)
				}
				w.quiet(m)
				if s := m.Status(); s.Open != 0 {
					t.Errorf("%+v", s)
				}
			})
			t.Run(fmt.Sprintf("%s, at first sight, symbols %t", a.name, symbols), func(t *testing.T) {
				w.t = t
				undo := a.do(w)
				m := w.monitor(opts)
				found, err := m.Attach(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				w.watching(m)
				if diff := cmp.Diff(first, texts(found), cmp.Transformer("sort", sorted)); diff != "" {
					t.Errorf("(-want +got)\n%s", diff)
				}
				w.quiet(m)
				undo()
				for _, f := range w.tick(m) {
					// What was taken for honest is found to change.
					if len(first) > 0 && f.Kind != KindCleared {
						t.Errorf("put right: %s %s", f.Kind, f.Message)
					}
				}
				if len(first) > 0 && len(m.Findings()) != 0 {
					t.Errorf("left over: %q", texts(m.Findings()))
				}
			})
		}
	}
}

func emptyNil(s []string) []string {
	if len(s) == 0 {
		return nil
	}
	return s
}

// checkFinding: a finding names all that it is about and survives JSON.
func checkFinding(t *testing.T, f Finding) {
	t.Helper()
	if f.VM.Name != "web1" || f.VM.PID != 42 || f.Time.IsZero() || f.Check == "" || f.Object == "" || f.Message == "" || f.New == nil || f.Kind == KindChanged && f.Old == nil {
		t.Errorf("%+v", f)
	}
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	var back Finding
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(f, back); diff != "" {
		t.Errorf("JSON (-want +got)\n%s", diff)
	}
}

// TestFindingJSON holds the form that programs read.
func TestFindingJSON(t *testing.T) {
	w := debian(t)
	m := w.monitor(Options{Symbols: w.symbols})
	w.quiet(m)
	w.put(w.at("sys_call_table")+59*8, 0xffffffffc0123450)
	found := w.tick(m)
	if len(found) != 1 {
		t.Fatalf("%q", texts(found))
	}
	got, err := json.Marshal(found[0])
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"time":"2023-11-14T22:13:20.4Z","vm":{"id":1,"name":"web1","uuid":"6a7e36a5-4e0f-4b94-b6a4-2f3c2d5c0c11","pid":42},` +
		`"check":"syscalls","object":"sys_call_table","entry":59,"name":"execve","kind":"changed",` +
		`"old":{"value":"0xffffffffa1558250","symbol":"__x64_sys_execve"},"new":{"value":"0xffffffffc0123450"},"reason":"outside kernel text",` +
		`"message":"system call 59 (execve) of guest web1 now points to 0xffffffffc0123450 (outside kernel text), was 0xffffffffa1558250 __x64_sys_execve"}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestHookedLSTAR: the slide is not taken from an LSTAR that was hooked.
func TestHookedLSTAR(t *testing.T) {
	for _, lstar := range []uint64{0xffffffffc0123450, made64 + 0x40 + 0x1000000 + 0x400000} {
		w := made(t, true, 0x1000000, 1)
		w.CPUs[0].LSTAR = lstar
		m := w.monitor(Options{Symbols: w.symbols})
		found, err := m.Attach(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"invariant msr/lstar@0/LSTAR"}, keys(found)); diff != "" {
			t.Errorf("LSTAR %#x (-want +got)\n%s", lstar, diff)
		}
		if s := m.Status(); s.Slide != 0x1000000 {
			t.Errorf("LSTAR %#x: %+v", lstar, s)
		}
	}
}

// TestOwnTable: a vCPU that is given another IDT, a copy with one gate hooked.
func TestOwnTable(t *testing.T) {
	w := made(t, true, 0, 2)
	m := w.monitor(Options{Symbols: w.symbols})
	w.quiet(m)
	honest := w.CPUs[1].IDTR
	copyAt := w.at("sys_call_table") + 0x8000
	for i := range uint64(512) {
		w.put(copyAt+i*8, w.read(honest.Base+i*8))
	}
	w.quiet(m)
	w.put(copyAt+14*16, 0xc0128e0000103450)
	w.CPUs[1].IDTR.Base = copyAt
	found := w.tick(m)
	if diff := cmp.Diff([]string{"changed idt/idtr@1/IDTR", "invariant idt/idt@1/14"}, keys(found)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	w.quiet(m)
	w.CPUs[1].IDTR = honest
	if diff := cmp.Diff([]string{"cleared idt/idt@1/14", "cleared idt/idtr@1/IDTR"}, keys(w.tick(m))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	w.quiet(m)
}

// TestWideGDT: entries beyond what Linux has.
func TestWideGDT(t *testing.T) {
	w := made(t, true, 0, 1)
	m := w.monitor(Options{Symbols: w.symbols})
	w.quiet(m)
	w.put(w.CPUs[0].GDTR.Base+16*8, 0xa012ec0000103450)
	w.quiet(m) // it cannot be reached
	w.CPUs[0].GDTR.Limit = 0xfff
	found := w.tick(m)
	if diff := cmp.Diff([]string{"changed gdt/gdt@0/16", "changed gdt/gdtr@0/GDTR"}, keys(found)); diff != "" {
		t.Errorf("(-want +got)\n%s\n%s", diff, strings.Join(texts(found), "\n"))
	}
	w.CPUs[0].GDTR.Limit = 127
	if diff := cmp.Diff([]string{"cleared gdt/gdt@0/16", "cleared gdt/gdtr@0/GDTR"}, keys(w.tick(m))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	w.CPUs[0].GDTR.Limit = 63
	found = w.tick(m)
	if len(found) == 0 || !strings.Contains(strings.Join(texts(found), "\n"), "the table has become shorter") {
		t.Errorf("a shorter table: %q", texts(found))
	}
	w.CPUs[0].GDTR.Limit = 127
	w.tick(m)
	if open := m.Findings(); len(open) != 0 {
		t.Errorf("left over: %q", texts(open))
	}
}

// TestTablesGone: registers that point nowhere.
func TestTablesGone(t *testing.T) {
	for _, base := range []uint64{0, 0x1234, 0xffff900000000000, 0x8000000000000000, ^uint64(15)} {
		w := made(t, true, 0, 2)
		m := w.monitor(Options{Symbols: w.symbols})
		w.quiet(m)
		idtr, gdtr := w.CPUs[0].IDTR, w.CPUs[1].GDTR
		w.CPUs[0].IDTR.Base, w.CPUs[1].GDTR.Base = base, base
		found := strings.Join(keys(w.tick(m)), "\n")
		for _, want := range []string{"changed idt/idtr@0/IDTR", "changed gdt/gdtr@1/GDTR"} {
			if !strings.Contains(found, want) {
				t.Errorf("base %#x: no %s in\n%s", base, want, found)
			}
		}
		w.quiet(m)
		w.CPUs[0].IDTR, w.CPUs[1].GDTR = idtr, gdtr
		w.tick(m)
		if open := m.Findings(); len(open) != 0 {
			t.Errorf("base %#x, left over: %q", base, texts(open))
		}
	}
}

// TestHonestChanges: what a guest does all the time is no finding.
func TestHonestChanges(t *testing.T) {
	w := made(t, true, 0, 2)
	m := w.monitor(Options{Symbols: w.symbols})
	w.quiet(m)
	slow := m.Status().Slow
	v := &w.CPUs[0]
	v.RIP, v.RAX, v.CR2, v.CR8, v.KernelGSBase, v.FS.Base = 1, 2, 3, 4, 5, 6
	v.CR4 |= 1<<8 | 1<<18 | 1<<7 // PCE, OSXSAVE, PGE
	v.CR0 |= 1 << 3              // TS
	v.Condition, v.CPL = kvmaccess.ConditionHalted, 3
	w.quiet(m)
	if s := m.Status(); s.Slow != slow {
		t.Errorf("%d ticks had to decode", s.Slow-slow)
	}
	gdt := w.CPUs[1].GDTR.Base
	w.put(gdt+12*8, 0x00cff3000000ffff) // a program's TLS
	w.put(gdt+10*8, 0x0000820030000fff) // and LDT
	w.put(gdt+11*8, 0xffff8880)
	w.quiet(m)
	w.put(gdt+8*8, w.read(gdt+8*8)&^(2<<40)) // TSS not busy
	w.put(gdt+5*8, w.read(gdt+5*8)&^(1<<40)) // not accessed
	w.quiet(m)
	v.CR4 |= guest.CR4UMIP // a guard more
	w.quiet(m)
	v.CR4 &^= guest.CR4UMIP
	if diff := cmp.Diff([]string{"changed control/cr4@0/CR4.UMIP"}, keys(w.tick(m))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func (w *world) read(gva uint64) uint64 {
	old := w.put(gva, 0)
	w.put(gva, old)
	return old
}

// TestLackingProcessor: a guest whose processor has no SMEP and SMAP.
func TestLackingProcessor(t *testing.T) {
	for _, symbols := range []bool{true, false} {
		w := made(t, true, 0, 2)
		w.put(w.at("cr4_pinned_bits"), 0)
		opts := Options{Settle: -1}
		if symbols {
			opts.Symbols = w.symbols
		}
		for i := range w.CPUs {
			w.CPUs[i].CR4 &^= guest.CR4SMEP | guest.CR4SMAP
		}
		m := w.monitor(opts)
		w.quiet(m)
		w.watching(m)
	}
}

// TestNotYet: vCPUs, and guests, that are not up give no findings.
func TestNotYet(t *testing.T) {
	reset := func(v *kvmaccess.VCPU) {
		v.Registers = kvmaccess.Registers{CR0: 0x60000010, RIP: 0xfff0}
		v.IDTR.Limit, v.GDTR.Limit = 0xffff, 0xffff
	}
	for _, tt := range []struct {
		name string
		do   func(w *world)
		says string
	}{
		{"never run", func(w *world) {
			for i := range w.CPUs {
				reset(&w.CPUs[i])
				w.CPUs[i].Condition = kvmaccess.ConditionNew
			}
		}, "never run"},
		{"real mode", func(w *world) {
			for i := range w.CPUs {
				reset(&w.CPUs[i])
			}
		}, "real mode"},
		{"firmware without paging", func(w *world) {
			for i := range w.CPUs {
				reset(&w.CPUs[i])
				w.CPUs[i].CR0 |= guest.CR0PE
			}
		}, "paging off"},
		{"firmware in long mode", func(w *world) {
			for i := range w.CPUs {
				w.CPUs[i].LSTAR = 0
			}
		}, "system call entry"},
		{"before the interrupt gates", func(w *world) {
			for i := uint64(64); i < 512; i++ {
				w.put(w.CPUs[0].IDTR.Base+i*8, 0)
			}
		}, "interrupt table"},
		{"kernel boots", func(w *world) { w.put(w.at("system_state"), 1) }, "boots"},
		{"nested guest", func(w *world) {
			for i := range w.CPUs {
				w.CPUs[i].Flags = kvmaccess.VCPUNested
			}
		}, "v"},
		{"no vCPUs", func(w *world) { w.CPUs = nil }, "no vCPUs"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := made(t, true, 0, 2)
			w.t = t
			up := append([]kvmaccess.VCPU(nil), w.CPUs...)
			pages := guest.Pages{}
			for gpa, p := range w.pages {
				c := *p
				pages[gpa] = &c
			}
			tt.do(w)
			m := w.monitor(Options{Symbols: w.symbols})
			w.quiet(m)
			if s := m.Status(); s.State != StateWaiting || !strings.Contains(s.Reason, tt.says) {
				t.Errorf("%+v", s)
			}
			if b := m.Baseline(); b.Version != 0 {
				t.Errorf("a baseline of a guest that is not up: %+v", b)
			}
			// Then it comes up.
			w.CPUs = up
			for gpa, p := range pages {
				*w.pages[gpa] = *p
			}
			w.quiet(m)
			w.watching(m)
		})
	}
}

// TestSecondCPU: one vCPU comes up, goes, and comes again, after the first.
func TestSecondCPU(t *testing.T) {
	w := made(t, true, 0, 2)
	m := w.monitor(Options{Symbols: w.symbols})
	up := w.CPUs[1]
	w.CPUs[1].Registers = kvmaccess.Registers{CR0: 0x60000010}
	w.CPUs[1].Condition = kvmaccess.ConditionNew
	w.quiet(m)
	if s := m.Status(); s.VCPUs != 1 || s.Waiting != 1 {
		t.Errorf("%+v", s)
	}
	// It has its registers loaded one by one.
	w.CPUs[1] = up
	w.CPUs[1].SFMASK, w.CPUs[1].CR4 = 0, guest.CR4PAE
	w.clock = w.clock.Add(time.Millisecond)
	w.CPUs[1].SFMASK = up.SFMASK
	if f, err := m.Tick(context.Background()); err != nil || len(f) != 0 {
		t.Errorf("%q, %v", texts(f), err)
	}
	w.CPUs[1] = up
	w.quiet(m)
	if s := m.Status(); s.VCPUs != 2 || s.Waiting != 0 {
		t.Errorf("%+v", s)
	}
	// Taken offline and online again.
	w.CPUs[1].Registers = kvmaccess.Registers{CR0: 0x60000010}
	w.quiet(m)
	w.CPUs[1] = up
	w.quiet(m)
	w.CPUs[1].LSTAR += 8
	if diff := cmp.Diff([]string{"changed msr/lstar@1/LSTAR"}, keys(w.tick(m))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	// Unplugged, and another one plugged in.
	w.CPUs = w.CPUs[:1]
	w.quiet(m)
	w.CPUs = append(w.CPUs, up)
	w.CPUs[1].ID = 1
	w.clock = w.clock.Add(time.Minute)
	for range 3 {
		w.tick(m)
	}
	if s := m.Status(); s.VCPUs != 2 || s.Open != 0 {
		t.Errorf("%+v", s)
	}
}

// TestRestart: the same kernel after another boot is compared, moved.
func TestRestart(t *testing.T) {
	for _, slow := range []bool{true, false} {
		for _, symbols := range []bool{true, false} {
			w := made(t, true, 0x1000000, 2)
			opts := Options{Settle: -1, Ranges: entryRange}
			if symbols {
				opts.Symbols = w.symbols
			}
			m := w.monitor(opts)
			w.quiet(m)
			if slow { // a tick sees the firmware
				up := append([]kvmaccess.VCPU(nil), w.CPUs...)
				for i := range w.CPUs {
					w.CPUs[i].Registers = kvmaccess.Registers{CR0: 0x60000010}
				}
				w.quiet(m)
				if s := m.Status(); s.State != StateWaiting {
					t.Errorf("%+v", s)
				}
				copy(w.CPUs, up)
			}
			w.reboot(0x2400000)
			w.CPUs[0].LSTAR += 0x40 // and infected
			found := w.tick(m)
			want := []string{"changed msr/lstar@0/LSTAR", "restarted guest/kernel"}
			if diff := cmp.Diff(want, keys(found)); diff != "" {
				t.Errorf("slow %t, symbols %t: (-want +got)\n%s\n%q", slow, symbols, diff, texts(found))
			}
			w.CPUs[0].LSTAR -= 0x40
			w.tick(m)
			w.quiet(m)
			if s := m.Status(); s.Open != 0 || s.State != StateWatching {
				t.Errorf("%+v", s)
			}
		}
	}
}

// TestReset: what a reset looks like from outside, vCPU by vCPU and stage by
// stage, is no finding; the kernel that comes up then is compared.
func TestReset(t *testing.T) {
	for _, symbols := range []bool{true, false} {
		w := made(t, true, 0x1000000, 2)
		opts := Options{Settle: time.Hour, Ranges: entryRange}
		if symbols {
			opts.Symbols = w.symbols
		}
		m := w.monitor(opts)
		w.quiet(m)
		w.watching(m)
		// The second vCPU's state is still that of before; LSTAR survives.
		old := append([]kvmaccess.VCPU(nil), w.CPUs...)
		w.CPUs[0].CR0 = 0x60000010
		w.quiet(m)
		if s := m.Status(); s.State != StateWaiting {
			t.Fatalf("%+v", s)
		}
		// A boot loader in long mode, with tables of its own.
		w.CPUs[0].CR0 = guest.CR0PE | guest.CR0PG
		w.CPUs[0].RIP = 0x4320000
		w.CPUs[0].IDTR = kvmaccess.TableRegister{Base: 0x4332050, Limit: 0x1ff}
		w.CPUs[0].GDTR = kvmaccess.TableRegister{Base: 0x4332010, Limit: 0x2f}
		w.quiet(m)
		copy(w.CPUs, old)
		// Early boot of the next kernel.
		w.reboot(0x2400000)
		w.protect(false)
		w.put(w.at("system_state"), 0)
		w.quiet(m)
		if s := m.Status(); s.State != StateWaiting {
			t.Fatalf("%+v", s)
		}
		w.put(w.at("system_state"), 3)
		w.protect(true)
		if diff := cmp.Diff([]string{"restarted guest/kernel"}, keys(w.tick(m))); diff != "" {
			t.Errorf("symbols %t: (-want +got)\n%s\n%+v", symbols, diff, m.Status())
		}
		w.quiet(m)
	}
}

// TestQuickReset: no tick saw the reset, only the next kernel's early boot,
// LSTAR still that of before.
func TestQuickReset(t *testing.T) {
	for _, symbols := range []bool{true, false} {
		for _, slide := range []uint64{0x1000000, 0x2400000} {
			w := made(t, true, 0x1000000, 2)
			opts := Options{Settle: time.Hour}
			if symbols {
				opts.Symbols = w.symbols
			}
			m := w.monitor(opts)
			w.quiet(m)
			lstar := w.CPUs[0].LSTAR
			w.reboot(slide)
			up := append([]kvmaccess.VCPU(nil), w.CPUs...)
			table := w.at("sys_call_table") + 0x8000
			for i := range uint64(64) { // exceptions only
				w.put(table+i*8, w.read(w.CPUs[0].IDTR.Base+i*8))
			}
			w.CPUs[0].IDTR.Base, w.CPUs[0].LSTAR = table, lstar
			w.CPUs[0].GDTR.Base = table + 0x1000
			w.CPUs[1].CR0 = 0x60000010
			w.protect(false)
			w.put(w.at("system_state"), 0)
			w.quiet(m)
			if s := m.Status(); s.State != StateWaiting {
				t.Errorf("symbols %t, slide %#x: %+v", symbols, slide, s)
			}
			copy(w.CPUs, up)
			w.put(w.at("system_state"), 3)
			w.protect(true)
			for _, f := range w.tick(m) {
				if f.Kind != KindRestarted {
					t.Errorf("symbols %t, slide %#x: %s %s", symbols, slide, f.Kind, f.Message)
				}
			}
			w.quiet(m)
			w.watching(m)
		}
	}
}

// TestOwnGDT: a CPU that is brought up uses its table in its own data.
func TestOwnGDT(t *testing.T) {
	for _, symbols := range []bool{true, false} {
		w := made(t, true, 0, 2)
		opts := Options{}
		if symbols {
			opts.Symbols = w.symbols
		}
		own := w.at("sys_call_table") + 0x8000
		up := w.CPUs[1].GDTR
		for i := range uint64(16) {
			w.put(own+i*8, w.read(up.Base+i*8))
		}
		m := w.monitor(opts)
		w.quiet(m)
		w.CPUs[1].GDTR.Base, w.CPUs[1].GS.Base = own, own-0x1000
		w.quiet(m)
		old := w.put(own+12*8, 0x0000ec0000100000)
		if diff := cmp.Diff([]string{"changed gdt/gdt@1/12"}, keys(w.tick(m))); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
		w.put(own+12*8, old)
		w.tick(m)
		w.CPUs[1].GDTR = up
		w.quiet(m)
		w.CPUs[1].GDTR.Base = own + 1<<24 // a table elsewhere
		if found := keys(w.tick(m)); !strings.Contains(strings.Join(found, "\n"), "changed gdt/gdtr@1/GDTR") {
			t.Errorf("%q", found)
		}
	}
}

// TestAllGatesHooked is no restart.
func TestAllGatesHooked(t *testing.T) {
	w := made(t, true, 0, 1)
	m := w.monitor(Options{Symbols: w.symbols, MaxFindings: 1000})
	w.quiet(m)
	for i := range uint64(256) {
		w.put(w.CPUs[0].IDTR.Base+i*16, 0xc0128e0000100000+i*16)
	}
	found := w.tick(m)
	if len(found) < 240 {
		t.Errorf("%d findings: %q", len(found), texts(found)[:min(3, len(found))])
	}
	for _, f := range found {
		if f.Check != checkIDT || f.Kind != KindChanged {
			t.Fatalf("%s %s", f.Kind, f.Message)
		}
	}
}

// TestAnotherKernel: the baseline of one kernel is not held against another.
func TestAnotherKernel(t *testing.T) {
	w := debian(t)
	m := w.monitor(Options{Symbols: w.symbols})
	w.quiet(m)
	b := m.Baseline()
	w2 := made(t, true, 0, 2)
	m2 := w2.monitor(Options{Symbols: w2.symbols, Baseline: &b})
	if diff := cmp.Diff([]string{"restarted guest/kernel"}, keys(w2.tick(m2))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	w2.quiet(m2)
}

// TestWrongSymbols: they are not used, and it is said so.
func TestWrongSymbols(t *testing.T) {
	w := debian(t)
	m := w.monitor(Options{Symbols: made(t, true, 0, 1).symbols, Settle: -1})
	w.quiet(m)
	s := m.Status()
	if s.Symbols != 0 || s.State != StateWatching || !strings.Contains(strings.Join(s.Problems, "\n"), "do not fit") {
		t.Errorf("%+v", s)
	}
	m = w.monitor(Options{Symbols: made(t, false, 0, 1).symbols, Settle: -1})
	w.quiet(m)
	if s := m.Status(); !strings.Contains(strings.Join(s.Problems, "\n"), "another width") {
		t.Errorf("%+v", s)
	}
}

// TestNeighbour: symbols of another version that has the same entry code.
func TestNeighbour(t *testing.T) {
	for _, user := range []bool{false, true} {
		w := debian(t)
		var text strings.Builder
		for _, line := range w.lines {
			var at uint64
			var kind, name string
			if n, err := fmt.Sscanf(line, "%x %s %s", &at, &kind, &name); err != nil || n != 3 {
				t.Fatal(line, err)
			}
			if strings.HasPrefix(name, "__x64_sys_") && len(name)%4 != 0 {
				at += 0x10
			}
			fmt.Fprintf(&text, "%x %s %s\n", at, kind, name)
		}
		symbols, err := guest.ParseSymbols(strings.NewReader(text.String()))
		if err != nil {
			t.Fatal(err)
		}
		if user {
			c := &w.CPUs[0]
			c.CR3 |= 0x1000
			c.CPL, c.KernelGSBase, c.GS.Base = 3, c.GS.Base, 0
		}
		m := w.monitor(Options{Symbols: symbols, Settle: -1})
		w.quiet(m)
		w.watching(m)
		if s := m.Status(); s.Symbols != 0 || !strings.Contains(strings.Join(s.Problems, "\n"), "the system call table does not") {
			t.Errorf("%+v", s)
		}
	}
}

// TestRecord: a monitor of a recording finds what one of the guest finds.
func TestRecord(t *testing.T) {
	for _, long := range []bool{true, false} {
		w := made(t, long, 0x400000, 2)
		w.put(w.at("sys_call_table")+40, 0xf8123450)
		opts := Options{Symbols: w.symbols}
		s, err := Record(context.Background(), w, w.VM, opts)
		if err != nil {
			t.Fatal(err)
		}
		m := w.monitorOf(s.Machine(), opts)
		want := []string{"invariant syscalls/sys_call_table/5"}
		if !long {
			want[0] = "invariant syscalls/sys_call_table/10"
		}
		if diff := cmp.Diff(want, keys(w.tick(m))); diff != "" {
			t.Errorf("long %t: (-want +got)\n%s", long, diff)
		}
	}
	w := made(t, true, 0, 1)
	w.CPUs[0].Registers = kvmaccess.Registers{}
	if _, err := Record(context.Background(), w, w.VM, Options{}); err == nil || !strings.Contains(err.Error(), "real mode") {
		t.Errorf("%v", err)
	}
}

// TestNotLinux: another system is compared with its baseline only.
func TestNotLinux(t *testing.T) {
	w := made(t, true, 0, 1)
	for i := range uint64(6) {
		w.put(w.CPUs[0].GDTR.Base+(1+i)*8, 0x0020980000000000)
	}
	w.CPUs[0].STAR, w.CPUs[0].SFMASK = 0x0023001000000000, 0
	m := w.monitor(Options{Settle: -1})
	w.quiet(m)
	w.watching(m)
	w.put(w.CPUs[0].IDTR.Base+14*16, 0xc0128e0000103450)
	if diff := cmp.Diff([]string{"changed idt/idt/14"}, keys(w.tick(m))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestSettle: without symbols a guest is waited for until it write-protects its
// kernel, runs a program, or stays the same.
func TestSettle(t *testing.T) {
	booting := func() (*world, *Monitor) {
		w := made(t, true, 0, 1)
		w.protect(false)
		m := w.monitor(Options{Settle: time.Second})
		for range 15 {
			w.CPUs[0].SysenterESP++
			w.quiet(m)
		}
		if s := m.Status(); s.State != StateWaiting || !strings.Contains(s.Reason, "booted") {
			t.Errorf("%+v", s)
		}
		return w, m
	}
	w, m := booting()
	for range 4 {
		w.quiet(m)
	}
	w.watching(m)

	w, m = booting()
	w.CPUs[0].CPL = 3
	w.quiet(m)
	w.watching(m)

	w, m = booting()
	w.protect(true)
	w.quiet(m)
	w.watching(m)
}

// protect makes the kernel's text of a made 64-bit guest read-only, or not.
func (w *world) protect(on bool) {
	at := 0x3000 + (made64+w.image.Slide)>>21&511*8
	entry := uint64(0x400000 | 0x83)
	if on {
		entry &^= 2
	}
	w.pages.WritePhysical(at, le64(entry))
}

func TestBaseline(t *testing.T) {
	w := debian(t)
	opts := Options{Symbols: w.symbols, Ranges: entryRange}
	m := w.monitor(opts)
	w.quiet(m)
	execve := w.put(w.at("sys_call_table")+59*8, 0xffffffffc0123450)
	text := w.put(w.at("entry_SYSCALL_64")+8, 0)
	if found := w.tick(m); len(found) != 2 {
		t.Fatalf("%q", texts(found))
	}
	b := m.Baseline()
	stored, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	var back Baseline
	if err := json.Unmarshal(stored, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b, back); diff != "" {
		t.Errorf("JSON (-want +got)\n%s", diff)
	}

	// What held then and still holds is not found again, what came is found,
	// what went is cleared.
	opts.Baseline = &back
	m = w.monitor(opts)
	w.quiet(m)
	if open := m.Findings(); len(open) != 2 {
		t.Errorf("%q", texts(open))
	}

	w.put(w.at("sys_call_table")+59*8, execve)
	write := w.put(w.at("sys_call_table")+8, 0xffffffffc0123000)
	m = w.monitor(opts)
	if diff := cmp.Diff([]string{"changed syscalls/sys_call_table/1", "cleared syscalls/sys_call_table/59"}, keys(w.tick(m))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	w.put(w.at("sys_call_table")+8, write)
	w.put(w.at("entry_SYSCALL_64")+8, text)
	w.tick(m)
	w.quiet(m)
	if open := m.Findings(); len(open) != 0 {
		t.Errorf("left over: %q", texts(open))
	}
	if diff := cmp.Diff(b.Items, m.Baseline().Items); diff != "" {
		t.Errorf("the baseline changed (-want +got)\n%s", diff)
	}
}

func TestBaselineBad(t *testing.T) {
	w := made(t, true, 0, 1)
	for name, b := range map[string]*Baseline{
		"version": {Version: 99},
		"twice":   {Version: BaselineVersion, Items: []Item{{Check: "x"}, {Check: "x"}}},
	} {
		if _, err := NewMonitor(w, VM{ID: 7}, Options{Baseline: b}); err == nil || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMany: more findings than may be returned at once come one tick later.
func TestMany(t *testing.T) {
	w := made(t, true, 0, 1)
	m := w.monitor(Options{Symbols: w.symbols, MaxFindings: 30})
	w.quiet(m)
	for nr := range uint64(100) {
		w.put(w.at("sys_call_table")+nr*8, 0xffffffffc0100000+nr)
	}
	seen := map[string]bool{}
	for i, want := range []struct{ n, more int }{{30, 70}, {30, 40}, {30, 10}, {10, 0}, {0, 0}} {
		found := w.tick(m)
		if len(found) != want.n {
			t.Fatalf("tick %d: %d findings, want %d", i, len(found), want.n)
		}
		for _, f := range found {
			seen[f.Key()] = true
		}
		if want.n > 0 && found[want.n-1].More != want.more || m.Status().Pending != want.more {
			t.Errorf("tick %d: %d more, want %d", i, found[want.n-1].More, want.more)
		}
	}
	if len(seen) != 100 {
		t.Errorf("%d different findings", len(seen))
	}
}

// TestFlood: a guest that changes faster than findings are taken does not grow
// the queue for ever, and the last of each entry is there.
func TestFlood(t *testing.T) {
	w := made(t, true, 0, 1)
	m := w.monitor(Options{Symbols: w.symbols, MaxFindings: 1})
	w.quiet(m)
	for round := range uint64(80) {
		for nr := range uint64(300) {
			w.put(w.at("sys_call_table")+nr*8, 0xffffffffc0100000+round<<8)
		}
		w.tick(m)
	}
	if n := m.Status().Pending; n > maxQueue {
		t.Errorf("%d findings wait", n)
	}
	last := m.queue[len(m.queue)-1]
	if last.New.Value != 0xffffffffc0100000+79<<8 {
		t.Errorf("the last one is %s", last.Message)
	}
}

func TestOptions(t *testing.T) {
	w := made(t, true, 0, 1)
	for name, ranges := range map[string][]MemoryRange{
		"empty":    {{Address: 0xffffffff81000000}},
		"too long": {{Address: 0xffffffff81000000, Length: kvmaccess.MaxBytes + 1}},
		"nowhere":  {{Length: 8}},
		"both":     {{Symbol: "_stext", Address: 1, Length: 8}},
		"twice":    {{Symbol: "_stext", Length: 8}, {Symbol: "_stext", Length: 16}},
		"too many": make([]MemoryRange, maxRanges+1),
		"too much": manyRanges(64),
	} {
		if _, err := NewMonitor(w, VM{ID: 7}, Options{Ranges: ranges}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	m := w.monitor(Options{Settle: -1, Ranges: []MemoryRange{
		{Symbol: "no_such_symbol", Length: 8},
		{Address: 0x8000000000000000, Length: 8},
		{Name: "nothing there", Address: 0xffff900000000000, Length: 8},
		{Symbol: "entry_SYSCALL_64", Length: 8},
	}, Symbols: w.symbols})
	found := w.tick(m)
	if diff := cmp.Diff([]string{"invariant memory/nothing there"}, keys(found)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	problems := strings.Join(m.Status().Problems, "\n")
	for _, want := range []string{"no_such_symbol", "not canonical"} {
		if !strings.Contains(problems, want) {
			t.Errorf("no %q in %q", want, problems)
		}
	}
	if _, err := CheckByName("nope"); err == nil || !strings.Contains(err.Error(), "syscalls") {
		t.Errorf("%v", err)
	}
	for _, c := range Checks() {
		if got, err := CheckByName(c.Name()); err != nil || got.Name() != c.Name() {
			t.Errorf("%v, %v", got, err)
		}
	}
}

func manyRanges(n int) []MemoryRange {
	var ranges []MemoryRange
	for i := range n {
		ranges = append(ranges, MemoryRange{Address: 0xffffffff81000000 + Hex(i)<<20, Length: kvmaccess.MaxBytes})
	}
	return ranges
}

// faulty is a source with the troubles of a live one.
type faulty struct {
	*world
	vcpu, virtual, physical error
	rangeErr                error
	buffer                  []byte // used again and again, as a client may
	out                     []kvmaccess.RangeData
}

func (f *faulty) VCPU(ctx context.Context, vm kvmaccess.VMID, id uint32) (kvmaccess.VCPU, error) {
	if f.vcpu != nil {
		return kvmaccess.VCPU{}, f.vcpu
	}
	return f.world.VCPU(ctx, vm, id)
}

func (f *faulty) ReadPhysical(ctx context.Context, vm kvmaccess.VMID, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error) {
	if f.physical != nil {
		return nil, f.physical
	}
	return f.world.ReadPhysical(ctx, vm, ranges...)
}

func (f *faulty) ReadVirtual(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, root uint64, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error) {
	if f.virtual != nil {
		return nil, f.virtual
	}
	out, err := f.world.ReadVirtual(ctx, vm, vcpu, root, ranges...)
	f.buffer, f.out = f.buffer[:0], f.out[:0]
	for _, r := range out {
		if f.rangeErr != nil {
			r.Data, r.Err = nil, f.rangeErr
		} else {
			start := len(f.buffer)
			f.buffer = append(f.buffer, r.Data...)
			r.Data = f.buffer[start:len(f.buffer):len(f.buffer)]
		}
		f.out = append(f.out, r)
	}
	return f.out, err
}

// TestTroubles: errors of the host are no findings, and none hides an attack.
func TestTroubles(t *testing.T) {
	dying := []error{kvmaccess.ErrNoVM, kvmaccess.ErrDying, context.Canceled}
	passing := []error{kvmaccess.ErrNotResident, kvmaccess.ErrUnsettled}
	setup := func() (*world, *faulty, *Monitor) {
		w := made(t, true, 0, 1)
		f := &faulty{world: w}
		m := w.monitorOf(f, Options{Symbols: w.symbols})
		w.quiet(m)
		w.watching(m)
		return w, f, m
	}
	for _, trouble := range dying {
		w, f, m := setup()
		f.vcpu = trouble
		if _, err := m.Tick(context.Background()); !errors.Is(err, trouble) {
			t.Errorf("vCPU %v: %v", trouble, err)
		}
		f.vcpu, f.virtual = nil, trouble
		if _, err := m.Tick(context.Background()); !errors.Is(err, trouble) {
			t.Errorf("memory %v: %v", trouble, err)
		}
		f.virtual = nil
		w.quiet(m)
	}
	for _, trouble := range passing {
		// The pages are had by physical address.
		w, f, m := setup()
		f.rangeErr = trouble
		w.quiet(m)
		old := w.put(w.at("sys_call_table"), 0xffffffffc0123450)
		if found := w.tick(m); len(found) != 1 {
			t.Errorf("%v: %q", trouble, texts(found))
		}
		w.put(w.at("sys_call_table"), old)
		w.tick(m)
		// They are not to be had at all, for a while.
		f.physical = trouble
		w.put(w.at("sys_call_table"), 0xffffffffc0123450)
		w.quiet(m)
		if m.Status().Unread == 0 {
			t.Errorf("%v: it was not counted", trouble)
		}
		f.virtual, f.rangeErr = trouble, nil
		w.quiet(m)
		f.physical, f.virtual = nil, nil
		if found := w.tick(m); len(found) != 1 {
			t.Errorf("%v, after it: %q", trouble, texts(found))
		}
	}
	w, f, m := setup()
	f.vcpu = kvmaccess.ErrUnsettled
	w.quiet(m)
	w.watching(m)
	// A guest that cannot be read from the start.
	w = made(t, true, 0, 1)
	f = &faulty{world: w, physical: kvmaccess.ErrProtected}
	m = w.monitorOf(f, Options{Symbols: w.symbols})
	w.quiet(m)
	if s := m.Status(); s.State != StateWaiting || !strings.Contains(s.Reason, "encrypted") {
		t.Errorf("%+v", s)
	}
}

// TestUnmapped: memory that the guest unmaps is the guest's doing.
func TestUnmapped(t *testing.T) {
	w := made(t, true, 0, 1)
	m := w.monitor(Options{Symbols: w.symbols})
	w.quiet(m)
	pmd := uint64(made64)>>21&511 + 1
	old := make([]byte, 8)
	if err := w.pages.ReadPhysical(context.Background(), 0x3000+pmd*8, old); err != nil {
		t.Fatal(err)
	}
	w.pages.WritePhysical(0x3000+pmd*8, make([]byte, 8))
	found := w.tick(m)
	if diff := cmp.Diff([]string{"invariant control/cr4_pinned_bits/memory of cr4_pinned_bits", "invariant syscalls/sys_call_table/memory of sys_call_table"}, keys(found)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	w.quiet(m)
	w.pages.WritePhysical(0x3000+pmd*8, old)
	w.tick(m)
	if open := m.Findings(); len(open) != 0 {
		t.Errorf("left over: %q", texts(open))
	}
	w.quiet(m)
}

// steady answers at once and allocates nothing.
type steady struct {
	Source
	cpu kvmaccess.VCPU
	out []kvmaccess.RangeData
}

func (s *steady) VCPU(context.Context, kvmaccess.VMID, uint32) (kvmaccess.VCPU, error) {
	return s.cpu, nil
}

func (s *steady) ReadVirtual(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, root uint64, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error) {
	if s.out == nil {
		out, err := s.Source.ReadVirtual(ctx, vm, vcpu, root, ranges...)
		s.out = out
		return out, err
	}
	return s.out, nil
}

func steadyMonitor(t testing.TB) *Monitor {
	w := debian(t)
	w.CPUs = w.CPUs[:1]
	m := w.monitorOf(&steady{Source: w, cpu: w.CPUs[0]}, Options{Symbols: w.symbols, Ranges: []MemoryRange{{Symbol: "entry_SYSCALL_64", Length: 4096}}})
	m.now = time.Now
	if f, err := m.Attach(context.Background()); err != nil || len(f) != 0 {
		t.Fatalf("%q, %v", texts(f), err)
	}
	return m
}

// TestTickAllocates: a tick without a difference allocates nothing itself.
func TestTickAllocates(t *testing.T) {
	m := steadyMonitor(t)
	ctx := context.Background()
	if n := testing.AllocsPerRun(1000, func() {
		if f, err := m.Tick(ctx); err != nil || len(f) != 0 {
			t.Fatal(f, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a tick", n)
	}
	if s := m.Status(); s.Slow != 0 {
		t.Errorf("%+v", s)
	}
}

func BenchmarkTick(b *testing.B) {
	m := steadyMonitor(b)
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if f, err := m.Tick(ctx); err != nil || len(f) != 0 {
			b.Fatal(f, err)
		}
	}
}
