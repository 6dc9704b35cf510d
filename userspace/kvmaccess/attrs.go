// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"bytes"
	"encoding/binary"

	"github.com/mdlayher/netlink"
)

// attrs walks over the attributes of a message or nest. It stands in for
// netlink.AttributeDecoder, which copies each attribute: a vCPU has more than
// a hundred, and one is read each period.
type attrs struct {
	set  string // for errors: which attribute set this is
	b    []byte // what is left
	typ  uint16 // current attribute, flags removed
	data []byte
	seen [2]uint64 // types below 128 met so far
	err  error
}

const (
	attrHeader   = 4
	attrTypeMask = ^uint16(netlink.Nested | netlink.NetByteOrder)
)

func align(n int) int { return (n + 3) &^ 3 }

// next goes to the next attribute. It returns false at the end and after an
// error.
func (a *attrs) next() bool {
	if a.err != nil || len(a.b) == 0 {
		return false
	}
	if len(a.b) < attrHeader {
		a.err = wireError("%s: %d stray bytes behind attribute %d", a.set, len(a.b), a.typ)
		return false
	}
	n := int(binary.NativeEndian.Uint16(a.b))
	a.typ = binary.NativeEndian.Uint16(a.b[2:]) & attrTypeMask
	if n < attrHeader || n > len(a.b) {
		a.err = wireError("%s: attribute %d has length %d of %d", a.set, a.typ, n, len(a.b))
		return false
	}
	a.data = a.b[attrHeader:n]
	a.b = a.b[min(align(n), len(a.b)):]
	return true
}

// once notes the current attribute and refuses a second one of its type.
func (a *attrs) once() bool {
	if a.err != nil {
		return false
	}
	if a.has(a.typ) {
		a.err = wireError("%s: attribute %d appears twice", a.set, a.typ)
		return false
	}
	a.mark()
	return true
}

func (a *attrs) mark() {
	if a.typ < 128 {
		a.seen[a.typ/64] |= 1 << (a.typ % 64)
	}
}

func (a *attrs) has(typ uint16) bool {
	return typ < 128 && a.seen[typ/64]&(1<<(typ%64)) != 0
}

// finish returns what went wrong on the way, or which of the attributes from
// first to last, but for the optional, was missing.
func (a *attrs) finish(first, last uint16, optional ...uint16) error {
	if a.err != nil {
		return a.err
	}
next:
	for typ := first; typ <= last; typ++ {
		if a.has(typ) {
			continue
		}
		for _, o := range optional {
			if o == typ {
				continue next
			}
		}
		return wireError("%s: attribute %d is missing", a.set, typ)
	}
	return nil
}

func (a *attrs) sized(n int) bool {
	if !a.once() {
		return false
	}
	if len(a.data) != n {
		a.err = wireError("%s: attribute %d has %d bytes, want %d", a.set, a.typ, len(a.data), n)
		return false
	}
	return true
}

func (a *attrs) u32() uint32 {
	if !a.sized(4) {
		return 0
	}
	return binary.NativeEndian.Uint32(a.data)
}

func (a *attrs) u64() uint64 {
	if !a.sized(8) {
		return 0
	}
	return binary.NativeEndian.Uint64(a.data)
}

// number is u32 for values that Go keeps in an int; max bounds it.
func (a *attrs) number(max uint32) int {
	v := a.u32()
	if a.err == nil && v > max {
		a.err = wireError("%s: attribute %d is %d, more than %d", a.set, a.typ, v, max)
		return 0
	}
	return int(v)
}

// text is a string that ends with one zero byte; it may be repeated.
func (a *attrs) text() string {
	if a.err != nil {
		return ""
	}
	a.mark()
	i := bytes.IndexByte(a.data, 0)
	if i < 0 || i != len(a.data)-1 {
		a.err = wireError("%s: attribute %d is not a terminated string", a.set, a.typ)
		return ""
	}
	return string(a.data[:i])
}

// bytes are the current attribute's own, valid as long as the message is.
func (a *attrs) bytes() []byte {
	if !a.once() {
		return nil
	}
	return a.data
}

// nest walks over the attributes in the current one, which may be repeated.
func (a *attrs) nest(set string) attrs {
	if a.err != nil {
		return attrs{set: set}
	}
	a.mark()
	return attrs{set: set, b: a.data}
}

// check takes over the outcome of parsing a nest.
func (a *attrs) check(err error) {
	if a.err == nil && err != nil {
		a.err = err
	}
}

func appendU32(b []byte, typ uint16, v uint32) []byte {
	b = binary.NativeEndian.AppendUint16(b, attrHeader+4)
	b = binary.NativeEndian.AppendUint16(b, typ)
	return binary.NativeEndian.AppendUint32(b, v)
}

func appendU64(b []byte, typ uint16, v uint64) []byte {
	b = binary.NativeEndian.AppendUint16(b, attrHeader+8)
	b = binary.NativeEndian.AppendUint16(b, typ)
	return binary.NativeEndian.AppendUint64(b, v)
}

// appendRange appends a nest of type typ with address and length in it.
func appendRange(b []byte, typ uint16, r Range) []byte {
	b = binary.NativeEndian.AppendUint16(b, attrHeader+12+8)
	b = binary.NativeEndian.AppendUint16(b, typ|netlink.Nested)
	b = appendU64(b, aRangeAddress, r.Address)
	return appendU32(b, aRangeLength, r.Length)
}
