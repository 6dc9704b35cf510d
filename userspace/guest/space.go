// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Space is kernel virtual memory through one root of page tables, which does
// not change with what a vCPU runs.
type Space struct {
	Memory Memory
	Mode   Mode
	Root   uint64 // guest-physical
}

// View is the same memory of which each page is read once, for an operation of
// many small reads. It is to be dropped with that operation, and for one
// goroutine.
func (s *Space) View() *Space {
	v := *s
	v.Memory = NewPageCache(s.Memory)
	return &v
}

// Read fills p from guest-virtual address gva on. Pages that lie side by side
// in physical memory, too, are read at once. The error is a *WalkError, or the
// Memory's with the address.
func (s *Space) Read(ctx context.Context, gva uint64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if gva+uint64(len(p)-1) < gva {
		return &WalkError{GVA: gva, Format: s.Mode.Format, Err: ErrNotCanonical}
	}
	tables := s.Memory
	if gva&4095+uint64(len(p)) > 4096 {
		tables = NewPageCache(s.Memory)
	}
	for len(p) > 0 {
		t, err := Translate(ctx, tables, s.Mode, s.Root, gva)
		if err != nil {
			return err
		}
		n := restOfPage(t, gva)
		for n < uint64(len(p)) {
			next, err := Translate(ctx, tables, s.Mode, s.Root, gva+n)
			if err != nil {
				return err
			}
			if next.GPA != t.GPA+n {
				break
			}
			n += restOfPage(next, gva+n)
		}
		n = min(n, uint64(len(p)))
		if err := s.Memory.ReadPhysical(ctx, t.GPA, p[:n]); err != nil {
			return fmt.Errorf("guest-virtual %#x: read guest-physical %#x: %w", gva, t.GPA, err)
		}
		p = p[n:]
		gva += n
	}
	return nil
}

func restOfPage(t Translation, gva uint64) uint64 {
	size := max(t.PageSize, 4096)
	return size - gva&(size-1)
}

// Uint reads a little-endian number of 1, 2, 4 or 8 bytes.
func (s *Space) Uint(ctx context.Context, gva uint64, size int) (uint64, error) {
	var p [8]byte
	switch size {
	case 1, 2, 4, 8:
	default:
		return 0, fmt.Errorf("guest-virtual %#x: no number has %d bytes", gva, size)
	}
	if err := s.Read(ctx, gva, p[:size]); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(p[:]), nil
}

// Pointer reads an address of 8 bytes.
func (s *Space) Pointer(ctx context.Context, gva uint64) (uint64, error) {
	return s.Uint(ctx, gva, 8)
}

// ErrUnterminated: a string is longer than it may be.
var ErrUnterminated = errors.New("the string does not end")

// String reads a string that ends with NUL, of at most most bytes without it.
// It reads no page behind the one in which the string ends. A longer one is
// ErrUnterminated.
func (s *Space) String(ctx context.Context, gva uint64, most int) (string, error) {
	var out []byte
	for at := gva; len(out) <= most; {
		chunk := make([]byte, min(4096-int(at&4095), most+1-len(out), 256))
		if err := s.Read(ctx, at, chunk); err != nil {
			return "", err
		}
		if i := bytes.IndexByte(chunk, 0); i >= 0 {
			return string(append(out, chunk[:i]...)), nil
		}
		out = append(out, chunk...)
		at += uint64(len(chunk))
	}
	return "", fmt.Errorf("guest-virtual %#x: %w within %d bytes", gva, ErrUnterminated, most)
}

// Mapping is what one page-table entry that is a leaf maps.
type Mapping struct {
	GVA, GPA   uint64
	Size       uint64 // bytes: 4 KiB, 2 MiB or 1 GiB
	Writable   bool   // at all levels
	Executable bool
	User       bool
}

// maxTables bounds how many tables Mappings reads: tables that refer to
// themselves map everything. It is enough for 128 GiB in pages of 4 KiB.
const maxTables = 1 << 16

// ErrManyTables: page tables are more than a kernel has, or go in circles.
var ErrManyTables = fmt.Errorf("the page tables have more than %d tables", maxTables)

// Mappings calls f for each present leaf that maps a part of from..to, to
// excluded (0: the end of the address space), by ascending address. Entries
// with reserved bits and tables in no memory map nothing, as on the processor.
// f's error ends the walk and is returned; other errors are ErrManyTables, the
// Memory's, or that the mode is not a 64-bit one.
func (s *Space) Mappings(ctx context.Context, from, to uint64, f func(Mapping) error) error {
	if !s.Mode.Long() {
		return fmt.Errorf("%v: only mappings of 64-bit guests are listed", s.Mode.Format)
	}
	level := 4
	if s.Mode.Format == Format5Level {
		level = 5
	}
	w := mappingWalk{Space: s, from: from, last: to - 1, f: f}
	return w.table(ctx, s.Mode.RootOf(s.Root), level, 0, Mapping{Writable: true, Executable: true, User: true})
}

type mappingWalk struct {
	*Space
	from, last uint64
	f          func(Mapping) error
	tables     int
}

// table lists what the table at gpa maps, whose first entry is for base.
func (w *mappingWalk) table(ctx context.Context, gpa uint64, level int, base uint64, rights Mapping) error {
	if w.tables++; w.tables > maxTables {
		return fmt.Errorf("guest-virtual %#x: %w", base, ErrManyTables)
	}
	shift := 12 + 9*(level-1)
	top := level == 4 && w.Mode.Format == Format4Level || level == 5
	// Only the entries for from..last are looked at.
	extend := func(gva uint64) uint64 {
		if top && gva>>(shift+8)&1 != 0 {
			gva |= ^uint64(0) << (shift + 9)
		}
		return gva
	}
	first, last := 512, -1
	for i := range 512 {
		start := extend(base + uint64(i)<<shift)
		if end := start + 1<<shift - 1; end >= w.from && start <= w.last {
			first, last = min(first, i), i
		}
	}
	if last < first {
		return nil
	}
	raw := make([]byte, (last-first+1)*8)
	if err := w.Memory.ReadPhysical(ctx, gpa+uint64(first)*8, raw); err != nil {
		if errors.Is(err, kvmaccess.ErrNoMemslot) {
			return nil
		}
		return fmt.Errorf("guest-virtual %#x: read page table at guest-physical %#x: %w", base, gpa, err)
	}
	for i := first; i <= last; i++ {
		start := extend(base + uint64(i)<<shift)
		if start+1<<shift-1 < w.from || start > w.last {
			continue
		}
		entry := binary.LittleEndian.Uint64(raw[(i-first)*8:])
		leaf := level == 1 || w.Mode.large(level, entry)
		if entry&entryPresent == 0 || entry&w.Mode.reserved(level, leaf) != 0 {
			continue
		}
		m := Mapping{GVA: start,
			Writable:   rights.Writable && entry&entryWrite != 0,
			Executable: rights.Executable && entry&entryNX == 0,
			User:       rights.User && entry&entryUser != 0,
		}
		var err error
		if leaf {
			m.GPA, m.Size = w.Mode.base(level, entry), 1<<shift
			err = w.f(m)
		} else {
			err = w.table(ctx, entry&w.Mode.addressMask(), level-1, start, m)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
