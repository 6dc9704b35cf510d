// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// madeSpace maps, in four levels, at 0xffff888000000000: a page to 0x10000,
// which users may not read, one to 0x11000, none, one that is not in memory, and
// at 2 MiB a large page to 0x200000.
func madeSpace() (*Space, Pages) {
	mem := Pages{}
	put := func(table, index, entry uint64) {
		mem.WritePhysical(table+8*index, binary.LittleEndian.AppendUint64(nil, entry))
	}
	const base = 0xffff888000000000
	put(0x1000, base>>39&511, 0x2003)
	put(0x2000, base>>30&511, 0x3003)
	put(0x3000, 0, 0x4003)
	put(0x3000, 1, 0x200000|0x81)
	put(0x4000, 0, 0x10000|entryNX|3)
	put(0x4000, 1, 0x11000|1)
	put(0x4000, 3, 0x7fff0000|1)
	mem.WritePhysical(0x10000, bytes.Repeat([]byte{1}, 4096))
	mem.WritePhysical(0x11000, bytes.Repeat([]byte{2}, 4096))
	mem.WritePhysical(0x10ffe, []byte("ab\x00"))
	for gpa := uint64(0x200000); gpa < 0x400000; gpa += 4096 {
		mem.WritePhysical(gpa, bytes.Repeat([]byte{3}, 4096))
	}
	return &Space{Memory: mem, Mode: Mode{Format: Format4Level, NX: true}, Root: 0x1000}, mem
}

func TestSpace(t *testing.T) {
	ctx := context.Background()
	s, mem := madeSpace()
	const base = 0xffff888000000000
	p := make([]byte, 8192)
	c := &counting{Memory: mem}
	direct := &Space{Memory: c, Mode: s.Mode, Root: s.Root}
	if err := direct.Read(ctx, base, p); err != nil || p[0] != 1 || p[8191] != 2 {
		t.Errorf("two pages: %v, %x %x", err, p[0], p[8191])
	}
	if c.reads != 5 {
		t.Errorf("%d reads of four tables and two pages side by side", c.reads)
	}
	for _, tt := range []struct {
		gva  uint64
		n    int
		want error
	}{
		{base + 0x2000, 1, ErrNotPresent},
		{base + 0x1fff, 2, ErrNotPresent},
		{base + 0x3000, 1, kvmaccess.ErrNoMemslot},
		{0x888000000000, 1, ErrNotCanonical},
		{^uint64(0) - 3, 8, ErrNotCanonical},
	} {
		if err := s.Read(ctx, tt.gva, make([]byte, tt.n)); !errors.Is(err, tt.want) {
			t.Errorf("%#x: %v, want %v", tt.gva, err, tt.want)
		}
	}
	if err := s.Read(ctx, 0x1234, nil); err != nil {
		t.Errorf("nothing: %v", err)
	}
	for _, tt := range []struct {
		size int
		want uint64
	}{{1, 2}, {2, 0x0202}, {4, 0x02020202}, {8, 0x0202020202020202}} {
		if v, err := s.Uint(ctx, base+0x1100, tt.size); err != nil || v != tt.want {
			t.Errorf("%d bytes: %#x, %v", tt.size, v, err)
		}
	}
	if _, err := s.Uint(ctx, base, 3); err == nil {
		t.Error("a number of three bytes")
	}
	if v, err := s.View().Pointer(ctx, base+0x200010); err != nil || v != 0x0303030303030303 {
		t.Errorf("large page: %#x, %v", v, err)
	}
	if text, err := s.String(ctx, base+0xffe, 10); err != nil || text != "ab" {
		t.Errorf("%q, %v", text, err)
	}
	if text, err := s.String(ctx, base+0xffe, 2); err != nil || text != "ab" {
		t.Errorf("just as long as may be: %q, %v", text, err)
	}
	if _, err := s.String(ctx, base+0xffe, 1); !errors.Is(err, ErrUnterminated) {
		t.Errorf("too long: %v", err)
	}
	if _, err := s.String(ctx, base+0x1f00, 1000); !errors.Is(err, ErrNotPresent) {
		t.Errorf("into nothing: %v", err)
	}
}

func TestMappings(t *testing.T) {
	ctx := context.Background()
	s, mem := madeSpace()
	const base = 0xffff888000000000
	want := []Mapping{
		{GVA: base, GPA: 0x10000, Size: 4096, Writable: true},
		{GVA: base + 0x1000, GPA: 0x11000, Size: 4096, Executable: true},
		{GVA: base + 0x3000, GPA: 0x7fff0000, Size: 4096, Executable: true},
		{GVA: base + 0x200000, GPA: 0x200000, Size: 2 << 20, Executable: true},
	}
	list := func(from, to uint64) []Mapping {
		t.Helper()
		var got []Mapping
		if err := s.Mappings(ctx, from, to, func(m Mapping) error { got = append(got, m); return nil }); err != nil {
			t.Errorf("%#x-%#x: %v", from, to, err)
		}
		return got
	}
	for _, tt := range []struct {
		from, to uint64
		want     []Mapping
	}{
		{0, 0, want},
		{base, base + 0x1000, want[:1]},
		{base + 0xfff, base + 0x1001, want[:2]},
		{base + 0x3fffff, base + 0x400000, want[3:]},
		{base + 0x400000, 0, nil},
		{0, base, nil},
	} {
		if diff := cmp.Diff(tt.want, list(tt.from, tt.to)); diff != "" {
			t.Errorf("%#x-%#x: (-want +got)\n%s", tt.from, tt.to, diff)
		}
	}
	stop := errors.New("stop")
	if err := s.Mappings(ctx, 0, 0, func(Mapping) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("stopped: %v", err)
	}
	// A table that is its own: everything is mapped, and the walk is bounded.
	page := new([4096]byte)
	for i := range 512 {
		binary.LittleEndian.PutUint64(page[8*i:], 0x1003)
	}
	mem[0x1000] = page
	n := 0
	if err := s.Mappings(ctx, 0, 0, func(Mapping) error { n++; return nil }); !errors.Is(err, ErrManyTables) {
		t.Errorf("tables in a circle: %v", err)
	}
	s.Mode.Format = FormatPAE
	if err := s.Mappings(ctx, 0, 0, func(Mapping) error { return nil }); err == nil {
		t.Error("mappings of a 32-bit guest were listed")
	}
}

// FuzzMappings walks page tables that are all one page.
func FuzzMappings(f *testing.F) {
	s, mem := madeSpace()
	for _, gpa := range []uint64{0x1000, 0x2000, 0x3000, 0x4000} {
		f.Add(mem[gpa][:], uint64(0xffff888000000000), uint64(0xffff888000400000), false)
	}
	f.Add(bytes.Repeat([]byte{3, 0x10, 0, 0, 0, 0, 0, 0}, 512), uint64(imageStart), uint64(imageEnd), true)
	f.Fuzz(func(t *testing.T, table []byte, from, to uint64, five bool) {
		page := make([]byte, 4096)
		copy(page, table)
		space := *s
		space.Memory = fuzzMemory{page}
		if five {
			space.Mode.Format = Format5Level
		}
		if to-from > 1<<34 {
			to = from + 1<<34
		}
		next := uint64(0)
		n := 0
		enough := errors.New("enough")
		err := space.Mappings(context.Background(), from, to, func(m Mapping) error {
			if n > 0 && m.GVA < next {
				t.Fatalf("%#x after %#x", m.GVA, next)
			}
			if n++; n == 4096 {
				return enough
			}
			next = m.GVA + m.Size
			// The processor's way to the same place.
			at := max(m.GVA, from)
			tr, err := Translate(context.Background(), space.Memory, space.Mode, space.Root, at)
			if err != nil || tr.GPA != m.GPA+(at-m.GVA) || tr.Write != m.Writable || tr.Execute != m.Executable || tr.User != m.User {
				t.Fatalf("%+v, but %#x is translated to %+v, %v", m, at, tr, err)
			}
			return nil
		})
		_ = err
	})
}
