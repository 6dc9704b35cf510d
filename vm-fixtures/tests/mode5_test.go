// SPDX-License-Identifier: MIT

//go:build kvmhost && la57

package tests

import (
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// As TestModes, on a host whose processor has page tables of 5 levels.
func TestMode5Level(t *testing.T) {
	if !openKVM(t).HasLA57() {
		t.Fatal("the host's processor has no 5-level paging: boot it with 'vmfixture run --cpu max'")
	}
	modeTest{
		mode: tinyvm.Long5,
		mappings: []mapping{
			{0x00fffffffffff000, highGPA + 0x3000, tinyvm.Page4K},
			{0xff11000000000000, highGPA &^ (tinyvm.Page1G - 1), tinyvm.Page1G},
			{0xffffffff81200000, highGPA &^ (tinyvm.Page2M - 1), tinyvm.Page2M},
			{0x0000800000000000, 5<<32 + tinyvm.Page4M, tinyvm.Page4K},
		},
		beyond: []uint64{0x0100000000000000, 0xfe00000000000000, 0x00fffffffffffff0},
		bits: func(r kvmaccess.Registers) bool {
			return r.EFER&tinyvm.EFERLMA != 0 && r.CR4&tinyvm.CR4LA57 != 0
		},
	}.run(t)
}
