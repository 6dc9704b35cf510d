// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// put64 and put32 write page-table entries.
func put64(m Pages, gpa uint64, v ...uint64) {
	for i, v := range v {
		m.WritePhysical(gpa+uint64(i)*8, binary.LittleEndian.AppendUint64(nil, v))
	}
}

func put32(m Pages, gpa uint64, v uint32) {
	m.WritePhysical(gpa, binary.LittleEndian.AppendUint32(nil, v))
}

const (
	rw  = entryPresent | entryWrite
	rwu = rw | entryUser
	nx  = uint64(entryNX)
	ps  = entryLarge
)

func TestModeOf(t *testing.T) {
	const pe, pg = uint64(CR0PE), uint64(CR0PE | CR0PG)
	for _, tt := range []struct {
		name           string
		cr0, cr4, efer uint64
		want           Mode
	}{
		{"reset", 0x60000010, 0, 0, Mode{Format: FormatNone}},
		{"protected", pe, CR4PAE, 0, Mode{Format: FormatNone}},
		{"32-bit", pg, 0, 0, Mode{Format: Format32}},
		{"32-bit with PSE", pg, CR4PSE, 0, Mode{Format: Format32, PSE: true}},
		{"PAE", pg, CR4PAE | CR4PSE, EFERNXE, Mode{Format: FormatPAE, PSE: true, NX: true}},
		{"4-level", pg, CR4PAE, EFERLMA | EFERLME | EFERNXE, Mode{Format: Format4Level, NX: true}},
		{"5-level", pg, CR4PAE | CR4LA57, EFERLMA | EFERLME, Mode{Format: Format5Level}},
		{"LA57 without long mode", pg, CR4PAE | CR4LA57, 0, Mode{Format: FormatPAE}},
	} {
		got := ModeOf(&kvmaccess.Registers{CR0: tt.cr0, CR4: tt.cr4, EFER: tt.efer})
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
	}
}

func TestCanonical(t *testing.T) {
	for _, tt := range []struct {
		format Format
		gva    uint64
		want   bool
		kernel bool
	}{
		{Format4Level, 0, true, false},
		{Format4Level, 0x7fffffffffff, true, false},
		{Format4Level, 0x800000000000, false, false},
		{Format4Level, 0xffff7fffffffffff, false, false},
		{Format4Level, 0xffff800000000000, true, true},
		{Format4Level, ^uint64(0), true, true},
		{Format4Level, 0xff11000000000000, false, false},
		{Format5Level, 0x800000000000, true, false},
		{Format5Level, 0xffffffffffffff, true, false},
		{Format5Level, 0x100000000000000, false, false},
		{Format5Level, 0xff00000000000000, true, true},
		{FormatPAE, 0xffffffff, true, true},
		{FormatPAE, 0x100000000, false, false},
		{Format32, 0xc0000000, true, true},
		{Format32, 0x08048000, true, false},
		{FormatNone, 0xffffffff, true, true},
	} {
		m := Mode{Format: tt.format}
		if got := m.Canonical(tt.gva); got != tt.want {
			t.Errorf("%v: Canonical(%#x) = %t", tt.format, tt.gva, got)
		}
		if got := m.Kernel(tt.gva); got != tt.kernel {
			t.Errorf("%v: Kernel(%#x) = %t", tt.format, tt.gva, got)
		}
	}
}

func TestRootOf(t *testing.T) {
	for _, tt := range []struct {
		mode      Mode
		cr3, want uint64
	}{
		{Mode{Format: Format4Level}, 0x8000000012345fff, 0x12345000},
		{Mode{Format: Format4Level}, 0x6000000012345018, 0x12345000}, // LAM
		{Mode{Format: Format4Level, PhysicalBits: 36}, 0xffffff000000f000, 0xf000},
		{Mode{Format: Format5Level}, 0x000ffffffffff001, 0x000ffffffffff000},
		{Mode{Format: FormatPAE}, 0xffffffff1234567f, 0x12345660},
		{Mode{Format: Format32}, 0xffffffff12345678, 0x12345000},
	} {
		if got := tt.mode.RootOf(tt.cr3); got != tt.want {
			t.Errorf("%+v: RootOf(%#x) = %#x, want %#x", tt.mode, tt.cr3, got, tt.want)
		}
	}
}

func TestTranslate(t *testing.T) {
	long := Mode{Format: Format4Level, NX: true}
	la57 := Mode{Format: Format5Level, NX: true}
	pae := Mode{Format: FormatPAE, NX: true}
	legacy := Mode{Format: Format32, PSE: true}

	mem := Pages{}
	// Five levels at 0x1000; four at 0x2000: index 0 and 511 of each.
	put64(mem, 0x1000, 0x2000|rwu)
	put64(mem, 0x1000+511*8, 0x2000|rwu)
	put64(mem, 0x2000, 0x3000|rwu)
	put64(mem, 0x2000+511*8, 0x3000|rw)
	put64(mem, 0x2000+1*8, 0x3000|rwu|ps) // reserved at level 4
	put64(mem, 0x2000+2*8, 0x3000|rwu|1<<45)
	put64(mem, 0x2000+3*8, 0xdead000|rwu) // no memory there
	put64(mem, 0x3000,
		0x4000|rwu,
		0x40000000|rwu|ps|nx|entryGlobal, // 1 GiB
		0x40002000|rwu|ps,                // reserved bit 13
		0x40001000|rwu|ps)                // bit 12: PAT
	put64(mem, 0x4000,
		0x5000|entryPresent|entryUser,
		0x200000|rwu|ps,
		0x202000|rwu|ps, // reserved bit 13
		0x5000|rwu|nx)
	put64(mem, 0x5000,
		0x6000|rwu|entryGlobal,
		0x7000|rwu|nx,
		0x8000, // not present
		0x9000|rw|ps)
	// PAE at 0xa020: four entries.
	put64(mem, 0xa020, 0xb000|entryPresent, 0xb000|rw, 0, 0xb000|entryPresent)
	put64(mem, 0xb000, 0xc000|rwu, 0x200000|rwu|ps|nx, 0x400000|rwu|1<<60)
	put64(mem, 0xc000, 0x100006000|rw)
	// 32-bit at 0xd000.
	put32(mem, 0xd000, 0xe000|rwu)
	put32(mem, 0xd004, 0x00400000|rwu|ps)
	put32(mem, 0xd008, 0x00800000|rwu|ps|0x5<<13) // bits 39:32
	put32(mem, 0xd00c, 0x00800000|rwu|ps|1<<21)   // reserved
	put32(mem, 0xe000, 0x6000|entryPresent|entryUser)

	for _, tt := range []struct {
		name string
		mode Mode
		root uint64
		gva  uint64
		want Translation
		err  error
		at   int // level of the error
	}{
		{"off", Mode{}, 0, 0x1234, Translation{GPA: 0x1234, Write: true, User: true, Execute: true}, nil, 0},
		{"off, beyond 4 GiB", Mode{}, 0, 1 << 32, Translation{}, ErrNotCanonical, 0},
		{"4 KiB", long, 0x2000, 0x123, Translation{GPA: 0x6123, PageSize: 4096, User: true, Execute: true, Global: true}, nil, 0},
		{"4 KiB, NX", long, 0x2000, 0x1fff, Translation{GPA: 0x7fff, PageSize: 4096, User: true}, nil, 0},
		{"upper half, kernel only", long, 0x2000, 0xffffff8000000010, Translation{GPA: 0x6010, PageSize: 4096, Execute: true, Global: true}, nil, 0},
		{"NX at level 2", long, 0x2000, 3<<21 | 0x10, Translation{GPA: 0x6010, PageSize: 4096, Write: true, User: true, Global: true}, nil, 0},
		{"PS is PAT at level 1", long, 0x2000, 0x3000, Translation{GPA: 0x9000, PageSize: 4096, Execute: true}, nil, 0},
		{"2 MiB", long, 0x2000, 1<<21 | 0x12345, Translation{GPA: 0x212345, PageSize: 2 << 20, Write: true, User: true, Execute: true}, nil, 0},
		{"1 GiB", long, 0x2000, 1<<30 | 0x1234567, Translation{GPA: 0x41234567, PageSize: 1 << 30, Write: true, User: true, Global: true}, nil, 0},
		{"1 GiB with PAT", long, 0x2000, 3<<30 | 5, Translation{GPA: 0x40000005, PageSize: 1 << 30, Write: true, User: true, Execute: true}, nil, 0},
		{"CR3 with PCID and bit 63", long, 1<<63 | 0x2000 | 0x7ff, 0x123, Translation{GPA: 0x6123, PageSize: 4096, User: true, Execute: true, Global: true}, nil, 0},
		{"not present", long, 0x2000, 0x2000, Translation{}, ErrNotPresent, 1},
		{"not present, level 2", long, 0x2000, 9 << 21, Translation{}, ErrNotPresent, 2},
		{"reserved, 2 MiB", long, 0x2000, 2 << 21, Translation{}, ErrReserved, 2},
		{"reserved, 1 GiB", long, 0x2000, 2 << 30, Translation{}, ErrReserved, 3},
		{"reserved, PS at level 4", long, 0x2000, 1 << 39, Translation{}, ErrReserved, 4},
		{"beyond the physical width", Mode{Format: Format4Level, PhysicalBits: 40}, 0x2000, 2 << 39, Translation{}, ErrReserved, 4},
		{"within the physical width", Mode{Format: Format4Level, PhysicalBits: 46}, 0x2000, 2 << 39, Translation{}, kvmaccess.ErrNoMemslot, 3},
		{"NX without EFER.NXE", Mode{Format: Format4Level}, 0x2000, 0x1000, Translation{}, ErrReserved, 1},
		{"table in no memory", long, 0x2000, 3 << 39, Translation{}, kvmaccess.ErrNoMemslot, 3},
		{"not canonical", long, 0x2000, 1 << 47, Translation{}, ErrNotCanonical, 0},
		{"5-level", la57, 0x1000, 0x123, Translation{GPA: 0x6123, PageSize: 4096, User: true, Execute: true, Global: true}, nil, 0},
		{"5-level, upper half", la57, 0x1000, 0xffff000000000123, Translation{GPA: 0x6123, PageSize: 4096, User: true, Execute: true, Global: true}, nil, 0},
		{"5-level, not present", la57, 0x1000, 1 << 48, Translation{}, ErrNotPresent, 5},
		{"5-level, not canonical", la57, 0x1000, 1 << 56, Translation{}, ErrNotCanonical, 0},
		{"PAE, above 4 GiB", pae, 0xa020, 0x45, Translation{GPA: 0x100006045, PageSize: 4096, Write: true, Execute: true}, nil, 0},
		{"PAE, 2 MiB", pae, 0xa03f, 3<<30 | 1<<21 | 7, Translation{GPA: 0x200007, PageSize: 2 << 20, Write: true, User: true}, nil, 0},
		{"PAE, reserved in the PDPTE", pae, 0xa020, 1 << 30, Translation{}, ErrReserved, 3},
		{"PAE, no PDPTE", pae, 0xa020, 2 << 30, Translation{}, ErrNotPresent, 3},
		{"PAE, reserved high bits", pae, 0xa020, 2 << 21, Translation{}, ErrReserved, 2},
		{"PAE, beyond 4 GiB", pae, 0xa020, 1 << 32, Translation{}, ErrNotCanonical, 0},
		{"32-bit", legacy, 0xd000, 0x77, Translation{GPA: 0x6077, PageSize: 4096, User: true, Execute: true}, nil, 0},
		{"32-bit, 4 MiB", legacy, 0xd000, 0x400000 | 0x12345, Translation{GPA: 0x412345, PageSize: 4 << 20, Write: true, User: true, Execute: true}, nil, 0},
		{"32-bit, 4 MiB above 4 GiB", legacy, 0xd000, 0x800001, Translation{GPA: 0x500800001, PageSize: 4 << 20, Write: true, User: true, Execute: true}, nil, 0},
		{"32-bit, 4 MiB, width of 32", Mode{Format: Format32, PSE: true, PhysicalBits: 32}, 0xd000, 0x800001, Translation{}, ErrReserved, 2},
		{"32-bit, reserved", legacy, 0xd000, 0xc00000, Translation{}, ErrReserved, 2},
		{"32-bit, without PSE", Mode{Format: Format32}, 0xd000, 0x400000, Translation{}, kvmaccess.ErrNoMemslot, 1},
		{"unknown mode", Mode{Format: 99}, 0, 0, Translation{}, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Translate(context.Background(), mem, tt.mode, tt.root, tt.gva)
			if tt.mode.Format == 99 {
				if err == nil {
					t.Fatal("no error")
				}
				return
			}
			if !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			var walk *WalkError
			if err != nil && (!errors.As(err, &walk) || walk.Level != tt.at || walk.GVA != tt.gva || walk.Error() == "") {
				t.Errorf("error %#v, want level %d", err, tt.at)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// counting counts reads: hostile tables must not make a walk long.
type counting struct {
	Memory
	reads int
}

func (c *counting) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	c.reads++
	return c.Memory.ReadPhysical(ctx, gpa, p)
}

func TestTranslateLoop(t *testing.T) {
	mem := Pages{}
	for i := range uint64(512) {
		put64(mem, 0x1000+i*8, 0x1000|rwu) // each table is itself
	}
	for _, format := range []Format{Format32, FormatPAE, Format4Level, Format5Level} {
		c := &counting{Memory: mem}
		_, err := Translate(context.Background(), c, Mode{Format: format}, 0x1000, 0x12345678)
		if c.reads > 5 {
			t.Errorf("%v: %d reads (%v)", format, c.reads, err)
		}
	}
}

func TestReadVirtual(t *testing.T) {
	mem := Pages{}
	put64(mem, 0x2000, 0x3000|rw)
	put64(mem, 0x2000+511*8, 0x3000|rw)
	put64(mem, 0x3000, 0x4000|rw)
	put64(mem, 0x3000+511*8, 0x4000|rw)
	put64(mem, 0x4000, 0x5000|rw)
	put64(mem, 0x4000+511*8, 0x5000|rw)
	put64(mem, 0x5000, 0x8000|rw, 0x7000|rw, 0)
	put64(mem, 0x5000+511*8, 0x6000|rw)
	mem.WritePhysical(0x8ffe, []byte("ab"))
	mem.WritePhysical(0x7000, []byte("cd"))
	mem.WritePhysical(0x6ffc, []byte("last"))
	mode := Mode{Format: Format4Level}
	p := make([]byte, 4)
	if err := ReadVirtual(context.Background(), mem, mode, 0x2000, 0xffe, p); err != nil || string(p) != "abcd" {
		t.Errorf("across pages: %q, %v", p, err)
	}
	if err := ReadVirtual(context.Background(), mem, mode, 0x2000, 0x1ffe, p); !errors.Is(err, ErrNotPresent) {
		t.Errorf("into an unmapped page: %v", err)
	}
	if err := ReadVirtual(context.Background(), mem, mode, 0x2000, ^uint64(3), p); err != nil || string(p) != "last" {
		t.Errorf("to the end: %q, %v", p, err)
	}
	if err := ReadVirtual(context.Background(), mem, mode, 0x2000, ^uint64(1), p); !errors.Is(err, ErrNotCanonical) {
		t.Errorf("beyond the end: %v", err)
	}
}

func TestExecutableExtent(t *testing.T) {
	mem := Pages{}
	const base = 0xffffffff80000000
	put64(mem, 0x2000+511*8, 0x3000|rw)
	put64(mem, 0x3000+510*8, 0x4000|rw)
	put64(mem, 0x4000, 0, 0x200000|entryPresent|ps, 0x400000|entryPresent|ps, 0x5000|rw, 0x800000|rw|ps|nx)
	put64(mem, 0x5000, 0x9000|entryPresent, 0xa000|entryPresent, 0xb000|entryPresent|nx)
	mode := Mode{Format: Format4Level, NX: true}
	for _, tt := range []struct {
		gva, limit uint64
		want       Extent
		fails      bool
	}{
		{base + 0x200123, 1 << 30, Extent{base + 0x200000, base + 0x602000}, false},
		{base + 0x601000, 1 << 30, Extent{base + 0x200000, base + 0x602000}, false},
		{base + 0x600000, 1, Extent{base + 0x400000, base + 0x601000}, false},
		{base + 0x800000, 1 << 30, Extent{}, true}, // data
		{base, 1 << 30, Extent{}, true},            // unmapped
	} {
		got, err := ExecutableExtent(context.Background(), mem, mode, 0x2000, tt.gva, tt.limit)
		if tt.fails {
			if err == nil {
				t.Errorf("%#x: %#x, want an error", tt.gva, got)
			}
			continue
		}
		if tt.limit == 1 { // one page more to either side at most
			if err != nil || !got.Contains(tt.gva) || got.Size() > 4<<20 {
				t.Errorf("%#x: %#x, %v", tt.gva, got, err)
			}
			continue
		}
		if err != nil || got != tt.want {
			t.Errorf("%#x: %#x, %v, want %#x", tt.gva, got, err, tt.want)
		}
	}
}

// TestExecutableExtentHostile: tables that map everything end with the limit.
func TestExecutableExtentHostile(t *testing.T) {
	mem := Pages{}
	for i := range uint64(512) {
		put64(mem, 0x1000+i*8, 0x1000|rw)
	}
	const limit = 1 << 20
	x, err := ExecutableExtent(context.Background(), mem, Mode{Format: Format4Level}, 0x1000, 0xffffffff81000000, limit)
	if err != nil || x.Size() > 2*limit+2*4096 {
		t.Errorf("%#x (%d bytes), %v", x, x.Size(), err)
	}
}

func TestKernelRoot(t *testing.T) {
	const probe = 0xffffffff81000000
	mem := Pages{}
	// A pair of roots at 0x2000 (kernel) and 0x3000 (user).
	put64(mem, 0x2000+511*8, 0x4000|rw)
	put64(mem, 0x4000+510*8, 0x40000000|rw|ps)
	put64(mem, 0x3000, 0)
	put64(mem, 0x7000, 0)
	mode := Mode{Format: Format4Level}
	for _, tt := range []struct {
		cr3, want uint64
		fails     bool
	}{
		{0x2000, 0x2000, false},
		{0x2001, 0x2000, false},                 // PCID
		{0x3000, 0x2000, false},                 // user half
		{1<<63 | 0x3000 | 0x802, 0x2000, false}, // user half, PCID, no flush
		{0x7000, 0, true},                       // its neighbour is no table
		{0x6000, 0, true},
	} {
		got, err := KernelRoot(context.Background(), mem, mode, tt.cr3, probe)
		if (err != nil) != tt.fails || got != tt.want {
			t.Errorf("KernelRoot(%#x) = %#x, %v", tt.cr3, got, err)
		}
	}
	if got := mode.KernelHalf(0x3801, true); got != 0x2000 {
		t.Errorf("KernelHalf, isolated: %#x", got)
	}
	if got := mode.KernelHalf(0x3801, false); got != 0x3000 {
		t.Errorf("KernelHalf, not isolated: %#x", got)
	}
}

func TestPageCache(t *testing.T) {
	mem := Pages{}
	mem.WritePhysical(0x1ffe, []byte("abcd"))
	c := &counting{Memory: mem}
	cache := NewPageCache(c)
	p := make([]byte, 4)
	for range 3 {
		if err := cache.ReadPhysical(context.Background(), 0x1ffe, p); err != nil || string(p) != "abcd" {
			t.Fatalf("%q, %v", p, err)
		}
	}
	if c.reads != 1 {
		t.Errorf("%d reads of two pages at once", c.reads)
	}
	for range 2 {
		if err := cache.ReadPhysical(context.Background(), 0x1000, make([]byte, bulk)); err == nil {
			t.Error("absent pages were read")
		}
	}
	if c.reads != 3 {
		t.Errorf("%d reads, two of them of too much to keep", c.reads)
	}
	if err := cache.ReadPhysical(context.Background(), 0x5000, p); !errors.Is(err, kvmaccess.ErrNoMemslot) {
		t.Errorf("absent page: %v", err)
	}
	if NewPageCache(cache) != cache {
		t.Error("a cache of a cache")
	}
}

// fuzzMemory is one page of table, wherever one looks.
type fuzzMemory struct{ page []byte }

func (f fuzzMemory) ReadPhysical(_ context.Context, gpa uint64, p []byte) error {
	if gpa >= 1<<52 {
		return fmt.Errorf("%#x: %w", gpa, kvmaccess.ErrNoMemslot)
	}
	for i := range p {
		p[i] = 0
		if at := int((gpa + uint64(i)) & 4095); at < len(f.page) {
			p[i] = f.page[at]
		}
	}
	return nil
}

func FuzzTranslate(f *testing.F) {
	f.Add(uint8(3), true, uint8(0), uint64(0x1000), uint64(0xffffffff81000000), []byte{0x63, 0x10, 0, 0, 0, 0, 0, 0x80})
	f.Add(uint8(4), false, uint8(39), ^uint64(0), uint64(1)<<55, []byte{0xe7, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Add(uint8(2), true, uint8(52), uint64(0x20), uint64(0xc0000000), []byte{1})
	f.Add(uint8(1), true, uint8(36), uint64(0), uint64(0x400000), []byte{0x87, 0xe0, 0x1f, 0})
	for _, name := range attachable {
		s := attachSnapshot(f, name)
		mode := ModeOf(&s.CPUs[0].Registers)
		table := s.Pages[mode.RootOf(s.CPUs[0].CR3)]
		for _, gva := range []uint64{imageStart + 16<<20, s.CPUs[0].IDTR.Base, s.CPUs[0].RIP} {
			f.Add(uint8(mode.Format), mode.NX, uint8(mode.PhysicalBits), s.CPUs[0].CR3, gva, table[:])
		}
	}
	f.Fuzz(func(t *testing.T, format uint8, flag bool, bits uint8, root, gva uint64, page []byte) {
		mode := Mode{Format: Format(format % 6), PSE: flag, NX: flag, PhysicalBits: int(bits)}
		mem := &counting{Memory: fuzzMemory{page}}
		tr, err := Translate(context.Background(), mem, mode, root, gva)
		if mem.reads > 5 {
			t.Fatalf("%d reads", mem.reads)
		}
		if err != nil {
			var walk *WalkError
			if !errors.As(err, &walk) || err.Error() == "" {
				t.Fatalf("untyped error %v", err)
			}
			if tr != (Translation{}) {
				t.Fatalf("error %v with a result %+v", err, tr)
			}
			return
		}
		if tr.GPA >= 1<<52 || tr.PageSize != 0 && tr.GPA&(tr.PageSize-1) != gva&(tr.PageSize-1) {
			t.Fatalf("%#x -> %+v", gva, tr)
		}
		ExecutableExtent(context.Background(), fuzzMemory{page}, mode, root, gva, 1<<16)
	})
}
