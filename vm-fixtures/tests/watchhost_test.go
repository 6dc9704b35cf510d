// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bytes"
	"encoding/binary"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// watchMemory watches all of a memslot's memory as it is now: its first half by
// its bytes and entries, the second by digests; one watch for each, of which
// the first is simple enough for a timer.
func watchMemory(t *testing.T, w *kvmaccess.Watcher, vm kvmaccess.VM, gpa uint64, content []byte) [2]*kvmaccess.Watch {
	t.Helper()
	half := len(content) / 2
	items := []kvmaccess.Item{{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: gpa, Data: slices.Clone(content[:min(half, 16<<10)])}}
	for at := 0; at < half; at += half / 8 {
		items = append(items, kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindEntry, GPA: gpa + uint64(at),
			Value: binary.LittleEndian.Uint64(content[at:])})
	}
	key := newKey(t)
	return [2]*kvmaccess.Watch{
		newWatch(t, w, vm, kvmaccess.WatchConfig{}, items...),
		newWatch(t, w, vm, kvmaccess.WatchConfig{Budget: half, Key: key}, kvmaccess.Item{
			Cookie: 3, Kind: kvmaccess.KindDigest, GPA: gpa + uint64(half), Digests: digests(t, *key, content[half:])}),
	}
}

// Whatever the host keeps a guest's memory in, and however large its pages are:
// what is there is compared, and a change of any byte is found.
func TestWatchBackings(t *testing.T) {
	const gpa, size = 1 << 30, 4 << 20
	c, k := newClient(t), openKVM(t)
	for _, backing := range []tinyvm.Backing{tinyvm.Anonymous, tinyvm.Transparent, tinyvm.Hugetlb, tinyvm.Memfd, tinyvm.File} {
		t.Run(backing.String(), func(t *testing.T) {
			if backing == tinyvm.Hugetlb {
				hugePages(t, size/tinyvm.HugePage)
			}
			w := newWatcher(t)
			m := newMemory(t, size, backing)
			copy(m.Bytes(), pattern(gpa, size))
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
			t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
			setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
			watches := watchMemory(t, w, vm, gpa, m.Bytes())
			wantQuiet(t, w, watches[0], 5)
			wantQuiet(t, w, watches[1], 5)
			for _, at := range []int{9, 4095, 8191, size/2 + 4095, size - tinyvm.HugePage, size - 1} {
				cookie := uint64(1)
				if at >= size/2 {
					cookie = 3
				}
				m.Bytes()[at] ^= 0x10
				if e := wantEvent(t, w, cookie, kvmaccess.StateDifferent); e.GPA != gpa+uint64(at) && e.GPA != gpa+uint64(at&^4095) {
					t.Errorf("change at %#x: %+v", at, e)
				}
				m.Bytes()[at] ^= 0x10
				wantEvent(t, w, cookie, kvmaccess.StateExpected)
			}
		})
	}
}

// Pages that are untouched but for a reading are the host's page of zeros.
func TestWatchZeroPages(t *testing.T) {
	const gpa, size = 1 << 30, 32 << 10
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
	content := slices.Clone(m.Bytes())
	watches := watchMemory(t, w, vm, gpa, content)
	wantQuiet(t, w, watches[0], 5)
	wantQuiet(t, w, watches[1], 5)
	for _, tt := range []struct {
		at     int
		cookie uint64
	}{{9, 1}, {size - 1, 3}} {
		m.Bytes()[tt.at] = 1
		// A busy emulator may leave the host without a page between the old one
		// and the new for as long as two ticks.
		e := nextEvent(t, w)
		for e.State != kvmaccess.StateDifferent {
			if e.State == kvmaccess.StateNoMemslot {
				t.Fatalf("%+v", e)
			}
			e = nextEvent(t, w)
		}
		if e.Cookie != tt.cookie {
			t.Errorf("%+v, want item %d", e, tt.cookie)
		}
	}
}

// What the host has in place, but mapped for nobody, as it does now and then to
// learn from a fault which node uses a page, is as it was; and looking does not
// make the host believe that anybody uses the memory.
func TestWatchLeavesPagesAlone(t *testing.T) {
	const gpa, size = 1 << 30, 128 << 10
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	// Else the kernel may make one mapping of this and another one beside it.
	if err := m.Advise(0, size, unix.MADV_DONTDUMP); err != nil {
		t.Fatal(err)
	}
	copy(m.Bytes(), pattern(gpa, size))
	setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
	watches := watchMemory(t, w, vm, gpa, m.Bytes())
	quiet := func(ticks uint64) {
		t.Helper()
		for _, watch := range watches {
			wantQuiet(t, w, watch, ticks)
		}
	}
	quiet(3)
	referenced := func() int { return smaps(t, m.HVA(), "Referenced") }
	if n := referenced(); n != size>>10 {
		t.Fatalf("%d KiB are referenced of what was just written", n)
	}
	// proc_pid_clear_refs(5): of all mappings.
	if err := os.WriteFile("/proc/self/clear_refs", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	before := watchStats(t, watches[1]).Passes
	quiet(10)
	if s := watchStats(t, watches[1]); s.Passes < before+5 {
		t.Errorf("%+v", s)
	}
	if n := referenced(); n != 0 {
		t.Errorf("%d KiB are referenced after some ticks", n)
	}

	for range 3 {
		if err := unix.Mprotect(m.Bytes(), unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
		quiet(5)
		if err := unix.Mprotect(m.Bytes(), unix.PROT_READ|unix.PROT_WRITE); err != nil {
			t.Fatal(err)
		}
		quiet(5)
	}
	m.Bytes()[1] ^= 1
	wantEvent(t, w, 1, kvmaccess.StateDifferent)
}

// What is a device's and no memory is told of as not resident: reading it could
// have effects. Video memory, which the kernel maps as if it were memory, and the
// addresses of interrupts (Intel SDM vol. 3, "Message Address Register Format"),
// which it does not.
func TestWatchDeviceMemory(t *testing.T) {
	const gpa, size = 1 << 30, 8 << 10
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	copy(m.Bytes(), pattern(gpa, size))
	setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
	page := m.Bytes()[kvmaccess.PageSize:]
	// Of both pages, which a timer looks at.
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: gpa, Data: slices.Clone(m.Bytes()[:64])},
		kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindBytes, GPA: gpa + kvmaccess.PageSize, Data: slices.Clone(page[:64])})
	wantQuiet(t, w, watch, 5)
	dev, err := os.Open("/dev/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for _, at := range []int64{0xa0000, 0xfee01000} {
		if _, err := unix.MmapPtr(int(dev.Fd()), at, unsafe.Pointer(&page[0]), kvmaccess.PageSize, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
			t.Fatalf("%#x: %v", at, err)
		}
		wantEvent(t, w, 2, kvmaccess.StateNotResident)
		wantQuiet(t, w, watch, 5)
		if _, err := unix.MmapPtr(-1, 0, unsafe.Pointer(&page[0]), kvmaccess.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED); err != nil {
			t.Fatal(err)
		}
		copy(page, pattern(gpa+kvmaccess.PageSize, kvmaccess.PageSize))
		// It may be found before all of it is written.
		e := nextEvent(t, w)
		for e.State == kvmaccess.StateDifferent {
			e = nextEvent(t, w)
		}
		if e.Cookie != 2 || e.State != kvmaccess.StateExpected {
			t.Fatalf("%#x: %+v", at, e)
		}
	}
	if s := watchStats(t, watch); s.NotResident != 0 || s.Different != 0 {
		t.Errorf("%+v", s)
	}
}

// Pages that are swapped out are told of as not resident, and stay out.
func TestWatchSwappedMemory(t *testing.T) {
	const gpa, size = 1 << 30, 1 << 20
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	swapOn(t, 64<<20)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	copy(m.Bytes(), pattern(gpa, size))
	setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
	key := newKey(t)
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Budget: size, Key: key},
		kvmaccess.Item{Cookie: 3, Kind: kvmaccess.KindDigest, GPA: gpa, Digests: digests(t, *key, m.Bytes())})
	wantQuiet(t, w, watch, 3)
	out := func() (n int) {
		for _, p := range mapped(t, m.Bytes()) {
			if !p {
				n++
			}
		}
		return n
	}
	// Swapping out is a wish.
	for range 100 {
		if err := m.Advise(0, size, unix.MADV_PAGEOUT); err != nil {
			t.Fatal(err)
		}
		if out() > 50 {
			break
		}
	}
	n := out()
	if n <= 50 {
		t.Fatalf("%d pages are out: nothing to be tested", n)
	}
	for range n {
		wantEvent(t, w, 3, kvmaccess.StateNotResident)
	}
	wantQuiet(t, w, watch, 10)
	if s := watchStats(t, watch); s.NotResident != n || out() != n {
		t.Errorf("%d pages were out, and are %d now: %+v", n, out(), s)
	}
	if !bytes.Equal(m.Bytes(), pattern(gpa, size)) {
		t.Error("other bytes")
	}
	for range n {
		wantEvent(t, w, 3, kvmaccess.StateExpected)
	}
}

// A migration has KVM keep a log of what the guest writes, which changes
// memslots, but nothing that is watched; at its end this VM goes.
func TestWatchMigration(t *testing.T) {
	const gpa, size = 1 << 30, 128 << 10
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	if err != nil {
		t.Fatal(err)
	}
	vm := newestVM(t, c, selfPID)
	started(t, g)
	m := newMemory(t, size, tinyvm.Anonymous)
	copy(m.Bytes(), pattern(gpa, size))
	slot := tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m}
	setSlot(t, g, slot)
	watches := watchMemory(t, w, vm, gpa, m.Bytes())
	for range 5 {
		for _, flags := range []uint32{slotLogDirty, 0} {
			slot.Flags = flags
			setSlot(t, g, slot)
			wantQuiet(t, w, watches[0], 3)
			wantQuiet(t, w, watches[1], 3)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	for range watches {
		if e := nextEvent(t, w); e.State != kvmaccess.StateEnded {
			t.Errorf("%+v", e)
		}
	}
}

// slotLogDirty is KVM_MEM_LOG_DIRTY_PAGES of linux/kvm.h.
const slotLogDirty = 1

// A VM that is reset is the same one, of which the registers are told to be
// others, and as they were once it has set them again.
func TestWatchReset(t *testing.T) {
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	until(t, c, vm.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
	cr0 := capture(t, c, vm.ID, 0).CR0
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR0, Value: cr0})
	wantQuiet(t, w, watch, 3)
	for range 3 {
		for _, tt := range []struct {
			mode  tinyvm.Mode
			state kvmaccess.ItemState
		}{{tinyvm.Real, kvmaccess.StateDifferent}, {tinyvm.Long, kvmaccess.StateExpected}} {
			stopped(t, g)
			if err := g.VCPUs[0].Enter(tt.mode, g.Tables.Root, tinyvm.Code); err != nil {
				t.Fatal(err)
			}
			started(t, g)
			wantEvent(t, w, 1, tt.state)
		}
	}
}

// CPUs go and come back while watches tick there, and while vCPUs are there.
func TestWatchCPUOffline(t *testing.T) {
	needCPUs(t, 2)
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	const lstarAt, cr0At, lstar = 0x40000, 0x40008, 0xffffffff81000000
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: msrLoop(lstarAt, cr0At)})
	put64(t, g, lstarAt, lstar)
	put64(t, g, cr0At, capture(t, c, vm.ID, 0).CR0)
	halt, haltVM := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Halt(), IRQChip: true})
	// They may go elsewhere when their CPU does.
	started(t, g)
	started(t, halt)
	until(t, c, vm.ID, 0, "with its LSTAR", func(v kvmaccess.VCPU) bool { return v.LSTAR == lstar })
	until(t, c, haltVM.ID, 0, "halted", inCondition(kvmaccess.ConditionHalted))
	put64(t, g, watchedEntry, 0)
	put64(t, halt, watchedEntry, 0)
	register := kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterLSTAR, Value: lstar}
	entry := kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindEntry, GPA: watchedEntry}
	cr0 := capture(t, c, haltVM.ID, 0).CR0
	halted := kvmaccess.Item{Cookie: 3, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR0, Value: cr0}

	// Timers begin where their watch was made.
	var watches []*kvmaccess.Watch
	for cpu := range runtime.NumCPU() {
		back := onCPU(t, cpu)
		watches = append(watches, newWatch(t, w, vm, kvmaccess.WatchConfig{Period: time.Millisecond}, register, entry),
			newWatch(t, w, haltVM, kvmaccess.WatchConfig{Period: time.Millisecond}, halted, entry))
		back()
	}
	quiet := func() {
		t.Helper()
		for _, watch := range watches {
			wantQuiet(t, w, watch, 5)
		}
	}
	defer setOnline(t, "1")
	for round := range uint64(5) {
		setOnline(t, "0")
		quiet()
		put64(t, g, lstarAt, lstar+1)
		put64(t, halt, watchedEntry, round+1)
		for range 2 * len(watches) / 2 {
			if e := nextEvent(t, w); e.State != kvmaccess.StateDifferent || e.Cookie == 3 {
				t.Errorf("CPU offline: %+v", e)
			}
		}
		put64(t, g, lstarAt, lstar)
		put64(t, halt, watchedEntry, 0)
		for range 2 * len(watches) / 2 {
			if e := nextEvent(t, w); e.State != kvmaccess.StateExpected {
				t.Errorf("CPU offline: %+v", e)
			}
		}
		setOnline(t, "1")
		quiet()
	}
	stopped(t, g)
	for _, watch := range watches {
		t.Logf("%+v", watchStats(t, watch))
	}
}

// However many watches there are: interrupts take no more than a share of each
// CPU, the worker does the rest, all stretch, and each of them still looks.
func TestWatchManyTimers(t *testing.T) {
	const gpa, size, n = 1 << 30, 32 << 10, 400
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	copy(m.Bytes(), pattern(gpa, size))
	setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
	content := slices.Clone(m.Bytes())
	var watches []*kvmaccess.Watch
	for i := range uint64(n) {
		watches = append(watches, newWatch(t, w, vm, kvmaccess.WatchConfig{Period: kvmaccess.WatchMinPeriod},
			kvmaccess.Item{Cookie: i, Kind: kvmaccess.KindBytes, GPA: gpa, Data: content}))
	}
	wantQuiet(t, w, watches[n-1], 3)
	before, err := c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	time.Sleep(2 * time.Second)
	took := time.Since(start)
	after, err := c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	interrupts := float64(after.Interrupt-before.Interrupt) / float64(took) / float64(runtime.NumCPU())
	worker := float64(after.Worker-before.Worker) / float64(took)
	s := watchStats(t, watches[0])
	t.Logf("interrupts %.0f%% of each CPU, the worker %.0f%% of one: %+v", 100*interrupts, 100*worker, s)
	// A fourth, and what one look takes beyond it.
	if interrupts > 0.30 || interrupts == 0 {
		t.Errorf("interrupts take %.0f%% of each CPU", 100*interrupts)
	}
	if worker > 0.75 || s.Effective == s.Period {
		t.Errorf("the worker takes %.0f%% of a CPU, effective period %v", 100*worker, s.Effective)
	}
	m.Bytes()[size-1] ^= 1
	told := map[uint64]bool{}
	for len(told) < n {
		told[wantEventOfAny(t, w, kvmaccess.StateDifferent).Cookie] = true
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if all, err := c.Watches(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%d watches, %v", len(all), err)
	}
}

func wantEventOfAny(t *testing.T, w *kvmaccess.Watcher, state kvmaccess.ItemState) kvmaccess.WatchEvent {
	t.Helper()
	e := nextEvent(t, w)
	if e.State != state {
		t.Fatalf("event %+v, want %v", e, state)
	}
	return e
}

// Where ftrace is off the destruction of VMs cannot be hooked for certain: the
// worker looks all the same, and what goes is told of.
func TestWatchWithoutFtrace(t *testing.T) {
	const sysctl = "/proc/sys/kernel/ftrace_enabled"
	// Watchers of before have no family any more.
	if err := unloadModule(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(sysctl, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	err := loadModule()
	t.Cleanup(func() {
		if err := unloadModule(5 * time.Second); err != nil {
			t.Error(err)
		}
		if err := os.WriteFile(sysctl, []byte("1"), 0); err != nil {
			t.Error(err)
		}
		if err := loadModule(); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	if err != nil {
		t.Fatal(err)
	}
	vm := newestVM(t, c, selfPID)
	started(t, g)
	put64(t, g, watchedEntry, 0)
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: time.Millisecond},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindEntry, GPA: watchedEntry},
		kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterLSTAR, Value: capture(t, c, vm.ID, 0).LSTAR})
	wantQuiet(t, w, watch, 50)
	put64(t, g, watchedEntry, 1)
	wantEvent(t, w, 1, kvmaccess.StateDifferent)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if e := nextEvent(t, w); e.State != kvmaccess.StateEnded {
		t.Errorf("%+v", e)
	}
}
