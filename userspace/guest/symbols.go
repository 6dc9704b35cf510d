// SPDX-License-Identifier: MIT

package guest

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"iter"
	"math"
	"math/bits"
	"slices"
	"sort"
	"strconv"
	"sync"
)

// Symbol is a name of an address.
type Symbol struct {
	Name    string
	Module  string // empty: the kernel image itself
	Address uint64 // in the file
	Type    byte   // as nm(1) prints it; lower case: local
}

// Absolute says whether the value is no address that moves with the kernel
// image: a constant, or an offset into each CPU's own data.
func (s Symbol) Absolute() bool { return s.Type == 'A' || s.Type == 'a' }

// Text says whether the symbol names code.
func (s Symbol) Text() bool {
	return s.Type == 'T' || s.Type == 't' || s.Type == 'W' || s.Type == 'w'
}

// Symbols are those of one kernel, as its symbol file gives them. They do not
// change once parsed and may be shared.
type Symbols struct {
	entries []symbolEntry // by address; of equal ones in the file's order
	text    string        // all names
	modules []string      // their names; the first is none
	long    bool          // of a 64-bit kernel
	once    sync.Once
	names   nameIndex
}

// symbolEntry is a Symbol without a pointer. There are some hundred thousand, and
// the garbage collector would follow each pointer in them.
type symbolEntry struct {
	address uint64
	name    uint32 // where it begins in text
	module  uint32 // in modules
	length  uint16 // of the name
	kind    byte
}

// nameIndex finds the kernel image's symbols by name. Each number is an index
// of entries, plus 1.
type nameIndex struct {
	seed  maphash.Seed
	first []uint32 // by hash of the name
	next  []uint32 // by index: the next one, by address, with that hash
}

// Bounds of what ParseSymbols takes.
const (
	maxSymbols    = 8 << 20
	maxSymbolLine = 4096
)

// What is wrong with a symbol file as a whole.
var (
	ErrZeroAddresses = errors.New("every address is zero: /proc/kallsyms shows addresses to root only (and to nobody with kernel.kptr_restrict=2); copy it as root")
	ErrNoSymbols     = errors.New("the file holds no symbols: give a copy of the guest's /proc/kallsyms, taken as root, or its kernel's System.map")
)

// SyntaxError is a line that is not "address type name [module]".
type SyntaxError struct {
	Line   int // from 1
	Text   string
	Reason string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("line %d: %s: %q", e.Line, e.Reason, e.Text)
}

// ParseSymbols reads a file in the format of /proc/kallsyms or System.map:
// lines of a hexadecimal address, a type letter, a name and, after a tab and
// in brackets, a module. Lines need not be sorted; the same name may stand for
// several addresses and the other way round. The error is a *SyntaxError,
// ErrZeroAddresses, ErrNoSymbols or the reader's.
func ParseSymbols(r io.Reader) (*Symbols, error) {
	var list symbolList
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 0, maxSymbolLine), maxSymbolLine)
	line, zero, long := 0, true, false
	for in.Scan() {
		line++
		text := in.Bytes()
		if len(bytes.TrimSpace(text)) == 0 {
			continue
		}
		sym, reason := parseSymbol(text)
		if reason != "" {
			return nil, &SyntaxError{Line: line, Text: clip(text), Reason: reason}
		}
		switch {
		case len(list.entries) == maxSymbols:
			return nil, &SyntaxError{Line: line, Text: clip(text), Reason: fmt.Sprintf("more than %d symbols", maxSymbols)}
		case len(list.text)+len(sym.Name) > math.MaxUint32:
			return nil, &SyntaxError{Line: line, Text: clip(text), Reason: fmt.Sprintf("more than %d bytes of names", uint32(math.MaxUint32))}
		}
		zero = zero && (sym.Address == 0 || sym.Absolute())
		long = long || sym.Address>>32 != 0
		list.add(sym)
	}
	switch err := in.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, &SyntaxError{Line: line + 1, Reason: fmt.Sprintf("longer than %d bytes", maxSymbolLine)}
	case err != nil:
		return nil, fmt.Errorf("line %d: %w", line+1, err)
	case len(list.entries) == 0:
		return nil, ErrNoSymbols
	case zero:
		return nil, ErrZeroAddresses
	}
	return list.symbols(long), nil
}

// symbolList collects what becomes Symbols. Names have at most 65,535 bytes, all of
// them 4 GiB.
type symbolList struct {
	entries []symbolEntry
	text    []byte
	modules []string
	numbers map[string]uint32 // of modules
}

func (l *symbolList) add(sym Symbol) {
	if l.modules == nil {
		l.modules, l.numbers = []string{""}, map[string]uint32{"": 0}
	}
	module, ok := l.numbers[sym.Module]
	if !ok {
		module = uint32(len(l.modules))
		l.modules = append(l.modules, sym.Module)
		l.numbers[sym.Module] = module
	}
	l.entries = append(l.entries, symbolEntry{
		address: sym.Address, name: uint32(len(l.text)), module: module, length: uint16(len(sym.Name)), kind: sym.Type,
	})
	l.text = append(l.text, sym.Name...)
}

// symbols are those in the list.
func (l *symbolList) symbols(long bool) *Symbols {
	s := &Symbols{entries: l.entries, text: string(l.text), modules: l.modules, long: long}
	s.sort()
	return s
}

func clip(text []byte) string {
	const most = 80
	if len(text) > most {
		return string(text[:most]) + "..."
	}
	return string(text)
}

func parseSymbol(text []byte) (Symbol, string) {
	var sym Symbol
	address, rest, ok := bytes.Cut(text, []byte(" "))
	if !ok {
		return sym, "not of the form \"address type name\""
	}
	value, err := strconv.ParseUint(string(address), 16, 64)
	if err != nil {
		return sym, fmt.Sprintf("%q is no hexadecimal address of up to 16 digits", clip(address))
	}
	sym.Address = value
	kind, rest, ok := bytes.Cut(rest, []byte(" "))
	if !ok || len(kind) != 1 || !symbolType(kind[0]) {
		return sym, "the type is not one letter"
	}
	sym.Type = kind[0]
	fields := bytes.Fields(rest)
	switch {
	case len(fields) == 2 && len(fields[1]) > 2 && fields[1][0] == '[' && fields[1][len(fields[1])-1] == ']':
		sym.Module = string(fields[1][1 : len(fields[1])-1])
	case len(fields) == 0:
		return sym, "the name is missing"
	case bytes.HasPrefix(rest, []byte("The real System.map is in ")):
		return sym, "this is Debian's placeholder: take the System.map of the linux-image package with -dbg in its name, or a copy of the guest's /proc/kallsyms, taken as root"
	case len(fields) > 1:
		return sym, "more than a name and a [module]"
	}
	sym.Name = string(fields[0])
	return sym, ""
}

func symbolType(c byte) bool {
	return c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c == '?' || c == '-'
}

// sort puts the symbols in order.
func (s *Symbols) sort() {
	byAddress := func(a, b symbolEntry) int { return cmp.Compare(a.address, b.address) }
	if !slices.IsSortedFunc(s.entries, byAddress) {
		slices.SortStableFunc(s.entries, byAddress)
	}
}

func (s *Symbols) index() {
	x := &s.names
	x.seed = maphash.MakeSeed()
	x.first = make([]uint32, 1<<bits.Len(uint(len(s.entries))))
	x.next = make([]uint32, len(s.entries))
	for i := len(s.entries) - 1; i >= 0; i-- {
		if s.entries[i].module == 0 {
			slot := &x.first[x.slot(s.name(i))]
			x.next[i], *slot = *slot, uint32(i+1)
		}
	}
}

func (x *nameIndex) slot(name string) uint64 {
	return maphash.String(x.seed, name) & uint64(len(x.first)-1)
}

// Len is the number of symbols.
func (s *Symbols) Len() int { return len(s.entries) }

// Long says whether they are a 64-bit kernel's.
func (s *Symbols) Long() bool { return s.long }

// All are the symbols, by address.
func (s *Symbols) All() iter.Seq[Symbol] {
	return func(yield func(Symbol) bool) {
		for i := range s.entries {
			if !yield(s.symbol(i)) {
				return
			}
		}
	}
}

func (s *Symbols) name(i int) string {
	e := &s.entries[i]
	return s.text[e.name:][:e.length]
}

func (s *Symbols) symbol(i int) Symbol {
	e := &s.entries[i]
	return Symbol{Name: s.name(i), Module: s.modules[e.module], Address: e.address, Type: e.kind}
}

// Lookup finds a symbol of the kernel image by name; modules' are not looked
// at, since anyone who loads one names them. Of several, the one with the
// lowest address is returned.
func (s *Symbols) Lookup(name string) (Symbol, bool) {
	for i := range s.named(name) {
		return s.symbol(i), true
	}
	return Symbol{}, false
}

// LookupAll finds all symbols of the kernel image with the name, by address.
func (s *Symbols) LookupAll(name string) []Symbol {
	var found []Symbol
	for i := range s.named(name) {
		found = append(found, s.symbol(i))
	}
	return found
}

// has says whether the kernel image has a symbol of the name at the address.
func (s *Symbols) has(name string, addr uint64) bool {
	for i := range s.named(name) {
		if s.entries[i].address == addr {
			return true
		}
	}
	return false
}

// named are the indices of the kernel image's symbols with the name.
func (s *Symbols) named(name string) iter.Seq[int] {
	s.once.Do(s.index)
	return func(yield func(int) bool) {
		for i := s.names.first[s.names.slot(name)]; i != 0; i = s.names.next[i-1] {
			if s.name(int(i-1)) == name && !yield(int(i-1)) {
				return
			}
		}
	}
}

// At returns the symbols at the highest address not above addr, in the file's
// order, and how far below it they lie; none if only absolute ones do.
func (s *Symbols) At(addr uint64) ([]Symbol, uint64) {
	high := sort.Search(len(s.entries), func(i int) bool { return s.entries[i].address > addr })
	for high > 0 {
		low := high - 1
		for low > 0 && s.entries[low-1].address == s.entries[high-1].address {
			low--
		}
		var found []Symbol
		for i := low; i < high; i++ {
			if sym := s.symbol(i); !sym.Absolute() && sym.Address != 0 {
				found = append(found, sym)
			}
		}
		if found != nil {
			return found, addr - found[0].Address
		}
		if s.long && s.entries[low].address>>63 == 0 {
			break
		}
		high = low
	}
	return nil, 0
}

// next is the address of the first symbol above addr.
func (s *Symbols) next(addr uint64) (uint64, bool) {
	i := sort.Search(len(s.entries), func(i int) bool { return s.entries[i].address > addr })
	if i == len(s.entries) {
		return 0, false
	}
	return s.entries[i].address, true
}

// within says whether addr, at or behind a symbol of the module, is in it for
// sure: before another of its symbols, or in the same page as the last one.
func (s *Symbols) within(addr uint64, module string) bool {
	i := sort.Search(len(s.entries), func(i int) bool { return s.entries[i].address > addr })
	if i < len(s.entries) && s.modules[s.entries[i].module] == module {
		return true
	}
	return i > 0 && s.entries[i-1].address&^4095 == addr&^4095
}
