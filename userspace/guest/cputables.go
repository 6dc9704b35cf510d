// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
)

// CPUTables are the tables by which one CPU of the guest is told what to do on
// interrupts and changes of privilege.
type CPUTables struct {
	CPU  int          `json:"cpu"`  // as the guest's kernel numbers it
	VCPU int          `json:"vcpu"` // index into Kernel.CPUs; -1: its registers are not known
	GDT  CPUTable     `json:"gdt"`
	GDTs []Descriptor `json:"descriptors"`
	TSS  CPUTable     `json:"tss"`
	// SP0 is the stack on an interrupt of a program, and IST those that gates
	// ask for by number, the first one has index 0.
	SP0 Stack    `json:"sp0"`
	IST [7]Stack `json:"ist"`
}

// CPUTable is where a table lies, by the CPU's register or, of a CPU whose
// registers are not known, by the kernel's variables.
type CPUTable struct {
	Base  uint64   `json:"base"`
	Limit uint32   `json:"limit"`          // bytes - 1
	Want  []uint64 `json:"want,omitempty"` // where an honest kernel has it; empty: not known
}

// Fits says whether the table is where an honest kernel has it, as far as that
// is known.
func (t CPUTable) Fits() bool {
	for _, want := range t.Want {
		if t.Base == want {
			return true
		}
	}
	return len(t.Want) == 0
}

// Stack is an address of a stack's end in a TSS.
type Stack struct {
	Name    string `json:"name,omitempty"` // "DF", "NMI", "DB", "MCE", "VC"
	Address uint64 `json:"address"`
	Want    uint64 `json:"want,omitempty"` // where an honest kernel has it; 0: not known, or unused
}

// istNames are the stacks by their number - 1 (IST_INDEX_* in
// arch/x86/include/asm/page_64_types.h).
var istNames = [...]string{"DF", "NMI", "DB", "MCE", "VC"}

// maxGDT bounds what is read of a GDT, in bytes: Linux has 16 entries, and a
// table fills a page at most.
const maxGDT = 4096

// CPUTables reads the GDT and the TSS of each CPU that is online, by its
// registers where these are known. If one is damaged the error is an
// *ObjectError, or several, and what could be read is returned all the same.
func (k *Kernel) CPUTables(ctx context.Context) ([]CPUTables, error) {
	k = k.View()
	cpus, err := k.OnlineCPUs(ctx)
	if err != nil {
		return nil, err
	}
	offsets, err := k.cpuOffsets(ctx)
	if err != nil {
		return nil, err
	}
	vcpus := map[int]int{}
	var errs []error
	for i := range k.CPUs {
		cpu, err := k.linuxCPU(i, offsets)
		if err != nil {
			errs = bounded(errs, err)
			continue
		}
		vcpus[cpu] = i
	}
	var all []CPUTables
	for _, cpu := range cpus {
		t := CPUTables{CPU: cpu, VCPU: -1}
		if i, ok := vcpus[cpu]; ok {
			t.VCPU = i
		}
		errs = bounded(errs, k.cpuTables(ctx, &t))
		all = append(all, t)
	}
	return all, errors.Join(errs...)
}

func (k *Kernel) cpuTables(ctx context.Context, t *CPUTables) error {
	own, err := k.PerCPU(ctx, "gdt_page", t.CPU)
	if err != nil {
		return err
	}
	tss, err := k.PerCPU(ctx, "cpu_tss_rw", t.CPU)
	if err != nil {
		return err
	}
	area, noArea := k.entryArea(ctx, t.CPU)
	t.GDT.Want, t.TSS.Want = []uint64{own}, nil
	if noArea == nil {
		gdt, err1 := area.Addr("gdt")
		at, err2 := area.Addr("tss.x86_tss")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		t.GDT.Want, t.TSS.Want = append(t.GDT.Want, gdt), []uint64{at}
	}
	hw, err := k.offset("tss_struct", "x86_tss")
	if err != nil {
		return err
	}
	// The entry area maps the CPU's own tables; writes go to these.
	t.GDT.Base, t.TSS.Base = own, tss+hw
	if s, err := k.Types.Struct("x86_hw_tss"); err == nil {
		t.TSS.Limit = s.Size - 1
	}
	if f, err := k.field("gdt_page", "gdt"); err == nil {
		t.GDT.Limit = min(f.Size, maxGDT) - 1
	}
	if t.VCPU >= 0 {
		state := &k.CPUs[t.VCPU]
		t.GDT.Base, t.GDT.Limit = state.GDTR.Base, uint32(state.GDTR.Limit)
		t.TSS.Base, t.TSS.Limit = state.TR.Base, state.TR.Limit
	} else {
		t.GDT.Want, t.TSS.Want = nil, nil
	}
	raw := make([]byte, min(t.GDT.Limit+1, maxGDT))
	if err := k.Space.Read(ctx, t.GDT.Base, raw); err != nil {
		return &ObjectError{fmt.Sprintf("GDT of CPU %d", t.CPU), t.GDT.Base, err}
	}
	t.GDTs = ParseGDT(raw, true)
	return errors.Join(k.stacks(ctx, t, area), noArea)
}

func (k *Kernel) field(typeName, path string) (Field, error) {
	s, err := k.Types.Struct(typeName)
	if err != nil {
		return Field{}, err
	}
	return s.Field(path)
}

// entryArea is the layout of a CPU's entry area where it lies. Since it is
// placed at random (6.2) only the pointer to its stacks says where.
func (k *Kernel) entryArea(ctx context.Context, cpu int) (*Object, error) {
	at, err := k.PerCPU(ctx, "cea_exception_stacks", cpu)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("cea_exception_stacks of CPU %d", cpu)
	stacks, err := k.Space.Pointer(ctx, at)
	if err != nil {
		return nil, &ObjectError{name, at, err}
	}
	s, err := k.Types.Struct("cpu_entry_area")
	if err != nil {
		return nil, &ObjectError{name, at, err}
	}
	f, err := s.Field("estacks")
	if err != nil {
		return nil, &ObjectError{name, at, err}
	}
	area := stacks - uint64(f.Offset)
	if area < cpuEntryArea || area >= cpuEntryAreaEnd || area%4096 != 0 {
		return nil, &ObjectError{name, at, fmt.Errorf("%#x is not in the CPU entry area", area)}
	}
	return &Object{Struct: s, Address: area}, nil // nothing of it is read
}

// Where x86-64 Linux has what CPUs need to enter the kernel
// (CPU_ENTRY_AREA_BASE in arch/x86/include/asm/pgtable_64_types.h).
const (
	cpuEntryArea    = 0xfffffe0000000000
	cpuEntryAreaEnd = 0xfffffe8000000000
)

// stacks reads those of the TSS, and tells where they should be.
func (k *Kernel) stacks(ctx context.Context, t *CPUTables, area *Object) error {
	tss, err := k.Object(ctx, "x86_hw_tss", t.TSS.Base)
	if err != nil {
		return err
	}
	if t.SP0.Address, err = tss.Uint("sp0"); err != nil {
		return err
	}
	for i := range t.IST {
		if t.IST[i].Address, err = tss.Uint(fmt.Sprintf("ist[%d]", i)); err != nil {
			return err
		}
	}
	if area == nil {
		return nil
	}
	end := func(path string) uint64 {
		f, err := area.Struct.Field(path)
		if err != nil {
			return 0
		}
		return area.Address + uint64(f.Offset) + uint64(f.Size)
	}
	t.SP0.Want = end("entry_stack_page.stack")
	for i, name := range istNames {
		t.IST[i].Name, t.IST[i].Want = name, end("estacks."+name+"_stack")
	}
	return nil
}

// Vector is a gate of an IDT with what its handler is.
type Vector struct {
	Gate
	Symbol string   `json:"symbol,omitempty"` // of the handler: "name" or "name+0x10 [module]"
	Want   []string `json:"want,omitempty"`   // what an honest kernel may have there; empty: see Handlers
}

// Interrupts reads the IDT of a vCPU, an index into CPUs, or with -1 the one
// that the kernel's symbols lead to. The error is an *ObjectError.
func (k *Kernel) Interrupts(ctx context.Context, vcpu int) (CPUTable, []Vector, error) {
	var t CPUTable
	own, err := k.symbol("idt_table")
	if err != nil {
		return t, nil, err
	}
	const whole = 256*16 - 1
	t.Base, t.Limit = own, whole
	name := "IDT"
	if vcpu >= 0 {
		if vcpu >= len(k.CPUs) {
			return t, nil, fmt.Errorf("vCPU %d: the guest has %d", vcpu, len(k.CPUs))
		}
		state := &k.CPUs[vcpu]
		t.Base, t.Limit = state.IDTR.Base, uint32(state.IDTR.Limit)
		t.Want = []uint64{own, cpuEntryArea} // CPU_ENTRY_AREA_RO_IDT
		name = fmt.Sprintf("IDT of vCPU %d", state.ID)
	}
	raw := make([]byte, min(t.Limit, whole)+1)
	if err := k.Space.Read(ctx, t.Base, raw); err != nil {
		return t, nil, &ObjectError{name, t.Base, err}
	}
	gates := ParseIDT(raw, true)
	all := make([]Vector, len(gates))
	for i, g := range gates {
		all[i] = Vector{Gate: g, Want: Handlers(g.Vector)}
		if g.Present {
			all[i].Symbol = k.Image.Name(g.Handler)
		}
	}
	return t, all, nil
}
