// SPDX-License-Identifier: MIT

package watch

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// Bulk is how long it takes to read much of a guest's memory, and to copy as
// much within a process, in instructions.
type Bulk struct {
	Bytes  int     `json:"bytes"`
	Read   []int64 `json:"read"`
	Memcpy []int64 `json:"memcpy"`  // by REP MOVSB, as the kernel copies, too
	GoCopy []int64 `json:"go_copy"` // by Go's copy
}

const (
	bulkGPA  = 1 << 30
	bulkSize = 32 << 20
)

// memcpy copies n bytes by REP MOVSB: what memcpy of C libraries does with large
// blocks, and the kernel with all, on a processor that says that this is fast
// (ERMS).
func memcpy(to, from *byte, n int)

// Reads reads all of a guest's resident memory, and copies as much, n times
// each.
func Reads(ctx context.Context, n int, alive func(string)) (r *Bulk, err error) {
	b, err := inside.OpenBench()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	g, err := inside.StartTiny(ctx, b.Client, b.KVM, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	m, err := tinyvm.NewMemory(bulkSize, tinyvm.Anonymous, "")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := g.SetSlot(tinyvm.Slot{Number: 1, GPA: bulkGPA, Size: bulkSize, Memory: m}); err != nil {
		return nil, err
	}
	for i := range m.Bytes() {
		if i%kvmaccess.PageSize == 0 {
			m.Bytes()[i] = byte(i >> 12)
		}
	}
	memory := kvmaccess.NewMemory(b.Client, g.VM)
	defer func() { err = errors.Join(err, memory.Close()) }()
	resident := memory.Resident()
	to := make([]byte, bulkSize)
	r = &Bulk{Bytes: bulkSize}
	for i := range n + 1 {
		for _, way := range []struct {
			took *[]int64
			copy func() error
		}{
			{&r.Read, func() error { return resident.ReadPhysical(ctx, bulkGPA, to) }},
			{&r.Memcpy, func() error { memcpy(&to[0], &m.Bytes()[0], bulkSize); return nil }},
			{&r.GoCopy, func() error { copy(to, m.Bytes()); return nil }},
		} {
			start, err := inside.Monotonic()
			if err != nil {
				return nil, err
			}
			if err := way.copy(); err != nil {
				return nil, err
			}
			end, err := inside.Monotonic()
			if err != nil {
				return nil, err
			}
			if i > 0 { // the first makes the pages of what is copied to
				*way.took = append(*way.took, int64(end-start))
			}
			if !bytes.Equal(to, m.Bytes()) {
				return nil, errors.New("what was read is not what is there")
			}
			clear(to)
		}
		alive(fmt.Sprint("bulk reads: ", i, " of ", n))
	}
	if s := memory.Stats(); s.Bulk.Bytes != uint64(bulkSize*(n+1)) {
		return nil, fmt.Errorf("it was not read by way of the VMM: %+v", s)
	}
	return r, nil
}
