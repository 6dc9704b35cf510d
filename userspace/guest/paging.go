// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Bits of control registers and EFER that decide how, and how well, a guest's
// memory is guarded (Intel SDM vol. 3, 2.5 "Control Registers"; AMD APM
// vol. 2, 3.1).
const (
	CR0PE = 1 << 0  // protected mode
	CR0WP = 1 << 16 // the kernel, too, cannot write read-only pages
	CR0PG = 1 << 31 // paging

	CR4PSE      = 1 << 4
	CR4PAE      = 1 << 5
	CR4UMIP     = 1 << 11
	CR4LA57     = 1 << 12
	CR4VMXE     = 1 << 13 // VMs, by Intel's VMX
	CR4FSGSBASE = 1 << 16
	CR4PCIDE    = 1 << 17
	CR4SMEP     = 1 << 20
	CR4SMAP     = 1 << 21
	CR4PKE      = 1 << 22
	CR4CET      = 1 << 23
	CR4FRED     = 1 << 32

	EFERSCE = 1 << 0  // SYSCALL
	EFERLME = 1 << 8  // long mode enabled
	EFERLMA = 1 << 10 // long mode active
	EFERNXE = 1 << 11 // no-execute
)

// Format is a format of page tables.
type Format int

const (
	FormatNone   Format = iota // paging is off: linear addresses are physical
	Format32                   // two levels of 4-byte entries
	FormatPAE                  // three levels of 8-byte entries
	Format4Level               // 48-bit linear addresses
	Format5Level               // 57-bit linear addresses
)

// String names the format as manuals do.
func (f Format) String() string {
	switch f {
	case FormatNone:
		return "no paging"
	case Format32:
		return "32-bit paging"
	case FormatPAE:
		return "PAE paging"
	case Format4Level:
		return "4-level paging"
	case Format5Level:
		return "5-level paging"
	}
	return fmt.Sprintf("Format(%d)", int(f))
}

// Mode is how a vCPU translates addresses.
type Mode struct {
	Format Format
	PSE    bool // 4 MiB pages, of Format32 only
	NX     bool // bit 63 of an entry forbids execution; reserved otherwise

	// PhysicalBits is the guest's physical address width, 32 to 52: higher
	// bits of an entry are reserved. Registers do not tell it. 0 is 52.
	PhysicalBits int
}

// ModeOf tells the mode from CR0, CR4 and EFER.
func ModeOf(r *kvmaccess.Registers) Mode {
	m := Mode{PSE: r.CR4&CR4PSE != 0, NX: r.EFER&EFERNXE != 0}
	switch {
	case r.CR0&CR0PG == 0:
		m.Format = FormatNone
	case r.EFER&EFERLMA != 0 && r.CR4&CR4LA57 != 0:
		m.Format = Format5Level
	case r.EFER&EFERLMA != 0:
		m.Format = Format4Level
	case r.CR4&CR4PAE != 0:
		m.Format = FormatPAE
	default:
		m.Format = Format32
	}
	return m
}

// Long says whether the mode is that of a 64-bit kernel.
func (m Mode) Long() bool { return m.Format == Format4Level || m.Format == Format5Level }

// Canonical says whether gva is an address at all in this mode: sign-extended
// from bit 47 or 56, or below 4 GiB.
func (m Mode) Canonical(gva uint64) bool {
	switch m.Format {
	case Format4Level:
		return uint64(int64(gva<<16)>>16) == gva
	case Format5Level:
		return uint64(int64(gva<<7)>>7) == gva
	default:
		return gva>>32 == 0
	}
}

// Kernel says whether gva is canonical and in the half, or in a 32-bit guest
// the upper quarter to half, that kernels keep for themselves. (A 32-bit Linux
// may be split at 1, 2 or 3 GiB; 1 GiB is the lowest.)
func (m Mode) Kernel(gva uint64) bool {
	if m.Long() {
		return m.Canonical(gva) && gva>>63 == 1
	}
	return gva>>32 == 0 && gva >= 0x40000000
}

// RootOf strips from a CR3 what is no address: PCID, or PCD and PWT, the
// LAM bits, and bit 63.
func (m Mode) RootOf(cr3 uint64) uint64 {
	switch m.Format {
	case Format32:
		return cr3 & 0xfffff000
	case FormatPAE:
		return cr3 & 0xffffffe0
	default:
		return cr3 & m.addressMask()
	}
}

func (m Mode) physicalBits() int {
	if m.PhysicalBits < 32 || m.PhysicalBits > 52 {
		return 52
	}
	return m.PhysicalBits
}

func (m Mode) addressMask() uint64 { return (1<<m.physicalBits() - 1) &^ 0xfff }

// Bits of a page-table entry (Intel SDM vol. 3, 4.2 to 4.5).
const (
	entryPresent = 1 << 0
	entryWrite   = 1 << 1
	entryUser    = 1 << 2
	entryLarge   = 1 << 7
	entryGlobal  = 1 << 8
	entryNX      = 1 << 63
)

// What a walk can find wrong; all are wrapped in a *WalkError.
var (
	ErrNotCanonical = errors.New("address is not canonical")
	ErrNotPresent   = errors.New("page is not present")
	ErrReserved     = errors.New("reserved bits are set in a page-table entry")
)

// WalkError says where a translation ended.
type WalkError struct {
	GVA      uint64
	Format   Format
	Level    int    // of the entry: 5 to 1; 0: before the first one
	EntryGPA uint64 // where the entry lies
	Entry    uint64
	Err      error // ErrNotCanonical, ErrNotPresent, ErrReserved, or Memory's
}

func (e *WalkError) Error() string {
	if e.Level == 0 {
		return fmt.Sprintf("guest-virtual %#x: %v (%v)", e.GVA, e.Err, e.Format)
	}
	if errors.Is(e.Err, ErrNotPresent) || errors.Is(e.Err, ErrReserved) {
		return fmt.Sprintf("guest-virtual %#x: %v: level %d entry %#x at guest-physical %#x (%v)",
			e.GVA, e.Err, e.Level, e.Entry, e.EntryGPA, e.Format)
	}
	return fmt.Sprintf("guest-virtual %#x: read level %d entry at guest-physical %#x: %v",
		e.GVA, e.Level, e.EntryGPA, e.Err)
}

// Unwrap returns Err.
func (e *WalkError) Unwrap() error { return e.Err }

// Translation is where a guest-virtual address lies and what may be done there.
type Translation struct {
	GPA      uint64 `json:"gpa"`
	PageSize uint64 `json:"page_size"` // bytes: 4 KiB, 2 MiB, 4 MiB or 1 GiB; 0: paging is off
	Write    bool   `json:"write"`     // at all levels; the kernel may despite it while CR0.WP is clear
	User     bool   `json:"user"`
	Execute  bool   `json:"execute"`
	Global   bool   `json:"global"`
}

// Translate walks the page tables at root, which is a CR3 or RootOf one. At
// most five entries are read, whatever the tables hold. The error is a
// *WalkError.
func Translate(ctx context.Context, mem Memory, m Mode, root, gva uint64) (Translation, error) {
	var t Translation
	if !m.Canonical(gva) {
		return t, &WalkError{GVA: gva, Format: m.Format, Err: ErrNotCanonical}
	}
	t.Write, t.User, t.Execute = true, true, true
	level, size, bits := 0, 8, 9
	switch m.Format {
	case FormatNone:
		t.GPA = gva
		return t, nil
	case Format32:
		level, size, bits = 2, 4, 10
	case FormatPAE:
		level = 3
	case Format4Level:
		level = 4
	case Format5Level:
		level = 5
	default:
		return Translation{}, &WalkError{GVA: gva, Format: m.Format, Err: errors.New("unknown paging mode")}
	}

	var buf [8]byte
	table := m.RootOf(root)
	for ; ; level-- {
		shift := 12 + bits*(level-1)
		index := gva >> shift & (1<<bits - 1)
		if m.Format == FormatPAE && level == 3 {
			index = gva >> 30 & 3
		}
		e := WalkError{GVA: gva, Format: m.Format, Level: level, EntryGPA: table + index*uint64(size)}
		if err := mem.ReadPhysical(ctx, e.EntryGPA, buf[:size]); err != nil {
			e.Err = err
			return Translation{}, &e
		}
		if size == 4 {
			e.Entry = uint64(binary.LittleEndian.Uint32(buf[:]))
		} else {
			e.Entry = binary.LittleEndian.Uint64(buf[:])
		}
		if e.Entry&entryPresent == 0 {
			e.Err = ErrNotPresent
			return Translation{}, &e
		}
		leaf := level == 1 || m.large(level, e.Entry)
		if e.Entry&m.reserved(level, leaf) != 0 {
			e.Err = ErrReserved
			return Translation{}, &e
		}
		if m.Format != FormatPAE || level != 3 { // PAE's PDPTEs grant nothing
			t.Write = t.Write && e.Entry&entryWrite != 0
			t.User = t.User && e.Entry&entryUser != 0
			t.Execute = t.Execute && (size == 4 || e.Entry&entryNX == 0)
		}
		if leaf {
			t.PageSize = 1 << shift
			t.Global = e.Entry&entryGlobal != 0
			t.GPA = m.base(level, e.Entry) | gva&(t.PageSize-1)
			return t, nil
		}
		if size == 4 {
			table = e.Entry & 0xfffff000
		} else {
			table = e.Entry & m.addressMask()
		}
	}
}

// large says whether an entry above level 1 maps a page.
func (m Mode) large(level int, entry uint64) bool {
	if entry&entryLarge == 0 {
		return false
	}
	switch m.Format {
	case Format32:
		return m.PSE
	case FormatPAE:
		return level == 2
	default:
		return level == 2 || level == 3
	}
}

// reserved is the mask of bits that must be clear in a present entry (Intel
// SDM vol. 3, tables 4-4 to 4-20).
func (m Mode) reserved(level int, leaf bool) uint64 {
	if m.Format == Format32 {
		if level == 2 && leaf { // bits 20:13 are address bits 39:32
			high := min(m.physicalBits(), 40) - 32
			return (1<<22 - 1) &^ (1<<(13+high) - 1)
		}
		return 0
	}
	mask := uint64(1<<52-1) &^ (1<<m.physicalBits() - 1)
	if m.Format == FormatPAE {
		mask |= 0x7ff << 52
		if level == 3 {
			return mask | entryNX | 0x1e6
		}
	}
	if !m.NX {
		mask |= entryNX
	}
	switch {
	case level >= 4:
		mask |= entryLarge
	case level > 1 && leaf: // but bit 12, PAT
		mask |= (1<<(12+9*(level-1)) - 1) &^ (1<<13 - 1)
	}
	return mask
}

// base is the guest-physical address of the page that a leaf maps.
func (m Mode) base(level int, entry uint64) uint64 {
	if m.Format == Format32 {
		if level == 2 {
			return entry&0xffc00000 | (entry>>13&0xff)<<32
		}
		return entry & 0xfffff000
	}
	return entry & m.addressMask() &^ (1<<(12+9*(level-1)) - 1)
}

// ReadVirtual fills p from guest-virtual address gva on, page by page.
func ReadVirtual(ctx context.Context, mem Memory, m Mode, root, gva uint64, p []byte) error {
	for len(p) > 0 {
		t, err := Translate(ctx, mem, m, root, gva)
		if err != nil {
			return err
		}
		n := 4096 - gva&4095
		if n > uint64(len(p)) {
			n = uint64(len(p))
		}
		if err := mem.ReadPhysical(ctx, t.GPA, p[:n]); err != nil {
			return fmt.Errorf("guest-virtual %#x: read guest-physical %#x: %w", gva, t.GPA, err)
		}
		p = p[n:]
		gva += n
		if len(p) > 0 && gva == 0 {
			return &WalkError{GVA: gva, Format: m.Format, Err: ErrNotCanonical}
		}
	}
	return nil
}

// Extent is a run of guest-virtual addresses, End excluded.
type Extent struct {
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
}

// Contains says whether gva lies in the extent.
func (x Extent) Contains(gva uint64) bool { return gva >= x.Start && gva < x.End }

// Size in bytes.
func (x Extent) Size() uint64 { return x.End - x.Start }

// ExecutableExtent finds the run of pages around gva that only the kernel may
// execute: of an address in kernel text that is the text of the kernel image,
// which unmapped, or data, pages follow and precede. It looks at most limit
// bytes to either side.
func ExecutableExtent(ctx context.Context, mem Memory, m Mode, root, gva, limit uint64) (Extent, error) {
	mem = NewPageCache(mem)
	t, err := Translate(ctx, mem, m, root, gva)
	if err != nil {
		return Extent{}, err
	}
	if !kernelText(t) {
		return Extent{}, fmt.Errorf("guest-virtual %#x is not mapped as kernel text (user %t, execute %t)", gva, t.User, t.Execute)
	}
	page := func(t Translation) uint64 { return max(t.PageSize, 4096) }
	x := Extent{Start: gva &^ (page(t) - 1)}
	x.End = x.Start + page(t)
	for x.End != 0 && x.End-gva < limit && m.Canonical(x.End) {
		t, err := Translate(ctx, mem, m, root, x.End)
		if err != nil || !kernelText(t) {
			if unreadable(err) {
				return x, err
			}
			break
		}
		x.End = x.End&^(page(t)-1) + page(t)
	}
	for x.Start != 0 && gva-x.Start < limit && m.Canonical(x.Start-1) {
		t, err := Translate(ctx, mem, m, root, x.Start-1)
		if err != nil || !kernelText(t) {
			if unreadable(err) {
				return x, err
			}
			break
		}
		x.Start = (x.Start - 1) &^ (page(t) - 1)
	}
	return x, nil
}

func kernelText(t Translation) bool { return t.Execute && !t.User }

// unreadable tells a table that could not be read from one that maps nothing.
func unreadable(err error) bool {
	return err != nil && !errors.Is(err, ErrNotPresent) && !errors.Is(err, ErrReserved) && !errors.Is(err, ErrNotCanonical)
}
