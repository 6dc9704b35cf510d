// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
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
				u64(aMemslotGPA, s.GPA), u64(aMemslotSize, s.Size), u64(aMemslotHVA, s.HVA), u32(aMemslotFlags, s.Flags))))
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
	mem := newTestMemory(t, c, m.vm)
	now := time.Now()
	mem.now = func() time.Time { return now }
	read := func(gpa uint64, n int) error {
		t.Helper()
		p := make([]byte, n)
		if err := mem.ReadPhysical(t.Context(), gpa, p); err != nil {
			return err
		}
		checkPattern(t, gpa, p)
		return nil
	}
	for _, tt := range []struct {
		name                string
		gpa                 uint64
		n                   int
		err                 error
		netlink, bulk, cold uint64 // bytes
	}{
		{"nothing", 0, 0, nil, 0, 0, 0},
		{"resident", 0x1003, 100, nil, 100, 0, 0},
		{"in no memslot of the VMM's, in parts", 0x800000, 3*MaxBytes + 5, nil, 3*MaxBytes + 5, 0, 0},
		{"not resident", first<<12 + 5, 100, nil, 0, 0, 100},
		{"across memslots, at once", first << 12, len(ram), nil, 0, uint64(len(ram)), 0},
		{"from the middle of a page", first<<12 + 100, BulkBytes, nil, 0, BulkBytes, 0},
		{"too small to go by way of the VMM", first<<12 + 100, BulkBytes - 1, nil, 0, 0, BulkBytes - 1},
		{"hole", 0x40000, 8, ErrNoMemslot, 0, 0, 0},
		{"end of the address space", 1<<64 - 4, 8, ErrInvalid, 0, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := mem.Stats()
			if err := read(tt.gpa, tt.n); !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
			after := mem.Stats()
			got := []uint64{after.Netlink.Bytes - before.Netlink.Bytes, after.Bulk.Bytes - before.Bulk.Bytes, after.Cold.Bytes - before.Cold.Bytes}
			if diff := cmp.Diff([]uint64{tt.netlink, tt.bulk, tt.cold}, got); diff != "" || after.Barred != "" {
				t.Errorf("netlink, process_vm_readv, faulted in (-want +got):\n%s%s", diff, after.Barred)
			}
		})
	}
	if m.lists != 1 {
		t.Errorf("memslots listed %d times", m.lists)
	}
	now = now.Add(slotsFresh)
	if err := read(first<<12, len(ram)); err != nil || m.lists != 2 {
		t.Errorf("memslots listed %d times after they grew old, %v", m.lists, err)
	}

	t.Run("memslot moved", func(t *testing.T) {
		moved := bytes.Clone(ram)
		m.slots = []Memslot{{AS: 0, Slot: 1, GPA: first << 12, Size: uint64(len(ram)), HVA: uint64(uintptr(unsafe.Pointer(&moved[0])))}}
		mem.slots[0].HVA, mem.slots[1].HVA = 8, 8
		if err := read(first<<12, 64); err != nil {
			t.Error(err)
		}
		if m.lists != 3 {
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
	m.slots = []Memslot{{GPA: first << 12, Size: uint64(len(ram)), HVA: hva}}
	t.Run("process gone", func(t *testing.T) {
		mem := newTestMemory(t, c, VM{ID: 1, PID: 1 << 30})
		if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, 8)); !errors.Is(err, unix.ESRCH) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("process goes", func(t *testing.T) {
		mem := newTestMemory(t, c, m.vm)
		mem.open = func(pid int) (*process, error) {
			proc, err := newProcess(pid)
			proc.readv = func(pid int, p []byte, hva uint64) (int, error) {
				_ = proc.pagemap.Close()
				proc.pagemap = nothing{}
				return processRead(pid, p, hva)
			}
			return proc, err
		}
		if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, 8)); !errors.Is(err, unix.ESRCH) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("id of the process given anew", func(t *testing.T) {
		mem := newTestMemory(t, c, m.vm)
		mem.open = func(pid int) (*process, error) {
			m.vm.PID++ // as if seen afterwards
			return newProcess(pid)
		}
		if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, 8)); !errors.Is(err, unix.ESRCH) {
			t.Errorf("error %v", err)
		}
		m.vm.PID--
	})
	t.Run("another pid namespace", func(t *testing.T) {
		mem := newTestMemory(t, c, m.vm)
		mem.open = func(int) (*process, error) { return nil, errors.New("another namespace") }
		m.holes = nil
		for range 2 {
			if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, len(ram))); err != nil {
				t.Error(err)
			}
		}
		m.holes = holes
		if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, 8)); !errors.Is(err, ErrNotResident) || !strings.Contains(err.Error(), "another namespace") {
			t.Errorf("error %v", err)
		}
		want := MemoryStats{Netlink: PathStats{Reads: 2 * uint64((len(ram)+MaxBytes-1)/MaxBytes), Bytes: 2 * uint64(len(ram))}, Barred: "another namespace"}
		if diff := cmp.Diff(want, mem.Stats()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
	t.Run("not permitted", func(t *testing.T) {
		mem := newTestMemory(t, c, m.vm)
		tries := 0
		mem.open = func(pid int) (*process, error) {
			proc, err := newProcess(pid)
			proc.readv = func(int, []byte, uint64) (int, error) { tries++; return 0, unix.EPERM }
			return proc, err
		}
		m.holes = nil
		for range 2 {
			if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, len(ram))); err != nil {
				t.Error(err)
			}
		}
		m.holes = holes
		if s := mem.Stats(); tries != 1 || s.Bulk.Bytes != 0 || s.Barred == "" {
			t.Errorf("tried %d times: %+v", tries, s)
		}
	})
	for name, vm := range map[string]VM{"encrypted guest": {ID: 1, PID: m.vm.PID, Flags: VMProtected}, "private memory": m.vm} {
		t.Run(name, func(t *testing.T) {
			mem := newTestMemory(t, c, vm)
			m.holes = nil
			m.slots[0].Flags = guestMemfd
			if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, len(ram))); err != nil {
				t.Error(err)
			}
			m.holes = holes
			m.slots[0].Flags = 0
			if s := mem.Stats(); s.Bulk.Bytes != 0 || s.Netlink.Bytes != uint64(len(ram)) {
				t.Errorf("%+v", s)
			}
		})
	}
	t.Run("closed", func(t *testing.T) {
		mem := newTestMemory(t, c, m.vm)
		p := make([]byte, len(ram))
		for range 2 {
			if err := mem.ReadPhysical(t.Context(), first<<12, p); err != nil {
				t.Error(err)
			}
			m.holes = nil
			if err := mem.Close(); err != nil {
				t.Error(err)
			}
		}
		m.holes = holes
		if s := mem.Stats(); s.Bulk.Bytes != uint64(len(ram)) || s.Netlink.Bytes != uint64(len(ram)) || s.Barred != "closed" {
			t.Errorf("%+v", s)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for _, n := range []int{8, len(ram)} {
			if err := mem.ReadPhysical(ctx, first<<12, make([]byte, n)); !errors.Is(err, context.Canceled) {
				t.Errorf("%d bytes: error %v", n, err)
			}
		}
	})
}

// nothing is a pagemap of a process that is gone.
type nothing struct{}

func (nothing) ReadAt([]byte, int64) (int, error) { return 0, io.EOF }
func (nothing) Close() error                      { return nil }

// newTestMemory is a Memory of a VM whose VMM is this process, in whatever pid
// namespace that is.
func newTestMemory(t *testing.T, c *Client, vm VM) *Memory {
	t.Helper()
	m := NewMemory(c, vm)
	m.open = newProcess
	t.Cleanup(func() { _ = m.Close() })
	return m
}

func checkPattern(t *testing.T, gpa uint64, p []byte) {
	t.Helper()
	for i, b := range p {
		if b != pattern(gpa+uint64(i)) {
			t.Errorf("%d bytes at %#x: wrong byte at +%#x", len(p), gpa, i)
			return
		}
	}
}

// What is not resident is not made so by reading the rest, nor by asking for
// it with Resident.
func TestMemoryResident(t *testing.T) {
	const first, pages = 0x100, 700
	ram, err := unix.Mmap(-1, 0, pages<<12, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(ram) }()
	if err := unix.Madvise(ram, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	holes := map[uint64]unix.Errno{}
	absent := func(page int) bool { return page/100%2 == 1 || page == 250 || page == 699 }
	for page := range pages {
		if absent(page) {
			holes[uint64(first+page)] = unix.ENODATA
			continue
		}
		for i := range 4096 {
			ram[page<<12+i] = pattern(uint64(first+page)<<12 + uint64(i))
		}
	}
	vmm := &fakeVMM{
		guestMemory: guestMemory{t: t, holes: holes},
		vm:          VM{ID: 1, PID: os.Getpid()},
		slots:       []Memslot{{GPA: first << 12, Size: uint64(len(ram)), HVA: uint64(uintptr(unsafe.Pointer(&ram[0])))}},
	}
	mem := newTestMemory(t, newClient(t, vmm.serve), vmm.vm)
	unchanged := func() {
		t.Helper()
		proc, err := newProcess(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		defer proc.close()
		for page := range pages {
			_, resident, err := proc.resident(vmm.slots[0].HVA+uint64(page)<<12, 1)
			if err != nil || resident == absent(page) {
				t.Fatalf("page %d: resident %t, %v", page, resident, err)
			}
		}
	}
	unchanged()
	resident := mem.Resident()
	for _, tt := range []struct {
		page, n int // pages
		err     error
	}{
		{0, 100, nil}, {0, 101, ErrNotResident}, {100, 100, ErrNotResident}, {199, 90, ErrNotResident},
		{200, 50, nil}, {201, 49, nil}, {200, 100, ErrNotResident}, {600, 99, nil}, {600, 100, ErrNotResident}, {0, 700, ErrNotResident},
	} {
		p := make([]byte, tt.n<<12)
		err := resident.ReadPhysical(t.Context(), uint64(first+tt.page)<<12, p)
		if !errors.Is(err, tt.err) {
			t.Errorf("%d pages from %d: %v, want %v", tt.n, tt.page, err, tt.err)
		}
		if err == nil {
			checkPattern(t, uint64(first+tt.page)<<12, p)
		}
	}
	unchanged()
	if s := mem.Stats(); s.Cold.Bytes != 0 || s.Bulk.Bytes == 0 {
		t.Errorf("%+v", s)
	}

	// Asked for all, it faults in what is absent, and only that.
	before := mem.Stats()
	if err := mem.ReadPhysical(t.Context(), first<<12, make([]byte, len(ram))); err != nil {
		t.Fatal(err)
	}
	gone := uint64(0)
	for page := range pages {
		if absent(page) {
			gone += 4096
		}
	}
	after := mem.Stats()
	if cold, all := after.Cold.Bytes-before.Cold.Bytes, after.Cold.Bytes+after.Bulk.Bytes-before.Bulk.Bytes; cold != gone || all != uint64(len(ram)) {
		t.Errorf("%d bytes faulted in, %d at all; want %d, %d", cold, all, gone, len(ram))
	}
}
