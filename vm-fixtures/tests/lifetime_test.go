// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// tinyPages are what readers read of a tiny guest: its code, and what follows.
var tinyPages = guest.Pages{GPA: tinyvm.Code, GVA: tinyvm.Code}

// VMs are destroyed while they are read: requests find them or say that they
// are gone, and nothing delays their end.
func TestDestroyedWhileRead(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	total := int64(0)
	const rounds = 30
	for round := range rounds {
		kind := []tinyvm.Kind{tinyvm.Spinning, tinyvm.Halting}[round%2]
		guests, err := k.StartGuests(kind, 1)
		if err != nil {
			t.Fatal(err)
		}
		g := guests[0]
		// Something to read behind the code.
		if err := g.Write(tinyvm.Code+64, pattern(0, 8192)); err != nil {
			t.Fatal(err)
		}
		vm := newestVM(t, c, selfPID)
		ctx, cancel := context.WithTimeout(t.Context(), patience*time.Minute)
		reads, wait := readers(ctx, t, vm, tinyPages)
		for reads() < 20 {
			time.Sleep(time.Millisecond)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		if err := wait(); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		if ctx.Err() != nil {
			t.Fatalf("round %d: the VM was there a minute after its last descriptor was closed", round)
		}
		cancel()
		total += reads()
		if _, err := c.VM(t.Context(), vm.ID); !errors.Is(err, kvmaccess.ErrNoVM) {
			t.Errorf("after the end: %v, want %v", err, kvmaccess.ErrNoVM)
		}
	}
	t.Logf("%d VMs, %d reads before their ends", rounds, total)
}

// A VMM with several VMs is killed while they are read.
func TestTinyVMMKilledWhileRead(t *testing.T) {
	c := newClient(t)
	for round := range 6 {
		kind := []tinyvm.Kind{tinyvm.Spinning, tinyvm.Halting}[round%2]
		const n = 3
		vmm, err := tinyvm.StartVMM(kind, n)
		if err != nil {
			t.Fatal(err)
		}
		vms, err := c.VMs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var ids []kvmaccess.VMID
		var waits []func() error
		var counts []func() int64
		ctx, cancel := context.WithTimeout(t.Context(), patience*time.Minute)
		for _, vm := range vms {
			if vm.PID == vmm.PID() {
				reads, wait := readers(ctx, t, vm, tinyPages)
				ids, waits, counts = append(ids, vm.ID), append(waits, wait), append(counts, reads)
			}
		}
		if len(ids) != n {
			t.Errorf("%d VMs of the VMM, want %d", len(ids), n)
		}
		for _, count := range counts {
			for count() < 10 {
				time.Sleep(time.Millisecond)
			}
		}
		if err := vmm.Kill(); err != nil {
			t.Error(err)
		}
		for i, wait := range waits {
			if err := wait(); err != nil {
				t.Errorf("VM %d: %v", ids[i], err)
			}
		}
		if ctx.Err() != nil {
			t.Error("VMs were there a minute after their VMM was killed")
		}
		cancel()
	}
}

// vCPUs are added, and VMs made, while all there are are captured: each capture
// is of a vCPU as it was before or after it was set up.
func TestVCPUsAddedWhileRead(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long), IRQChip: true})
	started(t, g)
	defer stopped(t, g)
	const more = 40
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var lists, captures atomic.Int64
	wg.Go(func() {
		rc := newClient(t)
		for ctx.Err() == nil {
			vcpus, err := rc.VCPUs(t.Context(), vm.ID)
			if errors.Is(err, kvmaccess.ErrUnsettled) {
				continue
			}
			if err != nil {
				t.Errorf("list: %v", err)
				return
			}
			lists.Add(1)
			for i, v := range vcpus {
				if v.ID != uint32(i) {
					t.Errorf("vCPU %d is the list's number %d", v.ID, i)
				}
				captures.Add(1)
				if i == 0 {
					continue
				}
				// The ioctl that gives it its state is under way.
				if v.Condition == kvmaccess.ConditionHost && v.Flags&kvmaccess.VCPUUnsettled != 0 {
					continue
				}
				fresh := v.RIP == 0xfff0 && v.CS.Base == 0xffff0000 && v.CR3 == 0
				// Zero: before KVM has given it the state of a reset.
				blank := v.RIP == 0 && v.CR0 == 0 && v.CS == (kvmaccess.Segment{Attrs: v.CS.Attrs})
				entered := v.CR3 == g.Tables.Root
				if v.Condition != kvmaccess.ConditionNew || !fresh && !blank && !entered {
					t.Errorf("a vCPU that was just added: %+v", v)
					return
				}
			}
		}
	})
	wg.Go(func() {
		rc := newClient(t)
		for n := uint32(0); ctx.Err() == nil; n++ {
			v, err := rc.VCPU(t.Context(), vm.ID, n%(more+1))
			switch {
			case err == nil && v.ID == n%(more+1):
				captures.Add(1)
			case errors.Is(err, kvmaccess.ErrNoVCPU), errors.Is(err, kvmaccess.ErrUnsettled):
			default:
				t.Errorf("vCPU %d: %+v, %v", n%(more+1), v, err)
				return
			}
		}
	})
	for id := uint32(1); id <= more; id++ {
		v, err := g.NewVCPU(id)
		if err != nil {
			t.Error(err)
			break
		}
		if err := v.Enter(tinyvm.Long, g.Tables.Root, tinyvm.Code); err != nil {
			t.Error(err)
			break
		}
		// Other VMs come and go meanwhile.
		if id%8 == 0 {
			passing, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Halt(), VCPUs: 2})
			if err != nil {
				t.Error(err)
				break
			}
			if err := passing.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	// All of them are seen in the end.
	vcpus, err := c.VCPUs(t.Context(), vm.ID)
	if err != nil || len(vcpus) != more+1 {
		t.Errorf("%d vCPUs in the end, want %d: %v", len(vcpus), more+1, err)
	}
	cancel()
	wg.Wait()
	t.Logf("%d lists, %d captures while %d vCPUs were added", lists.Load(), captures.Load(), more)
	if lists.Load() == 0 {
		t.Error("not one list meanwhile: nothing was shown")
	}
}

// Many VMs in one process: each is found, captured and gone.
func TestManyVMs(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	const n = 100
	guests, err := k.StartGuests(tinyvm.Halting, n)
	if err != nil {
		t.Fatal(err)
	}
	vms, err := c.VMs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, vm := range vms {
		if vm.PID != selfPID {
			continue
		}
		found++
		until(t, c, vm.ID, 0, "halted", inCondition(kvmaccess.ConditionHalted))
	}
	if found != n {
		t.Errorf("%d VMs, want %d", found, n)
	}
	for _, g := range guests {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	vms, err = c.VMs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, vm := range vms {
		if vm.PID == selfPID {
			t.Errorf("still there: %+v", vm)
		}
	}
}
