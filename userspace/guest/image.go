// SPDX-License-Identifier: MIT

package guest

import (
	"fmt"
	"iter"
	"sort"
)

// Image is a kernel's symbols where the kernel runs: moved by the slide that
// address-space randomization gave it.
type Image struct {
	Symbols *Symbols
	Slide   uint64 // running address - address in the file, modulo 2^64

	// Modules' symbols where they run, and where modules lie; nil: those in
	// Symbols are all there are.
	modules *Symbols
	extents []moduleExtent
	text    Extent // _stext.._etext
	whole   Extent // _text.._end
}

// NewImage moves symbols by slide.
func NewImage(s *Symbols, slide uint64) *Image {
	m := &Image{Symbols: s, Slide: slide}
	m.text = m.between("_stext", "_etext")
	m.whole = m.between("_text", "_end")
	return m
}

func (m *Image) between(first, end string) Extent {
	a, ok1 := m.Lookup(first)
	b, ok2 := m.Lookup(end)
	if !ok1 || !ok2 || a >= b {
		return Extent{}
	}
	return Extent{a, b}
}

// Lookup gives the running address of a symbol of the kernel image.
func (m *Image) Lookup(name string) (uint64, bool) {
	sym, ok := m.Symbols.Lookup(name)
	if !ok {
		return 0, false
	}
	if sym.Absolute() {
		return sym.Address, true
	}
	return m.wrap(sym.Address + m.Slide), true
}

// All are the symbols where they run: the kernel image's by address, then the
// modules'.
func (m *Image) All() iter.Seq[Symbol] {
	return func(yield func(Symbol) bool) {
		for sym := range m.Symbols.All() {
			if !sym.Absolute() {
				sym.Address = m.wrap(sym.Address + m.Slide)
			}
			if !yield(sym) {
				return
			}
		}
		if m.modules != nil {
			m.modules.All()(yield)
		}
	}
}

// WithoutModules are the symbols of the kernel image alone.
func (m *Image) WithoutModules() *Image {
	own := *m
	own.modules, own.extents = nil, nil
	return &own
}

// Len is the number of symbols.
func (m *Image) Len() int {
	n := m.Symbols.Len()
	if m.modules != nil {
		n += m.modules.Len()
	}
	return n
}

// Next gives the running address of the first symbol above a running address.
func (m *Image) Next(addr uint64) (uint64, bool) {
	next, ok := m.Symbols.next(m.wrap(addr - m.Slide))
	next = m.wrap(next + m.Slide)
	if m.modules != nil {
		if other, found := m.modules.next(addr); found && (!ok || other < next) {
			return other, true
		}
	}
	return next, ok
}

func (m *Image) wrap(addr uint64) uint64 {
	if m.Symbols.Long() {
		return addr
	}
	return addr & 0xffffffff
}

// maxDistance bounds how far behind a symbol an address still belongs to it.
const maxDistance = 1 << 20

// Contains says whether a running address is in the kernel image, and so not in
// a module; of symbols that do not say where that ends, none is.
func (m *Image) Contains(addr uint64) bool { return m.whole.Contains(addr) }

// At returns the symbols at, or nearest below, a running address, and how far
// below. A module's symbols are only found where the file is of this very
// boot (slide 0): modules do not move with the image. Where a module ends is
// not known: behind its last symbol only the rest of that page is its.
func (m *Image) At(addr uint64) ([]Symbol, uint64) {
	if m.modules != nil && !m.whole.Contains(addr) {
		return m.atModule(addr)
	}
	all, offset := m.Symbols.At(m.wrap(addr - m.Slide))
	if len(all) == 0 || offset > maxDistance {
		return nil, 0
	}
	if all[0].Module != "" {
		if m.Slide != 0 || !m.Symbols.within(m.wrap(addr-m.Slide), all[0].Module) {
			return nil, 0
		}
	} else if m.whole.End != 0 && !m.whole.Contains(addr) {
		return nil, 0
	}
	return all, offset
}

// atModule is At for what is not in the kernel image, where it is known which
// memory each module has.
func (m *Image) atModule(addr uint64) ([]Symbol, uint64) {
	i := sort.Search(len(m.extents), func(i int) bool { return m.extents[i].Start > addr }) - 1
	if i < 0 || !m.extents[i].Contains(addr) {
		return nil, 0
	}
	all, offset := m.modules.At(addr)
	if len(all) == 0 || all[0].Module != m.extents[i].module || addr-offset < m.extents[i].Start {
		return nil, 0
	}
	return all, offset
}

// Name describes a running address: "name", "name+0x10", "name+0x10 [module]",
// or nothing if no symbol is near.
func (m *Image) Name(addr uint64) string {
	all, offset := m.At(addr)
	if len(all) == 0 {
		return ""
	}
	name := all[0].Name
	if offset != 0 {
		name = fmt.Sprintf("%s+%#x", name, offset)
	}
	if all[0].Module != "" {
		name += " [" + all[0].Module + "]"
	}
	return name
}

// Is says whether the kernel image has, at exactly the running address, a
// symbol of one of the names.
func (m *Image) Is(addr uint64, names ...string) bool {
	all, offset := m.At(addr)
	if offset != 0 {
		return false
	}
	for _, sym := range all {
		for _, name := range names {
			if sym.Name == name && sym.Module == "" {
				return true
			}
		}
	}
	return false
}

// Text is where the kernel image's code runs, _stext.._etext; it is empty if
// the symbols lack these.
func (m *Image) Text() Extent { return m.text }
