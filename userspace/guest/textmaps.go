// SPDX-License-Identifier: MIT

package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
)

// Section is a part of the kernel image.
type Section string

// Sections.
const (
	SectionText   Section = "text"
	SectionRodata Section = "rodata"
)

// Area is a part of the kernel's address space (Documentation/arch/x86/x86_64/mm.rst).
type Area string

// Areas.
const (
	AreaImage     Area = "kernel image"
	AreaDirectMap Area = "direct map"
	AreaVmalloc   Area = "vmalloc"
	AreaVmemmap   Area = "vmemmap"
	AreaModules   Area = "modules"
	AreaFixmap    Area = "fixmap" // and what lies above
	AreaPoking    Area = "poking" // of the page tables by which the kernel changes code
	AreaOther     Area = "other"
)

// TextMapping is a run of mappings, alike in their rights, of memory that holds
// the kernel's text or read-only data.
type TextMapping struct {
	Mapping         // Size may be of several entries, and is cut to what is of the section
	Section Section // what is mapped
	Image   uint64  // where the kernel image itself has the first byte
	Area    Area    // where it is mapped
}

// Own says whether it is the image's own mapping.
func (m *TextMapping) Own() bool { return m.GVA == m.Image && m.Area != AreaPoking }

// String describes the mapping in a line.
func (m *TextMapping) String() string {
	rights := []byte("r--")
	if m.Writable {
		rights[1] = 'w'
	}
	if m.Executable {
		rights[2] = 'x'
	}
	return fmt.Sprintf("%s at %#x to %#x: %s of %#x (%s)", m.Area, m.GVA, m.GVA+m.Size, m.Section, m.Image, rights)
}

// physicalRun is a part of the image in physical memory.
type physicalRun struct {
	gpa, size uint64
	image     uint64
	section   Section
}

// Bounds of the walk for TextMappings.
const (
	maxImageSize    = 1 << 30
	maxTextMappings = 1 << 16
)

// TextMappings lists every mapping in the kernel's half of the address space of
// the physical memory that holds the kernel's text and read-only data, by
// ascending address, then those that are left of the kernel's own changes of
// code. Beside the image's own mappings only the direct map is to have some,
// which are not writable.
func (k *Kernel) TextMappings(ctx context.Context) ([]TextMapping, error) {
	k = k.View()
	var runs []physicalRun
	for _, x := range []struct {
		Extent
		section Section
	}{{k.Text, SectionText}, {k.Rodata, SectionRodata}} {
		if x.End <= x.Start || x.Size() > maxImageSize {
			return nil, &ObjectError{string(x.section) + " of the kernel", x.Start, fmt.Errorf("it ends at %#x", x.End)}
		}
		// Rights of a page go for all of it, so parts of pages count whole.
		start, end := x.Start&^4095, (x.End+4095)&^4095
		err := k.Space.Mappings(ctx, start, end, func(m Mapping) error {
			a, b := max(m.GVA, start), min(m.GVA+m.Size, end)
			run := physicalRun{m.GPA + (a - m.GVA), b - a, a, x.section}
			if n := len(runs); n > 0 {
				if last := &runs[n-1]; last.section == run.section && last.gpa+last.size == run.gpa && last.image+last.size == run.image {
					last.size += run.size
					return nil
				}
			}
			runs = append(runs, run)
			return nil
		})
		if err != nil {
			return nil, &ObjectError{string(x.section) + " of the kernel", x.Start, err}
		}
	}
	if len(runs) == 0 {
		return nil, &ObjectError{"text of the kernel", k.Text.Start, ErrNotPresent}
	}
	slices.SortFunc(runs, func(a, b physicalRun) int { return cmp.Compare(a.gpa, b.gpa) })

	w := textWalk{k: k, runs: runs}
	from := uint64(0xffff800000000000)
	if k.Space.Mode.Format == Format5Level {
		from = 0xff00000000000000
	}
	err := k.Space.Mappings(ctx, from, 0, func(m Mapping) error { return w.add(m, "") })
	if err == nil {
		err = w.poking(ctx)
	}
	if err != nil {
		return w.found, fmt.Errorf("mappings of the kernel's text: %w", err)
	}
	return w.found, nil
}

type textWalk struct {
	k     *Kernel
	runs  []physicalRun // by gpa
	found []TextMapping
}

// add takes what a mapping has of the runs.
func (w *textWalk) add(m Mapping, area Area) error {
	i, _ := slices.BinarySearchFunc(w.runs, m.GPA, func(r physicalRun, gpa uint64) int { return cmp.Compare(r.gpa, gpa) })
	if i > 0 && w.runs[i-1].gpa+w.runs[i-1].size > m.GPA {
		i--
	}
	for ; i < len(w.runs) && w.runs[i].gpa < m.GPA+m.Size; i++ {
		r := &w.runs[i]
		a, b := max(m.GPA, r.gpa), min(m.GPA+m.Size, r.gpa+r.size)
		t := TextMapping{Mapping: m, Section: r.section, Image: r.image + (a - r.gpa), Area: area}
		t.GPA, t.GVA, t.Size = a, m.GVA+(a-m.GPA), b-a
		if area == "" {
			t.Area = w.k.Area(t.GVA)
		}
		if n := len(w.found); n > 0 {
			last := &w.found[n-1]
			if last.GVA+last.Size == t.GVA && last.Image+last.Size == t.Image && last.Section == t.Section && last.Area == t.Area &&
				last.Writable == t.Writable && last.Executable == t.Executable && last.User == t.User {
				last.Size += t.Size
				continue
			}
		}
		if len(w.found) == maxTextMappings {
			return fmt.Errorf("more than %d", maxTextMappings)
		}
		w.found = append(w.found, t)
	}
	return nil
}

// poking looks at the page tables by which the kernel changes code: a page of
// user memory in them is the code while it does (text_poke() in
// arch/x86/kernel/alternative.c; the variables have other names since 6.16).
func (w *textWalk) poking(ctx context.Context) error {
	var mm, addr uint64
	for _, names := range [][2]string{{"text_poke_mm", "text_poke_mm_addr"}, {"poking_mm", "poking_addr"}} {
		if _, ok := w.k.Image.Lookup(names[0]); !ok {
			continue
		}
		var err error
		if mm, err = w.k.pointerAt(ctx, names[0]); err != nil {
			return err
		}
		if addr, err = w.k.pointerAt(ctx, names[1]); err != nil {
			return err
		}
		break
	}
	if mm == 0 { // the kernel has none, or not yet
		return nil
	}
	o, err := w.k.Part(ctx, "mm_struct", mm, "pgd")
	if err != nil {
		return err
	}
	pgd, err := o.Pointer("pgd")
	if err != nil {
		return err
	}
	root, err := Translate(ctx, w.k.Space.Memory, w.k.Space.Mode, w.k.Space.Root, pgd)
	if err != nil {
		return o.fail(err)
	}
	for page := addr &^ 4095; page <= addr&^4095+4096; page += 4096 {
		t, err := Translate(ctx, w.k.Space.Memory, w.k.Space.Mode, root.GPA, page)
		switch {
		case errors.Is(err, ErrNotPresent):
			continue
		case err != nil:
			return &ObjectError{"poking address", page, err}
		}
		m := Mapping{GVA: page, GPA: t.GPA &^ 4095, Size: 4096, Writable: t.Write, Executable: t.Execute, User: t.User}
		if err := w.add(m, AreaPoking); err != nil {
			return err
		}
	}
	return nil
}

// Where the image and modules are at most, which randomization does not change.
const (
	startImage = 0xffffffff80000000
	endModules = 0xffffffffff000000
	maxVmemmap = 512 << 40 // bytes, with 5-level paging; 1 TiB with 4-level
)

// Area says in which part of the kernel's address space an address is. The
// direct map, vmalloc and vmemmap lie in this order, wherever they begin.
func (k *Kernel) Area(gva uint64) Area {
	b := k.Bases
	switch {
	case gva >= endModules:
		return AreaFixmap
	case k.Image.whole.Contains(gva):
		return AreaImage
	case gva >= startImage:
		return AreaModules
	case b.DirectMap == 0 || b.DirectMap >= b.Vmalloc || b.Vmalloc >= b.Vmemmap || gva < b.DirectMap:
		return AreaOther
	case gva < b.Vmalloc:
		return AreaDirectMap
	case gva < b.Vmemmap:
		return AreaVmalloc
	case gva-b.Vmemmap < maxVmemmap:
		return AreaVmemmap
	}
	return AreaOther
}
