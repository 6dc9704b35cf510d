// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"golang.org/x/sys/unix"
)

// space is the address space of a memory request: guest-physical, or
// guest-virtual of a vCPU.
type space struct {
	virtual bool
	vcpu    uint32
	root    uint64 // 0: the vCPU's CR3
}

// ReadPhysical reads ranges of guest-physical memory, in as many requests as
// it takes. The result has one element for each range, with either Data or
// Err; an element's Err is an *Error that tells the address. If not one range
// could be read, the error is that of the first.
//
// Nothing is faulted in: what the host swapped out or the guest never touched
// is ErrNotResident, see Memory.
func (c *Client) ReadPhysical(ctx context.Context, vm VMID, ranges ...Range) ([]RangeData, error) {
	return c.readNew(ctx, vm, space{}, ranges)
}

// ReadVirtual is ReadPhysical by guest-virtual addresses, translated by the
// page tables that the vCPU uses or, unless root is 0, by those that root, in
// the format of CR3, points to.
func (c *Client) ReadVirtual(ctx context.Context, vm VMID, vcpu uint32, root uint64, ranges ...Range) ([]RangeData, error) {
	return c.readNew(ctx, vm, space{virtual: true, vcpu: vcpu, root: root}, ranges)
}

// ReadPhysicalInto is ReadPhysical for callers that read the same again and
// again: it reads the ranges in dst and reuses their Data.
func (c *Client) ReadPhysicalInto(ctx context.Context, vm VMID, dst []RangeData) error {
	return c.read(ctx, vm, space{}, dst)
}

// ReadVirtualInto is to ReadVirtual what ReadPhysicalInto is to ReadPhysical.
func (c *Client) ReadVirtualInto(ctx context.Context, vm VMID, vcpu uint32, root uint64, dst []RangeData) error {
	return c.read(ctx, vm, space{virtual: true, vcpu: vcpu, root: root}, dst)
}

func (c *Client) readNew(ctx context.Context, vm VMID, s space, ranges []Range) ([]RangeData, error) {
	total := 0
	dst := make([]RangeData, len(ranges))
	for i, r := range ranges {
		dst[i].Range = r
		if uint64(total)+uint64(r.Length) > math.MaxInt {
			return nil, invalid(vm, "range %d: the ranges have more bytes than memory can hold", i)
		}
		total += int(r.Length)
	}
	if total <= MaxBytes {
		// One piece for all; what is larger grows as it is read.
		data := make([]byte, total)
		for i, r := range ranges {
			dst[i].Data, data = data[:0:r.Length], data[r.Length:]
		}
	}
	err := c.read(ctx, vm, s, dst)
	if err != nil && !slices.ContainsFunc(dst, func(d RangeData) bool { return d.Err != nil }) {
		return nil, err
	}
	return dst, err
}

func invalid(vm VMID, format string, args ...any) error {
	return &Error{Op: commandNames[cmdMemRead], VM: vm, Errno: unix.EINVAL, Message: fmt.Sprintf(format, args...)}
}

func (c *Client) read(ctx context.Context, vm VMID, s space, dst []RangeData) error {
	if len(dst) == 0 {
		return invalid(vm, "no ranges to read")
	}
	total := uint64(0)
	for i := range dst {
		r := &dst[i]
		r.Data, r.Err = r.Data[:0], nil
		switch {
		case r.Length == 0:
			return invalid(vm, "range %d at %#x: length 0: ask for at least one byte", i, r.Address)
		case r.Address+uint64(r.Length-1) < r.Address:
			return invalid(vm, "range %d: %d bytes at %#x pass the end of the address space", i, r.Length, r.Address)
		}
		total += uint64(r.Length)
	}

	q, err := c.request(cmdMemRead, vm)
	if err != nil {
		return err
	}
	defer c.release(q)
	if len(dst) <= MaxRanges && total <= MaxBytes {
		err = c.exchange(ctx, q, vm, s, dst)
	} else {
		err = c.readSplit(ctx, q, vm, s, dst)
	}
	if err != nil {
		return err
	}
	for i := range dst {
		if dst[i].Err == nil {
			return nil
		}
	}
	return dst[0].Err
}

// readSplit reads more than fits into one request. A range of which a part
// cannot be read fails as a whole.
func (c *Client) readSplit(ctx context.Context, q *conn, vm VMID, s space, dst []RangeData) error {
	var (
		batch []RangeData
		owner []int // index into dst of each element of batch
		bytes uint32
	)
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if err := c.exchange(ctx, q, vm, s, batch); err != nil {
			return err
		}
		for i, p := range batch {
			d := &dst[owner[i]]
			switch {
			case d.Err != nil:
			case p.Err != nil:
				d.Data, d.Err = d.Data[:0], p.Err
			default:
				d.Data = append(d.Data, p.Data...)
			}
		}
		batch, owner, bytes = batch[:0], owner[:0], 0
		return nil
	}
	for i := range dst {
		for done := uint32(0); done < dst[i].Length && dst[i].Err == nil; {
			n := min(dst[i].Length-done, MaxBytes-bytes)
			// The pieces' buffers are used again and again.
			if len(batch) < cap(batch) {
				batch = batch[:len(batch)+1]
			} else {
				batch = append(batch, RangeData{})
			}
			batch[len(batch)-1].Range = Range{Address: dst[i].Address + uint64(done), Length: n}
			owner = append(owner, i)
			done += n
			bytes += n
			if bytes == MaxBytes || len(batch) == MaxRanges {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

// exchange reads what fits into one request. If the module refuses it because
// no range could be read, each is asked for alone to learn its own reason.
func (c *Client) exchange(ctx context.Context, q *conn, vm VMID, s space, batch []RangeData) error {
	q.request(c.family.ID, cmdMemRead, vm)
	q.u64(aMemVMID, uint64(vm))
	if s.virtual {
		q.u32(aMemVCPUID, s.vcpu)
		if s.root != 0 {
			q.u64(aMemRoot, s.root)
		}
	}
	for i := range batch {
		batch[i].Data, batch[i].Err = batch[i].Data[:0], nil
		q.rng(aMemRange, batch[i].Range)
	}
	b, err := c.execute(ctx, q)
	if err == nil {
		return parseRanges(b, vm, batch)
	}
	if !ofRange(err) {
		return err
	}
	if len(batch) == 1 {
		// The refusal of a request does not say where.
		var e *Error
		if errors.As(err, &e) {
			e.Address = batch[0].Address
		}
		batch[0].Err = err
		return nil
	}
	for i := range batch {
		if err := c.exchange(ctx, q, vm, s, batch[i:i+1]); err != nil {
			return err
		}
	}
	return nil
}

// ofRange tells failures of a range from those of the request, after which
// asking for another range is of no use.
func ofRange(err error) bool {
	return errors.Is(err, ErrNoMemslot) || errors.Is(err, ErrNotMapped) || errors.Is(err, ErrNotResident)
}
