// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
)

// XArray calls f with the index and the value of each entry of the xarray at
// addr that is a pointer; at most most entries are visited. object names it in
// errors; f's error ends the walk, ErrStop without one. Nodes that do not fit
// where they are, and values that are no pointers of the kernel, are errors,
// and the rest is visited all the same. Since 4.20 a radix tree and an IDR's
// idr_rt are xarrays, too. It needs types.
func (k *Kernel) XArray(ctx context.Context, object string, addr uint64, most int, f func(index, value uint64) error) error {
	o, err := k.Object(ctx, "xarray", addr)
	if err != nil {
		return err
	}
	head, err := o.Pointer("xa_head")
	if err != nil {
		return err
	}
	x := xarrayWalk{walk: k.walk(object, maxXNodes), f: f, left: most}
	if x.node, err = k.Types.Struct("xa_node"); err != nil {
		return x.fail(addr, err)
	}
	slots, err := x.node.Field("slots")
	if err != nil {
		return x.fail(addr, err)
	}
	// 64 slots, or 16 in kernels that are built to be small.
	for x.bits = 1; x.bits < 8 && 1<<x.bits < slots.Count; x.bits++ {
	}
	if 1<<x.bits != slots.Count || slots.ElemSize != 8 {
		return x.fail(addr, fmt.Errorf("%w: a node has %d slots of %d bytes", ErrBadTypes, slots.Count, slots.ElemSize))
	}
	x.slots = slots
	if !xaNode(head) { // empty, or the entry with index 0 alone
		err = x.entry(addr, 0, head)
	} else {
		err = x.visit(ctx, head&^3, 0, 0, 64, 0)
	}
	if errors.Is(err, ErrStop) {
		err = nil
	}
	return errors.Join(x.broken, err)
}

// maxXNodes bounds the nodes of an xarray: enough for some millions of entries.
const maxXNodes = 1 << 17

type xarrayWalk struct {
	*walk
	f      func(index, value uint64) error
	node   *Struct
	slots  Field
	bits   uint
	left   int
	broken error // the first thing found wrong that does not end the walk
}

// xaNode says whether an entry is a node (xa_is_node in include/linux/xarray.h):
// its low bits are 10, and it is above the other internal entries.
func xaNode(entry uint64) bool { return entry&3 == 2 && entry > 4096 }

func (x *xarrayWalk) note(at uint64, err error) {
	if x.broken == nil {
		x.broken = x.fail(at, err)
	}
}

// entry hands on a pointer. Empty slots, values (bit 0) and other internal
// entries, of which siblings and retries are some, are none.
func (x *xarrayWalk) entry(at, index, entry uint64) error {
	if entry == 0 || entry&3 == 2 {
		return nil
	}
	if entry&1 != 0 {
		return nil
	}
	if x.left--; x.left < 0 {
		return x.fail(at, ErrTooLong)
	}
	if err := x.k.pointer(entry, 1); err != nil {
		x.note(at, fmt.Errorf("entry %d: %w", index, err))
		return nil
	}
	err := x.f(index, entry)
	if err != nil && !errors.Is(err, ErrStop) {
		return x.fail(at, err)
	}
	return err
}

// visit walks a node that is in the given slot of parent, whose entries span
// 1<<shift indices each; 64 and more: the top one, which says it.
func (x *xarrayWalk) visit(ctx context.Context, at, parent, index uint64, shift uint, slot int) error {
	if err := x.enter(at, 8); err != nil {
		x.note(at, err)
		return nil
	}
	o, err := x.k.read(ctx, x.node, at, "shift", "offset", "parent", "slots")
	if err != nil {
		x.note(at, err)
		return nil
	}
	own, err1 := o.Uint("shift")
	offset, err2 := o.Uint("offset")
	up, err3 := o.Pointer("parent")
	if err := errors.Join(err1, err2, err3); err != nil {
		return x.fail(at, err)
	}
	switch {
	case shift >= 64 && (own > 60 || own%uint64(x.bits) != 0), shift < 64 && own+uint64(x.bits) != uint64(shift):
		x.note(at, fmt.Errorf("a node with the shift %d is not of this place", own))
		return nil
	case up != parent || int(offset) != slot:
		x.note(at, fmt.Errorf("%w: it says it is slot %d of %#x, and is slot %d of %#x", ErrBackLink, offset, up, slot, parent))
	}
	for i := range int(x.slots.Count) {
		entry, err := (Field{Path: "slots", Offset: x.slots.Offset + 8*uint32(i), Size: 8}).number(o.data)
		if err != nil {
			return x.fail(at, err)
		}
		below := index + uint64(i)<<own
		switch {
		case !xaNode(entry):
			err = x.entry(at, below, entry)
		case own == 0:
			x.note(at, fmt.Errorf("a node below the last level: %#x", entry))
		default:
			err = x.visit(ctx, entry&^3, at, below, uint(own), i)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// IDR is XArray for the struct idr at addr: pointers by their id.
func (k *Kernel) IDR(ctx context.Context, object string, addr uint64, most int, f func(id, value uint64) error) error {
	o, err := k.Object(ctx, "idr", addr)
	if err != nil {
		return err
	}
	base := uint64(0)
	if o.Has("idr_base") {
		if base, err = o.Uint("idr_base"); err != nil {
			return err
		}
	}
	tree, err := o.Addr("idr_rt")
	if err != nil {
		return err
	}
	return k.XArray(ctx, object, tree, most, func(index, value uint64) error { return f(index+base, value) })
}
