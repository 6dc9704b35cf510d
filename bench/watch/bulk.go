// SPDX-License-Identifier: MIT

package watch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// Bulk is how long it takes to read much of a guest's memory, and to copy as
// much within a process, in instructions.
type Bulk struct {
	Pages  string  `json:"pages"` // of the host, that the memory is in
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

// Pages of the host.
const (
	HugePages  = "2 MiB" // which QEMU asks for
	SmallPages = "4 KiB"
)

// Reads reads all of a guest's resident memory, in huge pages and in small ones,
// and copies as much, n times each.
func Reads(ctx context.Context, n int, alive func(string)) (all []Bulk, err error) {
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
	for _, backing := range []tinyvm.Backing{tinyvm.Transparent, tinyvm.Anonymous} {
		r := Bulk{Bytes: bulkSize, Pages: SmallPages}
		if backing == tinyvm.Transparent {
			r.Pages = HugePages
		}
		if err := r.take(ctx, b, g, backing, n, alive); err != nil {
			return nil, fmt.Errorf("pages of %s: %w", r.Pages, err)
		}
		all = append(all, r)
	}
	return all, nil
}

func (r *Bulk) take(ctx context.Context, b *inside.Bench, g *inside.Tiny, backing tinyvm.Backing, n int, alive func(string)) (err error) {
	m, err := tinyvm.NewMemory(bulkSize, backing, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := g.SetSlot(tinyvm.Slot{Number: 1, GPA: bulkGPA, Size: bulkSize, Memory: m}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.SetSlot(tinyvm.Slot{Number: 1})) }()
	before, err := hugePages()
	if err != nil {
		return err
	}
	for i := range m.Bytes() {
		if i%kvmaccess.PageSize == 0 {
			m.Bytes()[i] = byte(i >> 12)
		}
	}
	after, err := hugePages()
	if err != nil {
		return err
	}
	if huge := after-before >= bulkSize; huge != (backing == tinyvm.Transparent) {
		return fmt.Errorf("%d bytes are in huge pages, of %d", after-before, bulkSize)
	}
	memory := kvmaccess.NewMemory(b.Client, g.VM)
	defer func() { err = errors.Join(err, memory.Close()) }()
	resident := memory.Resident()
	to := make([]byte, bulkSize)
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
				return err
			}
			if err := way.copy(); err != nil {
				return err
			}
			end, err := inside.Monotonic()
			if err != nil {
				return err
			}
			if i > 0 { // the first makes the pages of what is copied to
				*way.took = append(*way.took, int64(end-start))
			}
			if !bytes.Equal(to, m.Bytes()) {
				return errors.New("what was read is not what is there")
			}
			clear(to)
		}
		alive(fmt.Sprint("bulk reads: ", i, " of ", n))
	}
	if s := memory.Stats(); s.Bulk.Bytes != uint64(bulkSize*(n+1)) {
		return fmt.Errorf("it was not read by way of the VMM: %+v", s)
	}
	return nil
}

// hugePages is how much of this process' memory is in huge pages, in bytes.
func hugePages() (int, error) {
	text, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib int
		if _, err := fmt.Sscanf(line, "AnonHugePages: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc/self/smaps_rollup does not tell of huge pages")
}
