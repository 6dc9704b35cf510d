// SPDX-License-Identifier: MIT

package integrity

import (
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// MemoryRange is guest memory of which no byte may change.
type MemoryRange struct {
	Name    string `json:"name,omitempty" yaml:"name,omitempty"`       // what findings call it; default: its symbol or address
	Symbol  string `json:"symbol,omitempty" yaml:"symbol,omitempty"`   // where it starts, instead of Address
	Address Hex    `json:"address,omitempty" yaml:"address,omitempty"` // guest-virtual
	Length  uint32 `json:"length" yaml:"length"`                       // bytes, 1 to kvmaccess.MaxBytes
}

// symbolEntry is the one symbol of a MemoryRange that needs no symbol file:
// LSTAR tells where it is.
const symbolEntry = "entry_SYSCALL_64"

// maxRanges bounds the ranges of a Monitor, and maxRangeBytes their sum.
const (
	maxRanges     = 256
	maxRangeBytes = 1 << 20
)

func checkRanges(ranges []MemoryRange) error {
	if len(ranges) > maxRanges {
		return fmt.Errorf("%d memory ranges, at most %d can be watched", len(ranges), maxRanges)
	}
	names := map[string]bool{}
	total := uint64(0)
	for i := range ranges {
		r := &ranges[i]
		switch {
		case r.Length == 0 || r.Length > kvmaccess.MaxBytes:
			return fmt.Errorf("memory range %s: length %d, 1 to %d bytes can be watched", r.name(), r.Length, kvmaccess.MaxBytes)
		case r.Symbol == "" && r.Address == 0:
			return errors.New("a memory range needs a symbol or an address")
		case r.Symbol != "" && r.Address != 0:
			return fmt.Errorf("memory range %s: give a symbol or an address, not both", r.name())
		case names[r.name()]:
			return fmt.Errorf("memory range %s is there twice", r.name())
		}
		names[r.name()] = true
		total += uint64(r.Length)
	}
	if total > maxRangeBytes {
		return fmt.Errorf("memory ranges of %d bytes, at most %d can be watched", total, maxRangeBytes)
	}
	return nil
}

func (r *MemoryRange) name() string {
	switch {
	case r.Name != "":
		return r.Name
	case r.Symbol != "":
		return r.Symbol
	}
	return r.Address.String()
}

// MemoryCheck watches the bytes of Options.Ranges.
type MemoryCheck struct{}

// Name implements Check.
func (MemoryCheck) Name() string { return checkMemory }

// Objects implements Check.
func (MemoryCheck) Objects(g *Guest) []Object {
	if len(g.CPUs) == 0 {
		return nil
	}
	var objects []Object
	for _, r := range g.Ranges {
		if !g.Mode.Canonical(uint64(r.Address)) || !g.Mode.Canonical(uint64(r.Address)+uint64(r.Length)-1) {
			continue
		}
		objects = append(objects, Object{
			Name: r.name(), CPU: g.CPUs[0].ID,
			Memory: kvmaccess.Range{Address: uint64(r.Address), Length: r.Length},
			Items: func(_ *Guest, _ *kvmaccess.VCPU, data []byte, err error) []Item {
				return memoryItems(r, data, err)
			},
		})
	}
	return objects
}

func memoryItems(r MemoryRange, data []byte, err error) []Item {
	it := Item{Check: checkMemory, Object: r.name(), Scope: ScopeBoot}
	if data == nil {
		it.Value.Detail, it.Raw = "unreadable", "unreadable"
		it.Fault = fmt.Sprintf("it cannot be read: %v", err)
		return []Item{it}
	}
	it.Raw = hex.EncodeToString(data)
	it.Value = Value{Value: r.Address, Detail: fmt.Sprintf("%d bytes at %v", len(data), r.Address)}
	return []Item{it}
}

// explainMemory replaces the values of a changed range by the first bytes that
// differ and returns how many do, of how many, from which address on.
func explainMemory(old, now Item) (oldV, newV Value, where string) {
	oldV, newV = old.Value, now.Value
	a, err1 := hex.DecodeString(old.Raw)
	b, err2 := hex.DecodeString(now.Raw)
	if err1 != nil || err2 != nil || len(a) != len(b) {
		return oldV, newV, ""
	}
	first, n := -1, 0
	for i := range a {
		if a[i] != b[i] {
			if first < 0 {
				first = i
			}
			n++
		}
	}
	if first < 0 {
		return oldV, newV, ""
	}
	end := min(first+16, len(a))
	side := func(p []byte) Value {
		v := Value{Detail: hex.EncodeToString(p[first:end])}
		for i := range min(8, end-first) {
			v.Value |= Hex(p[first+i]) << (8 * i)
		}
		return v
	}
	at := now.Value.Value + Hex(first)
	return side(a), side(b), fmt.Sprintf("%d of %d bytes differ, from %v on", n, len(a), at)
}
