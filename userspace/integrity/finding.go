// SPDX-License-Identifier: MIT

package integrity

import (
	"fmt"
	"strconv"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Hex is a 64-bit value that reads and writes as "0x..." in JSON: programs
// that hold JSON numbers as floating point lose the low bits of an address.
type Hex uint64

// String gives the value as 0x and up to 16 digits.
func (h Hex) String() string { return fmt.Sprintf("%#x", uint64(h)) }

// MarshalText implements encoding.TextMarshaler.
func (h Hex) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText takes decimal, or hexadecimal after 0x.
func (h *Hex) UnmarshalText(p []byte) error {
	v, err := strconv.ParseUint(string(p), 0, 64)
	if err != nil {
		return fmt.Errorf("%q is no 64-bit number: write it as 0x followed by hexadecimal digits", p)
	}
	*h = Hex(v)
	return nil
}

// VM is how findings name a guest.
type VM struct {
	ID   kvmaccess.VMID `json:"id"`
	Name string         `json:"name,omitempty"` // from the VMM; empty: it gives none
	UUID string         `json:"uuid,omitempty"`
	PID  int            `json:"pid"` // of the VMM
}

// String gives the name, or "#" and the id of a guest without one.
func (v VM) String() string {
	if v.Name != "" {
		return v.Name
	}
	return "#" + strconv.FormatUint(uint64(v.ID), 10)
}

// Kind says why there is a finding.
type Kind string

const (
	// KindChanged: the value is not the baseline's any more.
	KindChanged Kind = "changed"
	// KindInvariant: an honest kernel never has this value, whether or not it
	// ever was another one.
	KindInvariant Kind = "invariant"
	// KindCleared: an earlier finding does not hold any more.
	KindCleared Kind = "cleared"
	// KindRestarted: the guest runs another kernel, or the same one at another
	// place; what is watched was taken anew.
	KindRestarted Kind = "restarted"
)

// Value is one side of a change.
type Value struct {
	Value  Hex    `json:"value"`            // a handler's address, a register, a descriptor; of memory the first up to 8 bytes, little-endian
	Symbol string `json:"symbol,omitempty"` // name, or name+0xoffset, of an address
	Module string `json:"module,omitempty"` // kernel module that the symbol belongs to
	Detail string `json:"detail,omitempty"` // the rest in words: a gate's type, DPL and so on; of memory all bytes in hexadecimal
}

// Finding is one thing about one guest that is not as it was, or not as an
// honest kernel has it.
type Finding struct {
	Time    time.Time `json:"time"`
	VM      VM        `json:"vm"`
	VCPU    *uint32   `json:"vcpu,omitempty"` // nil: the object is not a vCPU's own
	Check   string    `json:"check"`          // Check.Name of the check that found it
	Object  string    `json:"object"`         // sys_call_table, idt, gdt, lstar, cr0, ...
	Entry   *int      `json:"entry,omitempty"`
	Name    string    `json:"name,omitempty"` // of the entry: execve, page fault, WP, ...
	Kind    Kind      `json:"kind"`
	Old     *Value    `json:"old,omitempty"` // the baseline's; nil: there was none
	New     *Value    `json:"new,omitempty"`
	Reason  string    `json:"reason,omitempty"` // why an honest kernel does not have the new value; empty: it may
	Message string    `json:"message"`
	More    int       `json:"more,omitempty"` // findings of this tick that follow in the next ones
}

// Key names what the finding is about; a later finding about the same, the
// one that clears it included, has the same key. Keys are unique within a VM.
func (f Finding) Key() string {
	s := f.Check + "/" + f.Object
	if f.VCPU != nil {
		s = fmt.Sprintf("%s@%d", s, *f.VCPU)
	}
	if f.Entry != nil {
		s = fmt.Sprintf("%s/%d", s, *f.Entry)
	}
	if f.Name != "" && f.Entry == nil {
		s += "/" + f.Name
	}
	return s
}
