// SPDX-License-Identifier: MIT

package stress

import (
	"encoding/binary"
	"math/rand/v2"

	"golang.org/x/sys/unix"
)

// message is a request by its parts, so that it can be broken at each.
type message struct {
	cmd, version uint8
	flags        uint16
	attrs        []attr
}

type attr struct {
	typ   uint16
	value []byte
	nest  []attr // in place of value
	lie   int    // how much longer than it is the attribute says to be
}

func u32(typ uint16, v uint32) attr {
	return attr{typ: typ, value: binary.NativeEndian.AppendUint32(nil, v)}
}

func u64(typ uint16, v uint64) attr {
	return attr{typ: typ, value: binary.NativeEndian.AppendUint64(nil, v)}
}

func (a attr) append(b []byte) []byte {
	start := len(b)
	b = append(b, 0, 0, byte(a.typ), byte(a.typ>>8))
	if a.nest != nil {
		for _, n := range a.nest {
			b = n.append(b)
		}
	} else {
		b = append(b, a.value...)
	}
	binary.NativeEndian.PutUint16(b[start:], uint16(len(b)-start+a.lie))
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// append appends the message as it is sent; the buffer so far ends on a
// multiple of four.
func (m *message) append(b []byte, family uint16) []byte {
	start := len(b)
	b = append(b, 0, 0, 0, 0, byte(family), byte(family>>8), byte(m.flags), byte(m.flags>>8),
		0, 0, 0, 0, 0, 0, 0, 0, m.cmd, m.version, 0, 0)
	for _, a := range m.attrs {
		b = a.append(b)
	}
	binary.NativeEndian.PutUint32(b[start:], uint32(len(b)-start))
	return b
}

// target is what requests are about.
type target struct {
	vms     []uint64
	vcpus   uint32
	watches []uint64 // of the socket
}

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// kinds are all requests there are, in their valid form.
var kinds = []struct {
	name string
	make func(r *rand.Rand, t target) message
}{
	{"info", func(*rand.Rand, target) message { return do(cmdInfo) }},
	{"vm", func(r *rand.Rand, t target) message { return do(cmdVMGet, t.vm(r)) }},
	{"vms", func(*rand.Rand, target) message { return dump(cmdVMGet) }},
	{"memslot", func(r *rand.Rand, t target) message {
		return do(cmdMemslotGet, t.vm(r), u32(aMemslotAS, 0), u32(aMemslotSlot, 0))
	}},
	{"memslots", func(r *rand.Rand, t target) message { return dump(cmdMemslotGet, t.vm(r)) }},
	{"vcpu", func(r *rand.Rand, t target) message { return do(cmdVCPUGet, t.vm(r), u32(aVCPUID, t.vcpu(r))) }},
	{"vcpus", func(r *rand.Rand, t target) message { return dump(cmdVCPUGet, t.vm(r)) }},
	{"table", func(r *rand.Rand, t target) message {
		return do(cmdTableGet, t.vm(r), u32(aTableVCPU, t.vcpu(r)), u32(aTableKind, pick(r, uint32(1), 2)))
	}},
	{"part of a table", func(r *rand.Rand, t target) message {
		return do(cmdTableGet, t.vm(r), u32(aTableVCPU, t.vcpu(r)), u32(aTableKind, pick(r, uint32(1), 2)),
			u32(aTableOffset, r.Uint32N(64)), u32(aTableLength, 1+r.Uint32N(64)))
	}},
	{"physical memory", func(r *rand.Rand, t target) message {
		return do(cmdMemRead, append([]attr{t.vm(r)}, ranges(r)...)...)
	}},
	{"virtual memory", func(r *rand.Rand, t target) message {
		return do(cmdMemRead, append([]attr{t.vm(r), u32(aMemVCPU, t.vcpu(r))}, ranges(r)...)...)
	}},
	{"virtual memory by a root", func(r *rand.Rand, t target) message {
		return do(cmdMemRead, append([]attr{t.vm(r), u32(aMemVCPU, t.vcpu(r)),
			u64(aMemRoot, uint64(r.Uint32N(0x200))<<12)}, ranges(r)...)...)
	}},
	{"statistics", func(*rand.Rand, target) message { return do(cmdStats) }},
	{"statistics of a VM", func(r *rand.Rand, t target) message { return do(cmdStats, t.vm(r)) }},
	{"statistics of all VMs", func(*rand.Rand, target) message { return dump(cmdStats) }},
	{"new watch", func(r *rand.Rand, t target) message {
		if len(t.watches) >= maxWatches {
			return do(cmdWatchDel, t.oldest())
		}
		attrs := []attr{u64(aWatchVMID, t.vm(r).number()), u64(aWatchPeriod, pick(r, uint64(500_000), 1_000_000, 10_000_000, 3_600_000_000_000))}
		if r.IntN(2) == 0 {
			attrs = append(attrs, u32(aWatchBudget, pick(r, uint32(4096), 65536)), attr{typ: aWatchKey, value: random(r, 16)})
		}
		return do(cmdWatchNew, attrs...)
	}},
	{"items", func(r *rand.Rand, t target) message {
		return do(cmdWatchAdd, append([]attr{t.watch(r)}, items(r, t)...)...)
	}},
	{"items of a cookie", func(r *rand.Rand, t target) message {
		return do(cmdWatchDel, t.watch(r), u64(aWatchCookie, uint64(r.Uint32N(4))))
	}},
	{"end of a watch", func(r *rand.Rand, t target) message { return do(cmdWatchDel, t.watch(r)) }},
	{"account of a watch", func(r *rand.Rand, t target) message { return do(cmdWatchGet, t.watch(r)) }},
	{"accounts of all watches", func(*rand.Rand, target) message { return dump(cmdWatchGet) }},
}

func do(cmd uint8, attrs ...attr) message {
	return message{cmd: cmd, version: 1, flags: unix.NLM_F_REQUEST, attrs: attrs}
}

func dump(cmd uint8, attrs ...attr) message {
	return message{cmd: cmd, version: 1, flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP, attrs: attrs}
}

func (t target) vm(r *rand.Rand) attr {
	if len(t.vms) == 0 {
		return u64(aVMID, 1)
	}
	return u64(aVMID, pick(r, t.vms...))
}

// number is the value of an attribute of 8 bytes.
func (a attr) number() uint64 { return binary.NativeEndian.Uint64(a.value) }

func (t target) watch(r *rand.Rand) attr {
	if len(t.watches) == 0 {
		return u64(aWatchID, 1)
	}
	return u64(aWatchID, pick(r, t.watches...))
}

func (t target) oldest() attr { return u64(aWatchID, t.watches[0]) }

func (t target) vcpu(r *rand.Rand) uint32 { return r.Uint32N(max(1, t.vcpus)) }

func ranges(r *rand.Rand) []attr {
	var attrs []attr
	for range 1 + r.IntN(3) {
		attrs = append(attrs, attr{typ: aMemRange | unix.NLA_F_NESTED, nest: []attr{
			u64(aRangeAddress, uint64(r.Uint32N(2<<20))),
			u32(aRangeLen, 1+r.Uint32N(pick(r, uint32(16), 4096, 8192))),
		}})
	}
	return attrs
}

func items(r *rand.Rand, t target) []attr {
	var attrs []attr
	for range 1 + r.IntN(4) {
		kind := pick(r, uint32(kindBytes), kindEntry, kindDigest, kindReg)
		nest := []attr{u64(aItemCookie, uint64(r.Uint32N(4))), u32(aItemKind, kind)}
		page := uint64(r.Uint32N(0x240)) << 12
		switch kind {
		case kindBytes:
			n := 1 + r.IntN(64)
			nest = append(nest, u64(aItemGPA, page+uint64(r.IntN(4096-n))), attr{typ: aItemData, value: random(r, n)})
		case kindEntry:
			nest = append(nest, u64(aItemGPA, page+8*uint64(r.IntN(512))), u64(aItemValue, 0), u64(aItemMask, r.Uint64()))
		case kindDigest:
			nest = append(nest, u64(aItemGPA, page), attr{typ: aItemData, value: random(r, 8*(1+r.IntN(4)))})
		case kindReg:
			nest = append(nest, u32(aItemRegister, 1+r.Uint32N(lastRegister)), u64(aItemValue, 0))
			if r.IntN(2) == 0 {
				nest = append(nest, u32(aItemVCPU, t.vcpu(r)))
			}
		}
		attrs = append(attrs, attr{typ: aWatchItem | unix.NLA_F_NESTED, nest: nest})
	}
	return attrs
}

// extremes are values at which counting goes wrong.
var extremes = []uint64{
	0, 1, 2, 7, 8, 63, 64, 65, 0xfff, 0x1000, 0x7000, 0x7001, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff,
	1 << 32, 1<<47 - 1, 1 << 47, 1<<52 - 1, 1 << 52, 1<<63 - 1, 1 << 63, 0xffff800000000000, 1<<64 - 4096, 1<<64 - 1,
}

// mutate breaks the message at some of its parts.
func (m *message) mutate(r *rand.Rand) {
	for again := true; again; again = r.IntN(2) == 0 {
		switch r.IntN(8) {
		case 0:
			m.flags = unix.NLM_F_REQUEST | uint16(r.Uint32N(1<<12))
		case 1:
			m.cmd = pick(r, uint8(r.Uint32N(cmdLast+3)), uint8(r.Uint32()))
		case 2:
			m.version = uint8(r.Uint32())
		default:
			m.attrs = mutateAttrs(r, m.attrs, 0)
		}
	}
}

func mutateAttrs(r *rand.Rand, attrs []attr, depth int) []attr {
	if len(attrs) == 0 || r.IntN(12) == 0 {
		return append(attrs, randomAttr(r, depth))
	}
	i := r.IntN(len(attrs))
	a := &attrs[i]
	switch r.IntN(11) {
	case 0: // one fewer
		return append(attrs[:i:i], attrs[i+1:]...)
	case 1: // one more, rarely a great many
		n := 1
		if r.IntN(4) == 0 {
			n = r.IntN(200)
		}
		for range n {
			attrs = append(attrs, *a)
		}
	case 2: // another order
		j := r.IntN(len(attrs))
		attrs[i], attrs[j] = attrs[j], attrs[i]
	case 3:
		a.typ = pick(r, uint16(r.Uint32N(12)), uint16(r.Uint32()), a.typ^unix.NLA_F_NESTED, a.typ^unix.NLA_F_NET_BYTEORDER)
	case 4: // it says to be longer or shorter
		a.lie = pick(r, -4, -3, -1, 1, 3, 4, 8, 0xff00, r.IntN(1<<16))
	case 5, 6: // another value of the same size
		value := pick(r, pick(r, extremes...), r.Uint64(), r.Uint64()>>r.IntN(64))
		b := binary.NativeEndian.AppendUint64(nil, value)
		if a.nest == nil && len(a.value) <= len(b) {
			a.value = b[:len(a.value)]
		}
	case 7: // another size
		a.value, a.nest = random(r, pick(r, 0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 16, r.IntN(300))), nil
	case 8: // nested where it should not be
		inner := *a
		if depth < 40 {
			a.nest, a.value = []attr{inner}, nil
		}
	default:
		if a.nest != nil && depth < 40 {
			a.nest = mutateAttrs(r, a.nest, depth+1)
		} else if len(a.value) > 0 {
			a.value = append([]byte(nil), a.value...)
			a.value[r.IntN(len(a.value))] ^= 1 << r.IntN(8)
		}
	}
	return attrs
}

func randomAttr(r *rand.Rand, depth int) attr {
	a := attr{typ: uint16(r.Uint32N(8))}
	if r.IntN(3) == 0 && depth < 4 {
		a.typ |= unix.NLA_F_NESTED
		for range r.IntN(4) {
			a.nest = append(a.nest, randomAttr(r, depth+1))
		}
		return a
	}
	a.value = random(r, r.IntN(20))
	return a
}

func random(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}
