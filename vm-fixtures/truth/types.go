// SPDX-License-Identifier: MIT

package truth

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// Kinds of types (Documentation/bpf/btf.rst of Linux).
const (
	kindInt    = 1
	kindArray  = 3
	kindStruct = 4
	kindUnion  = 5
	kindEnum   = 6
	kindProto  = 13
	kindVar    = 14
	kindSec    = 15
	kindTag    = 17
	kindEnum64 = 19
)

// btfType is one entry of BTF's type section.
type btfType struct {
	name, kind, size uint32
	flag             bool
	members          []btfMember
}

type btfMember struct{ name, typ, offset uint32 }

// parseBTF reads the types and strings of a kernel's BTF, which is trusted. It
// knows of them what it takes to lay out structs.
func parseBTF(raw []byte) (types []btfType, names []byte, err error) {
	var h struct {
		Magic          uint16
		Version, Flags uint8
		Header         uint32
		TypeOff        uint32
		TypeLen        uint32
		StrOff, StrLen uint32
	}
	if err := binary.Read(bytes.NewReader(raw), binary.LittleEndian, &h); err != nil {
		return nil, nil, fmt.Errorf("BTF: %w", err)
	}
	end := uint64(h.Header) + max(uint64(h.TypeOff)+uint64(h.TypeLen), uint64(h.StrOff)+uint64(h.StrLen))
	if h.Magic != 0xeb9f || end > uint64(len(raw)) {
		return nil, nil, errors.New("BTF: bad header")
	}
	names = raw[h.Header+h.StrOff:][:h.StrLen]
	b := raw[h.Header+h.TypeOff:][:h.TypeLen]
	types = []btfType{{}} // void
	for len(b) > 0 {
		word := func(i int) uint32 { return binary.LittleEndian.Uint32(b[4*i:]) }
		if len(b) < 12 {
			return nil, nil, errors.New("BTF: cut off")
		}
		t := btfType{name: word(0), kind: word(1) >> 24 & 31, flag: word(1)>>31 != 0, size: word(2)}
		n, words := int(word(1)&0xffff), 0
		switch t.kind {
		case kindInt, kindVar, kindTag:
			words = 1
		case kindArray:
			words = 3
		case kindEnum, kindProto:
			words = 2 * n
		case kindStruct, kindUnion, kindSec, kindEnum64:
			words = 3 * n
		}
		if len(b) < 12+4*words {
			return nil, nil, errors.New("BTF: cut off")
		}
		if t.kind == kindStruct || t.kind == kindUnion {
			for i := range n {
				t.members = append(t.members, btfMember{word(3 + 3*i), word(4 + 3*i), word(5 + 3*i)})
			}
		}
		types = append(types, t)
		b = b[12+4*words:]
	}
	return types, names, nil
}

// Types compares the layout of each struct and union that has a tag, and of
// the anonymous ones in it, with the guest's /sys/kernel/btf/vmlinux: sizes,
// and the offset of each named member, in bits for bit-fields. Of several with
// the same tag it is the first. Of the structs, each every-th is looked at: 1 for
// all. Members are what is counted.
func Types(btf []byte, found *guest.Types, every int) (Comparison, error) {
	var c Comparison
	types, names, err := parseBTF(btf)
	if err != nil {
		return c, err
	}
	name := func(at uint32) string {
		s, _, _ := bytes.Cut(names[min(int(at), len(names)):], []byte{0})
		return string(s)
	}
	seen := map[string]bool{}
	for i := range types {
		t := &types[i]
		tag := map[uint32]string{kindStruct: "struct ", kindUnion: "union "}[t.kind] + name(t.name)
		if t.kind != kindStruct && t.kind != kindUnion || t.name == 0 || seen[tag] || len(t.members) == 0 {
			continue
		}
		seen[tag] = true
		if len(seen)%every != 0 {
			continue
		}
		s, err := found.Struct(tag)
		switch {
		case err != nil:
			c.differs("%s: %v", tag, err)
		case s.Size != t.size:
			c.differs("%s: its size is %d, found %d", tag, t.size, s.Size)
		}
		bad := err != nil || s.Size != t.size
		members := map[string]bool{}
		var walk func(t *btfType, base uint32, depth int)
		walk = func(t *btfType, base uint32, depth int) {
			for _, m := range t.members {
				offset, bits := base+m.offset, uint32(0)
				if t.flag {
					offset, bits = base+m.offset&0xffffff, m.offset>>24
				}
				if m.name == 0 {
					if int(m.typ) < len(types) && depth < 16 {
						walk(&types[m.typ], offset, depth+1)
					}
					continue
				}
				path := name(m.name)
				if members[path] {
					continue // of a nested anonymous one, hidden by that outside
				}
				members[path] = true
				c.Truth++
				if bad {
					continue
				}
				f, err := s.Field(path)
				switch {
				case err != nil:
					c.differs("%s.%s: %v", tag, path, err)
				case f.Offset*8+f.BitOffset != offset || f.BitSize != bits:
					c.differs("%s.%s: at bit %d, %d bits; found at %d, %d bits", tag, path, offset, bits, f.Offset*8+f.BitOffset, f.BitSize)
				default:
					c.Equal++
				}
			}
		}
		walk(t, 0, 0)
	}
	return c, nil
}
