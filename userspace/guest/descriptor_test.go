// SPDX-License-Identifier: MIT

package guest

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func le(v ...uint64) []byte {
	var p []byte
	for _, v := range v {
		p = binary.LittleEndian.AppendUint64(p, v)
	}
	return p
}

func TestParseGDT(t *testing.T) {
	// As 64-bit Linux 6.1 has it, with a call gate in the first TLS entry.
	table := le(0, 0x00cf9b000000ffff, 0x00af9b000000ffff, 0x00cf93000000ffff,
		0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0,
		0x00008b0030004087, 0xfffffe00, 0, 0,
		0xa012ec0000103450, 0xffffffff, 0, 0x0040f50000000001)
	type row struct {
		index int
		text  string
		base  uint64
	}
	want := []row{
		{0, "unused", 0},
		{1, "code32 base 0x0 limit 0xffffffff DPL 0", 0},
		{2, "code64 base 0x0 limit 0xffffffff DPL 0", 0},
		{3, "data base 0x0 limit 0xffffffff DPL 0", 0},
		{4, "code32 base 0x0 limit 0xffffffff DPL 3", 0},
		{5, "data base 0x0 limit 0xffffffff DPL 3", 0},
		{6, "code64 base 0x0 limit 0xffffffff DPL 3", 0},
		{7, "unused", 0},
		{8, "TSS (busy) base 0xfffffe0000003000 limit 0x4087 DPL 0", 0xfffffe0000003000},
		{10, "unused", 0},
		{11, "unused", 0},
		{12, "call gate to 0x10:0xffffffffa0123450 DPL 3", 0xffffffffa0123450},
		{14, "unused", 0},
		{15, "data base 0x0 limit 0x1 DPL 3", 0},
	}
	var got []row
	for _, d := range ParseGDT(table, true) {
		got = append(got, row{d.Index, d.String(), d.Base})
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(row{})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestParseDescriptor(t *testing.T) {
	for _, tt := range []struct {
		raw  uint64
		want string
		call bool
		tss  bool
	}{
		{0xc0cf9b123456ffff, "code32 base 0xc0123456 limit 0xffffffff DPL 0", false, false},
		{0x000f9a000000ffff, "code16 base 0x0 limit 0xfffff DPL 0", false, false},
		{0x0000890012340067, "TSS base 0x1234 limit 0x67 DPL 0", false, true},
		{0x0000810012340067, "TSS base 0x1234 limit 0x67 DPL 0", false, true},
		{0x0000820012340067, "LDT base 0x1234 limit 0x67 DPL 0", false, false},
		{0x1234e40000085678, "call gate to 0x8:0x12345678 DPL 3", true, false},
		{0x12346c0000085678, "call gate to 0x8:0x12345678 DPL 3 not present", true, false},
		{0x0000850000f80000, "task gate to 0xf8:0x0 DPL 0", false, false},
		{0x12348e0000085678, "interrupt gate to 0x8:0x12345678 DPL 0", false, false},
		{0x12348f0000085678, "trap gate to 0x8:0x12345678 DPL 0", false, false},
		{0x0000880000000000, "reserved type 8 base 0x0 limit 0x0 DPL 0", false, false},
		{0x0000000000000001, "reserved type 0 base 0x0 limit 0x1 DPL 0 not present", false, false},
	} {
		d := ParseGDT(le(tt.raw), false)[0]
		if d.String() != tt.want || d.CallGate() != tt.call || d.TSS() != tt.tss {
			t.Errorf("%#x: %q, call gate %t, TSS %t", tt.raw, d, d.CallGate(), d.TSS())
		}
	}
}

func TestParseGDTShort(t *testing.T) {
	if got := ParseGDT(nil, true); len(got) != 0 {
		t.Errorf("of nothing: %v", got)
	}
	if got := ParseGDT(make([]byte, 15), true); len(got) != 1 {
		t.Errorf("of 15 bytes: %v", got)
	}
	// A wide descriptor of which the second half is missing.
	got := ParseGDT(le(0x00008b0030004087), true)
	if len(got) != 1 || got[0].Wide || got[0].Base != 0x3000 {
		t.Errorf("half a TSS: %+v", got)
	}
}

func TestParseIDT(t *testing.T) {
	long := ParseIDT(le(0xa1e08e0000100be0, 0xffffffff, 0xa1e0ee0100100b20, 0x5ffffffff, 0, 0), true)
	want := []Gate{
		{Vector: 0, Raw: 0xa1e08e0000100be0, High: 0xffffffff, Handler: 0xffffffffa1e00be0, Selector: 0x10, Type: TypeInterruptGate, Present: true},
		{Vector: 1, Raw: 0xa1e0ee0100100b20, High: 0x5ffffffff, Handler: 0xffffffffa1e00b20, Selector: 0x10, IST: 1, Type: TypeInterruptGate, DPL: 3, Present: true},
		{Vector: 2},
	}
	if diff := cmp.Diff(want, long); diff != "" {
		t.Errorf("long mode: (-want +got)\n%s", diff)
	}
	if got := long[1].String(); got != "interrupt gate to 0x10:0xffffffffa1e00b20 DPL 3 IST 1" {
		t.Errorf("%q", got)
	}
	legacy := ParseIDT(le(0xc1238e0000604567, 0x0000850000f80000), false)
	want = []Gate{
		{Vector: 0, Raw: 0xc1238e0000604567, Handler: 0xc1234567, Selector: 0x60, Type: TypeInterruptGate, Present: true},
		{Vector: 1, Raw: 0x0000850000f80000, Selector: 0xf8, Type: TypeTaskGate, Present: true},
	}
	if diff := cmp.Diff(want, legacy); diff != "" {
		t.Errorf("32-bit: (-want +got)\n%s", diff)
	}
	if got := ParseIDT(make([]byte, 65536), true); len(got) != 256 {
		t.Errorf("%d gates", len(got))
	}
	if got := ParseIDT(make([]byte, 17), true); len(got) != 1 {
		t.Errorf("%d gates of 17 bytes", len(got))
	}
}

func TestVectorName(t *testing.T) {
	for vector, want := range map[int]string{0: "divide error", 14: "page fault", 0x80: "int80", 22: "interrupt 22", 255: "interrupt 255", -1: "interrupt -1"} {
		if got := VectorName(vector); got != want {
			t.Errorf("VectorName(%d) = %q", vector, got)
		}
	}
}

func FuzzParseGDT(f *testing.F) {
	f.Add(le(0, 0x00af9b000000ffff, 0x00008b0030004087, 0xfffffe00), true)
	f.Add(le(0xa012ec0000103450, 0xffffffff), false)
	f.Fuzz(func(t *testing.T, data []byte, long bool) {
		next := 0
		for _, d := range ParseGDT(data, long) {
			if d.Index != next {
				t.Fatalf("entry %d, want %d", d.Index, next)
			}
			next++
			if d.Wide {
				next++
			}
			if d.String() == "" || d.Kind() == "" || !long && d.Wide {
				t.Fatalf("%+v", d)
			}
		}
		if next != len(data)/8 {
			t.Fatalf("%d entries of %d bytes", next, len(data))
		}
	})
}

func FuzzParseIDT(f *testing.F) {
	f.Add(le(0xa1e08e0000100be0, 0xffffffff), true)
	f.Add(le(0xc1238e0000604567), false)
	f.Fuzz(func(t *testing.T, data []byte, long bool) {
		gates := ParseIDT(data, long)
		if len(gates) != min(256, len(data)/GateSize(long)) {
			t.Fatalf("%d gates of %d bytes", len(gates), len(data))
		}
		for i, g := range gates {
			if g.Vector != i || g.String() == "" || !long && g.Handler>>32 != 0 {
				t.Fatalf("%+v", g)
			}
		}
	})
}
