// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Memory reads a VM's guest-physical memory, pages included that are not
// resident in the host: those come out of the VMM by process_vm_readv(2) at
// the memslots' host addresses, which faults them in there. It is safe for
// concurrent use.
type Memory struct {
	c     *Client
	vm    VM
	readv func(pid int, p []byte, hva uint64) (int, error)

	mu    sync.Mutex
	slots []Memslot // address space 0; nil: not asked for yet
}

// NewMemory makes a Memory of vm, as listed by c.
func NewMemory(c *Client, vm VM) *Memory {
	return &Memory{c: c, vm: vm, readv: processRead}
}

// ReadPhysical fills p with the memory at gpa. The error is ErrNoMemslot if a
// part of it lies in no memslot, ErrNoVM or ErrDying if the VM went away.
func (m *Memory) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if gpa+uint64(len(p)-1) < gpa {
		return invalid(m.vm.ID, "%d bytes at %#x pass the end of the address space", len(p), gpa)
	}
	var dst [1]RangeData
	for len(p) > 0 {
		n := min(len(p), MaxBytes)
		dst[0] = RangeData{Range: Range{Address: gpa, Length: uint32(n)}, Data: p[:0:n]}
		err := m.c.ReadPhysicalInto(ctx, m.vm.ID, dst[:])
		if errors.Is(err, ErrNotResident) {
			err = m.readVMM(ctx, gpa, p[:n])
		}
		if err != nil {
			return err
		}
		p = p[n:]
		gpa += uint64(n)
	}
	return nil
}

// readVMM reads through the VMM's address space.
func (m *Memory) readVMM(ctx context.Context, gpa uint64, p []byte) error {
	for refreshed := false; ; refreshed = true {
		slots, err := m.memslots(ctx, refreshed)
		if err != nil {
			return err
		}
		err = m.copyVMM(ctx, slots, gpa, p)
		if err == nil {
			break
		}
		// The memslots may have changed since they were listed.
		if refreshed {
			return err
		}
	}
	// The process was the VMM throughout if it is so still: ids of VMs are
	// given once, ids of processes again and again.
	vm, err := m.c.VM(ctx, m.vm.ID)
	if err != nil {
		return err
	}
	if vm.PID != m.vm.PID {
		return &Error{Op: "process_vm_readv", VM: m.vm.ID, Errno: unix.ESRCH, Address: gpa,
			Message: fmt.Sprintf("the VMM is process %d now, was %d", vm.PID, m.vm.PID)}
	}
	return nil
}

func (m *Memory) copyVMM(ctx context.Context, slots []Memslot, gpa uint64, p []byte) error {
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("kvmaccess: process_vm_readv: %w", err)
		}
		slot, ok := findSlot(slots, gpa)
		if !ok {
			return &Error{Op: "process_vm_readv", VM: m.vm.ID, Errno: unix.EFAULT, Address: gpa}
		}
		off := gpa - slot.GPA
		n := int(min(uint64(len(p)), slot.Size-off))
		got, err := m.readv(m.vm.PID, p[:n], slot.HVA+off)
		if err != nil || got == 0 {
			e := &Error{Op: "process_vm_readv", VM: m.vm.ID, Errno: unix.EIO, Address: gpa}
			errors.As(err, &e.Errno)
			e.Message = fmt.Sprintf("reading process %d at %#x: %v", m.vm.PID, slot.HVA+off, e.Errno)
			return e
		}
		p = p[got:]
		gpa += uint64(got)
	}
	return nil
}

func (m *Memory) memslots(ctx context.Context, refresh bool) ([]Memslot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.slots != nil && !refresh {
		return m.slots, nil
	}
	all, err := m.c.Memslots(ctx, m.vm.ID)
	if err != nil {
		return nil, err
	}
	slots := make([]Memslot, 0, len(all))
	for _, s := range all {
		if s.AS == 0 && s.Size > 0 {
			slots = append(slots, s)
		}
	}
	m.slots = slots
	return slots, nil
}

func findSlot(slots []Memslot, gpa uint64) (Memslot, bool) {
	for _, s := range slots {
		if gpa >= s.GPA && gpa-s.GPA < s.Size {
			return s, true
		}
	}
	return Memslot{}, false
}

func processRead(pid int, p []byte, hva uint64) (int, error) {
	local := []unix.Iovec{{Base: &p[0]}}
	local[0].SetLen(len(p))
	remote := []unix.RemoteIovec{{Base: uintptr(hva), Len: len(p)}}
	return unix.ProcessVMReadv(pid, local, remote, 0)
}
