// SPDX-License-Identifier: MIT

package integrity

import "fmt"

// Item is one watched entry of an object, as it is at one time. A Baseline is
// made of them.
type Item struct {
	Check  string  `json:"check"`
	Object string  `json:"object"`
	VCPU   *uint32 `json:"vcpu,omitempty"` // nil: the object is not a vCPU's own
	Entry  *int    `json:"entry,omitempty"`
	Name   string  `json:"name,omitempty"`

	Value Value `json:"value"`
	// Raw is what else than Value.Value must stay as it is.
	Raw string `json:"raw,omitempty"`
	// Scope says how far the item is the same.
	Scope Scope `json:"scope,omitempty"`
	// Flag marks a single bit: gaining it is no finding, losing it is.
	Flag bool `json:"flag,omitempty"`
	// Fault says why an honest kernel does not have this value; empty: it may.
	Fault string `json:"fault,omitempty"`
}

// Scope says what an item's value keeps its meaning across.
type Scope string

const (
	ScopeAlways Scope = ""      // it is the same after each boot
	ScopeImage  Scope = "image" // it moves with the kernel image
	ScopeBoot   Scope = "boot"  // each boot has its own
)

// itemKey identifies an item within a VM.
type itemKey struct {
	check, object string
	vcpu          int64 // -1: none
	entry         int   // -1: none
	name          string
}

func (it *Item) key() itemKey {
	k := itemKey{it.Check, it.Object, -1, -1, ""}
	if it.VCPU != nil {
		k.vcpu = int64(*it.VCPU)
	}
	if it.Entry != nil {
		k.entry = *it.Entry
	} else {
		k.name = it.Name
	}
	return k
}

// same says whether the item is what base is, base being of a kernel whose
// image lay delta bytes lower.
func (it *Item) same(base *Item, delta uint64) bool {
	old := base.Value.Value
	if base.Scope == ScopeImage && old != 0 {
		old += Hex(delta)
	}
	if it.Raw == partRaw || base.Raw == partRaw {
		return true
	}
	if it.Flag && base.Flag {
		return it.Value.Value >= old
	}
	return it.Value.Value == old && it.Raw == base.Raw
}

// subject names the item as a sentence about the guest begins.
func (it *Item) subject(vm VM) string {
	of := "guest " + vm.String()
	if it.VCPU != nil {
		of = fmt.Sprintf("vCPU %d of %s", *it.VCPU, of)
	}
	name := it.Object
	if it.Entry != nil {
		name = fmt.Sprintf("%s entry %d", it.Object, *it.Entry)
		switch it.Check {
		case checkSyscalls:
			name = fmt.Sprintf("system call %d", *it.Entry)
			if it.Object != tableSyscalls {
				name += " in " + it.Object
			}
		case checkIDT:
			name = fmt.Sprintf("IDT gate %d", *it.Entry)
		case checkGDT:
			name = fmt.Sprintf("GDT entry %d", *it.Entry)
		}
		if it.Name != "" {
			name += " (" + it.Name + ")"
		}
	} else if it.Check == checkMemory {
		name = "memory " + it.Object
	} else if it.Check == checkText {
		name = "kernel " + it.Object
	} else if it.Name != "" {
		name = it.Name
	}
	return name + " of " + of
}

// verb is how a sentence goes on from the subject to the value.
func (it *Item) verb() string {
	if it.Scope == ScopeImage {
		return "points to"
	}
	return "is"
}

// text describes a value: address and symbol, or what stands for them, with
// full and what else there is to say.
func (v *Value) text(it *Item, full bool) string {
	switch {
	case v.Detail == "unreadable", v.Detail == "absent":
		return v.Detail
	case it.Flag && v.Value == 0:
		return "clear"
	case it.Flag:
		return "set"
	case it.Check == checkGDT && it.Entry != nil, it.Check == checkMemory, it.Check == checkKernel, it.Check == checkText:
		return v.Detail
	}
	s := v.Value.String()
	if v.Symbol != "" {
		s += " " + v.Symbol
		if v.Module != "" {
			s += " [" + v.Module + "]"
		}
	}
	if v.Detail != "" && full {
		s += " (" + v.Detail + ")"
	}
	return s
}
