// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"encoding/binary"
	"testing"

	"github.com/mdlayher/netlink"
)

// attr encodes one attribute with its padding.
func attr(typ uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(attrHeader+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	return append(b, make([]byte, align(len(b))-len(b))...)
}

func u32(typ uint16, v uint32) []byte { return appendU32(nil, typ, v) }
func u64(typ uint16, v uint64) []byte { return appendU64(nil, typ, v) }
func text(typ uint16, s string) []byte {
	return attr(typ, append([]byte(s), 0))
}
func nest(typ uint16, attrs ...[]byte) []byte {
	return attr(typ|netlink.Nested, join(attrs...))
}

func join(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// split undoes join.
func split(t testing.TB, b []byte) [][]byte {
	t.Helper()
	var parts [][]byte
	for a := (attrs{set: "test", b: b}); a.next(); {
		n := len(b) - len(a.b)
		parts = append(parts, b[:n])
		b = b[n:]
	}
	if len(b) != 0 {
		t.Fatalf("%d bytes behind the last attribute", len(b))
	}
	return parts
}

func attrType(b []byte) uint16 { return binary.NativeEndian.Uint16(b[2:]) & attrTypeMask }

// overrides make the messages that specMessage generates consistent: values
// of attributes, or nil to leave one out.
var overrides = map[string]map[string][]byte{
	"table": {
		"offset": u32(aTableOffset, 0),
		"length": u32(aTableLength, 8),
		"limit":  u32(aTableLimit, 7),
	},
	"range": {
		"address": u64(aRangeAddress, 0x1000),
		"length":  u32(aRangeLength, 8),
		"error":   nil,
		"fault":   nil,
	},
	"vcpu": {"cpl": u32(aVCPUCPL, 3)},
}

// specMessage generates a message with each attribute that the spec gives a
// set, of the type that it gives it, with the attribute's number in its value.
func specMessage(t testing.TB, s spec, name string) []byte {
	t.Helper()
	for _, set := range s.Sets {
		if set.Name != name {
			continue
		}
		var b []byte
		for i, a := range set.Attrs {
			typ := uint16(i + 1)
			if v, ok := overrides[name][a.Name]; ok {
				b = append(b, v...)
				continue
			}
			var one []byte
			switch a.Type {
			case "pad":
			case "u32":
				one = u32(typ, uint32(typ))
			case "u64":
				one = u64(typ, uint64(typ)<<32|uint64(typ))
			case "string":
				one = text(typ, a.Name)
			case "binary":
				one = attr(typ, []byte("12345678"))
			case "nest":
				one = nest(typ, specMessage(t, s, a.Nested))
			default:
				t.Fatalf("%s %s: type %s", name, a.Name, a.Type)
			}
			b = append(b, one...)
			if a.Multi {
				b = append(b, one...)
			}
		}
		return b
	}
	t.Fatalf("the spec has no set %s", name)
	return nil
}

// wire is one parser with what a test must know about its attributes.
type wire struct {
	set      string
	parse    func([]byte) (any, error)
	optional []string
}

// wantedRanges are what wires' mem message answers.
func wantedRanges() []RangeData {
	r := RangeData{Range: Range{Address: 0x1000, Length: 8}}
	return []RangeData{r, r}
}

var wires = []wire{
	{"info", func(b []byte) (any, error) { return parseInfo(b) }, []string{"missing"}},
	{"vm", func(b []byte) (any, error) { return parseVM(b) }, nil},
	{"memslot", func(b []byte) (any, error) { return parseMemslot(b) }, nil},
	{"vcpu", func(b []byte) (any, error) { return parseVCPU(b) }, []string{"cpu", "cr8"}},
	{"segment", func(b []byte) (any, error) {
		a := attrs{b: attr(1, b)}
		a.next()
		v := a.segment()
		return v, a.err
	}, nil},
	{"table", func(b []byte) (any, error) { return parseTable(b, 0) }, []string{"offset", "length"}},
	{"mem", func(b []byte) (any, error) {
		want := wantedRanges()
		err := parseRanges(b, 7, want)
		return want, err
	}, []string{"vm-id", "vcpu-id", "root"}},
	{"range", func(b []byte) (any, error) {
		want := wantedRanges()[0]
		err := parseRange(&attrs{set: "range", b: b}, 7, &want)
		return want, err
	}, []string{"address", "length"}},
	{"stats", func(b []byte) (any, error) { return parseStats(b) }, []string{"vm-id", "events", "op"}},
	{"op", func(b []byte) (any, error) { return parseOp(&attrs{set: "op", b: b}) }, nil},
}
