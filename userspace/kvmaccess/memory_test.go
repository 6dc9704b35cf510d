// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"unsafe"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// fakeVMM is a module with one VM, whose memory is a slice of this process.
type fakeVMM struct {
	guestMemory
	vm    VM
	slots []Memslot
	lists int
}

func (m *fakeVMM) serve(g genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
	switch g.Header.Command {
	case cmdVMGet:
		return []genetlink.Message{message(cmdVMGet, join(u64(aVMID, uint64(m.vm.ID)), u32(aVMPID, uint32(m.vm.PID)), u32(aVMVCPUs, 1),
			u32(aVMMemslots, 1), u64(aVMMemory, 1), u64(aVMSeen, 1), u32(aVMFlags, 0)))}, nil
	case cmdMemslotGet:
		m.lists++
		var msgs []genetlink.Message
		for _, s := range m.slots {
			msgs = append(msgs, message(cmdMemslotGet, join(u64(aMemslotVMID, uint64(m.vm.ID)), u32(aMemslotASID, s.AS), u32(aMemslotSlot, s.Slot),
				u64(aMemslotGPA, s.GPA), u64(aMemslotSize, s.Size), u64(aMemslotHVA, s.HVA), u32(aMemslotFlags, 0))))
		}
		if len(msgs) == 0 {
			return nil, io.EOF
		}
		return msgs, nil
	}
	return m.guestMemory.serve(g, n)
}

func TestMemory(t *testing.T) {
	// The guest's pages 0x10 to 0x2f are this slice, and not resident.
	const first, pages = 0x10, 0x20
	ram := make([]byte, pages<<12)
	for i := range ram {
		ram[i] = pattern(first<<12 + uint64(i))
	}
	hva := uint64(uintptr(unsafe.Pointer(&ram[0])))
	holes := map[uint64]unix.Errno{0x40: unix.EFAULT}
	for p := range uint64(pages) {
		holes[first+p] = unix.ENODATA
	}
	half := uint64(len(ram) / 2)
	m := &fakeVMM{
		guestMemory: guestMemory{t: t, holes: holes},
		vm:          VM{ID: 1, PID: os.Getpid()},
		slots: []Memslot{
			{AS: 1, Slot: 0, GPA: first << 12, Size: uint64(len(ram)), HVA: 8},
			{AS: 0, Slot: 1, GPA: first << 12, Size: half, HVA: hva},
			{AS: 0, Slot: 2, GPA: first<<12 + half, Size: half, HVA: hva + half},
		},
	}
	c := newClient(t, m.serve)
	mem := NewMemory(c, m.vm)
	read := func(gpa uint64, n int) error {
		t.Helper()
		p := make([]byte, n)
		if err := mem.ReadPhysical(t.Context(), gpa, p); err != nil {
			return err
		}
		for i, b := range p {
			if b != pattern(gpa+uint64(i)) {
				t.Errorf("%d bytes at %#x: wrong byte at +%#x", n, gpa, i)
				break
			}
		}
		return nil
	}
	for _, tt := range []struct {
		name string
		gpa  uint64
		n    int
		err  error
	}{
		{"nothing", 0, 0, nil},
		{"resident", 0x1003, 100, nil},
		{"resident, in parts", 0x800000, 3*MaxBytes + 5, nil},
		{"not resident", first<<12 + 5, 100, nil},
		{"across memslots, in parts", first << 12, len(ram), nil},
		{"hole", 0x40000, 8, ErrNoMemslot},
		{"end of the address space", 1<<64 - 4, 8, ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := read(tt.gpa, tt.n); !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
		})
	}
	if m.lists != 1 {
		t.Errorf("memslots listed %d times", m.lists)
	}

	t.Run("memslot moved", func(t *testing.T) {
		moved := bytes.Clone(ram)
		m.slots = []Memslot{{AS: 0, Slot: 1, GPA: first << 12, Size: uint64(len(ram)), HVA: uint64(uintptr(unsafe.Pointer(&moved[0])))}}
		mem.slots[0].HVA, mem.slots[1].HVA = 8, 8
		if err := read(first<<12, 64); err != nil {
			t.Error(err)
		}
		if m.lists != 2 {
			t.Errorf("memslots listed %d times", m.lists)
		}
	})
	t.Run("memslot gone", func(t *testing.T) {
		m.slots = nil
		mem.slots = nil
		if err := read(first<<12, 64); !errors.Is(err, ErrNoMemslot) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("process gone", func(t *testing.T) {
		mem := NewMemory(c, VM{ID: 1, PID: 1 << 30})
		m.slots = []Memslot{{GPA: first << 12, Size: uint64(len(ram)), HVA: hva}}
		if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, 8)); !errors.Is(err, unix.ESRCH) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("id of the process given anew", func(t *testing.T) {
		mem := NewMemory(c, m.vm)
		mem.readv = func(pid int, p []byte, hva uint64) (int, error) {
			m.vm.PID++ // as if seen afterwards
			return processRead(pid, p, hva)
		}
		if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, 8)); !errors.Is(err, unix.ESRCH) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := mem.ReadPhysical(ctx, 0x1000, make([]byte, 8)); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	})
}
