// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// canonical is a random address that has 48 bits.
func canonical(r *rand.Rand) uint64 { return uint64(int64(r.Uint64()) >> 16) }

// randomSegment is a usable segment that KVM and both vendors' processors
// accept in long mode (Intel SDM vol. 3, "Checks on Guest Segment Registers").
func randomSegment(r *rand.Rand, dpl uint8) tinyvm.Segment {
	s := tinyvm.Segment{
		Selector: uint16(r.Uint32())&^3 | uint16(dpl), Type: 3, S: 1, DPL: dpl, Present: 1,
		DB: uint8(r.Uint32() & 1), AVL: uint8(r.Uint32() & 1), G: uint8(r.Uint32() & 1),
		Base: uint64(r.Uint32()), Limit: r.Uint32(),
	}
	if s.G == 1 {
		s.Limit |= 0xfff
	} else {
		s.Limit &= 0xfffff
	}
	return s
}

// randomise gives every register of a vCPU in long mode that a capture has a
// value that tells it from all others.
func randomise(t *testing.T, v *tinyvm.VCPU, r *rand.Rand) {
	t.Helper()
	u := r.Uint64
	regs := tinyvm.Regs{
		RAX: u(), RBX: u(), RCX: u(), RDX: u(), RSI: u(), RDI: u(), RSP: u(), RBP: u(),
		R8: u(), R9: u(), R10: u(), R11: u(), R12: u(), R13: u(), R14: u(), R15: u(),
		// CF, PF, AF, ZF, SF, IF, DF, OF, AC, ID; bit 1 is always set.
		RIP: canonical(r), RFLAGS: u()&0x240ed5 | 2,
	}
	if err := v.SetRegs(regs); err != nil {
		t.Fatal(err)
	}
	s, err := v.SRegs()
	if err != nil {
		t.Fatal(err)
	}
	dpl := uint8(r.Uint32()&1) * 3
	for _, d := range []*tinyvm.Segment{&s.DS, &s.ES, &s.FS, &s.GS, &s.SS} {
		*d = randomSegment(r, dpl)
	}
	s.FS.Base, s.GS.Base = canonical(r), canonical(r)
	s.CS = randomSegment(r, dpl)
	s.CS.Type, s.CS.L, s.CS.DB, s.CS.Base = 11, 1, 0, 0
	s.TR = tinyvm.Segment{Selector: uint16(r.Uint32()) &^ 7, Base: canonical(r), Limit: r.Uint32() & 0xffff, Type: 11, Present: 1}
	s.LDT = tinyvm.Segment{Selector: uint16(r.Uint32()) &^ 7, Base: canonical(r), Limit: r.Uint32() & 0xffff, Type: 2, Present: 1}
	if r.Uint32()&1 == 1 {
		s.LDT = tinyvm.Segment{Unusable: 1}
	}
	s.GDT = tinyvm.Table{Base: canonical(r), Limit: uint16(r.Uint32())}
	s.IDT = tinyvm.Table{Base: canonical(r), Limit: uint16(r.Uint32())}
	s.CR2, s.CR3, s.CR8 = u(), u()&0xfffff000, u()&15
	// MP, EM, TS, WP, AM; VME, PVI, TSD, DE, PGE, PCE, OSFXSR, OSXMMEXCPT.
	s.CR0 = s.CR0&^0x5000e | u()&0x5000e
	s.CR4 = s.CR4&^0x78f | u()&0x78f
	s.EFER = s.EFER&^1 | u()&1
	if err := v.SetSRegs(s); err != nil {
		t.Fatal(err)
	}
	if err := v.SetDebugRegs(tinyvm.DebugRegs{
		DB: [4]uint64{canonical(r), canonical(r), canonical(r), canonical(r)},
		// B0 to B3, BD, BS, BT; the enables, RW and LEN of four breakpoints.
		DR6: u()&0xe00f | 0xffff0ff0, DR7: u()&0xffff03ff | 0x400,
	}); err != nil {
		t.Fatal(err)
	}
	var pat uint64
	for i := range 8 {
		pat |= uint64([]byte{0, 1, 4, 5, 6, 7}[r.IntN(6)]) << (8 * i)
	}
	if err := v.SetMSRs(
		tinyvm.MSR{Index: tinyvm.MSRSTAR, Value: u()},
		tinyvm.MSR{Index: tinyvm.MSRLSTAR, Value: canonical(r)},
		tinyvm.MSR{Index: tinyvm.MSRCSTAR, Value: canonical(r)},
		tinyvm.MSR{Index: tinyvm.MSRSFMASK, Value: u() & 0xffffffff},
		tinyvm.MSR{Index: tinyvm.MSRSysenterCS, Value: u() & 0xffffffff},
		tinyvm.MSR{Index: tinyvm.MSRSysenterESP, Value: canonical(r)},
		tinyvm.MSR{Index: tinyvm.MSRSysenterEIP, Value: canonical(r)},
		tinyvm.MSR{Index: tinyvm.MSRKernelGSBase, Value: canonical(r)},
		tinyvm.MSR{Index: tinyvm.MSRPAT, Value: pat},
	); err != nil {
		t.Fatal(err)
	}
}

// Every register that a capture has equals what KVM itself says, whatever the
// value, on vCPUs that never ran and on one that did.
func TestRegistersAgainstKVM(t *testing.T) {
	const seed, rounds = 20261123, 100
	c, k := newClient(t), openKVM(t)
	for _, ran := range []bool{false, true} {
		t.Run(fmt.Sprintf("ran=%t", ran), func(t *testing.T) {
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long), VCPUs: 2, IRQChip: true})
			want := kvmaccess.ConditionNew
			if ran {
				started(t, g)
				for id := range uint32(2) {
					until(t, c, vm.ID, id, "in the guest", inCondition(kvmaccess.ConditionGuest))
				}
				stopped(t, g)
				want = kvmaccess.ConditionUser
			}
			r := rand.New(rand.NewPCG(seed, 0))
			for round := range rounds {
				for id, v := range g.VCPUs {
					randomise(t, v, r)
					truth := registersOf(t, v)
					got := capture(t, c, vm.ID, uint32(id))
					if diff := cmp.Diff(truth, got.Registers); diff != "" {
						t.Fatalf("seed %d, round %d, vCPU %d: KVM's (-) against ours (+):\n%s", seed, round, id, diff)
					}
					if got.Condition != want || got.CPL != int(truth.SS.Attrs>>5&3) {
						t.Fatalf("seed %d, round %d, vCPU %d: condition %v, CPL %d; want %v, SS's %d",
							seed, round, id, got.Condition, got.CPL, want, truth.SS.Attrs>>5&3)
					}
				}
			}
		})
	}
}
