// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// roIDT is where Linux has each CPU load its IDT from since 4.14, whatever the
// slide (CPU_ENTRY_AREA_RO_IDT in arch/x86/include/asm/pgtable_areas.h).
const roIDT = cpuEntryArea

// ImpliedVCPUs are the states of the CPUs that are online as far as the kernel's
// memory implies them: its page tables, and the IDT, GDT and TSS that it keeps.
// They are for a dump without registers; whether CPUs use these tables it does
// not tell. All carry kvmaccess.VCPUPartial.
func (k *Kernel) ImpliedVCPUs(ctx context.Context) ([]kvmaccess.VCPU, error) {
	if k.Types == nil {
		return nil, fmt.Errorf("CPUs: %w", k.TypesErr)
	}
	tables, err := k.CPUTables(ctx)
	if len(tables) == 0 {
		return nil, errors.Join(errors.New("no CPU is online"), err)
	}
	idt, ok := k.Image.Lookup("idt_table")
	if !ok {
		return nil, errors.New("the symbols have no idt_table")
	}
	if k.sameMemory(ctx, roIDT, idt) {
		idt = roIDT
	}
	r := kvmaccess.Registers{
		CR0: CR0PE | CR0WP | CR0PG, CR3: k.Space.Root, CR4: CR4PAE,
		EFER: EFERSCE | EFERLME | EFERLMA | EFERNXE,
		RIP:  k.Text.Start,
		IDTR: kvmaccess.TableRegister{Base: idt, Limit: 256*16 - 1},
	}
	if k.Space.Mode.Format == Format5Level {
		r.CR4 |= CR4LA57
	}
	cpus := make([]kvmaccess.VCPU, 0, len(tables))
	for _, t := range tables {
		// The entry area maps the GDT once more, read-only, and that is the one
		// that CPUs use.
		gdt := t.GDT.Base
		if area, err := k.entryArea(ctx, t.CPU); err == nil {
			if at, err := area.Addr("gdt"); err == nil && k.sameMemory(ctx, at, gdt) {
				gdt = at
			}
		}
		r.GDTR = kvmaccess.TableRegister{Base: gdt, Limit: uint16(t.GDT.Limit)}
		// LTR loads what the GDT has of the TSS.
		const selector = 0x40 // GDT_ENTRY_TSS
		for _, d := range t.GDTs {
			if d.Index == selector/8 && d.TSS() {
				r.TR = kvmaccess.Segment{Selector: selector, Base: d.Base, Limit: d.Limit, Attrs: 0x8b} // present, busy
			}
		}
		cpus = append(cpus, kvmaccess.VCPU{ID: uint32(t.CPU), CPU: -1, Flags: kvmaccess.VCPUPartial, Registers: r})
	}
	return cpus, nil
}

// sameMemory says whether two addresses are mapped to the same memory.
func (k *Kernel) sameMemory(ctx context.Context, a, b uint64) bool {
	x, err1 := Translate(ctx, k.Space.Memory, k.Space.Mode, k.Space.Root, a)
	y, err2 := Translate(ctx, k.Space.Memory, k.Space.Mode, k.Space.Root, b)
	return err1 == nil && err2 == nil && x.GPA == y.GPA
}
