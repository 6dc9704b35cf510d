// SPDX-License-Identifier: MIT

package integrity

import (
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// MSRCheck watches the model-specific registers that say where each vCPU
// enters the kernel for a system call.
type MSRCheck struct{}

// Name implements Check.
func (MSRCheck) Name() string { return checkMSR }

// Objects implements Check.
func (MSRCheck) Objects(g *Guest) []Object {
	var objects []Object
	for _, cpu := range g.CPUs {
		if cpu.Flags&kvmaccess.VCPUPartial != 0 {
			continue // a dump that lacks them
		}
		objects = append(objects, Object{
			Name: "msr", VCPU: ref(cpu.ID), CPU: cpu.ID,
			Items: func(g *Guest, cpu *kvmaccess.VCPU, _ []byte, _ error) []Item { return msrItems(g, cpu) },
		})
	}
	return objects
}

// What Linux loads (syscall_init in arch/x86/kernel/cpu/common.c).
const (
	star64 = 0x23<<48 | 0x10<<32 // __USER32_CS, __KERNEL_CS
	// sfmaskAlways are TF, IF, DF, IOPL, NT and AC, which every version
	// clears on a system call; since 5.13 it clears all other flags, too.
	sfmaskAlways = 0x100 | 0x200 | 0x400 | 0x3000 | 0x4000 | 0x40000
)

func msrItems(g *Guest, cpu *kvmaccess.VCPU) []Item {
	item := func(object, name string, v Value, scope Scope, fault string) Item {
		if !g.Linux {
			fault = ""
		}
		return Item{Check: checkMSR, Object: object, VCPU: ref(cpu.ID), Name: name, Value: v, Scope: scope, Fault: fault}
	}
	number := func(v uint64) Value { return Value{Value: Hex(v)} }
	var items []Item
	if g.Mode.Long() {
		fault := ""
		if cpu.STAR>>32 != star64>>32 {
			fault = fmt.Sprintf("not Linux's selectors, %#x", uint64(star64))
		}
		items = append(items, item("star", "STAR", number(cpu.STAR), ScopeAlways, fault))

		v, fault := g.expect(cpu.LSTAR, "entry_SYSCALL_64")
		if fault != "" && g.trampoline(cpu.LSTAR) {
			fault = ""
		}
		items = append(items, item("lstar", "LSTAR", v, ScopeImage, fault))

		v, fault = number(0), "" // processors without 32-bit SYSCALL
		if cpu.CSTAR != 0 {
			v, fault = g.expect(cpu.CSTAR, "entry_SYSCALL_compat", "entry_SYSCALL32_ignore", "ignore_sysret", "entry_SYSCALL_compat_after_hwframe")
		}
		items = append(items, item("cstar", "CSTAR", v, ScopeImage, fault))

		fault = ""
		if missing := sfmaskAlways &^ cpu.SFMASK; missing != 0 {
			fault = fmt.Sprintf("system calls keep the flags %#x of the program", missing)
		}
		items = append(items, item("sfmask", "SFMASK", number(cpu.SFMASK), ScopeAlways, fault))
	}

	code, entry := uint64(0x60), []string{"entry_SYSENTER_32", "sysenter_entry"}
	if g.Mode.Long() {
		code, entry = 0x10, []string{"entry_SYSENTER_compat"}
	}
	fault := ""
	if cs := cpu.SysenterCS & 0xffff; cs != 0 && cs != code {
		fault = fmt.Sprintf("not the kernel's code, %#x", code)
	}
	items = append(items, item("sysenter_cs", "SYSENTER_CS", number(cpu.SysenterCS), ScopeAlways, fault))
	items = append(items, item("sysenter_esp", "SYSENTER_ESP", number(cpu.SysenterESP), ScopeBoot, ""))

	v, fault, scope := number(0), "", ScopeImage
	switch at, ok := g.sysenterEntry(entry); {
	case cpu.SysenterEIP == 0:
	case cpu.SysenterEIP>>32 == 0 && g.Mode.Long():
		// AMD processors keep 32 bits of it, and do not use them in long mode.
		scope = ScopeBoot
		v = number(cpu.SysenterEIP)
		if ok && cpu.SysenterEIP != at&0xffffffff {
			fault = "not " + entry[0]
		} else if ok {
			v.Symbol, v.Detail = entry[0], "low half"
		}
	default:
		v, fault = g.expect(cpu.SysenterEIP, entry...)
	}
	return append(items, item("sysenter_eip", "SYSENTER_EIP", v, scope, fault))
}

func (g *Guest) sysenterEntry(names []string) (uint64, bool) {
	if g.Image == nil {
		return 0, false
	}
	for _, name := range names {
		if at, ok := g.Image.Lookup(name); ok {
			return at, true
		}
	}
	return 0, false
}

// trampoline says whether addr is where 4.15 to 4.19 enter under page-table
// isolation: a copy of entry_SYSCALL_64_trampoline for each CPU.
func (g *Guest) trampoline(addr uint64) bool {
	if g.Image == nil || addr < entryArea || addr >= entryAreaEnd {
		return false
	}
	_, ok := g.Image.Lookup("entry_SYSCALL_64_trampoline")
	return ok
}
