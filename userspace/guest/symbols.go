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
	symbols []Symbol // by address; of equal ones in the file's order
	long    bool     // of a 64-bit kernel
	once    sync.Once
	names   nameIndex
}

// nameIndex finds the kernel image's symbols by name. Each number is an index
// of symbols, plus 1.
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
	s := &Symbols{}
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 0, maxSymbolLine), maxSymbolLine)
	modules := map[string]string{}
	line, zero := 0, true
	for in.Scan() {
		line++
		text := in.Bytes()
		if len(bytes.TrimSpace(text)) == 0 {
			continue
		}
		sym, reason := parseSymbol(text, modules)
		if reason != "" {
			return nil, &SyntaxError{Line: line, Text: clip(text), Reason: reason}
		}
		if len(s.symbols) == maxSymbols {
			return nil, &SyntaxError{Line: line, Text: clip(text), Reason: fmt.Sprintf("more than %d symbols", maxSymbols)}
		}
		zero = zero && (sym.Address == 0 || sym.Absolute())
		s.long = s.long || sym.Address>>32 != 0
		s.symbols = append(s.symbols, sym)
	}
	switch err := in.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, &SyntaxError{Line: line + 1, Reason: fmt.Sprintf("longer than %d bytes", maxSymbolLine)}
	case err != nil:
		return nil, fmt.Errorf("line %d: %w", line+1, err)
	case len(s.symbols) == 0:
		return nil, ErrNoSymbols
	case zero:
		return nil, ErrZeroAddresses
	}
	s.sort()
	return s, nil
}

func clip(text []byte) string {
	const most = 80
	if len(text) > most {
		return string(text[:most]) + "..."
	}
	return string(text)
}

func parseSymbol(text []byte, modules map[string]string) (Symbol, string) {
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
		name := fields[1][1 : len(fields[1])-1]
		module, ok := modules[string(name)]
		if !ok {
			module = string(name)
			modules[module] = module
		}
		sym.Module = module
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
	byAddress := func(a, b Symbol) int { return cmp.Compare(a.Address, b.Address) }
	if !slices.IsSortedFunc(s.symbols, byAddress) {
		slices.SortStableFunc(s.symbols, byAddress)
	}
}

func (s *Symbols) index() {
	x := &s.names
	x.seed = maphash.MakeSeed()
	x.first = make([]uint32, 1<<bits.Len(uint(len(s.symbols))))
	x.next = make([]uint32, len(s.symbols))
	for i := len(s.symbols) - 1; i >= 0; i-- {
		if s.symbols[i].Module == "" {
			slot := &x.first[x.slot(s.symbols[i].Name)]
			x.next[i], *slot = *slot, uint32(i+1)
		}
	}
}

func (x *nameIndex) slot(name string) uint64 {
	return maphash.String(x.seed, name) & uint64(len(x.first)-1)
}

// Len is the number of symbols.
func (s *Symbols) Len() int { return len(s.symbols) }

// Long says whether they are a 64-bit kernel's.
func (s *Symbols) Long() bool { return s.long }

// All are the symbols, by address.
func (s *Symbols) All() iter.Seq[Symbol] { return slices.Values(s.symbols) }

// Lookup finds a symbol of the kernel image by name; modules' are not looked
// at, since anyone who loads one names them. Of several, the one with the
// lowest address is returned.
func (s *Symbols) Lookup(name string) (Symbol, bool) {
	for i := range s.named(name) {
		return s.symbols[i], true
	}
	return Symbol{}, false
}

// LookupAll finds all symbols of the kernel image with the name, by address.
func (s *Symbols) LookupAll(name string) []Symbol {
	var found []Symbol
	for i := range s.named(name) {
		found = append(found, s.symbols[i])
	}
	return found
}

// has says whether the kernel image has a symbol of the name at the address.
func (s *Symbols) has(name string, addr uint64) bool {
	for i := range s.named(name) {
		if s.symbols[i].Address == addr {
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
			if s.symbols[i-1].Name == name && !yield(int(i-1)) {
				return
			}
		}
	}
}

// At returns the symbols at the highest address not above addr, in the file's
// order, and how far below it they lie; none if only absolute ones do.
func (s *Symbols) At(addr uint64) ([]Symbol, uint64) {
	high := sort.Search(len(s.symbols), func(i int) bool { return s.symbols[i].Address > addr })
	for high > 0 {
		low := high - 1
		for low > 0 && s.symbols[low-1].Address == s.symbols[high-1].Address {
			low--
		}
		var found []Symbol
		for _, sym := range s.symbols[low:high] {
			if !sym.Absolute() && sym.Address != 0 {
				found = append(found, sym)
			}
		}
		if found != nil {
			return found, addr - found[0].Address
		}
		if s.long && s.symbols[low].Address>>63 == 0 {
			break
		}
		high = low
	}
	return nil, 0
}

// next is the address of the first symbol above addr.
func (s *Symbols) next(addr uint64) (uint64, bool) {
	i := sort.Search(len(s.symbols), func(i int) bool { return s.symbols[i].Address > addr })
	if i == len(s.symbols) {
		return 0, false
	}
	return s.symbols[i].Address, true
}

// within says whether addr, at or behind a symbol of the module, is in it for
// sure: before another of its symbols, or in the same page as the last one.
func (s *Symbols) within(addr uint64, module string) bool {
	i := sort.Search(len(s.symbols), func(i int) bool { return s.symbols[i].Address > addr })
	if i < len(s.symbols) && s.symbols[i].Module == module {
		return true
	}
	return i > 0 && s.symbols[i-1].Address&^4095 == addr&^4095
}
