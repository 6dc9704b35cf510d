// SPDX-License-Identifier: MIT

package tinyvm

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Flags of a Slot: KVM_MEM_*.
const (
	SlotLogDirty = 1 << 0
	SlotReadonly = 1 << 1
)

// Slot maps guest-physical addresses to host memory: a memslot.
type Slot struct {
	AS     uint16 // address space; 1 is system management mode
	Number uint16
	GPA    uint64
	Size   uint64 // bytes; 0 deletes the slot
	Memory *Memory
	Offset uint64 // into Memory
	Flags  uint32
}

// VM is a virtual machine without vCPUs and memory to begin with. It is safe
// for concurrent use, but for Close.
type VM struct {
	kvm *KVM
	fd  int

	mu    sync.Mutex
	slots []Slot
	vcpus []*VCPU
	owned []*Memory
}

// tssAddress and identityMap are where KVM hides what an Intel processor
// without unrestricted guests needs, four pages in all, below the BIOS.
const (
	identityMap = 0xfeffc000
	tssAddress  = 0xfeffd000
)

// NewVM creates a VM; with irqchip it has interrupt controllers in the kernel,
// and HLT waits there.
func (k *KVM) NewVM(irqchip bool) (*VM, error) {
	fd, err := ioctl(k.fd, createVM, 0)
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fd)
	vm := &VM{kvm: k, fd: fd}
	identity := uint64(identityMap)
	if _, err = ioctlAt(fd, setIdentityMap, &identity); err == nil {
		_, err = ioctl(fd, setTSSAddress, tssAddress)
	}
	if err == nil && irqchip {
		_, err = ioctl(fd, createIRQChip, 0)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return vm, nil
}

// Close destroys the VM: its vCPUs, which may not be running any more, and the
// memory of AddMemory.
func (vm *VM) Close() error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	var errs []error
	for _, v := range vm.vcpus {
		errs = append(errs, v.close())
	}
	errs = append(errs, unix.Close(vm.fd))
	for _, m := range vm.owned {
		errs = append(errs, m.Close())
	}
	vm.vcpus, vm.owned, vm.slots = nil, nil, nil
	return errors.Join(errs...)
}

// SetSlot adds a memslot, or moves it, changes its flags or, with Size 0,
// deletes it if there is one of this number already. KVM does not let the
// memory behind a slot change: delete it first.
func (vm *VM) SetSlot(s Slot) error {
	r := memoryRegion{slot: uint32(s.AS)<<16 | uint32(s.Number), flags: s.Flags, gpa: s.GPA, size: s.Size}
	if s.Size > 0 {
		if s.Memory == nil || s.Offset+s.Size > uint64(len(s.Memory.bytes)) {
			return fmt.Errorf("slot %d of %d bytes: its memory is smaller", s.Number, s.Size)
		}
		r.hva = s.Memory.HVA() + s.Offset
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if _, err := ioctlAt(vm.fd, setMemoryRegion, &r); err != nil {
		return fmt.Errorf("slot %d, %d bytes at %#x: %w", s.Number, s.Size, s.GPA, err)
	}
	vm.slots = slices.DeleteFunc(vm.slots, func(o Slot) bool { return o.AS == s.AS && o.Number == s.Number })
	if s.Size > 0 {
		vm.slots = append(vm.slots, s)
	}
	return nil
}

// AddMemory adds a slot of new anonymous memory, which goes with the VM.
func (vm *VM) AddMemory(number uint16, gpa, size uint64) (*Memory, error) {
	m, err := NewMemory(int(size), Anonymous, "")
	if err != nil {
		return nil, err
	}
	if err := vm.SetSlot(Slot{Number: number, GPA: gpa, Size: size, Memory: m}); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.owned = append(vm.owned, m)
	return m, nil
}

// Slots lists the memslots, in the order in which they were set.
func (vm *VM) Slots() []Slot {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return slices.Clone(vm.slots)
}

// Bytes is the host memory behind n bytes of address space 0, which must be in
// one slot.
func (vm *VM) Bytes(gpa, n uint64) ([]byte, error) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for _, s := range vm.slots {
		if s.AS == 0 && gpa >= s.GPA && gpa-s.GPA < s.Size && n <= s.Size-(gpa-s.GPA) {
			start := s.Offset + gpa - s.GPA
			return s.Memory.bytes[start : start+n : start+n], nil
		}
	}
	return nil, fmt.Errorf("no memslot holds %d bytes at %#x", n, gpa)
}

// Write copies p to guest-physical memory.
func (vm *VM) Write(gpa uint64, p []byte) error {
	b, err := vm.Bytes(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(b, p)
	return nil
}

// Interrupt sends a vCPU of an x2APIC or APIC id below 256 an interrupt: a
// message as a PCI device sends it. The VM must have an irqchip.
func (vm *VM) Interrupt(id uint8, vector uint8) error {
	m := msi{addressLow: 0xfee00000 | uint32(id)<<12, data: uint32(vector)}
	_, err := ioctlAt(vm.fd, signalMSI, &m)
	return err
}
