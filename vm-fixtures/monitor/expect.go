// SPDX-License-Identifier: MIT

package monitor

import (
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// Attacks are all attack modules of package attacks.
var Attacks = []string{"syscall_redirect", "idt_redirect", "gdt_callgate", "lstar_redirect", "cr0_wp", "cr4_protection"}

// bits of control registers that attacks clear, as findings name them.
var bits = []struct {
	object, name string
	bit          uint64
}{
	{"cr0", "CR0.WP", 1 << 16},
	{"cr4", "CR4.SMEP", 1 << 20},
	{"cr4", "CR4.SMAP", 1 << 21},
}

// Expected is what a finding has to say of a change.
type Expected struct {
	Object   string
	VCPU     int // -1: none
	Entry    int // -1: none
	Name     string
	Old, New uint64
	// OldSymbol is what the honest kernel has there; empty: no address.
	OldSymbol string
}

// Expect says what has to be found of the changes that an attack made.
func Expect(changes []guest.Change) []Expected {
	var all []Expected
	for _, c := range changes {
		e := Expected{Object: c.Object, VCPU: c.CPU, Entry: c.Entry, Old: c.Old, New: c.New}
		switch c.Object {
		case "sys_call_table":
			if c.Entry == 217 {
				e.OldSymbol = "__x64_sys_getdents64"
			}
		case "idt":
			if c.Entry == 14 {
				e.OldSymbol = "asm_exc_page_fault"
			}
		case "lstar":
			e.OldSymbol = "entry_SYSCALL_64"
		case "cr0", "cr4":
			for _, b := range bits {
				if b.object == c.Object && (c.Old^c.New)&b.bit != 0 {
					e.Name, e.Old, e.New = b.name, c.Old&b.bit/b.bit, c.New&b.bit/b.bit
					all = append(all, e)
				}
			}
			continue
		}
		all = append(all, e)
	}
	return all
}

// Same says whether a finding is about what is expected.
func (e Expected) Same(f integrity.Finding) bool {
	return f.Object == e.Object &&
		(e.VCPU < 0 || f.VCPU != nil && int(*f.VCPU) == e.VCPU) &&
		(e.Entry < 0 || f.Entry != nil && *f.Entry == e.Entry) &&
		(e.Name == "" || f.Name == e.Name)
}

// Check returns an error unless a finding of a change says all that it has to.
func (e Expected) Check(f integrity.Finding) error {
	switch {
	case f.New == nil || uint64(f.New.Value) != e.New:
		return fmt.Errorf("new value %+v, want %#x", f.New, e.New)
	case f.Kind == integrity.KindInvariant:
		if f.Reason == "" {
			return fmt.Errorf("no reason why an honest kernel has no such value")
		}
		return nil
	case f.Kind != integrity.KindChanged:
		return fmt.Errorf("kind %s", f.Kind)
	case f.Old == nil || uint64(f.Old.Value) != e.Old:
		return fmt.Errorf("old value %+v, want %#x", f.Old, e.Old)
	case e.OldSymbol != "" && f.Old.Symbol != e.OldSymbol:
		return fmt.Errorf("old symbol %q, want %q", f.Old.Symbol, e.OldSymbol)
	case f.Message == "":
		return fmt.Errorf("no message")
	}
	return nil
}
