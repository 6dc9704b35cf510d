// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/internal/symboltable"
)

const (
	madeText  = 0xffffffff92000000
	madeTable = 0xffffffff93000000
)

// madeNames are n symbols, some with long names, two of one name, and, with
// percpu, some of CPUs' own data.
func madeNames(n int, percpu bool) []symboltable.Symbol {
	var all []symboltable.Symbol
	for i := range n {
		s := symboltable.Symbol{Address: madeText + uint64(i)*64, Type: 't', Name: fmt.Sprintf("sys_init_%d_%d", i*7919%1000, i)}
		switch {
		case percpu && i < 40:
			s = symboltable.Symbol{Address: uint64(i) * 8, Type: 'A', Name: fmt.Sprintf("cpu_data_%d", i)}
		case i == 40:
			s.Type, s.Name = 'T', "_text"
		case i%97 == 0:
			s.Name += strings.Repeat("Q", 100+i%300)
		case i%50 == 1:
			s.Name = "again"
		case i == n-1:
			s.Type, s.Name = 'T', "_etext"
		}
		all = append(all, s)
	}
	return all
}

// hasText takes a table by which _text is where it should be.
func hasText(at uint64) func(*kallsyms) error {
	return func(k *kallsyms) error {
		if got := k.find("_text")[0]; got != at {
			return fmt.Errorf("_text is %#x, not %#x", got, at)
		}
		return nil
	}
}

// TestKallsyms decodes each layout, with each remainder of what is aligned, and
// amid other data.
func TestKallsyms(t *testing.T) {
	for name, layout := range symboltable.Layouts {
		for _, n := range []int{1024, 1025, 1279, 1280, 1281, 1282, 1283, 3000} {
			all := madeNames(n, layout.Addresses == symboltable.Percpu)
			text := uint64(madeText + 40*64)
			base := uint64(madeText)
			table := symboltable.Encode(madeTable+4096, base, all, layout)
			data := slices.Concat(bytes.Repeat([]byte("0\x001\x002\x003\x00"), 512), table, bytes.Repeat([]byte{1, 2, 3, 4}, 1024))
			s := &section{gva: madeTable, data: data}
			k, err := findKallsyms(s, hasText(text))
			if err != nil {
				t.Errorf("%s, %d symbols: %v", name, n, err)
				continue
			}
			if (k.order != nil) != layout.Order {
				t.Errorf("%s, %d symbols: an order of names: %t", name, n, k.order != nil)
			}
			const slide = 0x11000000
			d, err := k.decode(slide)
			if err != nil || len(d.doubts) != 0 {
				t.Errorf("%s, %d symbols: %v, doubts %q", name, n, err, d.doubts)
				continue
			}
			want := make([]Symbol, len(all))
			for i, sym := range all {
				want[i] = Symbol{Name: sym.Name, Type: sym.Type, Address: sym.Address}
				if sym.Type != 'A' {
					want[i].Address -= slide
				}
			}
			if diff := cmp.Diff(want, slices.Collect(d.symbols.All())); diff != "" {
				t.Errorf("%s, %d symbols: (-want +got)\n%s", name, n, diff)
			}
			// Elsewhere the same table has the same digest.
			if layout.Addresses == symboltable.Absolute {
				continue
			}
			const delta = 0x4000000
			for i := range all {
				if all[i].Type != 'A' {
					all[i].Address += delta
				}
			}
			moved := slices.Concat(make([]byte, 4096), symboltable.Encode(madeTable+4096+delta, base+delta, all, layout))
			other, err := findKallsyms(&section{gva: madeTable + delta, data: moved}, hasText(text+delta))
			if err != nil {
				t.Errorf("%s, %d symbols, moved: %v", name, n, err)
			} else if a, b := k.content(text), other.content(text+delta); !a.equal(&b) || a.digest() != b.digest() {
				t.Errorf("%s, %d symbols: digest %s, moved %s", name, n, a.digest(), b.digest())
			}
		}
	}
}

// TestKallsymsBad has tables that do not hold together.
func TestKallsymsBad(t *testing.T) {
	for name, layout := range symboltable.Layouts {
		all := madeNames(1300, layout.Addresses == symboltable.Percpu)
		good := symboltable.Encode(madeTable, madeText, all, layout)
		tokens := bytes.Index(good, []byte("0\x001\x002\x00"))
		for _, tt := range []struct {
			name   string
			change func(p []byte) []byte
		}{
			{"empty", func([]byte) []byte { return nil }},
			{"cut in the tokens", func(p []byte) []byte { return p[:tokens+40] }},
			{"no names", func(p []byte) []byte { return p[tokens-60:] }},
			{"no digits", func(p []byte) []byte { p[tokens+4] = 'x'; return p }},
			{"bad index", func(p []byte) []byte {
				end := bytes.Index(p[tokens:], []byte{0, 0}) + tokens
				copy(p[end+4:], bytes.Repeat([]byte{0xff}, 32))
				return p
			}},
			{"bad markers", func(p []byte) []byte {
				for at := tokens - 2400; at < tokens-100; at += 4 {
					binary.LittleEndian.PutUint32(p[at:], 0x80808080)
				}
				return p
			}},
		} {
			data := tt.change(slices.Clone(good))
			if k, err := findKallsyms(&section{gva: madeTable, data: data}, hasText(madeText+40*64)); !errors.Is(err, errNoKallsyms) {
				t.Errorf("%s, %s: %d symbols, %v", name, tt.name, k.count, err)
			}
		}
		if _, err := findKallsyms(&section{gva: madeTable, data: good}, hasText(madeText)); !errors.Is(err, errNoKallsyms) {
			t.Errorf("%s: a table that does not fit: %v", name, err)
		}
	}
}

// TestEffort searches what looks like symbol tables and goes on and on: of
// tokens alone, and of a whole table to which next to no effort is left.
func TestEffort(t *testing.T) {
	for name, layout := range symboltable.Layouts {
		good := symboltable.Encode(madeTable, madeText, madeNames(1300, layout.Addresses == symboltable.Percpu), layout)
		s := &section{gva: madeTable, data: good}
		if _, err := findKallsyms(s, hasText(madeText+40*64)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		took := s.effort
		if took < 1300 || took > mostEffort/100 {
			t.Errorf("%s: 1300 symbols took %d of %d", name, took, mostEffort)
		}
		s = &section{gva: madeTable, data: good, effort: mostEffort - took + 1}
		if _, err := findKallsyms(s, hasText(madeText+40*64)); !errors.Is(err, errEffort) || !errors.Is(err, errNoKallsyms) {
			t.Errorf("%s: with less effort than it takes: %v", name, err)
		}
	}
	s := &section{gva: madeTable, data: bytes.Repeat(digits, mostEffort/256+1)}
	if _, err := findKallsyms(s, hasText(madeText)); !errors.Is(err, errEffort) {
		t.Errorf("digits only: %v", err)
	}
}

// TestDisplaced moves one symbol, which the order of addresses gives away.
func TestDisplaced(t *testing.T) {
	for name, layout := range symboltable.Layouts {
		all := madeNames(1300, layout.Addresses == symboltable.Percpu)
		all[701].Address += 1 << 16
		data := symboltable.Encode(madeTable, madeText, all, layout)
		k, err := findKallsyms(&section{gva: madeTable, data: data}, hasText(madeText+40*64))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d, err := k.decode(0); err != nil || len(d.doubts) != 1 {
			t.Errorf("%s: %v, doubts %q", name, err, d.doubts)
		}
	}
}

// FuzzKallsyms has tables of all layouts.
func FuzzKallsyms(f *testing.F) {
	for _, layout := range symboltable.Layouts {
		f.Add(symboltable.Encode(madeTable, madeText, madeNames(1024, layout.Addresses == symboltable.Percpu), layout))
	}
	f.Add([]byte(digits))
	f.Fuzz(func(t *testing.T, data []byte) { decodeAny(t, &section{gva: madeTable, data: data}) })
}

// FuzzKallsymsReal overwrites a part of a real table.
func FuzzKallsymsReal(f *testing.F) {
	var real []*section
	for _, name := range attachable {
		_, l := tablesOf(f, attachSnapshot(f, name))
		_, s, err := l.findTables(context.Background())
		if err != nil {
			f.Fatal(err)
		}
		real = append(real, &section{gva: s.gva, data: s.data})
	}
	for i := range real {
		f.Add(uint8(i), uint32(1<<20), []byte{1})
		f.Add(uint8(i), uint32(bytes.Index(real[i].data, digits)-700), bytes.Repeat([]byte{0}, 64))
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint32, patch []byte) {
		s := real[int(which)%len(real)]
		data := slices.Clone(s.data)
		copy(data[int(at)%len(data):], patch)
		decodeAny(t, &section{gva: s.gva, data: data})
	})
}

// decodeAny takes any table that holds together.
func decodeAny(t *testing.T, s *section) {
	tried := 0
	k, err := findKallsyms(s, func(k *kallsyms) error {
		if tried++; tried > 4 {
			return errors.New("enough")
		}
		k.find("_text", "_etext")
		k.has(madeText)
		return nil
	})
	if err != nil {
		return
	}
	c := k.content(madeText)
	c.digest()
	for _, x := range k.parts {
		if x.Start < s.gva || x.End > s.gva+uint64(len(s.data)) || x.End < x.Start {
			t.Errorf("part %#x of %d bytes at %#x", x, len(s.data), s.gva)
		}
	}
	d, err := k.decode(0x1000000)
	if err != nil {
		return
	}
	if d.symbols.Len() != k.count {
		t.Errorf("%d symbols of %d", d.symbols.Len(), k.count)
	}
	image := NewImage(d.symbols, 0x1000000)
	image.Name(image.Text().Start)
	image.Is(madeText, "_text")
}
