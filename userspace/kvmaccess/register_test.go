// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestRegister: each register that can be watched has a place of its own, of as
// many bits as the module gives.
func TestRegister(t *testing.T) {
	narrow := map[Register]bool{RegisterGDTRLimit: true, RegisterIDTRLimit: true, RegisterTRSelector: true, RegisterLDTRSelector: true}
	want, got := map[Register]uint64{}, map[Register]uint64{}
	var r Registers
	for x := RegisterCR0; int(x) < len(registerNames); x++ {
		value := 0xabcdef0123450000 + uint64(x)
		if !r.Set(x, value) {
			t.Errorf("%v cannot be set", x)
		}
		if narrow[x] {
			value &= 0xffff
		}
		want[x] = value
	}
	for x := range want {
		got[x] = r.Get(x)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	before := r
	for _, x := range []Register{RegisterUnspec, Register(len(registerNames)), 1 << 31} {
		if r.Set(x, 1) || r.Get(x) != 0 {
			t.Errorf("%v is a register", x)
		}
	}
	if diff := cmp.Diff(before, r); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	named := Registers{LSTAR: 1, SysenterEIP: 2, IDTR: TableRegister{Base: 3, Limit: 4}}
	if diff := cmp.Diff([]uint64{1, 2, 3, 4}, []uint64{named.Get(RegisterLSTAR), named.Get(RegisterSysenterEIP), named.Get(RegisterIDTRBase), named.Get(RegisterIDTRLimit)}); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}
