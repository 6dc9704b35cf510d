// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math/bits"

	"github.com/cilium/ebpf/btf"
)

// typeGraph is which type of a BTF refers to which. It finds types by name,
// and it guards the decoder: that one follows references by recursion, and a
// guest can write a chain of half a million, which is more stack than a Go
// program may have.
type typeGraph struct {
	raw     []byte
	types   []byte // the type section
	strings []byte
	offsets []uint32 // of each type in types; ids count from first
	first   btf.TypeID
	tags    map[btf.TypeID][]btf.TypeID // declaration tags by what they are of
	visited []bool                      // decoded by now
	base    *typeGraph

	// The index of names. Each number is one of a type, from 1 on; chain has
	// the next one whose name has the same hash.
	seed         maphash.Seed
	heads, chain []uint32
}

// maxTypeDepth bounds the chain of references that the decoder follows:
// kernels need up to a few hundred. It takes about 2 KiB of stack each.
const maxTypeDepth = 1 << 14

// Kinds of types (include/uapi/linux/btf.h).
const (
	btfInt = iota + 1
	btfPtr
	btfArray
	btfStruct
	btfUnion
	btfEnum
	btfFwd
	btfTypedef
	btfVolatile
	btfConst
	btfRestrict
	btfFunc
	btfFuncProto
	btfVar
	btfDatasec
	btfFloat
	btfDeclTag
	btfTypeTag
	btfEnum64
)

// newTypeGraph reads where each type lies.
func newTypeGraph(raw []byte, base *typeGraph) (*typeGraph, error) {
	size, ok := btfSize(raw)
	if !ok {
		return nil, errors.New("it does not begin like BTF, or is cut off")
	}
	if size > maxBTF {
		return nil, fmt.Errorf("%d bytes, at most %d are taken", size, maxBTF)
	}
	word := func(at int) uint64 { return uint64(binary.LittleEndian.Uint32(raw[at:])) }
	body := raw[word(4):]
	g := &typeGraph{raw: raw, base: base, first: 1, tags: map[btf.TypeID][]btf.TypeID{}}
	g.types = body[word(8) : word(8)+word(12)]
	g.strings = body[word(16) : word(16)+word(20)]
	if base != nil {
		g.first = base.first + btf.TypeID(len(base.offsets))
	}
	g.offsets = make([]uint32, 0, len(g.types)/24)
	for at := 0; at < len(g.types); {
		if len(g.types)-at < 12 {
			return nil, fmt.Errorf("type %d is cut off", len(g.offsets))
		}
		kind, vlen := g.kind(at)
		id := g.first + btf.TypeID(len(g.offsets))
		if kind == btfDeclTag {
			of := btf.TypeID(binary.LittleEndian.Uint32(g.types[at+8:]))
			g.tags[of] = append(g.tags[of], id)
		}
		g.offsets = append(g.offsets, uint32(at))
		at += 12
		switch kind {
		case btfInt, btfVar, btfDeclTag:
			at += 4
		case btfArray:
			at += 12
		case btfStruct, btfUnion, btfDatasec, btfEnum64:
			at += 12 * vlen
		case btfEnum, btfFuncProto:
			at += 8 * vlen
		}
		if at > len(g.types) {
			return nil, fmt.Errorf("type %d is cut off", id)
		}
	}
	g.visited = make([]bool, len(g.offsets))
	return g, nil
}

func (g *typeGraph) kind(at int) (kind, vlen int) {
	info := binary.LittleEndian.Uint32(g.types[at+4:])
	return int(info >> 24 & 0x1f), int(info & 0xffff)
}

// named finds the types with exactly the name, in the order of their ids. It
// makes the index of names when it is first called.
func (g *typeGraph) named(name string) []btf.TypeID {
	if g.heads == nil {
		g.index()
	}
	var ids []btf.TypeID
	for i := g.heads[g.slot([]byte(name))]; i != 0; i = g.chain[i-1] {
		if string(g.nameOf(int(i-1))) == name {
			ids = append(ids, g.first+btf.TypeID(i-1))
		}
	}
	return ids
}

func (g *typeGraph) index() {
	g.seed = maphash.MakeSeed()
	g.heads = make([]uint32, 1<<bits.Len(uint(len(g.offsets))))
	g.chain = make([]uint32, len(g.offsets))
	for i := len(g.offsets) - 1; i >= 0; i-- {
		slot := &g.heads[g.slot(g.nameOf(i))]
		g.chain[i], *slot = *slot, uint32(i+1)
	}
}

func (g *typeGraph) slot(name []byte) uint64 {
	return maphash.Bytes(g.seed, name) & uint64(len(g.heads)-1)
}

// nameOf is the name of the i-th type, empty if it has none.
func (g *typeGraph) nameOf(i int) []byte {
	return g.string(binary.LittleEndian.Uint32(g.types[g.offsets[i]:]))
}

// string is the one at an offset, empty if there is none.
func (g *typeGraph) string(at uint32) []byte {
	offset := int64(at)
	for b := g.base; b != nil; b = b.base {
		offset -= int64(len(b.strings))
	}
	if offset < 0 {
		return g.base.string(at)
	}
	rest := g.strings[min(offset, int64(len(g.strings))):]
	return rest[:max(bytes.IndexByte(rest, 0), 0)]
}

// reference is the i-th type that the type at offset refers to, in the order
// in which the decoder follows them.
func (g *typeGraph) reference(id btf.TypeID, i int) (btf.TypeID, bool) {
	at := int(g.offsets[id-g.first])
	kind, vlen := g.kind(at)
	word := func(at int) btf.TypeID { return btf.TypeID(binary.LittleEndian.Uint32(g.types[at:])) }
	n := 0
	switch kind {
	case btfPtr, btfTypedef, btfVolatile, btfConst, btfRestrict, btfFunc, btfVar, btfDeclTag, btfTypeTag:
		if n = 1; i < n {
			return word(at + 8), true
		}
	case btfArray:
		if n = 2; i < n {
			return word(at + 12 + 4*(1-i)), true
		}
	case btfStruct, btfUnion:
		if n = vlen; i < n {
			return word(at + 12 + 12*i + 4), true
		}
	case btfFuncProto:
		if n = vlen + 1; i < vlen {
			return word(at + 12 + 8*i + 4), true
		} else if i == vlen {
			return word(at + 8), true
		}
	case btfDatasec:
		if n = vlen; i < n {
			return word(at + 12 + 12*i), true
		}
	}
	if tags := g.tags[id]; i-n < len(tags) {
		return tags[i-n], true
	}
	return 0, false
}

// owner is the graph that the type is in; nil: there is none, or it is void.
func (g *typeGraph) owner(id btf.TypeID) *typeGraph {
	for ; g != nil; g = g.base {
		if id >= g.first {
			if int64(id-g.first) >= int64(len(g.offsets)) {
				return nil
			}
			return g
		}
	}
	return nil
}

// descend follows all references of a type as the decoder does, and says
// whether that goes too deep for it.
func (g *typeGraph) descend(id btf.TypeID) error {
	type frame struct {
		g    *typeGraph
		id   btf.TypeID
		next int
	}
	enter := func(stack []frame, id btf.TypeID) []frame {
		o := g.owner(id)
		if o == nil || o.visited[id-o.first] {
			return stack
		}
		o.visited[id-o.first] = true
		return append(stack, frame{o, id, 0})
	}
	stack := enter(nil, id)
	for len(stack) > 0 {
		if len(stack) > maxTypeDepth {
			for g := g; g != nil; g = g.base {
				clear(g.visited)
			}
			return fmt.Errorf("types refer to each other in a chain of more than %d", maxTypeDepth)
		}
		top := &stack[len(stack)-1]
		ref, ok := top.g.reference(top.id, top.next)
		if !ok {
			stack = stack[:len(stack)-1]
			continue
		}
		top.next++
		stack = enter(stack, ref)
	}
	return nil
}
