// SPDX-License-Identifier: MIT

package guest

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// kernel makes the symbols of a kernel at base and the gates and registers of
// a guest that runs it.
func kernel(t *testing.T, base, slide uint64, width int) (*Symbols, []Gate, *kvmaccess.Registers) {
	t.Helper()
	var text strings.Builder
	r := &kvmaccess.Registers{}
	var gates []Gate
	next := base
	symbol := func(name string) uint64 {
		next += 0x40
		fmt.Fprintf(&text, "%0*x T %s\n", width, next, name)
		return next + slide
	}
	symbol("_stext")
	r.LSTAR = symbol("entry_SYSCALL_64")
	r.CSTAR = symbol("entry_SYSCALL_compat")
	stubs := symbol("irq_entries_start")
	next += 0x1000
	for vector := range 256 {
		g := Gate{Vector: vector, Present: true, Type: TypeInterruptGate}
		if names := Handlers(vector); names != nil && (vector < 0x20 || vector%3 != 0) {
			g.Handler = symbol(names[0])
		} else {
			g.Handler = stubs + uint64(vector)*8
		}
		gates = append(gates, g)
	}
	symbol("_etext")
	return parse(t, text.String()), gates, r
}

func TestFindSlide(t *testing.T) {
	const base = 0xffffffff81000000
	for _, tt := range []struct {
		name  string
		slide uint64
		spoil func(gates []Gate, r *kvmaccess.Registers)
		lstar bool
		fails bool
	}{
		{"the guest's own symbols", 0, nil, true, false},
		{"moved", 0x1fe00000, nil, true, false},
		{"symbols of an earlier boot", ^uint64(0x2000000) + 1, nil, true, false},
		{"LSTAR hooked", 0x3000000, func(_ []Gate, r *kvmaccess.Registers) { r.LSTAR = 0xffffffffc0123450 }, false, false},
		{"LSTAR hooked, aligned", 0x3000000, func(_ []Gate, r *kvmaccess.Registers) { r.LSTAR += 0x200000 }, false, false},
		{"LSTAR and CSTAR hooked, aligned", 0x3000000, func(_ []Gate, r *kvmaccess.Registers) { r.LSTAR += 0x200000; r.CSTAR += 0x200000 }, false, false},
		{"a few gates hooked", 0x3000000, func(g []Gate, _ *kvmaccess.Registers) {
			for i := range 10 {
				g[i].Handler += 0x400000
			}
		}, true, false},
		{"all gates hooked", 0x3000000, func(g []Gate, _ *kvmaccess.Registers) {
			for i := range g {
				g[i].Handler = 0xffffffffc0100000 + uint64(i)*0x23
			}
		}, true, false},
		{"all gates and LSTAR hooked", 0x3000000, func(g []Gate, r *kvmaccess.Registers) {
			for i := range g {
				g[i].Handler = 0xffffffffc0100000 + uint64(i)*0x23
			}
			r.LSTAR = 0xffffffffc0123450
		}, false, true},
		{"not a multiple of 2 MiB", 0x3001000, nil, false, true},
		{"too far", 2 << 30, nil, false, true},
		{"early boot", 0, func(g []Gate, r *kvmaccess.Registers) {
			for i := range g {
				g[i] = Gate{Vector: i}
			}
			r.LSTAR, r.CSTAR = 0, 0
		}, false, true},
		{"no gates", 0x200000, func(g []Gate, _ *kvmaccess.Registers) {
			for i := range g {
				g[i].Present = false
			}
		}, true, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, gates, r := kernel(t, base, tt.slide, 16)
			if tt.spoil != nil {
				tt.spoil(gates, r)
			}
			got, err := FindSlide(s, r, gates)
			if tt.fails {
				if !errors.Is(err, ErrSymbolsMismatch) {
					t.Fatalf("%+v, %v", got, err)
				}
				return
			}
			if err != nil || got.Value != tt.slide || got.LSTAR != tt.lstar {
				t.Errorf("%+v, %v, want slide %#x, LSTAR %t", got, err, tt.slide, tt.lstar)
			}
		})
	}
}

func TestFindSlide32(t *testing.T) {
	for _, slide := range []uint64{0, 0x1000000, 0xfffffffffff00000} {
		s, gates, r := kernel(t, 0xc1000000, slide, 8)
		r.LSTAR, r.CSTAR = 0, 0
		got, err := FindSlide(s, r, gates)
		if err != nil || got.Value != slide {
			t.Errorf("%#x, %v, want %#x", got.Value, err, slide)
		}
		if at, _ := NewImage(s, got.Value).Lookup("_stext"); at != (0xc1000040+slide)&0xffffffff {
			t.Errorf("slide %#x: _stext at %#x", slide, at)
		}
	}
}

func TestFindSlideOfAnotherKernel(t *testing.T) {
	_, gates, r := kernel(t, 0xffffffff81000000, 0x200000, 16)
	other := parse(t, someSymbols)
	if _, err := FindSlide(other, r, gates); !errors.Is(err, ErrSymbolsMismatch) {
		t.Errorf("no handlers: %v", err)
	}
	// The same names, elsewhere.
	var text strings.Builder
	fmt.Fprintf(&text, "ffffffff81000040 T entry_SYSCALL_64\n")
	for vector := range 32 {
		for _, name := range Handlers(vector) {
			fmt.Fprintf(&text, "ffffffff81%06x T %s\n", 0x1000+vector*0x51, name)
		}
	}
	if _, err := FindSlide(parse(t, text.String()), r, gates); !errors.Is(err, ErrSymbolsMismatch) {
		t.Errorf("another build: %v", err)
	}
}
