// SPDX-License-Identifier: MIT

// Package integrity finds out from outside whether a guest's kernel is as it
// was and as an honest kernel is.
//
// Checks turn what is watched into items, one for each entry; a Monitor reads
// the guest, compares bytes, and only where these differ from what it saw last
// has the items made anew and compared with the baseline.
package integrity

import (
	"fmt"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Check watches one kind of object of a guest.
type Check interface {
	// Name is what findings call the check.
	Name() string
	// Objects lists what there is to watch in the guest as it is now.
	Objects(g *Guest) []Object
}

// Names of the checks.
const (
	checkSyscalls = "syscalls"
	checkIDT      = "idt"
	checkGDT      = "gdt"
	checkMSR      = "msr"
	checkControl  = "control"
	checkMemory   = "memory"
	checkKernel   = "kernel"
	checkText     = "text"
)

// Checks returns all checks.
func Checks() []Check {
	return []Check{SyscallCheck{}, IDTCheck{}, GDTCheck{}, MSRCheck{}, ControlCheck{}, MemoryCheck{}, KernelCheck{}, TextCheck{}}
}

// CheckByName finds one of Checks.
func CheckByName(name string) (Check, error) {
	var names []string
	for _, c := range Checks() {
		if c.Name() == name {
			return c, nil
		}
		names = append(names, c.Name())
	}
	return nil, fmt.Errorf("no check is called %q: there are %s", name, strings.Join(names, ", "))
}

// Object is a table, a register set or a stretch of memory.
type Object struct {
	Name string
	VCPU *uint32 // whose it is; nil: the guest's
	// CPU is the vCPU whose registers the items are made of or read with.
	CPU uint32
	// Memory is what to read, guest-virtual; of Length 0 the object consists
	// of registers only.
	Memory kvmaccess.Range
	// Volatile is the part of Memory, in bytes from its start, that changes as
	// programs come and go; empty: none does.
	Volatile guest.Extent
	// Items decodes. data has Memory.Length bytes, or is nil if it could not
	// be read, for the reason err.
	Items func(g *Guest, cpu *kvmaccess.VCPU, data []byte, err error) []Item
	// Changed makes those of the items of now that are not what they were in
	// old, the Memory that they were made of last; false: it cannot tell which
	// these are. nil: Items makes all of them.
	Changed func(g *Guest, old, now []byte) ([]Item, bool)
}

// Guest is what checks know of the VM.
type Guest struct {
	VM    VM
	Mode  guest.Mode
	Image *guest.Image // nil: no symbols
	// Kernel is what was found in the guest's memory; nil: it was not, or the
	// symbols come out of a file.
	Kernel *guest.Kernel
	// Doubts are why some of what the kernel says of itself is wrong.
	Doubts []guest.Doubt
	// Code is the kernel's code as it was looked at last; nil: it was not.
	Code *Code
	// Text is the kernel image's code; empty: unknown.
	Text guest.Extent
	// Linux says whether the guest looks like one; nothing is expected of
	// other kernels.
	Linux  bool
	CPUs   []*kvmaccess.VCPU // that run the kernel, by id
	Ranges []MemoryRange     // with addresses resolved
	// IDT is the table that most vCPUs use.
	IDT kvmaccess.TableRegister
	// Pinned are the bits of CR4 that the guest's kernel itself holds to be
	// set for good; valid if HavePinned.
	Pinned     uint64
	HavePinned bool
	// modules takes up what Image is to say of an address outside of the kernel,
	// before it is asked; nil: it is known.
	modules func(addr uint64)
}

// notLinux is what there is to say of a guest of which nothing is expected.
const notLinux = "the guest does not look like Linux: it is compared with the baseline only"

// value describes a running address.
func (g *Guest) value(addr uint64) Value {
	v := Value{Value: Hex(addr)}
	if g.Image == nil {
		return v
	}
	if g.modules != nil && g.Mode.Kernel(addr) && !g.Image.Contains(addr) {
		g.modules(addr)
	}
	all, offset := g.Image.At(addr)
	if len(all) == 0 {
		return v
	}
	v.Symbol, v.Module = all[0].Name, all[0].Module
	if offset != 0 {
		v.Symbol = fmt.Sprintf("%s+%#x", v.Symbol, offset)
	}
	return v
}

// outside says why addr is no place for the kernel's code; empty: it is one.
func (g *Guest) outside(addr uint64) string {
	switch {
	case !g.Linux:
		return ""
	case !g.Mode.Canonical(addr):
		return "not a canonical address"
	case !g.Mode.Kernel(addr):
		return "not a kernel address"
	case g.Text.End != 0 && !g.Text.Contains(addr):
		return "outside kernel text"
	}
	return ""
}

// expect gives the value of a running address that must be, exactly, one of
// the named symbols, and why it is wrong.
func (g *Guest) expect(addr uint64, names ...string) (Value, string) {
	v := g.value(addr)
	if fault := g.outside(addr); fault != "" {
		return v, fault
	}
	if g.Image == nil || len(names) == 0 {
		return v, ""
	}
	known := false
	for _, name := range names {
		if at, ok := g.Image.Lookup(name); ok {
			known = true
			if at == addr {
				v.Symbol = name
				return v, ""
			}
		}
	}
	if !known {
		return v, ""
	}
	return v, "not " + names[0]
}

func ref[T any](v T) *T { return &v }
