// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// A 64-bit Linux maps its image into these addresses, at a multiple of 2 MiB
// and with one distance between virtual and physical addresses
// (arch/x86/include/asm/page_64_types.h: __START_KERNEL_map,
// KERNEL_IMAGE_SIZE).
const (
	imageStart = 0xffffffff80000000
	imageEnd   = 0xffffffffc0000000
	linkedText = 0xffffffff81000000 // where _text is without KASLR

	smallestImage = 4 << 20
	// fewestGates of exceptions are set up before anything else is believed.
	fewestGates = 16
)

// location is a kernel image as page tables have it.
type location struct {
	space    *Space
	extent   Extent // from the first page to the last one, with the holes of freed memory
	physical uint64 // guest-physical address of extent.Start
	parts    []Mapping
	handlers []uint64 // of the exceptions, that lie in the image
	gates    []Gate   // of the exceptions
	cpus     int      // that agree
	booted   bool     // a vCPU runs a program
	btf      Extent   // of the symbol table that fits: where it has the types
}

// gpa of an address in the image.
func (l *location) gpa(gva uint64) uint64 { return l.physical + (gva - l.extent.Start) }

// mapped says whether the image has a page at gva, and what may be done there.
func (l *location) mapped(gva uint64) (Mapping, bool) {
	i, found := slices.BinarySearchFunc(l.parts, gva, func(m Mapping, gva uint64) int { return cmp.Compare(m.GVA, gva) })
	if !found {
		i--
	}
	if i < 0 || gva-l.parts[i].GVA >= l.parts[i].Size {
		return Mapping{}, false
	}
	return l.parts[i], true
}

// mostLost bounds how much of an image may be in no memory, in bytes.
const mostLost = 8 << 20

// section is a run of the image. Pages that lie in no memory read as zeros, as
// long as they are few.
func (l *location) section(ctx context.Context, x Extent) *section {
	s := &section{gva: x.Start, data: make([]byte, 0, x.Size())}
	read := func(gva uint64, p []byte) error {
		return l.space.Memory.ReadPhysical(ctx, l.gpa(gva), p)
	}
	s.read = func(at int, p []byte) error {
		gva := x.Start + uint64(at)
		err := read(gva, p)
		for errors.Is(err, kvmaccess.ErrNoMemslot) && len(p) > 0 && s.lost < mostLost {
			n := min(len(p), 4096-int(gva&4095))
			one := read(gva, p[:n])
			if errors.Is(one, kvmaccess.ErrNoMemslot) {
				clear(p[:n])
				s.lost += n
			} else if one != nil {
				err = one
				break
			}
			if p, gva = p[n:], gva+uint64(n); len(p) == 0 {
				err = nil
			}
		}
		if err != nil {
			return fmt.Errorf("kernel image at %#x: %w", gva, err)
		}
		return nil
	}
	return s
}

// locate finds kernel images, the likeliest first: by each vCPU that may run a
// kernel, or, where there is none, in memory alone. The error wraps one of
// Attach's.
func locate(ctx context.Context, mem Memory, cpus []kvmaccess.VCPU, regions []Region) ([]*location, error) {
	if len(cpus) == 0 {
		return locateByMemory(ctx, mem, regions)
	}
	var found []*location
	reason := fmt.Errorf("%w: no vCPU has run", ErrNotBooted)
	booted := false
	for i := range cpus {
		v := &cpus[i]
		some, err := locateByCPU(ctx, mem, v)
		if err != nil {
			// What the first vCPU is like tells most.
			if i == 0 || errors.Is(reason, ErrNotBooted) && !errors.Is(err, ErrNotBooted) {
				reason = err
			}
			continue
		}
		booted = booted || v.CPL == 3
		for _, l := range some {
			same := func(o *location) bool { return o.extent == l.extent && o.physical == l.physical }
			if at := slices.IndexFunc(found, same); at >= 0 {
				found[at].cpus++
				if len(found[at].handlers) < len(l.handlers) {
					found[at].handlers, found[at].gates = l.handlers, l.gates
				}
				continue
			}
			found = append(found, l)
		}
	}
	if len(found) == 0 {
		return nil, reason
	}
	slices.SortStableFunc(found, func(a, b *location) int {
		return cmp.Or(cmp.Compare(b.cpus, a.cpus), cmp.Compare(len(b.handlers), len(a.handlers)))
	})
	for _, l := range found {
		l.booted = booted
	}
	return found, nil
}

// locateByCPU finds the image that the vCPU's interrupt table leads to, by its
// page tables or, where page-table isolation has it on the user's, by the
// kernel's beside them.
func locateByCPU(ctx context.Context, mem Memory, v *kvmaccess.VCPU) ([]*location, error) {
	mode := ModeOf(&v.Registers)
	// With FRED a kernel has no interrupt table: its page tables tell.
	fred := mode.Long() && v.CR4&CR4FRED != 0
	not := func(kind error, format string, args ...any) ([]*location, error) {
		return nil, fmt.Errorf("%w: vCPU %d %w", kind, v.ID, fmt.Errorf(format, args...))
	}
	switch {
	case v.Condition == kvmaccess.ConditionNew:
		return not(ErrNotBooted, "has never run")
	case v.Flags&kvmaccess.VCPUNested != 0:
		return not(ErrNotBooted, "runs a nested guest")
	case v.Flags&kvmaccess.VCPUSMM != 0:
		return not(ErrNotBooted, "is in system management mode")
	case v.CR0&CR0PE == 0:
		return not(ErrNotBooted, "is in real mode: in reset or in firmware")
	case mode.Format == FormatNone:
		return not(ErrNotBooted, "has paging off: in firmware or a boot loader")
	case v.GDTR.Limit == 0 || v.IDTR.Limit == 0 && !fred:
		return not(ErrNotBooted, "has no descriptor tables yet")
	case !fred && !mode.Kernel(v.IDTR.Base):
		return not(ErrNotBooted, "has the interrupt table of firmware or a boot loader, at %#x", v.IDTR.Base)
	}
	var idt []byte
	if !fred {
		idt = make([]byte, min(int(v.IDTR.Limit)+1, 256*GateSize(mode.Long())))
	}
	if err := ReadVirtual(ctx, mem, mode, v.CR3, v.IDTR.Base, idt); err != nil {
		if unreadable(err) && !errors.Is(err, kvmaccess.ErrNoMemslot) {
			return nil, fmt.Errorf("interrupt table of vCPU %d: %w", v.ID, err)
		}
		if e := mem.ReadPhysical(ctx, mode.RootOf(v.CR3), make([]byte, 8)); errors.Is(e, kvmaccess.ErrNoMemslot) {
			return not(ErrNoMemory, "has its page tables where there is none: %w", e)
		}
		return not(ErrNotBooted, "has no interrupt table that can be read: %w", err)
	}
	if !mode.Long() {
		return not(Err32Bit, "has %v", mode.Format)
	}
	var handlers []uint64
	var gates []Gate
	for _, g := range ParseIDT(idt, true)[:min(32, len(idt)/16)] {
		if !g.Present {
			continue
		}
		gates = append(gates, g)
		if g.Handler >= imageStart && g.Handler < imageEnd {
			handlers = append(handlers, g.Handler)
		}
	}
	if len(gates) < fewestGates && !fred {
		return not(ErrNotBooted, "has gates for %d exceptions only", len(gates))
	}
	elsewhere := len(gates) - len(handlers)
	if elsewhere >= len(handlers) {
		// Another system's, or all hooked: the page tables tell which.
		handlers = nil
	}
	root := mode.RootOf(v.CR3)
	roots := []uint64{root}
	if root&userHalf != 0 {
		roots = append(roots, root&^userHalf)
	}
	var found []*location
	var reason error
	for _, root := range roots {
		space := &Space{Memory: mem, Mode: mode, Root: root}
		l, err := imageBy(ctx, space, handlers)
		if err != nil && handlers != nil {
			l, err = imageBy(ctx, space, nil) // they are a module's
		}
		if err != nil {
			reason = errors.Join(reason, fmt.Errorf("page tables at %#x: %w", root, err))
			continue
		}
		l.gates, l.cpus = gates, 1
		found = append(found, l)
	}
	if len(found) == 0 {
		return not(ErrNotLinux, "has %d of %d exceptions' handlers outside %#x-%#x, where Linux has its kernel, and no kernel there: %w", elsewhere, len(gates), uint64(imageStart), uint64(imageEnd), reason)
	}
	// Of isolated page tables the user's map next to nothing of the kernel.
	slices.SortStableFunc(found, func(a, b *location) int { return cmp.Compare(b.extent.Size(), a.extent.Size()) })
	return found, nil
}

// imageBy finds the image that page tables map: what lies at the distance from
// physical memory that most handlers have or, without any, most of what is
// mapped. A page that was mapped elsewhere instead is a hole in it.
func imageBy(ctx context.Context, space *Space, handlers []uint64) (*location, error) {
	var all []Mapping
	err := space.Mappings(ctx, imageStart, imageEnd, func(m Mapping) error {
		if !m.User {
			all = append(all, m)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	votes := map[uint64]uint64{}
	for _, m := range all {
		if len(handlers) == 0 {
			votes[m.GVA-m.GPA] += m.Size
		}
		for _, h := range handlers {
			if h-m.GVA < m.Size && m.Executable {
				votes[m.GVA-m.GPA]++
			}
		}
	}
	distance, most := uint64(0), uint64(0)
	for d, n := range votes {
		if n > most || n == most && d < distance {
			distance, most = d, n
		}
	}
	l := &location{space: space}
	for _, m := range all {
		if m.GVA-m.GPA != distance {
			continue
		}
		if n := len(l.parts) - 1; n >= 0 {
			last := &l.parts[n]
			if last.GVA+last.Size == m.GVA && last.Writable == m.Writable && last.Executable == m.Executable {
				last.Size += m.Size
				continue
			}
		}
		l.parts = append(l.parts, m)
	}
	size := uint64(0)
	for _, m := range l.parts {
		size += m.Size
	}
	if size < smallestImage {
		return nil, fmt.Errorf("only %d KiB of it are mapped", size>>10)
	}
	last := l.parts[len(l.parts)-1]
	l.extent = Extent{l.parts[0].GVA, last.GVA + last.Size}
	l.physical = l.extent.Start - distance
	for _, h := range handlers {
		if m, ok := l.mapped(h); ok && m.Executable {
			l.handlers = append(l.handlers, h)
		}
	}
	return l, nil
}

// Bounds of the search of memory without vCPUs.
const (
	searchChunk = 1 << 20
	mostPlaces  = 64
)

// vmcoreinfo begins the page that a kernel leaves for crash dumps
// (kernel/vmcore_info.c).
var vmcoreinfo = []byte("OSRELEASE=")

// locateByMemory looks through all memory for the root of a kernel's page
// tables: by what the kernel noted for a crash dump, and by what the last
// entry of such a root must be like. Of several kernels, of which all but one
// are left from before a kexec, that of which the most roots there are runs.
func locateByMemory(ctx context.Context, mem Memory, regions []Region) ([]*location, error) {
	if len(regions) == 0 {
		return nil, fmt.Errorf("%w: no vCPU's state is at hand, and where there is memory is not known", ErrNoMemory)
	}
	type top struct {
		entry uint64
		roots int
		first uint64
	}
	tops := map[uint64]*top{}
	var spaces []*Space
	any := false
	buf := make([]byte, searchChunk)
	for _, r := range regions {
		for at := r.GPA &^ 4095; at < r.GPA+r.Size; at += searchChunk {
			p := buf[:min(searchChunk, r.GPA+r.Size-at)]
			if err := mem.ReadPhysical(ctx, at, p); err != nil {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				continue
			}
			any = true
			for off := 0; off+4096 <= len(p); off += 4096 {
				page := p[off : off+4096]
				if bytes.HasPrefix(page, vmcoreinfo) && len(spaces) < mostPlaces {
					spaces = append(spaces, spacesOfNote(mem, page)...)
					continue
				}
				// The last entry leads on to a table, for the kernel only.
				e := binary.LittleEndian.Uint64(page[4088:])
				if e&(entryPresent|entryLarge|entryUser) != entryPresent && e&(entryPresent|entryLarge|entryWrite) != entryPresent|entryWrite || e&^(1<<52-1) != 0 || e&(1<<52-4096) == 0 {
					continue
				}
				key := e & (1<<52 - 4096)
				t := tops[key]
				if t == nil {
					if len(tops) >= 1<<20 {
						continue
					}
					t = &top{entry: key, first: at + uint64(off)}
					tops[key] = t
				}
				t.roots++
			}
		}
	}
	if !any {
		return nil, fmt.Errorf("%w (%d regions)", ErrNoMemory, len(regions))
	}
	order := make([]*top, 0, len(tops))
	for _, t := range tops {
		if leadsToImage(ctx, mem, t.entry) {
			order = append(order, t)
		}
	}
	slices.SortFunc(order, func(a, b *top) int {
		return cmp.Or(cmp.Compare(b.roots, a.roots), cmp.Compare(a.first, b.first))
	})
	for _, t := range order[:min(len(order), mostPlaces)] {
		for _, f := range []Format{Format4Level, Format5Level} {
			spaces = append(spaces, &Space{Memory: mem, Mode: Mode{Format: f, NX: true}, Root: t.first})
		}
	}
	var found []*location
	for _, s := range spaces {
		l, err := imageBy(ctx, s, nil)
		if err != nil {
			continue
		}
		if !slices.ContainsFunc(found, func(o *location) bool {
			return o.extent == l.extent && o.physical == l.physical && o.space.Mode == l.space.Mode
		}) {
			found = append(found, l)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: no page tables of a 64-bit Linux kernel are in its memory", ErrNotLinux)
	}
	return found, nil
}

// leadsToImage says whether the table at gpa, or one that its last entry leads
// to, has what Linux puts into the last but one entry of its third level: the
// kernel image.
func leadsToImage(ctx context.Context, mem Memory, gpa uint64) bool {
	var p [16]byte
	for range 2 {
		if mem.ReadPhysical(ctx, gpa+510*8, p[:]) != nil {
			return false
		}
		image, fixed := binary.LittleEndian.Uint64(p[:]), binary.LittleEndian.Uint64(p[8:])
		table := func(e uint64) bool { return e&(entryPresent|entryLarge) == entryPresent && e>>52&0x7ff == 0 }
		if !table(fixed) {
			return false
		}
		if table(image) {
			return true
		}
		gpa = fixed & (1<<52 - 4096) // with five levels
	}
	return false
}

// spacesOfNote makes of what a kernel noted the kernel's own page tables.
func spacesOfNote(mem Memory, page []byte) []*Space {
	text, _, _ := bytes.Cut(page, []byte{0})
	notes := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			notes[key] = value
		}
	}
	root, err1 := strconv.ParseUint(notes["SYMBOL(swapper_pg_dir)"], 16, 64)
	base, err2 := strconv.ParseInt(notes["NUMBER(phys_base)"], 10, 64)
	if err1 != nil || err2 != nil || root < imageStart || root >= imageEnd {
		return nil
	}
	mode := Mode{Format: Format4Level, NX: true}
	if notes["NUMBER(pgtable_l5_enabled)"] == "1" {
		mode.Format = Format5Level
	}
	return []*Space{{Memory: mem, Mode: mode, Root: mode.RootOf(root - imageStart + uint64(base))}}
}
