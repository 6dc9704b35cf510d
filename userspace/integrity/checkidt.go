// SPDX-License-Identifier: MIT

package integrity

import (
	"fmt"
	"slices"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// IDTCheck watches the interrupt descriptor table, and each vCPU's register
// that says where it is.
type IDTCheck struct{}

// Name implements Check.
func (IDTCheck) Name() string { return checkIDT }

// Objects implements Check: one table for all vCPUs that share it, one more
// for each vCPU that has another.
func (IDTCheck) Objects(g *Guest) []Object {
	var objects []Object
	for i, cpu := range g.CPUs {
		objects = append(objects, Object{
			Name: "idtr", VCPU: ref(cpu.ID), CPU: cpu.ID,
			Items: func(g *Guest, cpu *kvmaccess.VCPU, _ []byte, _ error) []Item { return idtrItems(g, cpu) },
		})
		var vcpu *uint32
		if cpu.IDTR != g.IDT {
			vcpu = ref(cpu.ID)
		} else if first := firstWith(g, g.IDT); first != i {
			continue
		}
		if !g.Mode.Canonical(cpu.IDTR.Base) {
			continue // the register's item says so
		}
		objects = append(objects, Object{
			Name: "idt", VCPU: vcpu, CPU: cpu.ID,
			Memory: kvmaccess.Range{Address: cpu.IDTR.Base, Length: idtLength(g, cpu.IDTR)},
			Items: func(g *Guest, _ *kvmaccess.VCPU, data []byte, err error) []Item {
				return idtItems(g, vcpu, data, err)
			},
			Changed: func(g *Guest, old, now []byte) ([]Item, bool) { return changedGates(g, vcpu, old, now) },
		})
	}
	return objects
}

func firstWith(g *Guest, idt kvmaccess.TableRegister) int {
	for i, cpu := range g.CPUs {
		if cpu.IDTR == idt {
			return i
		}
	}
	return -1
}

// idtLength is how much of a table the processor ever looks at.
func idtLength(g *Guest, r kvmaccess.TableRegister) uint32 {
	return min(uint32(r.Limit)+1, uint32(256*guest.GateSize(g.Mode.Long())))
}

// idtrItems: Linux maps the table read-only at a fixed place of its own
// (CPU_ENTRY_AREA_RO_IDT, since 4.15), the same for all CPUs.
func idtrItems(g *Guest, cpu *kvmaccess.VCPU) []Item {
	it := Item{Check: checkIDT, Object: "idtr", VCPU: ref(cpu.ID), Name: "IDTR", Scope: ScopeBoot}
	it.Value = g.value(cpu.IDTR.Base)
	it.Value.Detail = fmt.Sprintf("limit %#x", cpu.IDTR.Limit)
	it.Raw = it.Value.Detail
	if g.Mode.Long() {
		it.Scope = ScopeAlways
	}
	switch {
	case !g.Linux:
	case !g.Mode.Kernel(cpu.IDTR.Base):
		it.Fault = "not a kernel address"
	case int(cpu.IDTR.Limit)+1 != 256*guest.GateSize(g.Mode.Long()):
		it.Fault = fmt.Sprintf("the limit is not that of 256 gates, %#x", 256*guest.GateSize(g.Mode.Long())-1)
	case g.entryArea() && cpu.IDTR.Base != entryArea:
		it.Fault = fmt.Sprintf("not the kernel's read-only table at %#x", uint64(entryArea))
	case cpu.IDTR != g.IDT:
		it.Fault = "not the table of the other vCPUs"
	}
	return []Item{it}
}

// entryArea is where 64-bit Linux has the IDT and, behind it, what else each
// CPU needs when it enters the kernel (CPU_ENTRY_AREA_BASE in
// arch/x86/include/asm/pgtable_64_types.h), and entryAreaEnd where that ends.
const (
	entryArea    = 0xfffffe0000000000
	entryAreaEnd = 0xfffffe8000000000
)

// entryArea says whether the guest's kernel is of those that have one.
func (g *Guest) entryArea() bool {
	if !g.Linux || !g.Mode.Long() {
		return false
	}
	if g.Image != nil {
		for _, name := range []string{"get_cpu_entry_area", "cea_set_pte"} {
			if _, ok := g.Image.Lookup(name); ok {
				return true
			}
		}
	}
	return g.IDT.Base == entryArea
}

func idtItems(g *Guest, vcpu *uint32, data []byte, err error) []Item {
	if data == nil {
		return []Item{unreadable(checkIDT, "idt", vcpu, err)}
	}
	gates := guest.ParseIDT(data, g.Mode.Long())
	stubs := newStubs(g, gates)
	items := make([]Item, 0, len(gates))
	for _, gate := range gates {
		items = append(items, gateItem(g, vcpu, gate, stubs))
	}
	return items
}

// changedGates makes the items of gates that are others than before.
func changedGates(g *Guest, vcpu *uint32, old, now []byte) ([]Item, bool) {
	before, gates := guest.ParseIDT(old, g.Mode.Long()), guest.ParseIDT(now, g.Mode.Long())
	stubs := newStubs(g, gates)
	if was := newStubs(g, before); len(before) != len(gates) || !stubs.equal(was) {
		return nil, false // what all others should be is something else
	}
	var items []Item
	for i, gate := range gates {
		if gate != before[i] {
			items = append(items, gateItem(g, vcpu, gate, stubs))
		}
	}
	return items, true
}

func gateItem(g *Guest, vcpu *uint32, gate guest.Gate, stubs stubs) Item {
	it := Item{Check: checkIDT, Object: "idt", VCPU: vcpu, Entry: ref(gate.Vector), Name: guest.VectorName(gate.Vector), Scope: ScopeImage}
	it.Value = g.value(gate.Handler)
	it.Raw = fmt.Sprintf("%s selector %#x DPL %d IST %d%s%s", gate.Kind(), gate.Selector, gate.DPL, gate.IST, present(gate.Present), reservedBits(gate, g.Mode.Long()))
	it.Value.Detail = it.Raw
	switch {
	case !gate.Present:
		// Nothing can come of it but an exception.
		it.Scope = ScopeAlways
		it.Value.Symbol, it.Value.Module = "", ""
	case gate.Type == guest.TypeTaskGate:
		// 32-bit Linux has one, for double faults.
		if g.Linux && (g.Mode.Long() || gate.Vector != 8) {
			it.Fault = "a task gate"
		}
	default:
		it.Fault = wrongGate(g, gate, stubs, &it.Value)
	}
	return it
}

func present(p bool) string {
	if p {
		return ""
	}
	return " not present"
}

// reservedBits describes what a gate has where it should have nothing.
func reservedBits(gate guest.Gate, long bool) string {
	rest := gate.Raw >> 32 & 0xff
	if long {
		rest = gate.Raw >> 35 & 0x1f
		rest |= gate.High >> 32 << 5
	}
	if rest == 0 {
		return ""
	}
	return fmt.Sprintf(" reserved bits %#x", rest)
}

// userVectors are the gates that a program may go through by itself
// (idt_setup_traps in arch/x86/kernel/idt.c).
func userVector(vector int) bool { return vector == 3 || vector == 4 || vector == 0x80 }

func wrongGate(g *Guest, gate guest.Gate, stubs stubs, v *Value) string {
	if !g.Linux {
		return ""
	}
	names := guest.Handlers(gate.Vector)
	if why := g.outside(gate.Handler); why != "" && !stubs.early(gate) {
		return why
	}
	if gate.DPL != 0 && !userVector(gate.Vector) {
		return fmt.Sprintf("programs may use it: DPL %d", gate.DPL)
	}
	if g.Mode.Long() && gate.Selector != 0x10 {
		return fmt.Sprintf("the selector %#x is not the kernel's code, 0x10", gate.Selector)
	}
	if !g.Mode.Long() && gate.Selector != 0x60 {
		return fmt.Sprintf("the selector %#x is not the kernel's code, 0x60", gate.Selector)
	}
	if g.Image == nil {
		return ""
	}
	for _, name := range names {
		if g.Image.Is(gate.Handler, name) {
			v.Symbol = name
			return ""
		}
	}
	if gate.Vector >= 32 && stubs.fits(gate) || stubs.early(gate) {
		return ""
	}
	if gate.Vector >= 32 && len(names) == 0 {
		if all, offset := g.Image.At(gate.Handler); offset == 0 {
			for _, sym := range all {
				if strings.HasPrefix(sym.Name, "asm_sysvec_") {
					v.Symbol = sym.Name
					return ""
				}
			}
		}
	}
	for _, name := range names {
		if _, ok := g.Image.Lookup(name); ok {
			return "not " + name
		}
	}
	return "not a handler of this interrupt"
}

// stubs are the rows of small pieces of code, one a vector, that gates without
// a handler of their own point to (irq_entries_start, spurious_entries_start,
// early_idt_handler_array in arch/x86/include/asm/idtentry.h, segment.h). How
// far apart the pieces of a row are depends on the kernel's configuration, and
// which vector is the first one of a row on its version: what most gates agree
// on is taken.
type stubs struct {
	rows        []stubRow
	earlyStart  uint64 // of early_idt_handler_array; 0: unknown
	earlyStride uint64
}

type stubRow struct {
	start, end uint64
	stride     uint64
	first      int
}

func newStubs(g *Guest, gates []guest.Gate) stubs {
	var s stubs
	s.findEarly(g, gates)
	if g.Image == nil {
		return s
	}
	for _, name := range []string{"irq_entries_start", "spurious_entries_start"} {
		start, ok := g.Image.Lookup(name)
		if !ok {
			continue
		}
		type guess struct {
			stride uint64
			first  int
		}
		votes := map[guess]int{}
		for _, stride := range []uint64{8, 16} {
			for _, gate := range gates {
				if gate.Vector < 32 || gate.Handler < start || gate.Handler >= start+256*stride || (gate.Handler-start)%stride != 0 {
					continue
				}
				votes[guess{stride, gate.Vector - int((gate.Handler-start)/stride)}]++
			}
		}
		var best guess
		most := 0
		for gs, n := range votes {
			if n > most || n == most && gs.stride < best.stride {
				best, most = gs, n
			}
		}
		if best.first >= 32 {
			s.rows = append(s.rows, stubRow{start, start + uint64(256-best.first)*best.stride, best.stride, best.first})
		}
	}
	return s
}

func (s stubs) equal(o stubs) bool {
	return slices.Equal(s.rows, o.rows) && s.earlyStart == o.earlyStart && s.earlyStride == o.earlyStride
}

func (s stubs) fits(gate guest.Gate) bool {
	for _, row := range s.rows {
		if gate.Vector >= row.first && gate.Handler == row.start+uint64(gate.Vector-row.first)*row.stride {
			return true
		}
	}
	return false
}

// optional says whether a kernel may lack a handler for an exception: one that
// only some processors have, or machine checks, which can be configured out.
func optional(vector int) bool { return vector == 18 || vector >= 20 && vector < 32 }

// findEarly finds the row of handlers that the kernel booted with, of 9 bytes
// each or, with ENDBR, 13: by its symbol or by the gates that still point
// there.
func (s *stubs) findEarly(g *Guest, gates []guest.Gate) {
	symbol, haveSymbol := uint64(0), false
	if g.Image != nil {
		symbol, haveSymbol = g.Image.Lookup("early_idt_handler_array")
	}
	most := 2
	for _, stride := range []uint64{9, 13} {
		votes := map[uint64]int{}
		for _, gate := range gates {
			if !optional(gate.Vector) || !gate.Present {
				continue
			}
			start := gate.Handler - uint64(gate.Vector)*stride
			if haveSymbol && start != symbol {
				continue
			}
			if votes[start]++; votes[start] > most || haveSymbol && votes[start] == 1 && s.earlyStart == 0 {
				most = max(most, votes[start])
				s.earlyStart, s.earlyStride = start, stride
			}
		}
	}
}

// early says whether an exception that the kernel knows nothing of still has
// the handler that the kernel booted with.
func (s stubs) early(gate guest.Gate) bool {
	return optional(gate.Vector) && s.earlyStart != 0 &&
		gate.Handler == s.earlyStart+uint64(gate.Vector)*s.earlyStride
}
