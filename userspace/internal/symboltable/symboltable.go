// SPDX-License-Identifier: MIT

// Package symboltable writes symbol tables as the kernel's build does, in each
// order and with each way to write addresses that there has been, for tests
// (scripts/kallsyms.c).
package symboltable

import (
	"encoding/binary"
	"slices"
	"strings"
)

// Symbol is one name. Symbols of CPUs' own data (type A) have small addresses.
type Symbol struct {
	Address uint64
	Type    byte
	Name    string
}

// Layout is an order of the parts and a way to write addresses.
type Layout struct {
	// TablesLast: the addresses come behind the tokens (6.4).
	TablesLast bool
	// Order: there is a table of the names' order (6.2).
	Order bool
	// Addresses are written so.
	Addresses Addresses
}

// Addresses is a way to write addresses.
type Addresses int

// Ways to write addresses.
const (
	Percpu   Addresses = iota // base-relative, CPUs' data absolute (before 6.15)
	Base                      // base-relative
	Place                     // relative to their own place, all at multiples of 4 (7.0)
	Absolute                  // before 6.11, where nothing else was chosen
)

// Layouts are those that kernels had.
var Layouts = map[string]Layout{
	"absolute": {Addresses: Absolute},
	"4.6":      {Addresses: Percpu},
	"6.2":      {Order: true, Addresses: Percpu},
	"6.4":      {TablesLast: true, Order: true, Addresses: Percpu},
	"6.15":     {TablesLast: true, Order: true, Addresses: Base},
	"7.0":      {TablesLast: true, Order: true, Addresses: Place},
}

// tokens: printable characters stand for themselves, all others for a few
// letters, as frequent ones do.
func tokens() [256]string {
	frequent := []string{"sys_", "x64_", "entry_", "asm_exc_", "__", "_page", "init", "able"}
	var t [256]string
	next := 0
	for c := range t {
		switch {
		case c > ' ' && c < 0x7f:
			t[c] = string(rune(c))
		case next < len(frequent):
			t[c] = frequent[next]
			next++
		default:
			t[c] = string([]byte{'a' + byte(next%26), 'a' + byte(next/26)})
			next++
		}
	}
	return t
}

// Encode writes the table of symbols, which are sorted by address, as it lies
// at gva, a multiple of 8. base is the lowest address in the image.
func Encode(gva, base uint64, symbols []Symbol, l Layout) []byte {
	align := 8
	if l.Addresses == Place {
		align = 4
	}
	var out []byte
	pad := func() {
		for len(out)%align != 0 {
			out = append(out, 0)
		}
	}
	u32 := func(v uint32) { out = binary.LittleEndian.AppendUint32(out, v) }
	addresses := func() {
		pad()
		for _, s := range symbols {
			switch {
			case l.Addresses == Absolute:
				out = binary.LittleEndian.AppendUint64(out, s.Address)
			case l.Addresses == Place:
				u32(uint32(s.Address - (gva + uint64(len(out)))))
			case l.Addresses == Base:
				u32(uint32(s.Address - base))
			case s.Type == 'A':
				u32(uint32(s.Address))
			default:
				u32(uint32(base - 1 - s.Address))
			}
		}
		if l.Addresses == Percpu || l.Addresses == Base {
			pad()
			out = binary.LittleEndian.AppendUint64(out, base)
		}
	}
	order := func() {
		if !l.Order {
			return
		}
		pad()
		seq := make([]int, len(symbols))
		for i := range seq {
			seq[i] = i
		}
		slices.SortStableFunc(seq, func(a, b int) int { return strings.Compare(symbols[a].Name, symbols[b].Name) })
		for _, n := range seq {
			out = append(out, byte(n>>16), byte(n>>8), byte(n))
		}
	}
	if !l.TablesLast {
		addresses()
	}
	pad()
	u32(uint32(len(symbols)))
	pad()
	all := tokens()
	var markers []uint32
	names := len(out)
	for i, s := range symbols {
		if i%256 == 0 {
			markers = append(markers, uint32(len(out)-names))
		}
		code := compress(string(s.Type)+s.Name, &all)
		if n := len(code); n >= 0x80 {
			out = append(out, byte(n)|0x80, byte(n>>7))
		} else {
			out = append(out, byte(n))
		}
		out = append(out, code...)
	}
	pad()
	for _, m := range markers {
		u32(m)
	}
	if !l.TablesLast {
		order()
	}
	pad()
	start := len(out)
	var index []byte
	for _, token := range all {
		index = binary.LittleEndian.AppendUint16(index, uint16(len(out)-start))
		out = append(append(out, token...), 0)
	}
	pad()
	out = append(out, index...)
	if l.TablesLast {
		addresses()
		order()
	}
	return out
}

// compress writes a name in tokens.
func compress(name string, tokens *[256]string) []byte {
	var out []byte
	for len(name) > 0 {
		best := int(name[0])
		for c, token := range tokens {
			if len(token) > len(tokens[best]) && strings.HasPrefix(name, token) {
				best = c
			}
		}
		out = append(out, byte(best))
		name = name[len(tokens[best]):]
	}
	return out
}
