// SPDX-License-Identifier: MIT

package tinyvm

import (
	"encoding/binary"
	"fmt"
)

// Mode is a CPU mode that a vCPU can begin in.
type Mode int

// Values of Mode.
const (
	Real       Mode = iota // 16-bit
	Protected              // 32-bit, no paging
	Paged32                // 32-bit, page tables of 2 levels
	Paged32PSE             // the same with pages of 4 MiB
	PAE                    // 32-bit, page tables of 3 levels
	Long                   // 64-bit, page tables of 4 levels
	Long5                  // 64-bit, page tables of 5 levels
)

var modeNames = []string{"real", "protected", "32-bit paged", "32-bit paged with PSE", "PAE", "long", "long with 5 levels"}

// String returns the name of the mode.
func (m Mode) String() string {
	if m >= 0 && int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode %d", int(m))
}

// Paging is the format of the mode's page tables; Levels is 0 without paging.
func (m Mode) Paging() Paging {
	switch m {
	case Paged32:
		return Paging{Levels: 2}
	case Paged32PSE:
		return Paging{Levels: 2, PSE: true}
	case PAE:
		return Paging{Levels: 3}
	case Long:
		return Paging{Levels: 4}
	case Long5:
		return Paging{Levels: 5}
	}
	return Paging{}
}

// Where PrepareTables and Enter expect and put things: guest-physical
// addresses in the first memslot, which in ready-made guests are
// guest-virtual addresses as well.
const (
	GDT        = 0x1000
	TSS        = 0x1800
	IDT        = 0x2000
	StackTop   = 0x7000
	RealBase   = 0x7000 // of CS in real mode
	Code       = 0x8000
	SMBase     = 0x30000 // where system management mode begins after a reset
	PageTables = 0x100000
)

// Selectors in the GDT of PrepareTables. The user's have RPL 3.
const (
	Code64     = 0x08
	Data       = 0x10
	Code32     = 0x18
	UserData   = 0x23 // Code64User - 8, as SYSRET wants it
	Code64User = 0x2b
	Code16     = 0x30
	TSSSelect  = 0x40
)

const (
	gdtLimit = 0x4f
	tssLimit = 0x67
	idtLimit = 0xfff
)

// descriptors of the GDT: Intel SDM vol. 3, "Segment Descriptors". All are
// marked as accessed, so that loading one changes nothing.
var descriptors = []uint64{
	Code64 / 8:      0x00af9b000000ffff,
	Data / 8:        0x00cf93000000ffff,
	Code32 / 8:      0x00cf9b000000ffff,
	UserData / 8:    0x00cff3000000ffff,
	Code64User / 8:  0x00affb000000ffff,
	Code16 / 8:      0x000f9b000000ffff,
	TSSSelect / 8:   0x00008b0000000000 | TSS<<16 | tssLimit,
	TSSSelect/8 + 1: 0,
}

// PrepareTables writes the GDT, a TSS whose stack is at StackTop, and an IDT
// without gates.
func (vm *VM) PrepareTables() error {
	gdt := make([]byte, gdtLimit+1)
	for i, d := range descriptors {
		binary.LittleEndian.PutUint64(gdt[i*8:], d)
	}
	tss := make([]byte, tssLimit+1)
	binary.LittleEndian.PutUint64(tss[4:], StackTop)
	if err := vm.Write(GDT, gdt); err != nil {
		return err
	}
	if err := vm.Write(TSS, tss); err != nil {
		return err
	}
	return vm.Write(IDT, make([]byte, idtLimit+1))
}

// SetGate makes an interrupt of the 64-bit IDT go to handler, with interrupts
// off.
func (vm *VM) SetGate(vector uint8, handler uint64) error {
	gate := make([]byte, 16)
	binary.LittleEndian.PutUint64(gate, handler&0xffff|Code64<<16|0x8e00<<32|handler>>16&0xffff<<48)
	binary.LittleEndian.PutUint64(gate[8:], handler>>32)
	return vm.Write(IDT+uint64(vector)*16, gate)
}

func (s *Segment) flat(selector uint16, code, dpl uint8) {
	*s = Segment{Limit: 0xffffffff, Selector: selector, Type: 3 | code<<3, Present: 1, DPL: dpl, S: 1, G: 1, DB: 1}
}

// Enter makes the vCPU begin at the linear address rip in mode, at CPL 0, all
// general registers 0 but RSP. Root is what CR3 gets. Interrupts are on: an
// emulator may not interrupt a nested guest that has them off.
func (v *VCPU) Enter(m Mode, root, rip uint64) error {
	s, err := v.SRegs()
	if err != nil {
		return err
	}
	r := Regs{RIP: rip, RSP: StackTop, RFLAGS: 0x202}
	s.GDT = Table{Base: GDT, Limit: gdtLimit}
	s.IDT = Table{Base: IDT, Limit: idtLimit}
	s.CR0, s.CR3, s.CR4, s.EFER = CR0ET|CR0NE, root, 0, 0
	for _, d := range []*Segment{&s.DS, &s.ES, &s.FS, &s.GS, &s.SS} {
		d.flat(Data, 0, 0)
	}
	s.CS.flat(Code32, 1, 0)
	s.TR = Segment{Base: TSS, Limit: tssLimit, Selector: TSSSelect, Type: 11, Present: 1}
	s.LDT = Segment{Unusable: 1}
	if m != Real {
		s.CR0 |= CR0PE
	}
	p := m.Paging()
	if p.Levels > 0 {
		s.CR0 |= CR0PG | CR0WP
	}
	if p.PSE {
		s.CR4 |= CR4PSE
	}
	if p.Levels > 2 {
		s.CR4 |= CR4PAE
	}
	if p.Levels > 3 {
		s.EFER = EFERSCE | EFERLME | EFERLMA
		s.CS.Selector, s.CS.L, s.CS.DB = Code64, 1, 0
	}
	if p.Levels > 4 {
		s.CR4 |= CR4LA57
	}
	if m == Real {
		s.IDT = Table{Limit: 0x3ff}
		for _, d := range []*Segment{&s.CS, &s.DS, &s.ES, &s.FS, &s.GS, &s.SS} {
			*d = Segment{Limit: 0xffff, Type: 3, Present: 1, S: 1}
		}
		s.CS.Type, s.CS.Selector, s.CS.Base = 11, RealBase>>4, RealBase
		r.RIP -= RealBase
	}
	if err := v.SetSRegs(s); err != nil {
		return fmt.Errorf("%v mode: %w", m, err)
	}
	return v.SetRegs(r)
}

// EnterUser puts a vCPU that is in long mode at CPL 0 to CPL 3.
func (v *VCPU) EnterUser() error {
	s, err := v.SRegs()
	if err != nil {
		return err
	}
	s.CS.Selector, s.CS.DPL = Code64User, 3
	for _, d := range []*Segment{&s.DS, &s.ES, &s.FS, &s.GS, &s.SS} {
		d.flat(UserData, 0, 3)
	}
	return v.SetSRegs(s)
}

// EnableX2APIC switches the vCPU's APIC to x2APIC mode and on: its registers
// are MSRs then. The VM must have an irqchip.
func (v *VCPU) EnableX2APIC() error {
	s, err := v.SRegs()
	if err != nil {
		return err
	}
	// IA32_APIC_BASE: bit 11 enables, bit 10 is x2APIC mode.
	s.APICBase |= 1<<11 | 1<<10
	if err := v.SetSRegs(s); err != nil {
		return fmt.Errorf("x2APIC: %w", err)
	}
	return v.SetMSRs(MSR{Index: MSRX2APICSpurious, Value: 0x1ff})
}
