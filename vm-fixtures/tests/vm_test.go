// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

func TestInfo(t *testing.T) {
	info, err := newClient(t).Info(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", info)
	if info.Vendor == kvmaccess.VendorNone {
		t.Error("the vendor is none, but KVM is loaded")
	}
	if want := kvmaccess.CapMemory | kvmaccess.CapVCPU | kvmaccess.CapEvents | kvmaccess.CapWatch; info.Caps != want {
		t.Errorf("capabilities %v, want %v", info.Caps, want)
	}
	if len(info.Missing) > 0 {
		t.Errorf("missing: %q", info.Missing)
	}
	if info.Version == "" || info.MaxBytes != kvmaccess.MaxBytes || info.MaxRanges != kvmaccess.MaxRanges {
		t.Errorf("version %q, at most %d bytes in %d ranges", info.Version, info.MaxBytes, info.MaxRanges)
	}
}

func TestVMs(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	ids := map[kvmaccess.VMID]bool{}
	for name, config := range sharedConfigs {
		g := sharedGuest(t, name)
		vm := vmOf(t, c, g)
		t.Logf("%+v", vm)
		ids[vm.ID] = true
		if vm.VCPUs != config.CPUs {
			t.Errorf("%s: %d vCPUs, want %d", name, vm.VCPUs, config.CPUs)
		}
		memory := uint64(config.Memory)
		if memory == 0 {
			memory = 256
		}
		// Firmware lies in a slot of its own beside the RAM.
		if extra := vm.Memory - memory<<20; extra > 1<<20 {
			t.Errorf("%s: %d bytes of memory, want %d MiB and firmware", name, vm.Memory, memory)
		}
		slots, err := c.Memslots(ctx, vm.ID)
		if err != nil {
			t.Fatal(err)
		}
		if len(slots) != vm.Memslots {
			t.Errorf("%s: %d memslots, but the VM is said to have %d", name, len(slots), vm.Memslots)
		}
		var sum uint64
		for _, s := range slots {
			if s.AS == 0 {
				sum += s.Size
			}
			one, err := c.Memslot(ctx, vm.ID, s.AS, s.Slot)
			if err != nil {
				t.Errorf("%s: memslot %d: %v", name, s.Slot, err)
			} else if one != s {
				t.Errorf("%s: memslot %d is %+v alone, %+v in the list", name, s.Slot, one, s)
			}
		}
		if sum != vm.Memory {
			t.Errorf("%s: memslots of %d bytes, but the VM is said to have %d", name, sum, vm.Memory)
		}
		again, err := c.VM(ctx, vm.ID)
		if err != nil {
			t.Fatal(err)
		}
		if again != vm {
			t.Errorf("%s: %+v alone, %+v in the list", name, again, vm)
		}
		vmm, err := kvmaccess.Identify(vm.PID)
		if err != nil {
			t.Fatal(err)
		}
		if vmm.Name != name || vmm.UUID != config.UUID {
			t.Errorf("VMM is named %q %q, want %q %q", vmm.Name, vmm.UUID, name, config.UUID)
		}
	}
	if len(ids) != len(sharedConfigs) {
		t.Errorf("%d ids for %d VMs", len(ids), len(sharedConfigs))
	}
}

// The memslots' host addresses are right: the VMM's memory there is the guest's.
func TestMemslotAddresses(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	pages, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	slots, err := c.Memslots(ctx, vm.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range slots {
		if s.AS != 0 || pages.GPA < s.GPA || pages.GPA >= s.GPA+s.Size {
			continue
		}
		got := make([]byte, pages.Size)
		hva := uintptr(s.HVA + pages.GPA - s.GPA)
		n, err := unix.ProcessVMReadv(vm.PID,
			[]unix.Iovec{{Base: &got[0], Len: pages.Size}},
			[]unix.RemoteIovec{{Base: hva, Len: int(pages.Size)}}, 0)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:n], pages.Content()) {
			t.Errorf("the VMM's memory at %#x is not the guest's at %#x", hva, pages.GPA)
		}
		return
	}
	t.Errorf("no memslot holds %#x: %+v", pages.GPA, slots)
}

func TestEvents(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	s, err := kvmaccess.Subscribe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	receive := func(kind kvmaccess.EventKind) kvmaccess.VM {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, patience*20*time.Second)
		defer cancel()
		e, err := s.Receive(ctx)
		if err != nil {
			t.Fatalf("waiting for %v: %v", kind, err)
		}
		if e.Kind != kind {
			t.Fatalf("event %+v, want %v", e, kind)
		}
		return e.VM
	}
	var last kvmaccess.VMID
	for _, how := range []string{"stop", "kill"} {
		g := startGuest(t, guest.Config{Name: "short1"})
		created := receive(kvmaccess.VMCreated)
		if created.PID != g.PID {
			t.Errorf("created: %+v, want the VM of process %d", created, g.PID)
		}
		vm := vmOf(t, c, g)
		if created.ID != vm.ID {
			t.Errorf("created: VM %d, listed as %d", created.ID, vm.ID)
		}
		if created.ID <= last {
			t.Errorf("id %d after %d: ids are never reused", created.ID, last)
		}
		last = created.ID
		end := g.Kill
		if how == "stop" {
			end = func() error { return g.Stop(ctx) }
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if gone := receive(kvmaccess.VMDestroyed); gone.ID != created.ID {
			t.Errorf("destroyed: %+v, want VM %d", gone, created.ID)
		}
		if _, err := c.VM(ctx, created.ID); !errors.Is(err, kvmaccess.ErrNoVM) {
			t.Errorf("after the end: %v, want %v", err, kvmaccess.ErrNoVM)
		}
	}
}
