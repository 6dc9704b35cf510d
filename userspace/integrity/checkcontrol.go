// SPDX-License-Identifier: MIT

package integrity

import (
	"encoding/binary"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// ControlCheck watches the bits of CR0, CR4 and EFER that guard the kernel and
// that Linux sets once and for all: write protection, SMEP, SMAP, and so on. A
// bit that the guest's processor lacks is no finding: what a guest has is told
// by what its kernel pinned (cr4_pinned_bits, since 5.3), and without symbols
// by the other vCPUs and by what was seen before.
type ControlCheck struct{}

// Name implements Check.
func (ControlCheck) Name() string { return checkControl }

const symbolPinned = "cr4_pinned_bits"

// Objects implements Check.
func (ControlCheck) Objects(g *Guest) []Object {
	var objects []Object
	for _, cpu := range g.CPUs {
		objects = append(objects, Object{
			Name: "control", VCPU: ref(cpu.ID), CPU: cpu.ID,
			Items: func(g *Guest, cpu *kvmaccess.VCPU, _ []byte, _ error) []Item { return controlItems(g, cpu) },
		})
	}
	if at, ok := g.pinnedAt(); ok && len(g.CPUs) > 0 {
		objects = append(objects, Object{
			Name: symbolPinned, CPU: g.CPUs[0].ID,
			Memory: kvmaccess.Range{Address: at, Length: uint32(pointerSize(g))},
			Items:  pinnedItems,
		})
	}
	return objects
}

// pinnedAt is where the guest's kernel keeps what it pinned.
func (g *Guest) pinnedAt() (uint64, bool) {
	if g.Image == nil {
		return 0, false
	}
	at, ok := g.Image.Lookup(symbolPinned)
	return at, ok && g.Mode.Kernel(at)
}

// cr4Bits are those that Linux pins (cr4_pinned_mask in
// arch/x86/kernel/cpu/common.c).
var cr4Bits = []struct {
	name string
	bit  uint64
}{
	{"SMEP", guest.CR4SMEP},
	{"SMAP", guest.CR4SMAP},
	{"UMIP", guest.CR4UMIP},
	{"FSGSBASE", guest.CR4FSGSBASE},
	{"CET", guest.CR4CET},
}

func controlItems(g *Guest, cpu *kvmaccess.VCPU) []Item {
	item := func(object, name string, value, bit uint64, fault string) Item {
		it := Item{Check: checkControl, Object: object, VCPU: ref(cpu.ID), Name: name, Flag: true}
		if value&bit != 0 {
			it.Value.Value = 1
		} else if g.Linux {
			it.Fault = fault
		}
		return it
	}
	items := []Item{
		item("cr0", "CR0.WP", cpu.CR0, guest.CR0WP, "the kernel can write its read-only memory"),
	}
	for _, b := range cr4Bits {
		items = append(items, item("cr4", "CR4."+b.name, cpu.CR4, b.bit, g.missing(b.bit)))
	}
	if cpu.Flags&kvmaccess.VCPUPartial != 0 {
		return items // a dump that lacks EFER
	}
	// EFER.NXE is not there to be expected: without it a guest that uses
	// bit 63 of page-table entries does not get far.
	items = append(items, item("efer", "EFER.NXE", cpu.EFER, guest.EFERNXE, ""))
	if g.Mode.Long() {
		items = append(items, item("efer", "EFER.SCE", cpu.EFER, guest.EFERSCE, "64-bit Linux has system calls"))
	}
	return items
}

// missing says why the bit should be set in CR4; empty: it need not.
func (g *Guest) missing(bit uint64) string {
	if g.HavePinned {
		if g.Pinned&bit != 0 {
			return "the guest's kernel pinned it"
		}
		return ""
	}
	for _, cpu := range g.CPUs {
		if cpu.CR4&bit != 0 {
			return "other vCPUs have it set"
		}
	}
	return ""
}

func pinnedItems(g *Guest, _ *kvmaccess.VCPU, data []byte, err error) []Item {
	if data == nil {
		return []Item{unreadable(checkControl, symbolPinned, nil, err)}
	}
	pinned := uint64(0)
	if len(data) == 8 {
		pinned = binary.LittleEndian.Uint64(data)
	} else {
		pinned = uint64(binary.LittleEndian.Uint32(data))
	}
	var items []Item
	for _, b := range cr4Bits {
		it := Item{Check: checkControl, Object: symbolPinned, Name: symbolPinned + "." + b.name, Flag: true}
		if pinned&b.bit != 0 {
			it.Value.Value = 1
		}
		items = append(items, it)
	}
	return items
}
