// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// BulkBytes is from how many bytes on a Memory reads by way of the VMM.
const BulkBytes = 16 << 10

// Memory reads a VM's guest-physical memory, each time the way that suits:
//
//   - Small reads, and all where the other ways are barred, go to the module by
//     netlink. It answers from the host's page tables and changes nothing.
//   - Reads of BulkBytes and more are copied from the VMM by
//     process_vm_readv(2), at the host addresses that the module's memslots
//     tell. That is one system call for what takes netlink one for each
//     MaxBytes. Only pages go that way that /proc/PID/pagemap says are
//     resident: process_vm_readv faults in all others, and a monitor would
//     make each guest grow to its full size. It needs the initial pid
//     namespace, where the module's pids are from, and CAP_SYS_PTRACE.
//   - Pages that are not resident are faulted in by process_vm_readv, as the
//     last resort, because the caller asked for them; see Resident.
//
// Memory is safe for concurrent use.
type Memory struct {
	c    *Client
	vm   VM
	open func(pid int) (*process, error)
	now  func() time.Time

	netlink, bulk, cold path

	mu     sync.Mutex
	proc   *process
	barred error     // process_vm_readv is, for good
	slots  []Memslot // address space 0; nil: not asked for yet
	listed time.Time
}

// NewMemory makes a Memory of vm, as listed by c.
func NewMemory(c *Client, vm VM) *Memory {
	return &Memory{c: c, vm: vm, open: openProcess, now: time.Now}
}

// path counts what one way of reading served.
type path struct{ reads, bytes atomic.Uint64 }

func (p *path) count(bytes int) {
	p.reads.Add(1)
	p.bytes.Add(uint64(bytes))
}

func (p *path) stats() PathStats { return PathStats{p.reads.Load(), p.bytes.Load()} }

// PathStats is what one way of reading served.
type PathStats struct {
	Reads uint64 `json:"reads"` // system calls
	Bytes uint64 `json:"bytes"` // of guest memory
}

func (p PathStats) add(q PathStats) PathStats {
	return PathStats{p.Reads + q.Reads, p.Bytes + q.Bytes}
}

// MemoryStats says which way a Memory's reads went.
type MemoryStats struct {
	Netlink PathStats `json:"netlink"`          // by the module
	Bulk    PathStats `json:"process_vm_readv"` // resident pages by way of the VMM
	Cold    PathStats `json:"faulted_in"`       // other pages by way of the VMM, which made them resident
	// Barred says why nothing goes by way of the VMM, if so.
	Barred string `json:"barred,omitempty"`
}

// Add sums up two accounts.
func (s MemoryStats) Add(t MemoryStats) MemoryStats {
	s.Netlink, s.Bulk, s.Cold = s.Netlink.add(t.Netlink), s.Bulk.add(t.Bulk), s.Cold.add(t.Cold)
	if s.Barred == "" {
		s.Barred = t.Barred
	}
	return s
}

// Stats says what was read so far, and how.
func (m *Memory) Stats() MemoryStats {
	s := MemoryStats{Netlink: m.netlink.stats(), Bulk: m.bulk.stats(), Cold: m.cold.stats()}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.barred != nil {
		s.Barred = m.barred.Error()
	}
	return s
}

// Close releases what reading by way of the VMM takes. The Memory works on
// without it, by netlink alone.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var err error
	if m.proc != nil {
		err = m.proc.close()
		m.proc = nil
	}
	if m.barred == nil {
		m.barred = errors.New("closed")
	}
	return err
}

// ReadPhysical fills p with the memory at gpa, and brings what is not resident
// in the host back into it. The error is ErrNoMemslot if a part of it lies in
// no memslot, ErrNoVM or ErrDying if the VM went away.
func (m *Memory) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	return m.read(ctx, gpa, p, true)
}

// ResidentMemory is a Memory that makes nothing resident.
type ResidentMemory struct{ m *Memory }

// Resident is the same memory without the last resort: what is not resident is
// ErrNotResident, and the guest does not grow by being looked at.
func (m *Memory) Resident() ResidentMemory { return ResidentMemory{m} }

// ReadPhysical fills p with the memory at gpa, or returns ErrNotResident if a
// part of it is not in the host's memory. Other errors are as Memory's.
func (r ResidentMemory) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	return r.m.read(ctx, gpa, p, false)
}

func (m *Memory) read(ctx context.Context, gpa uint64, p []byte, fault bool) error {
	if len(p) == 0 {
		return nil
	}
	if gpa+uint64(len(p)-1) < gpa {
		return invalid(m.vm.ID, "%d bytes at %#x pass the end of the address space", len(p), gpa)
	}
	var dst [1]RangeData
	away := 0 // bytes that do not go by way of the VMM
	for len(p) > 0 {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("kvmaccess: mem_read: %w", err)
		}
		n := min(len(p), MaxBytes)
		if away == 0 && len(p) >= BulkBytes {
			var got int
			if got, away = m.readBulk(ctx, gpa, p); got > 0 {
				p = p[got:]
				gpa += uint64(got)
				continue
			}
		}
		if away > 0 {
			n = min(n, away)
			away -= n
		}
		dst[0] = RangeData{Range: Range{Address: gpa, Length: uint32(n)}, Data: p[:0:n]}
		err := m.c.ReadPhysicalInto(ctx, m.vm.ID, dst[:])
		switch {
		case err == nil:
			m.netlink.count(n)
		case fault && errors.Is(err, ErrNotResident):
			err = m.readCold(ctx, gpa, p[:n])
		}
		if err != nil {
			return err
		}
		p = p[n:]
		gpa += uint64(n)
	}
	return nil
}

// slotsFresh is how long a list of memslots is taken for granted. VMMs change
// theirs when firmware moves a device's memory, or devices are plugged in.
const slotsFresh = 100 * time.Millisecond

// guestMemfd in a memslot's flags (KVM_MEM_GUEST_MEMFD): what the guest keeps
// private is not in the VMM's address space.
const guestMemfd = 1 << 2

// readBulk copies resident pages from gpa on, and returns how many bytes, or
// how many have to be read otherwise. Why does not matter: the module will
// tell, or be able to.
func (m *Memory) readBulk(ctx context.Context, gpa uint64, p []byte) (got, away int) {
	proc, err := m.process(ctx)
	if err != nil {
		return 0, len(p)
	}
	slots, err := m.memslots(ctx, false)
	if err != nil {
		return 0, len(p)
	}
	slot, ok := findSlot(slots, gpa)
	if !ok {
		return 0, len(p)
	}
	off := gpa - slot.GPA
	n := int(min(uint64(len(p)), slot.Size-off))
	if slot.Flags&guestMemfd != 0 {
		return 0, n
	}
	run, resident, err := proc.resident(slot.HVA+off, n)
	if err != nil || run == 0 {
		return 0, n
	}
	if !resident {
		return 0, run
	}
	got, err = proc.read(p[:run], slot.HVA+off)
	if err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
			m.bar(fmt.Errorf("process_vm_readv: %w", err))
		}
		return 0, n
	}
	m.bulk.count(got)
	return got, 0
}

// process opens the VMM, once.
func (m *Memory) process(ctx context.Context) (*process, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.barred != nil || m.proc != nil {
		return m.proc, m.barred
	}
	if m.vm.Flags&VMProtected != 0 {
		m.barred = ErrProtected
		return nil, m.barred
	}
	proc, err := m.open(m.vm.PID)
	if err != nil {
		m.barred = err
		return nil, err
	}
	// What was opened is the VMM if the VM's is still the process of that
	// number: ids of VMs are given once, ids of processes again and again.
	vm, err := m.c.VM(ctx, m.vm.ID)
	if err == nil && vm.PID != m.vm.PID {
		err = &Error{Op: "process_vm_readv", VM: m.vm.ID, Errno: unix.ESRCH,
			Message: fmt.Sprintf("the VMM is process %d now, was %d", vm.PID, m.vm.PID)}
		m.barred = err
	}
	if err != nil {
		_ = proc.close()
		return nil, err
	}
	m.proc = proc
	return proc, nil
}

func (m *Memory) bar(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.barred == nil {
		m.barred = err
	}
}

// readCold reads through the VMM's address space what may not be resident.
func (m *Memory) readCold(ctx context.Context, gpa uint64, p []byte) error {
	proc, err := m.process(ctx)
	if err != nil {
		e := &Error{Op: "process_vm_readv", VM: m.vm.ID, Errno: unix.ENODATA, Address: gpa,
			Message: fmt.Sprintf("the page is not resident in the host, and the VMM, process %d, cannot be read: %v", m.vm.PID, err)}
		if errors.Is(err, unix.ESRCH) {
			e.Errno = unix.ESRCH
		}
		return e
	}
	for refreshed := false; ; refreshed = true {
		slots, err := m.memslots(ctx, refreshed)
		if err != nil {
			return err
		}
		err = m.copyVMM(ctx, proc, slots, gpa, p)
		// The memslots may have changed since they were listed.
		if err == nil || refreshed {
			return err
		}
	}
}

func (m *Memory) copyVMM(ctx context.Context, proc *process, slots []Memslot, gpa uint64, p []byte) error {
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
		got, err := proc.read(p[:n], slot.HVA+off)
		if err != nil {
			e := &Error{Op: "process_vm_readv", VM: m.vm.ID, Errno: unix.EIO, Address: gpa,
				Message: fmt.Sprintf("reading process %d at %#x: %v", m.vm.PID, slot.HVA+off, err)}
			errors.As(err, &e.Errno)
			return e
		}
		m.cold.count(got)
		p = p[got:]
		gpa += uint64(got)
	}
	return nil
}

func (m *Memory) memslots(ctx context.Context, refresh bool) ([]Memslot, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	if age := now.Sub(m.listed); m.slots != nil && !refresh && age >= 0 && age < slotsFresh {
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
	m.slots, m.listed = slots, now
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
