// SPDX-License-Identifier: MIT

package guest

import (
	"encoding/binary"
	"fmt"
)

// Gate is an entry of an interrupt descriptor table (Intel SDM vol. 3, 6.11
// "IDT Descriptors", 6.14.1 "64-Bit Mode IDT"; AMD APM vol. 2, 4.8.4).
type Gate struct {
	Vector   int    `json:"vector"`
	Raw      uint64 `json:"raw"`
	High     uint64 `json:"high,omitempty"` // second half, in long mode
	Handler  uint64 `json:"handler"`
	Selector uint16 `json:"selector"`
	IST      uint8  `json:"ist"` // interrupt stack, 0: none; in long mode
	Type     uint8  `json:"type"`
	DPL      uint8  `json:"dpl"`
	Present  bool   `json:"present"`
}

// GateSize is the size in bytes of an IDT's entries.
func GateSize(long bool) int {
	if long {
		return 16
	}
	return 8
}

// ParseIDT decodes an IDT, of a guest in long mode or not. At most 256 gates
// are returned; a trailing part of one is ignored.
func ParseIDT(data []byte, long bool) []Gate {
	size := GateSize(long)
	n := min(len(data)/size, 256)
	table := make([]Gate, n)
	for i := range table {
		p := data[i*size:]
		g := &table[i]
		g.Vector = i
		g.Raw = binary.LittleEndian.Uint64(p)
		g.Handler = g.Raw&0xffff | g.Raw>>48<<16
		g.Selector = uint16(g.Raw >> 16)
		g.Type = uint8(g.Raw >> 40 & 31) // with S, which is 0 in a gate
		g.DPL = uint8(g.Raw >> 45 & 3)
		g.Present = g.Raw>>47&1 == 1
		if long {
			g.IST = uint8(g.Raw >> 32 & 7)
			g.High = binary.LittleEndian.Uint64(p[8:])
			g.Handler |= g.High & 0xffffffff << 32
		}
	}
	return table
}

// Kind names the type.
func (g Gate) Kind() string {
	switch g.Type {
	case TypeInterruptGate, TypeInterruptGate16:
		return "interrupt gate"
	case TypeTrapGate, TypeTrapGate16:
		return "trap gate"
	case TypeTaskGate:
		return "task gate"
	case TypeCallGate, TypeCallGate16:
		return "call gate"
	}
	return fmt.Sprintf("type %d", g.Type)
}

// String describes the gate in a line.
func (g Gate) String() string {
	if g.Raw == 0 && g.High == 0 {
		return "unused"
	}
	s := fmt.Sprintf("%s to %#x:%#x DPL %d", g.Kind(), g.Selector, g.Handler, g.DPL)
	if g.IST != 0 {
		s += fmt.Sprintf(" IST %d", g.IST)
	}
	return s + absent(g.Present)
}

// vectors are the x86 exceptions (Intel SDM vol. 3, table 6-1).
var vectors = [32]string{
	0: "divide error", 1: "debug", 2: "NMI", 3: "breakpoint", 4: "overflow",
	5: "bound range", 6: "invalid opcode", 7: "device not available",
	8: "double fault", 9: "coprocessor segment overrun", 10: "invalid TSS",
	11: "segment not present", 12: "stack segment", 13: "general protection",
	14: "page fault", 15: "reserved", 16: "x87 error", 17: "alignment check",
	18: "machine check", 19: "SIMD error", 20: "virtualization",
	21: "control protection", 28: "hypervisor injection",
	29: "VMM communication", 30: "security",
}

// VectorName names an interrupt vector: an exception's name, "int80", or
// "interrupt N".
func VectorName(vector int) string {
	if vector >= 0 && vector < len(vectors) && vectors[vector] != "" {
		return vectors[vector]
	}
	if vector == 0x80 {
		return "int80"
	}
	return fmt.Sprintf("interrupt %d", vector)
}
