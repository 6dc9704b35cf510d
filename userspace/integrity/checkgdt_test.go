// SPDX-License-Identifier: MIT

package integrity

import (
	"strings"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// A CPU that is brought up has its GDT in its own data, before 6.15 and since.
func TestOwnGDTBySymbol(t *testing.T) {
	const (
		area  = 0xffff8a078f400000 // a CPU's own data
		table = area + 0xb000
		delta = 0xffff8a07d6e00000 // from 0xffffffffb8600000, where the image has them
	)
	image := func(line string) *guest.Image {
		s, err := guest.ParseSymbols(strings.NewReader(line + "ffffffffb6000000 T _text\nffffffffb6e00000 T _etext\n"))
		if err != nil {
			t.Fatal(err)
		}
		return guest.NewImage(s, 0)
	}
	before, since := image("000000000000b000 A gdt_page\n"), image("ffffffffb860b000 D gdt_page\n")
	for _, tt := range []struct {
		name      string
		image     *guest.Image
		gdtr      uint64
		gs, other uint64
		want      bool
	}{
		{"before", before, table, area, 0, true},
		{"before, user mode", before, table, 0x7f0000001000, area, true},
		{"before, elsewhere", before, table + 0x1000, area, 0, false},
		{"since", since, table, delta, 0, true},
		{"since, user mode", since, table, 0x7f0000001000, delta, true},
		{"since, elsewhere", since, table + 0x1000, delta, 0, false},
		{"no symbols", nil, table, area, 0, true},
		{"no symbols, elsewhere", nil, area + 2<<20, area, 0, false},
		{"not the kernel's", before, 0x7f000000b000, 0x7f0000000000, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cpu := kvmaccess.VCPU{Registers: kvmaccess.Registers{
				CR0: guest.CR0PE | guest.CR0PG, CR4: guest.CR4PAE, EFER: guest.EFERLMA | guest.EFERLME,
				GDTR: kvmaccess.TableRegister{Base: tt.gdtr, Limit: 0x7f}, GS: kvmaccess.Segment{Base: tt.gs}, KernelGSBase: tt.other,
			}}
			g := &Guest{Mode: guest.ModeOf(&cpu.Registers), Image: tt.image, Linux: true}
			if got := g.ownGDT(&cpu); got != tt.want {
				t.Errorf("%v, want %v", got, tt.want)
			}
		})
	}
}
