// SPDX-License-Identifier: MIT

package tinyvm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// VCPU is a virtual CPU. While a Thread runs it, the methods that get or set
// its state wait until that has left KVM_RUN.
type VCPU struct {
	vm   *VM
	id   uint32
	fd   int
	area []byte // struct kvm_run
}

// NewVCPU adds a vCPU with all the features that KVM has. It may be called
// while others run. Without an Enter it has the state of a processor that was
// just reset.
func (vm *VM) NewVCPU(id uint32) (*VCPU, error) {
	fd, err := ioctl(vm.fd, createVCPU, uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("vCPU %d: %w", id, err)
	}
	unix.CloseOnExec(fd)
	v := &VCPU{vm: vm, id: id, fd: fd}
	v.area, err = unix.Mmap(fd, 0, vm.kvm.runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err == nil {
		err = v.SetCPUID(vm.kvm.cpuid)
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.vcpus = append(vm.vcpus, v)
	if err != nil {
		return nil, fmt.Errorf("vCPU %d: %w", id, err)
	}
	return v, nil
}

func (v *VCPU) close() error {
	var err error
	if v.area != nil {
		err = unix.Munmap(v.area)
	}
	return errors.Join(err, unix.Close(v.fd))
}

// ID is the vCPU's number, and that of its APIC.
func (v *VCPU) ID() uint32 { return v.id }

// Regs gets the general registers.
func (v *VCPU) Regs() (Regs, error) {
	var r Regs
	_, err := ioctlAt(v.fd, getRegs, &r)
	return r, err
}

// SetRegs sets the general registers.
func (v *VCPU) SetRegs(r Regs) error {
	_, err := ioctlAt(v.fd, setRegs, &r)
	return err
}

// SRegs gets the special registers.
func (v *VCPU) SRegs() (SRegs, error) {
	var s SRegs
	_, err := ioctlAt(v.fd, getSRegs, &s)
	return s, err
}

// SetSRegs sets the special registers.
func (v *VCPU) SetSRegs(s SRegs) error {
	_, err := ioctlAt(v.fd, setSRegs, &s)
	return err
}

// DebugRegs gets the debug registers.
func (v *VCPU) DebugRegs() (DebugRegs, error) {
	var d DebugRegs
	_, err := ioctlAt(v.fd, getDebugRegs, &d)
	return d, err
}

// SetDebugRegs sets the debug registers.
func (v *VCPU) SetDebugRegs(d DebugRegs) error {
	_, err := ioctlAt(v.fd, setDebugRegs, &d)
	return err
}

// Events gets the pending events.
func (v *VCPU) Events() (VCPUEvents, error) {
	var e VCPUEvents
	_, err := ioctlAt(v.fd, getVCPUEvents, &e)
	return e, err
}

// SetEvents sets the pending events.
func (v *VCPU) SetEvents(e VCPUEvents) error {
	_, err := ioctlAt(v.fd, setVCPUEvents, &e)
	return err
}

// MSRs gets at most 64 model-specific registers. KVM refusing one of them is
// an error.
func (v *VCPU) MSRs(index ...uint32) ([]uint64, error) {
	list := msrList{n: uint32(len(index))}
	if len(index) > msrEntries {
		return nil, fmt.Errorf("%d MSRs: at most %d at once", len(index), msrEntries)
	}
	for i, x := range index {
		list.entries[i].Index = x
	}
	n, err := ioctlAt(v.fd, getMSRs, &list)
	if err != nil {
		return nil, err
	}
	if n < len(index) {
		return nil, fmt.Errorf("%s: MSR %#x is refused", getMSRs.name, index[n])
	}
	values := make([]uint64, n)
	for i := range values {
		values[i] = list.entries[i].Value
	}
	return values, nil
}

// SetMSRs sets at most 64 model-specific registers. KVM refusing one of them
// is an error.
func (v *VCPU) SetMSRs(msrs ...MSR) error {
	list := msrList{n: uint32(len(msrs))}
	if len(msrs) > msrEntries {
		return fmt.Errorf("%d MSRs: at most %d at once", len(msrs), msrEntries)
	}
	copy(list.entries[:], msrs)
	n, err := ioctlAt(v.fd, setMSRs, &list)
	if err != nil {
		return err
	}
	if n < len(msrs) {
		return fmt.Errorf("%s: MSR %#x, value %#x, is refused", setMSRs.name, msrs[n].Index, msrs[n].Value)
	}
	return nil
}

// SetCPUID replaces what the CPUID instruction tells the guest. It must come
// before the first run.
func (v *VCPU) SetCPUID(entries []CPUID) error {
	if len(entries) > cpuidEntries {
		return fmt.Errorf("%d CPUID leaves: at most %d", len(entries), cpuidEntries)
	}
	list := cpuidList{n: uint32(len(entries))}
	copy(list.entries[:], entries)
	_, err := ioctlAt(v.fd, setCPUID, &list)
	return err
}

// SetRunnable lets a vCPU other than the first run without waiting for an INIT
// and a SIPI. The VM must have an irqchip.
func (v *VCPU) SetRunnable() error {
	state := uint32(0) // KVM_MP_STATE_RUNNABLE
	_, err := ioctlAt(v.fd, setMPState, &state)
	return err
}

// SMI sends a system management interrupt, which the vCPU takes as soon as it
// runs. KVM must have CapX86SMM.
func (v *VCPU) SMI() error {
	_, err := ioctl(v.fd, raiseSMI, 0)
	return err
}

// setImmediate makes the next entry to the guest return at once.
func (v *VCPU) setImmediate(on bool) {
	// A byte of its own; KVM reads it once per KVM_RUN.
	if on {
		v.area[runImmediateExit] = 1
	} else {
		v.area[runImmediateExit] = 0
	}
}

// Run lets the guest run until it needs something. The error is unix.EINTR
// after a signal, or after an entry that was to return at once.
func (v *VCPU) Run() (*Exit, error) {
	if _, err := ioctl(v.fd, run, 0); err != nil {
		return nil, err
	}
	return v.exit(), nil
}

// Complete lets KVM finish what the last exit began, such as the reading of a
// port, without running the guest. Registers are exact afterwards.
func (v *VCPU) Complete() error {
	v.setImmediate(true)
	defer v.setImmediate(false)
	if _, err := ioctl(v.fd, run, 0); !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("an entry that was to return at once: %w", err)
	}
	return nil
}
