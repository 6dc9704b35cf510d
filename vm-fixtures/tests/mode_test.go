// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// mapping is a guest page, and bytes in it that are to be found there.
type mapping struct {
	gva, gpa, size uint64
}

// Memory for the mappings: a slot in the last MiB of the second GiB, so that a
// page of 1 GiB covers mostly nothing.
const (
	highGPA  = 0x7ff00000
	highSize = 1 << 20
)

// modeTest is a CPU mode and what there is to see in it.
type modeTest struct {
	mode     tinyvm.Mode
	mappings []mapping
	beyond   []uint64 // addresses that this mode does not have
	bits     func(kvmaccess.Registers) bool
}

var modes = []modeTest{
	{
		mode:   tinyvm.Real,
		beyond: []uint64{1 << 32, 0xffff800000000000},
		bits:   func(r kvmaccess.Registers) bool { return r.CR0&1 == 0 && r.CS.Base == tinyvm.RealBase },
	},
	{
		mode:   tinyvm.Protected,
		beyond: []uint64{1 << 32},
		bits:   func(r kvmaccess.Registers) bool { return r.CR0&1 == 1 && r.CR0>>31 == 0 },
	},
	{
		mode:     tinyvm.Paged32,
		mappings: []mapping{{0xc0001000, highGPA + 0x3000, tinyvm.Page4K}, {0xc0002000, highGPA, tinyvm.Page4K}},
		beyond:   []uint64{1 << 32},
		bits:     func(r kvmaccess.Registers) bool { return r.CR0>>31 == 1 && r.CR4&(tinyvm.CR4PAE|tinyvm.CR4PSE) == 0 },
	},
	{
		mode: tinyvm.Paged32PSE,
		mappings: []mapping{
			{0xc0001000, highGPA + 0x3000, tinyvm.Page4K},
			{0xd0000000, highGPA &^ (tinyvm.Page4M - 1), tinyvm.Page4M},
			// Beyond 4 GiB: bits 39:32 of the address are in the entry's 20:13.
			{0xd0800000, 5<<32 + tinyvm.Page4M, tinyvm.Page4M},
		},
		beyond: []uint64{1 << 32},
		bits: func(r kvmaccess.Registers) bool {
			return r.CR0>>31 == 1 && r.CR4&(tinyvm.CR4PAE|tinyvm.CR4PSE) == tinyvm.CR4PSE
		},
	},
	{
		mode: tinyvm.PAE,
		mappings: []mapping{
			{0xc0001000, highGPA + 0x3000, tinyvm.Page4K},
			{0xffe00000, highGPA &^ (tinyvm.Page2M - 1), tinyvm.Page2M},
			{0x40000000, 5<<32 + tinyvm.Page4M, tinyvm.Page4K},
		},
		beyond: []uint64{1 << 32},
		bits:   func(r kvmaccess.Registers) bool { return r.CR4&tinyvm.CR4PAE != 0 && r.EFER&tinyvm.EFERLMA == 0 },
	},
	{
		mode: tinyvm.Long,
		mappings: []mapping{
			{0x7ffffffff000, highGPA + 0x3000, tinyvm.Page4K},
			{0xffffffff81200000, highGPA &^ (tinyvm.Page2M - 1), tinyvm.Page2M},
			{0xffff888000000000, highGPA &^ (tinyvm.Page1G - 1), tinyvm.Page1G},
			{0xffff800000000000, 5<<32 + tinyvm.Page4M, tinyvm.Page4K},
		},
		beyond: []uint64{0x800000000000, 0xff00000000000000, 0x7ffffffffff0},
		bits: func(r kvmaccess.Registers) bool {
			return r.EFER&tinyvm.EFERLMA != 0 && r.CR4&tinyvm.CR4LA57 == 0
		},
	},
}

// pattern is different in each 8 bytes of guest-physical memory.
func pattern(gpa uint64, n int) []byte {
	var b []byte
	for at := gpa &^ 7; at < gpa+uint64(n); at += 8 {
		b = binary.LittleEndian.AppendUint64(b, at*0x9e3779b97f4a7c15^0x5851f42d4c957f2d)
	}
	return b[gpa&7:][:n]
}

// addPatterned adds a memslot that is full of pattern.
func addPatterned(t *testing.T, vm *tinyvm.VM, number uint16, gpa, size uint64) *tinyvm.Memory {
	t.Helper()
	m, err := vm.AddMemory(number, gpa, size)
	if err != nil {
		t.Fatal(err)
	}
	copy(m.Bytes(), pattern(gpa, int(size)))
	return m
}

// readVirtual reads one range.
func readVirtual(ctx context.Context, c *kvmaccess.Client, vm kvmaccess.VMID, root, gva uint64, n int) ([]byte, error) {
	got, err := c.ReadVirtual(ctx, vm, 0, root, kvmaccess.Range{Address: gva, Length: uint32(n)})
	if err != nil {
		return nil, err
	}
	return got[0].Data, got[0].Err
}

// mustReadVirtual reads bytes that must be want.
func mustReadVirtual(t *testing.T, c *kvmaccess.Client, vm kvmaccess.VMID, root, gva uint64, want []byte) {
	t.Helper()
	var got []byte
	var err error
	// While it runs, KVM may not catch it at once.
	for range 100 {
		if got, err = readVirtual(t.Context(), c, vm, root, gva, len(want)); !errors.Is(err, kvmaccess.ErrUnsettled) {
			break
		}
	}
	if err != nil {
		t.Errorf("%d bytes at %#x, root %#x: %v", len(want), gva, root, err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%d bytes at %#x, root %#x are %x..., want %x...", len(want), gva, root, got[:8], want[:8])
	}
}

// In each CPU mode a stopped vCPU is what KVM says, a running one is the same
// but for what its program changes, and its virtual addresses lead where its
// page tables say. The mode with page tables of 5 levels is in TestMode5Level,
// as most hosts do not have it.
func TestModes(t *testing.T) {
	for _, tt := range modes {
		t.Run(tt.mode.String(), tt.run)
	}
}

func (tt modeTest) run(t *testing.T) {
	needCPUs(t, 2)
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tt.mode, Code: tinyvm.Spin(tt.mode)})
	addPatterned(t, g.VM, 1, highGPA, highSize)
	addPatterned(t, g.VM, 2, 5<<32+tinyvm.Page4M, highSize)
	// What is to be read: a page or so in each mapping, and in the end
	// of what the slots have in it.
	type check struct{ gva, gpa uint64 }
	var checks []check
	for _, m := range tt.mappings {
		if err := g.Tables.Map(m.gva, m.gpa, m.size, m.size, 0); err != nil {
			t.Fatal(err)
		}
		first := max(m.gpa, highGPA)
		last := min(m.gpa+m.size, first+highSize) - 64
		checks = append(checks, check{m.gva + first - m.gpa, first}, check{m.gva + last - m.gpa, last})
	}
	if tt.mode.Paging().Levels == 0 {
		checks = append(checks, check{highGPA, highGPA}, check{highGPA + highSize - 64, highGPA + highSize - 64})
	}
	verify := func() {
		t.Helper()
		for _, ch := range checks {
			mustReadVirtual(t, c, vm.ID, 0, ch.gva, pattern(ch.gpa, 64))
		}
		mustReadVirtual(t, c, vm.ID, 0, tinyvm.Code, tinyvm.Spin(tt.mode))
		for _, gva := range tt.beyond {
			if _, err := readVirtual(t.Context(), c, vm.ID, 0, gva, 64); !errors.Is(err, kvmaccess.ErrInvalid) {
				t.Errorf("reading at %#x: %v, want %v", gva, err, kvmaccess.ErrInvalid)
			}
		}
		if tt.mode.Paging().Levels > 0 {
			if _, err := readVirtual(t.Context(), c, vm.ID, 0, 0xa0000000, 64); !errors.Is(err, kvmaccess.ErrNotMapped) {
				t.Errorf("reading what is not mapped: %v, want %v", err, kvmaccess.ErrNotMapped)
			}
		}
	}
	before := registersOf(t, g.VCPUs[0])
	if diff := cmp.Diff(before, capture(t, c, vm.ID, 0).Registers); diff != "" {
		t.Errorf("before it ran: KVM's (-) against ours (+):\n%s", diff)
	}
	if !tt.bits(before) {
		t.Errorf("the vCPU is not in the mode: %+v", before)
	}
	verify()

	defer onCPU(t, 0)()
	started(t, g, vcpuCPU)
	var first kvmaccess.VCPU
	for i := range 50 {
		s := until(t, c, vm.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
		if i == 0 {
			first = s
		}
		got := s.Registers
		if rip := got.RIP + got.CS.Base; rip < tinyvm.Code || rip > tinyvm.Code+4 {
			t.Fatalf("capture %d: at %#x, far from its program", i, rip)
		}
		got.RAX, got.RIP, got.RFLAGS = before.RAX, before.RIP, before.RFLAGS
		if before.CR0&tinyvm.CR0PE == 0 {
			// In real mode the type of CS says nothing; Bochs makes it data.
			got.CS.Attrs = before.CS.Attrs
		}
		if diff := cmp.Diff(before, got); diff != "" {
			t.Fatalf("capture %d of the running vCPU: before (-) against now (+):\n%s", i, diff)
		}
		if s.CPL != 0 {
			t.Fatalf("capture %d: CPL %d", i, s.CPL)
		}
	}
	verify()
	// 16-bit counters come around.
	until(t, c, vm.ID, 0, "counting", func(s kvmaccess.VCPU) bool { return s.RAX != first.RAX })

	stopped(t, g)
	if diff := cmp.Diff(registersOf(t, g.VCPUs[0]), capture(t, c, vm.ID, 0).Registers); diff != "" {
		t.Errorf("after it ran: KVM's (-) against ours (+):\n%s", diff)
	}
	verify()
}

// A guest with page-table isolation in user mode: its CR3 leads to a table
// without the kernel, which is found by naming the kernel's.
func TestPageTableIsolation(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	addPatterned(t, g.VM, 1, highGPA, highSize)
	const kernel, user = 0xffffffff80000000, 0x7ffff0000000
	// As Linux has it: the user's table in the page after the kernel's.
	g.Next = (g.Next + 0x1fff) &^ 0x1fff
	var roots [2]*tinyvm.Tables
	for i := range roots {
		var err error
		if roots[i], err = g.NewTables(tinyvm.Long.Paging(), &g.Next); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range []struct {
		tables        *tinyvm.Tables
		gva, gpa      uint64
		pages, access uint64
	}{
		{roots[0], kernel, highGPA, 16, tinyvm.EntryWrite},
		{roots[0], user, tinyvm.Code, 1, tinyvm.EntryUser},
		{roots[1], user, tinyvm.Code, 1, tinyvm.EntryUser},
		{roots[1], kernel, highGPA, 1, 0}, // what entries to the kernel need
	} {
		if err := m.tables.Map(m.gva, m.gpa, m.pages*tinyvm.Page4K, tinyvm.Page4K, m.access); err != nil {
			t.Fatal(err)
		}
	}
	v := g.VCPUs[0]
	if err := v.Enter(tinyvm.Long, roots[1].Root, user); err != nil {
		t.Fatal(err)
	}
	if err := v.EnterUser(); err != nil {
		t.Fatal(err)
	}
	verify := func() {
		t.Helper()
		s := capture(t, c, vm.ID, 0)
		if s.CPL != 3 || s.CR3 != roots[1].Root || s.CR3 != roots[0].Root|1<<12 || s.RIP&^0xf != user {
			t.Errorf("CPL %d, CR3 %#x, RIP %#x; want 3, %#x, %#x", s.CPL, s.CR3, s.RIP, roots[1].Root, uint64(user))
		}
		const secret = kernel + 5*tinyvm.Page4K + 24
		want := pattern(highGPA+5*tinyvm.Page4K+24, 3*tinyvm.Page4K)
		mustReadVirtual(t, c, vm.ID, 0, user, tinyvm.Spin(tinyvm.Long))
		mustReadVirtual(t, c, vm.ID, 0, kernel, pattern(highGPA, 100))
		if _, err := readVirtual(t.Context(), c, vm.ID, 0, secret, 64); !errors.Is(err, kvmaccess.ErrNotMapped) {
			t.Errorf("the kernel by the user's root: %v, want %v", err, kvmaccess.ErrNotMapped)
		}
		// With a PCID, and with the bit that keeps translations.
		for _, bits := range []uint64{0, 0x801, 1<<63 | 0xfff} {
			mustReadVirtual(t, c, vm.ID, roots[0].Root|bits, secret, want)
		}
	}
	verify()
	started(t, g)
	until(t, c, vm.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
	verify()
	stopped(t, g)
	verify()
	if diff := cmp.Diff(registersOf(t, v), capture(t, c, vm.ID, 0).Registers); diff != "" {
		t.Errorf("KVM's (-) against ours (+):\n%s", diff)
	}
}

// System management mode has a memory of its own, which its virtual addresses
// lead to; all others read the guest's.
func TestSystemManagementMode(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	for _, capability := range []int{tinyvm.CapX86SMM, tinyvm.CapMultiAddressSpace} {
		if has, err := k.Has(capability); err != nil || has == 0 {
			t.Fatalf("this KVM lacks capability %d (%v): build it with CONFIG_KVM_SMM", capability, err)
		}
	}
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long), IRQChip: true})
	v := g.VCPUs[0]
	if err := g.Write(tinyvm.SMBase, pattern(tinyvm.SMBase, 0x10000)); err != nil {
		t.Fatal(err)
	}
	// The same addresses in the other address space: the handler spins until
	// it finds a non-zero word at flag, then returns. It begins in 16-bit mode
	// at SMBASE + 0x8000 with CS based at SMBASE.
	const entry, flag, data = 0x8000, 0x9000, 0xa000
	memory, err := tinyvm.NewMemory(0x10000, tinyvm.Anonymous, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := memory.Close(); err != nil {
			t.Error(err)
		}
	})
	handler := []byte{
		0x40,                               // inc ax
		0x2e, 0x83, 0x3e, 0x00, 0x90, 0x00, // cmp word cs:[0x9000], 0
		0x74, 0xf7, // je to inc
		0x0f, 0xaa, // rsm
	}
	copy(memory.Bytes()[entry:], handler)
	copy(memory.Bytes()[data:], "only in system management mode")
	if err := g.SetSlot(tinyvm.Slot{AS: 1, Number: 0, GPA: tinyvm.SMBase, Size: 0x10000, Memory: memory}); err != nil {
		t.Fatal(err)
	}
	before := registersOf(t, v)
	started(t, g)
	until(t, c, vm.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
	stopped(t, g)
	outside := capture(t, c, vm.ID, 0)
	if outside.Flags&kvmaccess.VCPUSMM != 0 {
		t.Errorf("flags %v before any interrupt of system management", outside.Flags)
	}
	if err := v.SMI(); err != nil {
		t.Fatal(err)
	}
	started(t, g)
	inSMM := func(s kvmaccess.VCPU) bool { return s.Flags&kvmaccess.VCPUSMM != 0 }
	for range 20 {
		s := until(t, c, vm.ID, 0, "in system management mode", func(s kvmaccess.VCPU) bool {
			return inSMM(s) && s.Condition == kvmaccess.ConditionGuest
		})
		// Intel SDM vol. 3, "SMM Initial Processor State".
		if s.CS.Base != tinyvm.SMBase || s.RIP < entry || s.RIP > entry+uint64(len(handler)) || s.CR0&(tinyvm.CR0PE|tinyvm.CR0PG) != 0 || s.EFER&tinyvm.EFERLMA != 0 {
			t.Fatalf("in system management mode at %#x:%#x with CR0 %#x, EFER %#x", s.CS.Base, s.RIP, s.CR0, s.EFER)
		}
	}
	verify := func() {
		t.Helper()
		mustReadVirtual(t, c, vm.ID, 0, tinyvm.SMBase+data, []byte("only in system management mode"))
		got, err := c.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: tinyvm.SMBase + data, Length: 64})
		if err != nil || !bytes.Equal(got[0].Data, pattern(tinyvm.SMBase+data, 64)) {
			t.Errorf("the guest's own memory there: %v, %+v", err, got)
		}
		slot, err := c.Memslot(t.Context(), vm.ID, 1, 0)
		if err != nil || slot.HVA != memory.HVA() || slot.GPA != tinyvm.SMBase || slot.AS != 1 {
			t.Errorf("memslot 0 of address space 1: %+v, %v", slot, err)
		}
	}
	verify()
	stopped(t, g)
	s := capture(t, c, vm.ID, 0)
	if diff := cmp.Diff(registersOf(t, v), s.Registers); diff != "" || !inSMM(s) {
		t.Errorf("stopped in system management mode, flags %v: KVM's (-) against ours (+):\n%s", s.Flags, diff)
	}
	verify()
	// And back.
	started(t, g)
	memory.Bytes()[flag] = 1
	back := until(t, c, vm.ID, 0, "back", func(s kvmaccess.VCPU) bool {
		return !inSMM(s) && s.Condition == kvmaccess.ConditionGuest
	}).Registers
	back.RAX, back.RIP, back.RFLAGS = before.RAX, before.RIP, before.RFLAGS
	// What the return loads out of the saved state are these, to a bit that
	// says that a busy TSS is busy.
	if diff := cmp.Diff(before, back); diff != "" {
		t.Logf("before system management mode (-), after it (+):\n%s", diff)
	}
	if back.CR3 != before.CR3 || back.CR0 != before.CR0 || back.EFER != before.EFER || back.CS.Selector != before.CS.Selector {
		t.Errorf("back with CR3 %#x, CR0 %#x, EFER %#x, CS %#x", back.CR3, back.CR0, back.EFER, back.CS.Selector)
	}
	mustReadVirtual(t, c, vm.ID, 0, tinyvm.SMBase+data, pattern(tinyvm.SMBase+data, 64))
	stopped(t, g)
}
