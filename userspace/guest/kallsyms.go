// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
)

// The kernel's own symbol table (kernel/kallsyms.c, scripts/kallsyms.c) is in
// its read-only data: compressed names, a marker for each 256th of them, the
// tokens that names are made of, and addresses. Which order these come in, how
// they are aligned and how addresses are written changed from version to
// version, and distributions port changes back. So each part is found by what
// it must look like, and believed if it fits the others:
//
//   - the token table holds 256 strings, the digits each for themselves, and
//     the token index behind it says where each begins;
//   - markers go up from 0, and stand behind the names that they point into;
//   - names are a chain of lengths that meets every marker;
//   - addresses go up, lie in the image, and those of the image's bounds are
//     where the page tables have them.

// kallsyms is a symbol table as it lies in memory.
type kallsyms struct {
	count   int
	names   []byte // compressed
	markers []byte // of 4 bytes
	tokens  [256]string
	table   []byte // the tokens and their index as they lie in memory
	layout  addressLayout
	offsets []byte // of 4 bytes, or addresses of 8
	at      uint64 // where offsets is, guest-virtual
	base    uint64 // for layouts that have one
	// order has the numbers of the names as they are sorted, 3 bytes each, big
	// endian, since 6.2; nil: there is no such table.
	order []byte
	// parts is where all that lies.
	parts []Extent
}

// addressLayout is how a symbol table writes addresses.
type addressLayout int

const (
	// layoutPercpu: base-relative with CONFIG_KALLSYMS_ABSOLUTE_PERCPU: v >= 0
	// is v, v < 0 is base - 1 - v.
	layoutPercpu addressLayout = iota
	// layoutBase: base + v, v unsigned.
	layoutBase
	// layoutPlace: the place of v + v.
	layoutPlace
	// layoutAbsolute: 8 bytes each.
	layoutAbsolute
)

func (l addressLayout) String() string {
	return [...]string{"base-relative, CPUs' data absolute", "base-relative", "place-relative", "absolute"}[l]
}

// Bounds of what is taken for a symbol table.
const (
	fewestSymbols = 1024
	mostSymbols   = 4 << 20
	longestToken  = 256
	longestName   = 1024 // KSYM_NAME_LEN is 128, since 6.1 512
	fewestMarkers = fewestSymbols / 256

	// mostEffort bounds the search of a section: words looked at and names
	// followed. A table of mostSymbols takes half of it; one that only looks
	// like a table takes as much each time that it is there.
	mostEffort = 4 * mostSymbols
)

// errNoKallsyms: there is no symbol table, or none that holds together.
var errNoKallsyms = errors.New("no symbol table")

// errEffort: what looks like symbol tables was followed mostEffort steps long.
var errEffort = errors.New("too much looks like one")

// digits is what the token table has for the ten digits, each of which stands
// for itself because symbols' names have all of them.
var digits = []byte("0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00")

// section is a run of the guest's bytes, which are read as far as they are
// looked at.
type section struct {
	gva  uint64
	data []byte                       // what was read of it, of capacity for all
	read func(at int, p []byte) error // more of it; nil: data is all
	err  error                        // of read
	lost int                          // bytes that lie in no memory

	effort int // spent on it, of mostEffort
}

// spend takes steps of the effort, and says whether any is left.
func (s *section) spend(steps int) error {
	if s.effort += steps; s.effort > mostEffort {
		return errEffort
	}
	return nil
}

// loadStep is how much of a section is read at once, in bytes.
const loadStep = 512 << 10

// load reads the section at least up to end, and says whether it goes so far.
func (s *section) load(end int) bool {
	have := len(s.data)
	if end <= have {
		return true
	}
	if end > cap(s.data) || s.read == nil || s.err != nil {
		return false
	}
	next := min(max(end, have+loadStep), cap(s.data))
	if s.err = s.read(have, s.data[have:next]); s.err != nil {
		return false
	}
	s.data = s.data[:next]
	return true
}

// findKallsyms looks for symbol tables in a section. fits says whether the
// addresses of a table fit what is known of the running kernel: nil, or why
// not. The first that does is returned. The error is errNoKallsyms with what
// came nearest.
func findKallsyms(s *section, fits func(*kallsyms) error) (*kallsyms, error) {
	nearest := errNoKallsyms
	for from := 0; ; {
		i := bytes.Index(s.data[from:], digits)
		if i < 0 {
			from = max(from, len(s.data)-len(digits)+1)
			if !s.load(len(s.data) + 1) {
				return nil, nearest
			}
			continue
		}
		k, err := kallsymsAt(s, from+i, fits)
		switch {
		case err == nil:
			return k, nil
		case errors.Is(err, errEffort):
			return nil, fmt.Errorf("%w: %w", errNoKallsyms, err)
		}
		nearest = fmt.Errorf("%w that holds together: that with tokens about %#x: %w", errNoKallsyms, s.gva+uint64(from+i), err)
		from += i + len(digits)
	}
}

// kallsymsAt makes out the symbol table that has its digits at data[zero:].
func kallsymsAt(s *section, zero int, fits func(*kallsyms) error) (*kallsyms, error) {
	k := &kallsyms{}
	if err := s.spend(len(k.tokens)); err != nil {
		return nil, err
	}
	start, end, err := k.readTokens(s, zero)
	if err != nil {
		return nil, err
	}
	names, err := k.findNames(s, start)
	if err != nil {
		return nil, err
	}
	if err := k.findAddresses(s, names, end, fits); err != nil {
		return nil, err
	}
	k.findOrder(s, start)
	return k, nil
}

// readTokens takes the tokens, of which that of '0' is at zero, and returns
// where their table begins and their index ends.
func (k *kallsyms) readTokens(s *section, zero int) (start, end int, err error) {
	s.load(min(zero+256*longestToken+512, cap(s.data)))
	at := zero
	var length [256]int
	for i := '0'; i < 256; i++ {
		rest := s.data[at:min(len(s.data), at+longestToken)]
		n := bytes.IndexByte(rest, 0)
		if n < 0 {
			return 0, 0, fmt.Errorf("token %d does not end", i)
		}
		k.tokens[i], length[i] = string(rest[:n]), n+1
		at += n + 1
	}
	// The index has the offset of each token; in front of it is padding.
	found := 0
	for _, align := range []int{8, 4, 2} {
		index := s.align(at, align)
		if index+512 > len(s.data) {
			continue
		}
		entry := func(i int) int { return int(binary.LittleEndian.Uint16(s.data[index+2*i:])) }
		start = zero - entry('0')
		if entry(0) != 0 || start < 0 {
			continue
		}
		good := true
		for i := 0; i < 255 && good; i++ {
			n := entry(i+1) - entry(i)
			switch {
			case n < 1 || n > longestToken || start+entry(i+1) > at:
				good = false
			case i >= '0':
				good = n == length[i]
			default:
				token := s.data[start+entry(i) : start+entry(i+1)]
				good = bytes.IndexByte(token, 0) == n-1
				k.tokens[i] = string(token[:n-1])
			}
		}
		if good && start+entry(255)+length[255] == at {
			found = index + 512
			break
		}
	}
	if found == 0 {
		return 0, 0, errors.New("behind the tokens is no index of them")
	}
	k.table = s.data[start:found]
	k.parts = append(k.parts, s.extent(start, found))
	return start, found, nil
}

// align is the first offset from off on of which the address is a multiple.
func (s *section) align(off, multiple int) int {
	at := s.gva + uint64(off)
	return off + int(-at&uint64(multiple-1))
}

func (s *section) extent(start, end int) Extent {
	return Extent{s.gva + uint64(start), s.gva + uint64(end)}
}

func (s *section) u32(off int) uint32 { return binary.LittleEndian.Uint32(s.data[off:]) }

// findNames finds the markers and the names in front of the tokens, and
// returns where the number of names stands.
func (k *kallsyms) findNames(s *section, tokens int) (int, error) {
	tried := 0
	for end := s.align(tokens-7, 4); end >= 4 && tokens-end <= mostSymbols*4; {
		// A run that goes up, the last of which is at data[end:].
		start := end
		for start >= 4 && plausibleStep(s.u32(start-4), s.u32(start)) {
			start -= 4
		}
		if err := s.spend((end-start)/4 + 1); err != nil {
			return 0, err
		}
		if s.u32(start) == 0 {
			// What follows the markers may seem to go on with them.
			for count := (end-start)/4 + 1; count >= fewestMarkers; count-- {
				if err := s.spend(1); err != nil {
					return 0, err
				}
				if !endsMarkers(tokens-(start+4*count), count) {
					continue
				}
				names, err := k.namesBefore(s, start, count)
				if err == nil || errors.Is(err, errEffort) {
					return names, err
				}
				if tried++; tried == 16 {
					return 0, err
				}
			}
		}
		end = start - 4
	}
	return 0, errors.New("no markers that point to names stand before the tokens")
}

// endsMarkers says whether what lies between count markers and the tokens is
// padding or a table of the names' order, of 3 or 4 bytes each.
func endsMarkers(gap, count int) bool {
	if gap >= 0 && gap < 8 {
		return true
	}
	for _, width := range []int{3, 4} {
		if gap > width*(count-1)*256 && gap < width*count*256+16 {
			return true
		}
	}
	return false
}

// plausibleStep says whether 256 names, each a length and at least a type and
// a letter in one byte, lie between two markers.
func plausibleStep(a, b uint32) bool {
	return a < b && b-a >= 256*2 && b-a <= 256*(longestName+2)
}

// namesBefore finds the names in front of count markers at data[markers:].
func (k *kallsyms) namesBefore(s *section, markers, count int) (int, error) {
	final := int(s.u32(markers + 4*(count-1)))
	// The names end in front of the markers; the last of them, up to 256, have
	// no marker to tell how long they are.
	first := max(markers-final-256*(longestName+2)-8, 4)
	for start := s.align(first, 4); start <= markers-final-2; start += 4 {
		if err := s.spend(1); err != nil {
			return 0, err
		}
		// The number of names, padded to 8 bytes in older kernels.
		for _, gap := range []int{8, 4} {
			if start < gap {
				continue
			}
			n := int(s.u32(start - gap))
			if n <= (count-1)*256 || n > count*256 || gap == 8 && s.u32(start-4) != 0 {
				continue
			}
			end, followed, ok := nameChain(s.data[start:markers], s.data[markers:markers+4*count], n)
			if err := s.spend(followed); err != nil {
				return 0, err
			}
			if !ok {
				continue
			}
			k.count = n
			k.names = s.data[start : start+end]
			k.markers = s.data[markers : markers+4*count]
			k.parts = append(k.parts, s.extent(start-gap, markers+4*count))
			return start - gap, nil
		}
	}
	return 0, fmt.Errorf("%d markers end where no names lie", count)
}

// nameChain follows the lengths of n names and says where they end, how many
// it followed, and whether they meet each marker and reach the end of data but
// for padding.
func nameChain(data, markers []byte, n int) (end, followed int, ok bool) {
	at := 0
	for i := range n {
		if i%256 == 0 && uint32(at) != binary.LittleEndian.Uint32(markers[i/256*4:]) {
			return 0, i, false
		}
		length, size := nameLength(data[min(at, len(data)):])
		if size == 0 || length == 0 || length > longestName {
			return 0, i, false
		}
		at += size + length
	}
	if at > len(data) || len(data)-at >= 8 {
		return 0, n, false
	}
	return at, n, !slices.ContainsFunc(data[at:], func(b byte) bool { return b != 0 })
}

// nameLength reads how many tokens a name has: 7 bits and, since 6.1 where the
// top bit is set, 7 or 8 more. size is how many bytes say so; 0: there are not
// as many.
func nameLength(p []byte) (length, size int) {
	switch {
	case len(p) == 0:
		return 0, 0
	case p[0]&0x80 == 0:
		return int(p[0]), 1
	case len(p) == 1:
		return 0, 0
	}
	return int(p[0]&0x7f) | int(p[1])<<7, 2
}

// findAddresses finds the addresses, in front of the number of names or behind
// the token index, and how they are written.
func (k *kallsyms) findAddresses(s *section, number, index int, fits func(*kallsyms) error) error {
	type place struct {
		layouts []addressLayout
		offsets int
		base    int
	}
	relative := []addressLayout{layoutPercpu, layoutBase}
	after := s.align(index, 8)
	places := []place{
		{relative, after, s.align(after+4*k.count, 8)},
		{relative, s.align(index, 4), s.align(s.align(index, 4)+4*k.count, 4)},
		{[]addressLayout{layoutPlace}, s.align(index, 4), -1},
		{[]addressLayout{layoutPlace}, after, -1},
		{[]addressLayout{layoutAbsolute}, after, -1},
	}
	// In front, all is at multiples of 8.
	base := number - 8
	places = append(places,
		place{relative, s.align(base-4*k.count-7, 8), base},
		place{[]addressLayout{layoutAbsolute}, number - 8*k.count, -1})
	var nearest error
	for _, p := range places {
		width := 4
		if p.layouts[0] == layoutAbsolute {
			width = 8
		}
		end := p.offsets + width*k.count
		if p.offsets < 0 || !s.load(end) || p.base >= 0 && !s.load(p.base+8) {
			continue
		}
		for _, layout := range p.layouts {
			try := *k
			try.layout, try.offsets, try.at = layout, s.data[p.offsets:end], s.gva+uint64(p.offsets)
			if p.base >= 0 {
				try.base = binary.LittleEndian.Uint64(s.data[p.base:])
			}
			if !try.ordered() {
				continue
			}
			if err := fits(&try); err != nil {
				if nearest == nil {
					nearest = fmt.Errorf("%d %v addresses: %w", k.count, layout, err)
				}
				continue
			}
			try.parts = append(slices.Clone(k.parts), s.extent(p.offsets, max(end, p.base+8)))
			*k = try
			return nil
		}
	}
	if nearest == nil {
		nearest = errors.New("its names have no addresses that go up")
	}
	return nearest
}

// address is the i-th symbol's.
func (k *kallsyms) address(i int) uint64 {
	if k.layout == layoutAbsolute {
		return binary.LittleEndian.Uint64(k.offsets[8*i:])
	}
	v := binary.LittleEndian.Uint32(k.offsets[4*i:])
	switch k.layout {
	case layoutBase:
		return k.base + uint64(v)
	case layoutPlace:
		return k.at + 4*uint64(i) + uint64(int64(int32(v)))
	}
	if int32(v) >= 0 {
		return uint64(v)
	}
	return k.base - 1 - uint64(int64(int32(v)))
}

// has says whether a symbol is at the address.
func (k *kallsyms) has(addr uint64) bool {
	i := sort.Search(k.count, func(i int) bool { return k.address(i) >= addr })
	return i < k.count && k.address(i) == addr
}

// ordered says whether the addresses go up, as far as a few look. Symbols of
// CPUs' own data stand first.
func (k *kallsyms) ordered() bool {
	step := max(k.count/512, 1)
	previous := uint64(0)
	for i := 0; i < k.count; i += step {
		at := k.address(i)
		if at < previous {
			return false
		}
		previous = at
	}
	return previous>>63 == 1
}

// findOrder finds the table of the names' order, behind the addresses or, in
// 6.2 and 6.3, between the markers and the tokens.
func (k *kallsyms) findOrder(s *section, tokens int) {
	behind := int(k.parts[len(k.parts)-1].End - s.gva)
	markers := int(k.parts[1].End - s.gva)
	for _, at := range []int{s.align(behind, 8), s.align(behind, 4), s.align(markers, 8)} {
		end := at + 3*k.count
		if at < tokens && end > tokens || !s.load(end) {
			continue
		}
		order := s.data[at:end]
		if k.permutes(order) {
			k.order = order
			k.parts = append(k.parts, s.extent(at, end))
			return
		}
	}
}

// permutes says whether a table has all numbers of names, or nearly.
func (k *kallsyms) permutes(order []byte) bool {
	seen, bad := make([]bool, k.count), 0
	for i := range k.count {
		n := sequence(order, i)
		if n >= k.count || seen[n] {
			bad++
			continue
		}
		seen[n] = true
	}
	return bad <= k.count/64
}

func sequence(order []byte, i int) int {
	return int(order[3*i])<<16 | int(order[3*i+1])<<8 | int(order[3*i+2])
}

// decoded is what a symbol table says, and what contradicts itself in it.
type decoded struct {
	symbols *Symbols
	doubts  []Doubt
}

func (d *decoded) doubt(format string, args ...any) {
	d.doubts = append(d.doubts, Doubt{DoubtSymbols, fmt.Sprintf(format, args...)})
}

// decode makes Symbols of the table, moved by -slide.
func (k *kallsyms) decode(slide uint64) (*decoded, error) {
	ends := make([]uint32, k.count)
	sizes := k.tokenSizes()
	total, at := 0, 0
	for i := range ends {
		length, size := nameLength(k.names[at:])
		at += size
		for _, c := range k.names[at : at+length] {
			total += int(sizes[c])
		}
		at += length
		if total > k.count*longestName || total > math.MaxUint32 {
			return nil, fmt.Errorf("%d names of more than %d bytes", k.count, total)
		}
		ends[i] = uint32(total)
	}
	all := k.expand(total, &sizes)
	order := make(chan string, 1)
	go func() { order <- k.checkOrder(all, ends) }()
	s := &Symbols{entries: make([]symbolEntry, k.count), text: all, modules: []string{""}, long: true}
	d := &decoded{symbols: s}
	start, displaced := 0, 0
	previous := uint64(0)
	for i := range ends {
		end := int(ends[i])
		if end-start < 2 {
			return nil, fmt.Errorf("symbol %d has no type and name", i)
		}
		sym := Symbol{Address: k.address(i), Type: all[start], Name: all[start+1 : end]}
		e := symbolEntry{name: uint32(start + 1), length: uint16(len(sym.Name)), kind: sym.Type}
		start = end
		if !symbolType(sym.Type) {
			return nil, fmt.Errorf("symbol %d has the type %q", i, sym.Type)
		}
		if sym.Address < previous {
			if displaced++; displaced == 1 {
				d.doubt("the addresses do not go up from %#x to %#x (%s), though the kernel's build sorts them", previous, sym.Address, sym.Name)
			}
		} else {
			previous = sym.Address
		}
		if !sym.Absolute() {
			sym.Address -= slide
		}
		e.address = sym.Address
		s.entries[i] = e
	}
	s.sort()
	if doubt := <-order; doubt != "" {
		d.doubt("%s", doubt)
	}
	return d, nil
}

// tokenSizes are the tokens' lengths.
func (k *kallsyms) tokenSizes() (sizes [256]uint16) {
	for i, token := range k.tokens {
		sizes[i] = uint16(len(token))
	}
	return sizes
}

// expand makes one string of all names, of which total is the length.
func (k *kallsyms) expand(total int, sizes *[256]uint16) string {
	// Most tokens are short: all of a word is written, and what is behind the
	// token is written over.
	const word = 8
	var words [256]uint64
	for i, token := range k.tokens {
		var p [word]byte
		copy(p[:], token)
		words[i] = binary.LittleEndian.Uint64(p[:])
	}
	text := make([]byte, total+word)
	at, to := 0, 0
	for range k.count {
		length, size := nameLength(k.names[at:])
		at += size
		for _, c := range k.names[at : at+length] {
			if sizes[c] <= word {
				binary.LittleEndian.PutUint64(text[to:], words[c])
			} else {
				copy(text[to:], k.tokens[c])
			}
			to += int(sizes[c])
		}
		at += length
	}
	return string(text[:total])
}

// checkOrder says which names, that end in all at ends, are not where the table of
// their order has them; empty: none.
func (k *kallsyms) checkOrder(all string, ends []uint32) string {
	if k.order == nil {
		return ""
	}
	wrong := 0
	var first, second string
	previous := ""
	for i := range k.count {
		n := sequence(k.order, i)
		if n >= k.count {
			wrong++
			continue
		}
		start := uint32(0)
		if n > 0 {
			start = ends[n-1]
		}
		name := all[min(start+1, ends[n]):ends[n]] // without its type
		if name < previous {
			if wrong++; first == "" {
				first, second = previous, name
			}
		}
		previous = name
	}
	// A kernel built with clang's link-time optimization sorts names without
	// their suffixes.
	if wrong == 0 || wrong > k.count/64 {
		return ""
	}
	return fmt.Sprintf("the table of the names' order does not fit the names: %q comes before %q", first, second)
}

// find returns the addresses of some symbols, by their places in names; 0: the
// table does not have it.
func (k *kallsyms) find(names ...string) []uint64 {
	found := make([]uint64, len(names))
	var buf [longestName]byte
	// Most names do not begin like one of these.
	var possible [256]bool
	for c, head := range k.tokens {
		for _, name := range names {
			n := min(len(head)-1, len(name))
			possible[c] = possible[c] || n <= 0 || head[1:1+n] == name[:n]
		}
	}
	// Nor are most as long as one of these.
	sizes := k.tokenSizes()
	var asLong [longestName + 1]bool
	for _, name := range names {
		asLong[1+len(name)] = true
	}
	at := 0
	for i := range k.count {
		length, size := nameLength(k.names[at:])
		at += size
		token := k.names[at : at+length]
		at += length
		if !possible[token[0]] {
			continue
		}
		total := 0
		for _, c := range token {
			total += int(sizes[c])
		}
		if total >= len(asLong) || !asLong[total] {
			continue
		}
		text := buf[:0]
		for _, c := range token {
			text = append(text, k.tokens[c]...)
		}
		for j, name := range names {
			if found[j] == 0 && string(text[1:]) == name {
				found[j] = k.address(i)
			}
		}
	}
	return found
}

// tableContent is all that the symbols' names and, against text, their addresses
// are made of.
type tableContent struct {
	count                        int
	layout                       addressLayout
	base, at                     uint64
	table, names, offsets, order []byte
}

// content is that of the table; text is the address of _text.
func (k *kallsyms) content(text uint64) tableContent {
	base := k.base
	if k.layout == layoutPercpu || k.layout == layoutBase {
		base -= text
	}
	return tableContent{k.count, k.layout, base, k.at - text, k.table, k.names, k.offsets, k.order}
}

func (c *tableContent) parts() []*[]byte {
	return []*[]byte{&c.table, &c.names, &c.offsets, &c.order}
}

func (c *tableContent) equal(d *tableContent) bool {
	if c.count != d.count || c.layout != d.layout || c.base != d.base || c.at != d.at {
		return false
	}
	other := d.parts()
	for i, p := range c.parts() {
		if !bytes.Equal(*p, *other[i]) {
			return false
		}
	}
	return true
}

func (c tableContent) clone() tableContent {
	for _, p := range c.parts() {
		*p = bytes.Clone(*p)
	}
	return c
}

func (c *tableContent) digest() string {
	h := sha256.New()
	fmt.Fprintf(h, "%d %v %#x %#x %d %d\n", c.count, c.layout, c.base, c.at, len(c.names), len(c.order))
	for _, p := range c.parts() {
		h.Write(*p)
	}
	return hex.EncodeToString(h.Sum(nil))
}
