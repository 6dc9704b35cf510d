// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// always captures a vCPU again and again; each time it must be in condition.
func always(t *testing.T, c *kvmaccess.Client, vm kvmaccess.VMID, vcpu uint32, condition kvmaccess.Condition) kvmaccess.VCPU {
	t.Helper()
	var s kvmaccess.VCPU
	for i := range 20 {
		if s = capture(t, c, vm, vcpu); s.Condition != condition {
			t.Fatalf("capture %d: %v, want %v: %+v", i, s.Condition, condition, s)
		}
	}
	return s
}

// share is in how many of 500 captures a vCPU was in each condition.
func share(t *testing.T, c *kvmaccess.Client, vm kvmaccess.VMID, vcpu uint32) map[kvmaccess.Condition]int {
	t.Helper()
	seen := map[kvmaccess.Condition]int{}
	for range 500 {
		seen[capture(t, c, vm, vcpu).Condition]++
	}
	return seen
}

func TestConditionNew(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	if s := always(t, c, vm.ID, 0, kvmaccess.ConditionNew); s.TID != 0 || s.Flags != 0 {
		t.Errorf("a vCPU that never ran has thread %d, flags %v", s.TID, s.Flags)
	}
	// One that nothing was set of has what a processor has after a reset.
	v, err := g.NewVCPU(1)
	if err != nil {
		t.Fatal(err)
	}
	s := always(t, c, vm.ID, 1, kvmaccess.ConditionNew)
	if s.RIP != 0xfff0 || s.CS.Selector != 0xf000 || s.CS.Base != 0xffff0000 {
		t.Errorf("after a reset at %#x:%#x, CS based at %#x", s.CS.Selector, s.RIP, s.CS.Base)
	}
	if diff := cmp.Diff(registersOf(t, v), s.Registers); diff != "" {
		t.Errorf("KVM's (-) against ours (+):\n%s", diff)
	}
}

func TestConditionGuest(t *testing.T) {
	needCPUs(t, 2)
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	defer onCPU(t, 0)()
	started(t, g, vcpuCPU)
	s := until(t, c, vm.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
	if s.CPU != vcpuCPU || s.TID != g.Threads()[0].TID() || s.Method != kvmaccess.MethodInterrupt || s.Flags != 0 {
		t.Errorf("on CPU %d by thread %d, taken by method %v, flags %v; want CPU %d, thread %d, %v, none",
			s.CPU, s.TID, s.Method, s.Flags, vcpuCPU, g.Threads()[0].TID(), kvmaccess.MethodInterrupt)
	}
	// Nothing makes the guest exit but the capture and the host's clock. Of
	// what shares that CPU only the kernel's own threads preempt it, as often
	// as they have something to do.
	if seen := share(t, c, vm.ID, 0); seen[kvmaccess.ConditionGuest] < 9*seen[kvmaccess.ConditionHost] ||
		seen[kvmaccess.ConditionGuest] < seen[kvmaccess.ConditionPreempted] ||
		seen[kvmaccess.ConditionHalted]+seen[kvmaccess.ConditionUser]+seen[kvmaccess.ConditionNew] > 0 {
		t.Errorf("a spinning vCPU with a CPU to itself: %v", seen)
	}
	stopped(t, g)
	always(t, c, vm.ID, 0, kvmaccess.ConditionUser)
}

func TestConditionHalted(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Halt(), IRQChip: true, VCPUs: 2})
	started(t, g)
	for id := range uint32(2) {
		until(t, c, vm.ID, id, "halted", inCondition(kvmaccess.ConditionHalted))
		s := always(t, c, vm.ID, id, kvmaccess.ConditionHalted)
		if s.RIP != tinyvm.Code+2 || s.RFLAGS&flagIF == 0 || s.Flags != 0 || s.TID != g.Threads()[id].TID() {
			t.Errorf("halted at %#x with RFLAGS %#x, flags %v, thread %d", s.RIP, s.RFLAGS, s.Flags, s.TID)
		}
	}
	stopped(t, g)
	always(t, c, vm.ID, 0, kvmaccess.ConditionUser)
}

// A vCPU that its VMM works for, and the state is what KVM_GET_REGS says.
func TestConditionUser(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	load := []byte{
		0x48, 0xbb, 0, 0, 0, 0x40, 0, 0, 0, 0, // mov rbx, mmioAt
		0xba, 0x10, 0x05, 0, 0, // mov edx, port
		0xb8, 0x78, 0x56, 0x34, 0x12, // mov eax, 0x12345678
		0xbe, 0, 0xe0, 0, 0, // mov esi, dataAt
		0xbf, 0, 0xe0, 0, 0, // mov edi, dataAt
		0xb9, 9, 0, 0, 0, // mov ecx, 9
	}
	for _, tt := range []struct {
		name string
		code []byte
	}{
		{"out", []byte{0xef}},
		{"in", []byte{0xed}},
		{"rep outsb", []byte{0xf3, 0x6e}},
		{"rep insb", []byte{0xf3, 0x6c}},
		{"write of MMIO", []byte{0x48, 0x89, 0x03}},
		{"read of MMIO", []byte{0x48, 0x8b, 0x03}},
		{"exchange with MMIO", []byte{0x48, 0x87, 0x03}},
		{"addition to MMIO", []byte{0x48, 0x01, 0x03}},
		{"rep movsb to MMIO", []byte{0x48, 0x89, 0xdf, 0xf3, 0xa4}},
		{"rep movsb from MMIO", []byte{0x48, 0x89, 0xde, 0xf3, 0xa4}},
		{"push of MMIO", []byte{0xff, 0x33}},
		{"pop to MMIO", []byte{0x8f, 0x03}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long})
			mapDevice(t, g, mmioAt, mmioGPA)
			code := append(append([]byte{}, load...), tt.code...)
			code = append(code, 0xeb, byte(-len(code)-2)) // jmp
			if err := g.Write(tinyvm.Code, code); err != nil {
				t.Fatal(err)
			}
			in, goOn := make(chan struct{}), make(chan struct{})
			if err := g.Start(func(e *tinyvm.Exit) (bool, error) {
				in <- struct{}{}
				<-goOn
				if !e.Write {
					for i := range e.Data {
						e.Data[i] = byte(0x11 * (i + 1))
					}
				}
				return tinyvm.Ignore(&tinyvm.Exit{Reason: e.Reason, Write: true})
			}); err != nil {
				t.Fatal(err)
			}
			flagged := 0
			for exit := range 10 {
				select {
				case <-in:
				case <-g.Threads()[0].Done():
					t.Fatal(g.Threads()[0].Err())
				}
				s := capture(t, c, vm.ID, 0)
				if s.Condition != kvmaccess.ConditionUser || s.Flags&kvmaccess.VCPUUnsettled != 0 {
					t.Errorf("exit %d: %v, flags %v of a vCPU in user space", exit, s.Condition, s.Flags)
				}
				if s.Flags&kvmaccess.VCPUEmulating != 0 {
					flagged++
				}
				// KVM_GET_REGS puts the emulator's registers in place, so it
				// comes second; after it, what is captured is still the same.
				want := registersOf(t, g.VCPUs[0])
				if diff := cmp.Diff(want, s.Registers); diff != "" {
					t.Errorf("exit %d, flags %v: KVM's (-) against ours (+):\n%s", exit, s.Flags, diff)
				}
				if diff := cmp.Diff(want, capture(t, c, vm.ID, 0).Registers); diff != "" {
					t.Errorf("exit %d, again: KVM's (-) against ours (+):\n%s", exit, diff)
				}
				goOn <- struct{}{}
			}
			// The last one is let go.
			go func() {
				for range in {
					goOn <- struct{}{}
				}
			}()
			t.Logf("%d of 10 exits amid an instruction", flagged)
			stopped(t, g)
			close(in)
		})
	}
}

// On a CPU, but in KVM: a guest that exits all the time. And asleep in KVM,
// but not halted: for a page that does not come.
func TestConditionHost(t *testing.T) {
	needCPUs(t, 2)
	c, k := newClient(t), openKVM(t)
	t.Run("exits", func(t *testing.T) {
		g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: []byte{
			0x31, 0xc0, // xor eax, eax
			0x0f, 0xa2, // cpuid
			0xeb, 0xfa, // jmp
		}})
		defer onCPU(t, 0)()
		started(t, g, vcpuCPU)
		s := until(t, c, vm.ID, 0, "in the host part of KVM_RUN", inCondition(kvmaccess.ConditionHost))
		if s.CPU != vcpuCPU || s.Method != kvmaccess.MethodInterrupt || s.Flags&kvmaccess.VCPUUnsettled == 0 {
			t.Errorf("on CPU %d by method %v, flags %v", s.CPU, s.Method, s.Flags)
		}
	})
	t.Run("waits for a page", func(t *testing.T) {
		g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: []byte{
			0xbb, 0, 0, 0x1f, 0, // mov ebx, 0x1f0000
			0x48, 0x89, 0x03, // mov [rbx], rax
			0xeb, 0xfe, // jmp to itself
		}})
		const page = 0x1f0000
		release, err := g.Memory.Hold(page, tinyvm.Page4K)
		if err != nil {
			t.Fatal(err)
		}
		started(t, g)
		until(t, c, vm.ID, 0, "at the page", func(s kvmaccess.VCPU) bool {
			return s.RBX == page && s.Condition == kvmaccess.ConditionHost && waiting(t, g.Threads()[0].TID())
		})
		s := always(t, c, vm.ID, 0, kvmaccess.ConditionHost)
		if s.RIP != tinyvm.Code+5 || s.RBX != page || s.Flags&kvmaccess.VCPUUnsettled == 0 {
			t.Errorf("waits at %#x with RBX %#x, flags %v", s.RIP, s.RBX, s.Flags)
		}
		// Who reads the page does not wait for it.
		if _, err := c.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: page, Length: 8}); !errors.Is(err, kvmaccess.ErrNotResident) {
			t.Errorf("the page that is held: %v, want %v", err, kvmaccess.ErrNotResident)
		}
		if err := release(); err != nil {
			t.Fatal(err)
		}
		// An interrupt may come before the instruction is done again.
		until(t, c, vm.ID, 0, "beyond the page", func(s kvmaccess.VCPU) bool {
			return s.Condition == kvmaccess.ConditionGuest && s.RIP == tinyvm.Code+8
		})
	})
}

// waiting reports whether a thread of this process sleeps.
func waiting(t *testing.T, tid int) bool {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", tid))
	if err != nil {
		t.Fatal(err)
	}
	_, state, _ := strings.Cut(string(text), ") ")
	return state[0] == 'S' || state[0] == 'D'
}

// Two vCPUs that want one CPU: either is preempted again and again.
func TestConditionPreempted(t *testing.T) {
	needCPUs(t, 2)
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long), VCPUs: 2, IRQChip: true})
	defer onCPU(t, 0)()
	started(t, g, vcpuCPU)
	for id := range uint32(2) {
		until(t, c, vm.ID, id, "in the guest", inCondition(kvmaccess.ConditionGuest))
		s := until(t, c, vm.ID, id, "preempted", inCondition(kvmaccess.ConditionPreempted))
		if s.CPU != vcpuCPU || s.RIP < tinyvm.Code || s.RIP > tinyvm.Code+3 {
			t.Errorf("vCPU %d: preempted on CPU %d at %#x", id, s.CPU, s.RIP)
		}
		if seen := share(t, c, vm.ID, id); seen[kvmaccess.ConditionGuest]+seen[kvmaccess.ConditionPreempted] < 450 ||
			seen[kvmaccess.ConditionHalted]+seen[kvmaccess.ConditionUser]+seen[kvmaccess.ConditionNew] > 0 {
			t.Errorf("vCPU %d: %v", id, seen)
		}
	}
}

// Whoever asks on the vCPU's CPU needs no interrupt.
func TestMethods(t *testing.T) {
	needCPUs(t, 2)
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g, vcpuCPU)
	until(t, c, vm.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
	stopped(t, g)
	want := registersFrom(t, g.VCPUs[0], vcpuCPU)
	for cpu, method := range []kvmaccess.Method{vcpuCPU: kvmaccess.MethodLocal, vcpuCPU ^ 1: kvmaccess.MethodInterrupt} {
		back := onCPU(t, cpu)
		before, err := c.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s := always(t, c, vm.ID, 0, kvmaccess.ConditionUser)
		after, err := c.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		back()
		if s.Method != method || s.CPU != vcpuCPU {
			t.Errorf("asked on CPU %d: method %v, want %v, on CPU %d", cpu, s.Method, method, s.CPU)
		}
		if diff := cmp.Diff(want, s.Registers); diff != "" {
			t.Errorf("%v: KVM's (-) against ours (+):\n%s", method, diff)
		}
		if sent := after.Interrupts - before.Interrupts; sent != 0 && method == kvmaccess.MethodLocal || sent == 0 && method == kvmaccess.MethodInterrupt {
			t.Errorf("%v: %d interrupts sent", method, sent)
		}
	}
}

// registersFrom is registersOf, asked for on a CPU, where the vCPU is loaded
// last then.
func registersFrom(t *testing.T, v *tinyvm.VCPU, cpu int) kvmaccess.Registers {
	t.Helper()
	defer onCPU(t, cpu)()
	return registersOf(t, v)
}

const onlineFile = "/sys/devices/system/cpu/cpu1/online"

func setOnline(t *testing.T, online string) {
	t.Helper()
	if err := os.WriteFile(onlineFile, []byte(online), 0); err != nil {
		t.Fatal(err)
	}
}

// The CPU that the vCPU ran on last goes away.
func TestCPUOffline(t *testing.T) {
	needCPUs(t, 2)
	c, k := newClient(t), openKVM(t)
	info, err := c.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	method := map[kvmaccess.Vendor]kvmaccess.Method{
		kvmaccess.VendorSVM: kvmaccess.MethodMemory,
		kvmaccess.VendorVMX: kvmaccess.MethodLoaded,
	}[info.Vendor]

	spin, spinVM := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	fresh, freshVM := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	halt, haltVM := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Halt(), IRQChip: true})
	started(t, spin, vcpuCPU)
	until(t, c, spinVM.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
	stopped(t, spin)
	// One that never ran, but whose registers were set.
	if err := fresh.VCPUs[0].SetRegs(tinyvm.Regs{RIP: tinyvm.Code, RAX: 77, RFLAGS: 2}); err != nil {
		t.Fatal(err)
	}
	started(t, halt, vcpuCPU)
	until(t, c, haltVM.ID, 0, "halted", inCondition(kvmaccess.ConditionHalted))
	want := registersFrom(t, spin.VCPUs[0], vcpuCPU)
	wantFresh := registersFrom(t, fresh.VCPUs[0], vcpuCPU)

	setOnline(t, "0")
	defer setOnline(t, "1")
	for _, tt := range []struct {
		vm        kvmaccess.VMID
		want      kvmaccess.Registers
		condition kvmaccess.Condition
	}{
		{spinVM.ID, want, kvmaccess.ConditionUser},
		{freshVM.ID, wantFresh, kvmaccess.ConditionNew},
	} {
		s := capture(t, c, tt.vm, 0)
		if s.Method != method || s.Condition != tt.condition {
			t.Errorf("CPU offline: method %v, condition %v, CPU %d; want %v, %v", s.Method, s.Condition, s.CPU, method, tt.condition)
		}
		if diff := cmp.Diff(tt.want, s.Registers); diff != "" {
			t.Errorf("CPU offline: KVM's (-) against ours (+):\n%s", diff)
		}
	}
	// Halted in KVM_RUN, it cannot be loaded by anyone else: it is read in
	// memory, or, where its thread has been woken up since and sleeps on
	// another CPU, there; else the error says so at once.
	start := time.Now()
	s, err := c.VCPU(t.Context(), haltVM.ID, 0)
	switch {
	case err != nil && (info.Vendor != kvmaccess.VendorVMX || !errors.Is(err, kvmaccess.ErrUnsettled)):
		t.Errorf("halted, CPU offline: %v", err)
	case err == nil && (s.Condition != kvmaccess.ConditionHalted || s.RIP != tinyvm.Code+2 || s.CPU == vcpuCPU && s.Method != method):
		t.Errorf("halted, CPU offline: %v by %v on CPU %d at %#x", s.Condition, s.Method, s.CPU, s.RIP)
	}
	t.Logf("halted, CPU offline: %v by %v, %v, after %v", s.Condition, s.Method, err, time.Since(start))

	setOnline(t, "1")
	always(t, c, spinVM.ID, 0, kvmaccess.ConditionUser)
	always(t, c, freshVM.ID, 0, kvmaccess.ConditionNew)
	started(t, spin, vcpuCPU)
	until(t, c, spinVM.ID, 0, "in the guest again", inCondition(kvmaccess.ConditionGuest))
}
