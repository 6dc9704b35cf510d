// SPDX-License-Identifier: MIT

package integrity

import (
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// GDTCheck watches each vCPU's global descriptor table, the register that says
// where it is, and the task register.
type GDTCheck struct{}

// Name implements Check.
func (GDTCheck) Name() string { return checkGDT }

// maxGDT bounds what is read of a table: Linux's is one page at most.
const maxGDT = 4096

// Objects implements Check.
func (GDTCheck) Objects(g *Guest) []Object {
	var objects []Object
	for _, cpu := range g.CPUs {
		objects = append(objects, Object{
			Name: "gdtr", VCPU: ref(cpu.ID), CPU: cpu.ID,
			Items: func(g *Guest, cpu *kvmaccess.VCPU, _ []byte, _ error) []Item { return gdtrItems(g, cpu) },
		})
		if !g.Mode.Canonical(cpu.GDTR.Base) {
			continue // the register's item says so
		}
		objects = append(objects, Object{
			Name: "gdt", VCPU: ref(cpu.ID), CPU: cpu.ID,
			Memory:   kvmaccess.Range{Address: cpu.GDTR.Base, Length: min(uint32(cpu.GDTR.Limit)+1, maxGDT)},
			Volatile: volatileGDT(g),
			Items:    gdtItems,
		})
	}
	return objects
}

// What 64-bit and 32-bit Linux keep where (arch/x86/include/asm/segment.h).
const (
	tss64, ldt64       = 8, 10
	tlsMin64, tlsMax64 = 12, 14
	cpuNode64          = 15
	gdtEntries64       = 16

	tss32, ldt32       = 16, 17
	tlsMin32, tlsMax32 = 6, 8
	doubleFault32      = 31
	gdtEntries32       = 32
)

// accessed is the bit that the processor, or the kernel in advance, sets in
// the descriptor of a segment that was loaded.
const accessed = 1 << 40

// flat are the descriptors of code and data segments over all addresses
// (gdt_page in arch/x86/kernel/cpu/common.c), accessed.
var (
	flat64 = map[int]uint64{
		1: 0x00cf9b000000ffff, // kernel code, 32-bit
		2: 0x00af9b000000ffff, // kernel code
		3: 0x00cf93000000ffff, // kernel data
		4: 0x00cffb000000ffff, // user code, 32-bit
		5: 0x00cff3000000ffff, // user data
		6: 0x00affb000000ffff, // user code
	}
	flat32 = map[int]uint64{
		12: 0x00cf9b000000ffff,
		13: 0x00cf93000000ffff,
		14: 0x00cffb000000ffff,
		15: 0x00cff3000000ffff,
	}
	names64 = map[int]string{
		1: "kernel code, 32-bit", 2: "kernel code", 3: "kernel data",
		4: "user code, 32-bit", 5: "user data", 6: "user code",
		8: "TSS", 10: "LDT", 12: "TLS", 13: "TLS", 14: "TLS", 15: "CPU number",
	}
	names32 = map[int]string{
		6: "TLS", 7: "TLS", 8: "TLS",
		12: "kernel code", 13: "kernel data", 14: "user code", 15: "user data",
		16: "TSS", 17: "LDT", 27: "per-CPU data", 31: "double fault TSS",
	}
)

// looksLinux says whether most of the flat segments are where Linux has them:
// a changed one does not make another system of it.
func looksLinux(data []byte, long bool) bool {
	flat := flat32
	if long {
		flat = flat64
	}
	found := 0
	for _, d := range guest.ParseGDT(data, long) {
		if want, ok := flat[d.Index]; ok && d.Raw|accessed == want {
			found++
		}
	}
	return found > len(flat)/2
}

func gdtrItems(g *Guest, cpu *kvmaccess.VCPU) []Item {
	gdtr := Item{Check: checkGDT, Object: "gdtr", VCPU: ref(cpu.ID), Name: "GDTR", Scope: ScopeBoot}
	gdtr.Value = g.value(cpu.GDTR.Base)
	gdtr.Value.Detail = fmt.Sprintf("limit %#x", cpu.GDTR.Limit)
	gdtr.Raw = gdtr.Value.Detail
	if g.ownGDT(cpu) {
		// While a CPU is brought up, and around calls of firmware.
		gdtr.Value = Value{}
	}
	entries := gdtEntries32
	if g.Mode.Long() {
		entries = gdtEntries64
	}
	switch {
	case !g.Linux:
	case !g.Mode.Kernel(cpu.GDTR.Base):
		gdtr.Fault = "not a kernel address"
	case int(cpu.GDTR.Limit)+1 > entries*8:
		gdtr.Fault = fmt.Sprintf("the limit is beyond Linux's %d entries, %#x", entries, entries*8-1)
	case gdtr.Value == Value{}:
	case g.entryArea() && (cpu.GDTR.Base < entryArea || cpu.GDTR.Base >= entryAreaEnd):
		gdtr.Fault = "not in the kernel's read-only CPU entry area"
	}

	tr := Item{Check: checkGDT, Object: "tr", VCPU: ref(cpu.ID), Name: "TR", Scope: ScopeBoot}
	tr.Value = Value{Value: Hex(cpu.TR.Base), Detail: fmt.Sprintf("selector %#x", cpu.TR.Selector)}
	tr.Raw = tr.Value.Detail
	selector := uint16(tss32 * 8)
	if g.Mode.Long() {
		selector = tss64 * 8
	}
	switch {
	case !g.Linux:
	case cpu.TR.Selector == doubleFault32*8 && !g.Mode.Long():
		// the processor is in the double fault task
	case cpu.TR.Selector != selector:
		tr.Fault = fmt.Sprintf("the selector is not the kernel's TSS, %#x", selector)
	case g.entryArea() && (cpu.TR.Base < entryArea || cpu.TR.Base >= entryAreaEnd):
		tr.Fault = "not in the kernel's CPU entry area"
	}
	if gdtr.Value == (Value{}) && gdtr.Fault == "" {
		return []Item{tr}
	}
	return []Item{gdtr, tr}
}

// ownGDT says whether the vCPU uses its table where the kernel may write it:
// gdt_page in the CPU's own data (load_direct_gdt in
// arch/x86/kernel/cpu/common.c). GS points to these data or, since 6.15, holds
// what is to be added to a symbol of theirs. What is in it is checked all the
// same.
func (g *Guest) ownGDT(cpu *kvmaccess.VCPU) bool {
	if !g.Mode.Long() || !g.Mode.Kernel(cpu.GDTR.Base) {
		return false
	}
	const perCPU = 1 << 20 // more than the kernel's own data of a CPU
	at, known := uint64(0), false
	if g.Image != nil {
		at, known = g.Image.Lookup("gdt_page")
	}
	for _, base := range []uint64{cpu.GS.Base, cpu.KernelGSBase} {
		switch {
		case known && cpu.GDTR.Base-base == at:
			return true
		case !known && g.Mode.Kernel(base) && cpu.GDTR.Base-base < perCPU:
			return true
		}
	}
	return false
}

func gdtItems(g *Guest, cpu *kvmaccess.VCPU, data []byte, err error) []Item {
	if data == nil {
		return []Item{unreadable(checkGDT, "gdt", ref(cpu.ID), err)}
	}
	long := g.Mode.Long()
	names := names32
	if long {
		names = names64
	}
	var items []Item
	for _, d := range guest.ParseGDT(data, long) {
		if d.Raw == 0 && (long && d.Index >= gdtEntries64 || d.Index >= gdtEntries32) {
			continue // beyond Linux's table: what is there is what counts
		}
		it := Item{Check: checkGDT, Object: "gdt", VCPU: ref(cpu.ID), Entry: ref(d.Index), Name: names[d.Index]}
		raw := d.Raw
		if !d.System || d.TSS() && d.Type&2 != 0 {
			if d.System {
				raw &^= 2 << 40 // busy
			} else {
				raw |= accessed
			}
		}
		it.Value = Value{Value: Hex(d.Raw), Detail: d.String()}
		it.Raw = fmt.Sprintf("%#x:%#x", d.High, raw)
		if g.Linux {
			it.Fault = wrongDescriptor(g, cpu, d, long)
		}
		switch own := volatileEntry(d, long); {
		case it.Fault != "":
		case own: // as programs need it
			it.Raw, it.Value = "", Value{Detail: "as programs set it"}
		case d.TSS() || d.Index == cpuNode64 || !long && d.Index > 15:
			it.Scope = ScopeBoot
		}
		// What a descriptor says else than its address is in Raw.
		if it.Raw != "" {
			it.Value.Value = Hex(raw)
		}
		if long && (d.Index == ldt64+1 || d.Index == tss64+1) && d.Raw == 0 {
			it.Raw, it.Value = partRaw, Value{Detail: "unused"}
		}
		items = append(items, it)
		if d.Wide { // says it all about both entries
			items = append(items, Item{Check: checkGDT, Object: "gdt", VCPU: ref(cpu.ID), Entry: ref(d.Index + 1), Name: names[d.Index+1], Raw: partRaw})
		}
	}
	return items
}

// partRaw marks the entry that is the second half of another one; it compares
// equal to everything.
const partRaw = "part"

// volatileEntry says whether the entry changes as programs come and go.
func volatileEntry(d guest.Descriptor, long bool) bool {
	if long {
		return d.Index == ldt64 || d.Index >= tlsMin64 && d.Index <= tlsMax64
	}
	return d.Index == ldt32 || d.Index >= tlsMin32 && d.Index <= tlsMax32 || d.Index == 26 // ESPFIX
}

// volatileGDT is where volatileEntry's lie, and what is between them.
func volatileGDT(g *Guest) guest.Extent {
	if g.Mode.Long() {
		return guest.Extent{Start: ldt64 * 8, End: (tlsMax64 + 1) * 8}
	}
	return guest.Extent{Start: tlsMin32 * 8, End: (tlsMax32 + 1) * 8}
}

func wrongDescriptor(g *Guest, cpu *kvmaccess.VCPU, d guest.Descriptor, long bool) string {
	flat, tss, ldt, tlsMin, tlsMax, entries := flat32, tss32, ldt32, tlsMin32, tlsMax32, gdtEntries32
	if long {
		flat, tss, ldt, tlsMin, tlsMax, entries = flat64, tss64, ldt64, tlsMin64, tlsMax64, gdtEntries64
	}
	unused := d.Raw == 0 && d.High == 0
	switch want, ok := flat[d.Index]; {
	case d.CallGate():
		return "Linux has no call gates"
	case ok && d.Raw|accessed != want:
		return fmt.Sprintf("not Linux's segment, %v", guest.ParseGDT(le64(want), long)[0])
	case ok:
		return ""
	case d.Index == tss:
		switch {
		case !d.TSS() || !d.Present || d.DPL != 0:
			return "not the kernel's TSS"
		case cpu.TR.Selector == uint16(tss*8) && d.Base != cpu.TR.Base:
			return fmt.Sprintf("not the TSS that the task register holds, at %#x", cpu.TR.Base)
		}
	case unused:
	case d.Index == ldt:
		if !d.System || d.Type != guest.TypeLDT || d.DPL != 0 {
			return "not an LDT"
		}
	case d.Index >= tlsMin && d.Index <= tlsMax:
		if d.System || d.DPL != 3 {
			return "not a program's segment"
		}
	case long && d.Index == cpuNode64:
		if d.System || d.DPL != 3 || d.Type&8 != 0 {
			return "not the CPU number"
		}
	case long || d.Index >= entries:
		return "Linux does not use this entry"
	case d.System && d.Index != doubleFault32:
		return "Linux has no system segment here"
	case !d.System && d.DPL != 0:
		return "Linux has no segment for programs here"
	}
	return ""
}

func le64(v uint64) []byte {
	p := make([]byte, 8)
	for i := range p {
		p[i] = byte(v >> (8 * i))
	}
	return p
}
