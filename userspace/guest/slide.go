// SPDX-License-Identifier: MIT

package guest

import (
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Linux moves its image by a multiple of this (CONFIG_PHYSICAL_ALIGN; the page
// tables of a 64-bit kernel map it in 2 MiB pages), and by less than
// maxSlide (KERNEL_IMAGE_SIZE).
const (
	slideAlign64 = 2 << 20
	slideAlign32 = 8 << 10
	maxSlide     = 1 << 30
)

// ErrSymbolsMismatch: the symbols are not those of the running kernel.
var ErrSymbolsMismatch = errors.New("the symbols do not fit the running kernel: give those of this very kernel version, or a copy of this guest's /proc/kallsyms, taken as root")

// Slide is how far the running kernel lies from its symbols, and what says so.
type Slide struct {
	Value uint64 // running address - address in the file, modulo 2^64
	Votes int    // gates of exceptions and interrupts that say so
	Of    int    // gates that could have
	// LSTAR says whether the system call entry agrees. If it does not, the
	// guest's LSTAR has been changed.
	LSTAR bool
}

// FindSlide works out where the kernel lies from where the gates of the IDT
// and the system call entries point to. A single hooked entry, LSTAR included,
// does not lead it astray: the slide is what more than half of the gates agree
// on, or failing these LSTAR and CSTAR together. The error is
// ErrSymbolsMismatch, with the evidence.
func FindSlide(s *Symbols, r *kvmaccess.Registers, idt []Gate) (Slide, error) {
	align := uint64(slideAlign32)
	if s.Long() {
		align = slideAlign64
	}
	possible := func(slide uint64) bool {
		return slide%align == 0 && (slide < maxSlide || -slide < maxSlide)
	}
	votes := map[uint64]int{}
	of := 0
	for _, g := range idt {
		if !g.Present {
			continue
		}
		names := Handlers(g.Vector)
		known := false
		seen := map[uint64]bool{} // one vote a gate and slide
		for _, name := range names {
			for _, sym := range s.LookupAll(name) {
				known = true
				slide := distance(s, g.Handler, sym.Address)
				if possible(slide) && !seen[slide] {
					seen[slide] = true
					votes[slide]++
				}
			}
		}
		if known {
			of++
		}
	}
	best := Slide{Of: of}
	for slide, n := range votes {
		if n > best.Votes || n == best.Votes && slide < best.Value {
			best.Value, best.Votes = slide, n
		}
	}
	// Vectors beyond the exceptions hold a stub instead of a named handler
	// where the guest lacks the device, hence half, and no more.
	const fewest = 8
	fromLSTAR, ok1 := slideOf(s, r.LSTAR, "entry_SYSCALL_64")
	fromCSTAR, ok2 := slideOf(s, r.CSTAR, "entry_SYSCALL_compat", "entry_SYSCALL32_ignore", "ignore_sysret")
	switch {
	case best.Votes >= fewest && 2*best.Votes > of:
		best.LSTAR = ok1 && fromLSTAR == best.Value
		return best, nil
	case ok1 && ok2 && fromLSTAR == fromCSTAR && possible(fromLSTAR):
		return Slide{Value: fromLSTAR, Votes: votes[fromLSTAR], Of: of, LSTAR: true}, nil
	}
	return Slide{}, fmt.Errorf("%w (%d of %d handlers of the IDT fit; LSTAR is %#x)", ErrSymbolsMismatch, best.Votes, of, r.LSTAR)
}

// slideOf is the slide at which addr is the first of the symbols that there is.
func slideOf(s *Symbols, addr uint64, names ...string) (uint64, bool) {
	for _, name := range names {
		if sym, ok := s.Lookup(name); ok && addr != 0 {
			return distance(s, addr, sym.Address), true
		}
	}
	return 0, false
}

func distance(s *Symbols, running, file uint64) uint64 {
	d := running - file
	if !s.Long() {
		d = uint64(int64(int32(d)))
	}
	return d
}
