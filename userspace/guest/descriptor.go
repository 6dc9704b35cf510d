// SPDX-License-Identifier: MIT

package guest

import (
	"encoding/binary"
	"fmt"
)

// Descriptor is an entry of a global descriptor table (Intel SDM vol. 3, 3.4.5
// "Segment Descriptors", 3.5 "System Descriptor Types"; AMD APM vol. 2, 4.7,
// 4.8).
type Descriptor struct {
	Index    int    `json:"index"` // selector >> 3
	Raw      uint64 `json:"raw"`
	High     uint64 `json:"high,omitempty"` // second half of a 16-byte descriptor
	Wide     bool   `json:"wide,omitempty"` // it takes 16 bytes: Index + 1 is part of it
	Base     uint64 `json:"base"`           // of a gate: its target's offset
	Limit    uint32 `json:"limit"`          // bytes - 1, granularity applied; 0 of a gate
	Type     uint8  `json:"type"`           // 4 bits
	System   bool   `json:"system"`         // TSS, LDT or gate, not code or data
	DPL      uint8  `json:"dpl"`
	Present  bool   `json:"present"`
	Long     bool   `json:"long"`               // 64-bit code
	Big      bool   `json:"big"`                // D/B
	Granular bool   `json:"granular"`           // G
	Selector uint16 `json:"selector,omitempty"` // of a gate's target
}

// System descriptor types.
const (
	TypeTSS16           = 1
	TypeLDT             = 2
	TypeTSS16Busy       = 3
	TypeCallGate16      = 4
	TypeTaskGate        = 5
	TypeInterruptGate16 = 6
	TypeTrapGate16      = 7
	TypeTSS             = 9
	TypeTSSBusy         = 11
	TypeCallGate        = 12
	TypeInterruptGate   = 14
	TypeTrapGate        = 15
)

// ParseGDT decodes a GDT, of a guest in long mode or not. The null descriptor
// and unused entries are returned too; the second half of a 16-byte descriptor
// is not, and a trailing part of an entry is ignored.
func ParseGDT(data []byte, long bool) []Descriptor {
	table := make([]Descriptor, 0, len(data)/8)
	for i := 0; i+8 <= len(data); i += 8 {
		d := parseDescriptor(binary.LittleEndian.Uint64(data[i:]))
		d.Index = i / 8
		if long && d.System && d.wide() && i+16 <= len(data) {
			d.Wide = true
			d.High = binary.LittleEndian.Uint64(data[i+8:])
			d.Base |= d.High << 32
			i += 8
		}
		table = append(table, d)
	}
	return table
}

// wide says whether the system type takes 16 bytes in long mode. An entry of
// all zeros is no system descriptor but an unused one.
func (d Descriptor) wide() bool {
	switch d.Type {
	case TypeLDT, TypeTSS, TypeTSSBusy, TypeCallGate, TypeInterruptGate, TypeTrapGate:
		return true
	}
	return false
}

func parseDescriptor(raw uint64) Descriptor {
	d := Descriptor{
		Raw:      raw,
		Base:     raw>>16&0xffffff | raw>>56<<24,
		Limit:    uint32(raw&0xffff | raw>>32&0xf0000),
		Type:     uint8(raw >> 40 & 15),
		System:   raw>>44&1 == 0,
		DPL:      uint8(raw >> 45 & 3),
		Present:  raw>>47&1 == 1,
		Long:     raw>>53&1 == 1,
		Big:      raw>>54&1 == 1,
		Granular: raw>>55&1 == 1,
	}
	if d.Granular {
		d.Limit = d.Limit<<12 | 0xfff
	}
	if d.Gate() {
		d.Selector = uint16(raw >> 16)
		d.Base = raw&0xffff | raw>>48<<16
		d.Limit = 0
	}
	return d
}

// Gate says whether the descriptor is a call, task, interrupt or trap gate.
func (d Descriptor) Gate() bool {
	return d.System && d.Type >= TypeCallGate16 && d.Type != TypeTSS && d.Type != TypeTSSBusy &&
		d.Type != 8 && d.Type != 10 && d.Type != 13
}

// CallGate says whether code of a lower privilege may call through it.
func (d Descriptor) CallGate() bool {
	return d.System && (d.Type == TypeCallGate || d.Type == TypeCallGate16)
}

// TSS says whether the descriptor is of a task state segment, busy or not.
func (d Descriptor) TSS() bool {
	return d.System && (d.Type == TypeTSS || d.Type == TypeTSSBusy || d.Type == TypeTSS16 || d.Type == TypeTSS16Busy)
}

// Kind names the type: "code64", "data", "TSS (busy)", "call gate", ...
func (d Descriptor) Kind() string {
	if !d.System {
		switch {
		case d.Type&8 == 0:
			return "data"
		case d.Long:
			return "code64"
		case d.Big:
			return "code32"
		}
		return "code16"
	}
	switch d.Type {
	case 0:
		if d.Raw == 0 {
			return "unused"
		}
	case TypeTSS, TypeTSS16:
		return "TSS"
	case TypeTSSBusy, TypeTSS16Busy:
		return "TSS (busy)"
	case TypeLDT:
		return "LDT"
	case TypeCallGate, TypeCallGate16:
		return "call gate"
	case TypeTaskGate:
		return "task gate"
	case TypeInterruptGate, TypeInterruptGate16:
		return "interrupt gate"
	case TypeTrapGate, TypeTrapGate16:
		return "trap gate"
	}
	return fmt.Sprintf("reserved type %d", d.Type)
}

// String describes the descriptor in a line.
func (d Descriptor) String() string {
	switch {
	case d.Raw == 0 && d.High == 0:
		return "unused"
	case d.Gate():
		return fmt.Sprintf("%s to %#x:%#x DPL %d%s", d.Kind(), d.Selector, d.Base, d.DPL, absent(d.Present))
	}
	return fmt.Sprintf("%s base %#x limit %#x DPL %d%s", d.Kind(), d.Base, d.Limit, d.DPL, absent(d.Present))
}

func absent(present bool) string {
	if present {
		return ""
	}
	return " not present"
}
