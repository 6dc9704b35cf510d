// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// watchPeriod is that of most watches here.
const watchPeriod = 5 * time.Millisecond

func newWatcher(t *testing.T) *kvmaccess.Watcher {
	t.Helper()
	w, err := kvmaccess.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func newWatch(t *testing.T, w *kvmaccess.Watcher, vm kvmaccess.VM, c kvmaccess.WatchConfig, items ...kvmaccess.Item) *kvmaccess.Watch {
	t.Helper()
	if c.Period == 0 {
		c.Period = watchPeriod
	}
	watch, err := w.New(t.Context(), vm.ID, c)
	if err != nil {
		t.Fatal(err)
	}
	addItems(t, watch, items...)
	return watch
}

func addItems(t *testing.T, watch *kvmaccess.Watch, items ...kvmaccess.Item) kvmaccess.WatchStats {
	t.Helper()
	s, err := watch.Add(t.Context(), items...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func watchStats(t *testing.T, watch *kvmaccess.Watch) kvmaccess.WatchStats {
	t.Helper()
	s, err := watch.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// nextEvent is the next one, which must come soon.
func nextEvent(t *testing.T, w *kvmaccess.Watcher) kvmaccess.WatchEvent {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience*20*time.Second)
	defer cancel()
	e, err := w.Receive(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// wantEvent is the next event, which must be about this item in this state.
func wantEvent(t *testing.T, w *kvmaccess.Watcher, cookie uint64, state kvmaccess.ItemState) kvmaccess.WatchEvent {
	t.Helper()
	e := nextEvent(t, w)
	if e.Cookie != cookie || e.State != state {
		t.Fatalf("event %+v, want item %d %v", e, cookie, state)
	}
	return e
}

// wantQuiet lets a watch tick some more times, of which nothing may be heard.
func wantQuiet(t *testing.T, w *kvmaccess.Watcher, watch *kvmaccess.Watch, ticks uint64) {
	t.Helper()
	for from := watchStats(t, watch).Ticks; watchStats(t, watch).Ticks < from+ticks; {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
		e, err := w.Receive(ctx)
		cancel()
		if err == nil {
			t.Fatalf("event %+v, want none", e)
		}
	}
}

// monotonic is the clock of events.
func monotonic(t *testing.T) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// inTime checks that what was changed between two times was found within a
// period, counted from when the tick took place.
func inTime(t *testing.T, watch *kvmaccess.Watch, changed time.Duration, e kvmaccess.WatchEvent) {
	t.Helper()
	s := watchStats(t, watch)
	// What the busy machine under the emulator takes from the ticks shows in
	// how late they were and how long.
	limit := s.Effective + s.Latest + s.Longest + time.Millisecond
	if took := e.Time - changed; took > limit {
		t.Errorf("found after %v, want %v at most: %+v", took, limit, s)
	}
}

func put64(t *testing.T, g *tinyvm.Guest, gpa, value uint64) {
	t.Helper()
	if err := g.Write(gpa, binary.LittleEndian.AppendUint64(nil, value)); err != nil {
		t.Fatal(err)
	}
}

// A guest's memory here: pages that it does not touch itself.
const (
	watchedBytes  = 0x40000
	watchedEntry  = 0x50000
	watchedDigest = 0x60000 // 16 pages
)

func digests(t *testing.T, key kvmaccess.WatchKey, content []byte) []uint64 {
	t.Helper()
	d := kvmaccess.NewDigester(key)
	var all []uint64
	for page := range slices.Chunk(content, kvmaccess.PageSize) {
		v, err := d.Page(page)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, v)
	}
	return all
}

func newKey(t *testing.T) *kvmaccess.WatchKey {
	t.Helper()
	var key kvmaccess.WatchKey
	if _, err := rand.Read(key[:]); err != nil {
		t.Fatal(err)
	}
	return &key
}

// Each kind of item finds a change within a period, another one, and that all
// is well again.
func TestWatchItems(t *testing.T) {
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	content := pattern(7, 9000)
	if err := g.Write(watchedBytes+100, content); err != nil {
		t.Fatal(err)
	}
	const entry = 0x8000_0000_1234_5063
	put64(t, g, watchedEntry, entry)
	pages := pattern(3, 16*kvmaccess.PageSize)
	if err := g.Write(watchedDigest, pages); err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Budget: len(pages), Key: key},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: watchedBytes + 100, Data: content},
		kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindEntry, GPA: watchedEntry, Value: entry &^ 0x60, Mask: ^uint64(0x60)},
		kvmaccess.Item{Cookie: 3, Kind: kvmaccess.KindDigest, GPA: watchedDigest, Digests: digests(t, *key, pages)},
	)
	wantQuiet(t, w, watch, 10)
	s := watchStats(t, watch)
	if s.Items != 5 || s.Bytes != 9008 || s.Digested != uint64(len(pages)) || s.Passes < 5 || s.Different+s.NotResident+s.NoMemslot != 0 {
		t.Errorf("after some ticks: %+v", s)
	}

	// Bytes: at the ends, at the edge of a page, of an odd number.
	for _, at := range []int{0, 1, 3995, 3996, 4999, 8191, 8999} {
		gpa := uint64(watchedBytes + 100 + at)
		b, err := g.Bytes(gpa, 1)
		if err != nil {
			t.Fatal(err)
		}
		for _, change := range []byte{0x80, 0x01} {
			now := monotonic(t)
			b[0] = content[at] ^ change
			e := wantEvent(t, w, 1, kvmaccess.StateDifferent)
			inTime(t, watch, now, e)
			n := min(len(content)-at, kvmaccess.PageSize-int(gpa%kvmaccess.PageSize), kvmaccess.WatchEventBytes)
			want := slices.Clone(content[at : at+n])
			if e.GPA != gpa || !bytes.Equal(e.Expected, want) {
				t.Errorf("change of byte %d: %+v", at, e)
			}
			want[0] ^= change
			if !bytes.Equal(e.Data, want) || e.Kind != kvmaccess.KindBytes || e.Watch != watch.ID || e.VM != vm.ID {
				t.Errorf("change of byte %d: %+v, want %x", at, e, want)
			}
		}
		b[0] = content[at]
		wantEvent(t, w, 1, kvmaccess.StateExpected)
		// The rate of one item is bounded.
		time.Sleep(20 * time.Millisecond)
	}

	// An entry: bits that do not count, then one that does.
	put64(t, g, watchedEntry, entry^0x40)
	wantQuiet(t, w, watch, 3)
	now := monotonic(t)
	put64(t, g, watchedEntry, entry^0x1000)
	e := wantEvent(t, w, 2, kvmaccess.StateDifferent)
	inTime(t, watch, now, e)
	if got := binary.LittleEndian.Uint64(e.Data); got != entry^0x1000 || e.GPA != watchedEntry {
		t.Errorf("entry: %+v", e)
	}
	put64(t, g, watchedEntry, entry)
	wantEvent(t, w, 2, kvmaccess.StateExpected)

	// A digest says which page.
	for _, page := range []int{0, 5, 15} {
		gpa := uint64(watchedDigest + page*kvmaccess.PageSize + 77)
		b, err := g.Bytes(gpa, 1)
		if err != nil {
			t.Fatal(err)
		}
		now := monotonic(t)
		b[0] ^= 4
		e := wantEvent(t, w, 3, kvmaccess.StateDifferent)
		inTime(t, watch, now, e)
		if e.Offset != uint32(page*kvmaccess.PageSize) || e.GPA != gpa-77 || len(e.Data) != 8 {
			t.Errorf("page %d: %+v", page, e)
		}
		if s := watchStats(t, watch); s.Different != 1 {
			t.Errorf("page %d: %+v", page, s)
		}
		b[0] ^= 4
		wantEvent(t, w, 3, kvmaccess.StateExpected)
	}

	// Without them the watch goes on.
	for cookie := range uint64(3) {
		if _, err := watch.Remove(t.Context(), cookie+1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := watch.Remove(t.Context(), 1); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such cookie: %v", err)
	}
	put64(t, g, watchedEntry, 0)
	put64(t, g, watchedBytes+100, 0)
	wantQuiet(t, w, watch, 3)
	if s, err := watch.Close(t.Context()); err != nil || s.Items != 0 || s.Memory != 0 || s.Bytes != 0 || s.Digested != 0 || s.Events != 14*1+7+2+6 {
		t.Errorf("in the end: %+v, %v", s, err)
	}
	if _, err := watch.Stats(t.Context()); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a watch that is no more: %v", err)
	}
	vs, err := c.VMStats(t.Context(), vm.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range vs.Ops {
		if op.Command == "watch_event" && (op.Count == 0 || op.Bytes == 0 || op.Time == 0 || vs.Worker+vs.Interrupt < op.Time) {
			t.Errorf("the VM's account: %+v of %+v", op, vs)
		}
	}
}

// msrLoop sets LSTAR and CR0 to what is at two addresses, for ever.
func msrLoop(lstar, cr0 uint32) []byte {
	a := tinyvm.Assembler{Base: tinyvm.Code}
	abs := func(op []byte, at uint32) { a.Bytes(binary.LittleEndian.AppendUint32(op, at)...) }
	abs([]byte{0x48, 0x8b, 0x04, 0x25}, lstar) // mov rax, [lstar]
	a.Copy(tinyvm.RDX, tinyvm.RAX)
	a.Bytes(0x48, 0xc1, 0xea, 32)                     // shr rdx, 32
	a.Bytes(0xb9, 0x82, 0, 0, 0xc0)                   // mov ecx, LSTAR
	a.WRMSR()                                         //
	abs([]byte{0x48, 0x8b, 0x04, 0x25}, cr0)          // mov rax, [cr0]
	a.Bytes(0x0f, 0x22, 0xc0)                         // mov cr0, rax
	a.Bytes(0xb9, 0, 1, 0, 0, 0xff, 0xc9, 0x75, 0xfc) // mov ecx, 256; dec ecx; jnz
	a.Jmp(a.Base)
	return a.Code
}

// Registers are watched while the vCPU runs, and cost nothing while it does not.
func TestWatchRegisters(t *testing.T) {
	const lstarAt, cr0At = 0x40000, 0x40008
	const lstar, other = 0xffffffff81000000, 0xffffffffc0400000
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: msrLoop(lstarAt, cr0At)})
	fresh := capture(t, c, vm.ID, 0)
	const wp = 1 << 16
	put64(t, g, lstarAt, lstar)
	put64(t, g, cr0At, fresh.CR0|wp)
	vcpu := uint32(0)
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterLSTAR, Value: lstar},
		kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR0, Value: wp, Mask: wp, VCPU: &vcpu},
		kvmaccess.Item{Cookie: 3, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterIDTRBase, Value: fresh.IDTR.Base},
		kvmaccess.Item{Cookie: 4, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterGDTRLimit, Value: uint64(fresh.GDTR.Limit)},
		kvmaccess.Item{Cookie: 5, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterEFER, Value: fresh.EFER},
		kvmaccess.Item{Cookie: 6, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterTRSelector, Value: uint64(fresh.TR.Selector)},
		kvmaccess.Item{Cookie: 7, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterPAT, Value: fresh.PAT},
		kvmaccess.Item{Cookie: 8, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterDR7, Value: fresh.DR7},
	)
	// It never ran: whatever its registers are, nothing uses them.
	wantQuiet(t, w, watch, 5)
	if s := watchStats(t, watch); s.Captures != 0 || s.Skipped < 5 {
		t.Errorf("a vCPU that never ran: %+v", s)
	}

	started(t, g)
	// LSTAR may be met before the guest has set it.
	settled := func() {
		for {
			ctx, cancel := context.WithTimeout(t.Context(), 10*watchPeriod)
			e, err := w.Receive(ctx)
			cancel()
			if err != nil {
				break
			}
			if e.Cookie > 2 {
				t.Errorf("event %+v", e)
			}
		}
		if s := watchStats(t, watch); s.Different != 0 {
			t.Errorf("after the guest has set its registers: %+v", s)
		}
	}
	until(t, c, vm.ID, 0, "with its LSTAR", func(v kvmaccess.VCPU) bool { return v.LSTAR == lstar })
	for from := watchStats(t, watch).Ticks; watchStats(t, watch).Ticks < from+3; {
		time.Sleep(watchPeriod)
	}
	settled()
	wantQuiet(t, w, watch, 20)
	for range 5 {
		now := monotonic(t)
		put64(t, g, lstarAt, other)
		e := wantEvent(t, w, 1, kvmaccess.StateDifferent)
		inTime(t, watch, now, e)
		if got := binary.LittleEndian.Uint64(e.Data); got != other || e.Register != kvmaccess.RegisterLSTAR || e.VCPU != 0 ||
			e.Condition == kvmaccess.ConditionUnknown {
			t.Errorf("LSTAR: %+v", e)
		}
		put64(t, g, lstarAt, lstar)
		wantEvent(t, w, 1, kvmaccess.StateExpected)

		put64(t, g, cr0At, fresh.CR0&^wp)
		e = wantEvent(t, w, 2, kvmaccess.StateDifferent)
		if got := binary.LittleEndian.Uint64(e.Data); got&wp != 0 {
			t.Errorf("CR0: %+v", e)
		}
		put64(t, g, cr0At, fresh.CR0|wp)
		wantEvent(t, w, 2, kvmaccess.StateExpected)
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("%+v", watchStats(t, watch))

	// It does not run: one more look at most.
	stopped(t, g)
	wantQuiet(t, w, watch, 2)
	before := watchStats(t, watch)
	wantQuiet(t, w, watch, 20)
	after := watchStats(t, watch)
	if after.Captures > before.Captures || after.Skipped < before.Skipped+20 {
		t.Errorf("a vCPU that does not run: %+v, then %+v", before, after)
	}
	if _, err := watch.Add(t.Context(), kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR3, VCPU: new(uint32(7))}); !errors.Is(err, kvmaccess.ErrNoVCPU) {
		t.Errorf("an item of a vCPU that is not there: %v", err)
	}
}

// A vCPU that waits in the kernel costs nothing; one that comes later is seen.
func TestWatchHaltedVCPU(t *testing.T) {
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Halt(), IRQChip: true})
	fresh := capture(t, c, vm.ID, 0)
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR4, Value: fresh.CR4})
	started(t, g)
	until(t, c, vm.ID, 0, "halted", inCondition(kvmaccess.ConditionHalted))
	wantQuiet(t, w, watch, 3)
	before := watchStats(t, watch)
	wantQuiet(t, w, watch, 20)
	if after := watchStats(t, watch); after.Captures != before.Captures || after.Skipped < before.Skipped+20 {
		t.Errorf("a vCPU that waits: %+v, then %+v", before, after)
	}

	v, err := g.NewVCPU(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Enter(tinyvm.Real, 0, tinyvm.Code); err != nil {
		t.Fatal(err)
	}
	if err := v.SetRunnable(); err != nil {
		t.Fatal(err)
	}
	wantQuiet(t, w, watch, 3)
	thread, err := v.Start(tinyvm.Ignore)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := thread.Stop(); err != nil {
			t.Error(err)
		}
	}()
	// In real mode CR4 is another.
	if e := wantEvent(t, w, 1, kvmaccess.StateDifferent); e.VCPU != 1 {
		t.Errorf("event %+v", e)
	}
}

// Memory that comes and goes is told of, once each time, and never touched.
func TestWatchMemoryGoes(t *testing.T) {
	const gpa, size = 1 << 30, 16 * kvmaccess.PageSize
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	slot := tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m}
	setSlot(t, g, slot)

	key := newKey(t)
	zeros := make([]byte, kvmaccess.PageSize)
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Budget: 1 << 20, Key: key},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: gpa, Data: zeros},
		kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindEntry, GPA: gpa + 0x1000},
		kvmaccess.Item{Cookie: 3, Kind: kvmaccess.KindDigest, GPA: gpa + 0x2000, Digests: digests(t, *key, zeros)},
		kvmaccess.Item{Cookie: 4, Kind: kvmaccess.KindBytes, GPA: gpa + size, Data: zeros[:8]})
	all := func(state kvmaccess.ItemState, cookies ...uint64) {
		t.Helper()
		got := map[uint64]kvmaccess.ItemState{}
		for range cookies {
			e := nextEvent(t, w)
			got[e.Cookie] = e.State
			if e.Data != nil || e.Expected != nil {
				t.Errorf("bytes of what cannot be read: %+v", e)
			}
		}
		for _, cookie := range cookies {
			if got[cookie] != state {
				t.Fatalf("%v, want all %v", got, state)
			}
		}
	}
	// Nothing has been touched yet, and nothing is behind the end.
	first := map[uint64]kvmaccess.ItemState{}
	for range 4 {
		e := nextEvent(t, w)
		first[e.Cookie] = e.State
	}
	if first[1] != kvmaccess.StateNotResident || first[2] != first[1] || first[3] != first[1] || first[4] != kvmaccess.StateNoMemslot {
		t.Errorf("untouched memory: %v", first)
	}
	wantQuiet(t, w, watch, 10)
	if s := watchStats(t, watch); s.NotResident != 3 || s.NoMemslot != 1 {
		t.Errorf("%+v", s)
	}
	resident := func() int {
		t.Helper()
		in, err := m.Resident(0, size)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, r := range in {
			if r {
				n++
			}
		}
		return n
	}
	if n := resident(); n != 0 {
		t.Errorf("%d pages are resident now", n)
	}

	for range 3 {
		for page := range 3 {
			m.Bytes()[page*kvmaccess.PageSize] = 0
		}
		all(kvmaccess.StateExpected, 1, 2, 3)
		// What a balloon does.
		if err := m.Advise(0, size, unix.MADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		all(kvmaccess.StateNotResident, 1, 2, 3)
		wantQuiet(t, w, watch, 3)
		if n := resident(); n != 0 {
			t.Errorf("%d pages are resident now", n)
		}
	}

	// The slot goes, comes back, moves away, and back.
	for page := range 3 {
		m.Bytes()[page*kvmaccess.PageSize] = 0
	}
	all(kvmaccess.StateExpected, 1, 2, 3)
	for range 3 {
		setSlot(t, g, tinyvm.Slot{Number: 1})
		all(kvmaccess.StateNoMemslot, 1, 2, 3)
		setSlot(t, g, slot)
		all(kvmaccess.StateExpected, 1, 2, 3)
		moved := slot
		moved.GPA = 2 * gpa
		setSlot(t, g, moved)
		all(kvmaccess.StateNoMemslot, 1, 2, 3)
		setSlot(t, g, slot)
		all(kvmaccess.StateExpected, 1, 2, 3)
		time.Sleep(100 * time.Millisecond)
	}
	// Changes of others do not matter.
	for n := range 20 {
		setSlot(t, g, tinyvm.Slot{Number: 2, GPA: 3 * gpa, Size: kvmaccess.PageSize, Memory: m})
		setSlot(t, g, tinyvm.Slot{Number: 2})
		if n%5 == 0 {
			wantQuiet(t, w, watch, 1)
		}
	}
	m.Bytes()[5] = 1
	wantEvent(t, w, 1, kvmaccess.StateDifferent)
}

// The end of a VM is told at once, however long the period is.
func TestWatchDestroyedVM(t *testing.T) {
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	for _, kind := range []tinyvm.Kind{tinyvm.Spinning, tinyvm.Halting} {
		for _, period := range []time.Duration{time.Millisecond, kvmaccess.WatchMaxPeriod} {
			guests, err := k.StartGuests(kind, 1)
			if err != nil {
				t.Fatal(err)
			}
			vm := newestVM(t, c, selfPID)
			watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: period},
				kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: tinyvm.Code, Data: tinyvm.Spin(tinyvm.Long)[:1]},
				kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterDR0})
			time.Sleep(10 * time.Millisecond)
			start := time.Now()
			if err := guests[0].Close(); err != nil {
				t.Fatal(err)
			}
			e := nextEvent(t, w)
			for ; e.State != kvmaccess.StateEnded; e = nextEvent(t, w) {
			}
			if e.Watch != watch.ID || e.VM != vm.ID {
				t.Errorf("%+v", e)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("told after %v", took)
			}
			if s := watchStats(t, watch); s.Flags&kvmaccess.WatchEnded == 0 || s.Items != 0 {
				t.Errorf("%+v", s)
			}
			if _, err := watch.Add(t.Context(), kvmaccess.Item{Kind: kvmaccess.KindEntry}); !errors.Is(err, kvmaccess.ErrDying) {
				t.Errorf("an item of a VM that is gone: %v", err)
			}
			if _, err := watch.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
	}
	// A VMM that is killed.
	for _, kind := range []tinyvm.Kind{tinyvm.Spinning, tinyvm.Halting} {
		vmm, err := tinyvm.StartVMM(kind, 2)
		if err != nil {
			t.Fatal(err)
		}
		vms, err := c.VMs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, vm := range vms {
			if vm.PID == vmm.PID() {
				newWatch(t, w, vm, kvmaccess.WatchConfig{Period: time.Duration(1+n) * time.Millisecond},
					kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindEntry, GPA: tinyvm.Code, Mask: 1 << 63})
				n++
			}
		}
		time.Sleep(20 * time.Millisecond)
		if err := vmm.Kill(); err != nil {
			t.Fatal(err)
		}
		for ended := 0; ended < 2; {
			if nextEvent(t, w).State == kvmaccess.StateEnded {
				ended++
			}
		}
	}
}

const roleWatch = "watch"

// playWatch watches the VM that the environment names until it is killed.
func playWatch() error {
	var vm kvmaccess.VMID
	if _, err := fmt.Sscan(os.Getenv(watchVMEnv), &vm); err != nil {
		return err
	}
	w, err := kvmaccess.NewWatcher()
	if err != nil {
		return err
	}
	ctx := context.Background()
	for range 3 {
		watch, err := w.New(ctx, vm, kvmaccess.WatchConfig{Period: time.Millisecond})
		if err != nil {
			return err
		}
		_, err = watch.Add(ctx,
			kvmaccess.Item{Kind: kvmaccess.KindBytes, GPA: tinyvm.Code, Data: make([]byte, 8192)},
			kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR3})
		if err != nil {
			return err
		}
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

const watchVMEnv = "KVMACCESS_TEST_VM"

// Who watches is killed: his watches go with him, and others' stay.
func TestWatcherKilled(t *testing.T) {
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	put64(t, g, watchedEntry, 0)
	own := newWatch(t, w, vm, kvmaccess.WatchConfig{}, kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindEntry, GPA: watchedEntry})
	for round := range 5 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), roleEnv+"="+roleWatch, fmt.Sprintf("%s=%d", watchVMEnv, vm.ID))
		cmd.Stderr = os.Stderr
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		defer stdin.Close()
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
			t.Fatalf("%q, %v", line, err)
		}
		all, err := c.Watches(t.Context())
		if err != nil || len(all) != 4 {
			t.Fatalf("round %d: watches %+v, %v", round, all, err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		all, err = c.Watches(t.Context())
		if err != nil || len(all) != 1 || all[0].ID != own.ID {
			t.Fatalf("round %d: watches %+v, %v", round, all, err)
		}
	}
	put64(t, g, watchedEntry, 1)
	wantEvent(t, w, 1, kvmaccess.StateDifferent)
}

// Two watch one VM; neither can touch or hears of what is the other's.
func TestWatchersAreIndependent(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	put64(t, g, watchedEntry, 0)
	w1, w2 := newWatcher(t), newWatcher(t)
	item := kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindEntry, GPA: watchedEntry}
	watch1 := newWatch(t, w1, vm, kvmaccess.WatchConfig{}, item)
	item.Cookie = 2
	watch2 := newWatch(t, w2, vm, kvmaccess.WatchConfig{Period: 2 * watchPeriod}, item)
	for value := range uint64(3) {
		put64(t, g, watchedEntry, value+1)
		wantEvent(t, w1, 1, kvmaccess.StateDifferent)
		wantEvent(t, w2, 2, kvmaccess.StateDifferent)
	}
	m := dialModule(t)
	id := func(id kvmaccess.WatchID) func(*netlink.AttributeEncoder) {
		return func(e *netlink.AttributeEncoder) { e.Uint64(aWatchID, uint64(id)) }
	}
	if err := m.ask(t, cmdWatchDel, 0, id(watch1.ID)); !errors.Is(err, unix.ENOENT) {
		t.Errorf("another socket ended the watch: %v", err)
	}
	if err := m.ask(t, cmdWatchGet, 0, id(watch1.ID)); err != nil {
		t.Errorf("another socket asked for the account: %v", err)
	}
	if _, err := watch1.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	put64(t, g, watchedEntry, 0)
	wantEvent(t, w2, 2, kvmaccess.StateExpected)
	if _, err := watch2.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// What cannot be is refused with an explanation.
func TestWatchBadRequests(t *testing.T) {
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	_, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	for _, tt := range []struct {
		vm    kvmaccess.VMID
		c     kvmaccess.WatchConfig
		want  error
		words string
	}{
		{vm.ID, kvmaccess.WatchConfig{Period: kvmaccess.WatchMinPeriod - 1}, kvmaccess.ErrInvalid, "500 us"},
		{vm.ID, kvmaccess.WatchConfig{Period: kvmaccess.WatchMaxPeriod + 1}, kvmaccess.ErrInvalid, "500 us"},
		{vm.ID, kvmaccess.WatchConfig{}, kvmaccess.ErrInvalid, "500 us"},
		{vm.ID, kvmaccess.WatchConfig{Period: -time.Second}, kvmaccess.ErrInvalid, "500 us"},
		{vm.ID, kvmaccess.WatchConfig{Period: time.Second, Budget: kvmaccess.WatchMaxBudget + 1}, kvmaccess.ErrInvalid, "16 MiB"},
		{1 << 40, kvmaccess.WatchConfig{Period: time.Second}, kvmaccess.ErrNoVM, "no VM"},
	} {
		if _, err := w.New(t.Context(), tt.vm, tt.c); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.words) {
			t.Errorf("%+v: %v", tt.c, err)
		}
	}
	for _, period := range []time.Duration{kvmaccess.WatchMinPeriod, kvmaccess.WatchMaxPeriod} {
		if _, err := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: period}).Close(t.Context()); err != nil {
			t.Error(err)
		}
	}

	plain := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: time.Second})
	keyed := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: time.Second, Budget: kvmaccess.PageSize, Key: newKey(t)})
	page := make([]byte, kvmaccess.PageSize)
	for _, tt := range []struct {
		watch *kvmaccess.Watch
		item  kvmaccess.Item
		want  error
		words string
	}{
		{plain, kvmaccess.Item{Kind: kvmaccess.KindBytes, GPA: 1}, kvmaccess.ErrInvalid, "DATA"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindBytes, GPA: 1 << 52, Data: page[:1]}, kvmaccess.ErrInvalid, "end of the address space"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindBytes, GPA: 1<<64 - 1, Data: page[:1]}, kvmaccess.ErrInvalid, "end of the address space"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindEntry, GPA: 4}, kvmaccess.ErrInvalid, "multiple of 8"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindEntry, Value: 3, Mask: 1}, kvmaccess.ErrInvalid, "MASK"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindDigest, Digests: []uint64{1}}, kvmaccess.ErrInvalid, "KEY"},
		{keyed, kvmaccess.Item{Kind: kvmaccess.KindDigest, GPA: 8, Digests: []uint64{1}}, kvmaccess.ErrInvalid, "multiple of 4096"},
		{keyed, kvmaccess.Item{Kind: kvmaccess.KindDigest}, kvmaccess.ErrInvalid, "DATA"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindRegister}, kvmaccess.ErrInvalid, "no such register"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterPAT + 1}, kvmaccess.ErrInvalid, "no such register"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR0, VCPU: new(uint32(1))}, kvmaccess.ErrNoVCPU, "no vCPU"},
		{plain, kvmaccess.Item{Kind: kvmaccess.KindRegister + 1}, kvmaccess.ErrInvalid, "kind"},
	} {
		if _, err := tt.watch.Add(t.Context(), tt.item); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.words) {
			t.Errorf("%+v: %v", tt.item, err)
		}
	}
	// One bad item, and none is added.
	if _, err := plain.Add(t.Context(), kvmaccess.Item{Kind: kvmaccess.KindEntry}, kvmaccess.Item{Kind: kvmaccess.KindEntry, GPA: 1}); err == nil {
		t.Error("a GPA of 1 was taken")
	}
	if s := watchStats(t, plain); s.Items != 0 {
		t.Errorf("%+v", s)
	}
	// A watch that ends otherwise than by request.
	other, err := kvmaccess.NewWatcher()
	if err != nil {
		t.Fatal(err)
	}
	newWatch(t, other, vm, kvmaccess.WatchConfig{})
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if all, err := c.Watches(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
}

// Ten thousand items, and as many as there may be.
func TestWatchManyItems(t *testing.T) {
	const gpa, size, n = 1 << 30, 40 << 20, 10_000
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
	copy(m.Bytes(), pattern(9, size))
	var items []kvmaccess.Item
	for i := range uint64(n) {
		at := i * kvmaccess.PageSize
		item := kvmaccess.Item{Cookie: i, Kind: kvmaccess.KindBytes, GPA: gpa + at, Data: m.Bytes()[at : at+64]}
		if i%3 == 0 {
			item = kvmaccess.Item{Cookie: i, Kind: kvmaccess.KindEntry, GPA: gpa + at, Value: binary.LittleEndian.Uint64(m.Bytes()[at:])}
		}
		items = append(items, item)
	}
	for i := range items {
		items[i].Data = slices.Clone(items[i].Data)
	}
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: 20 * time.Millisecond}, items...)
	wantQuiet(t, w, watch, 3)
	s := watchStats(t, watch)
	t.Logf("%+v", s)
	if s.Items != n {
		t.Errorf("%d items, want %d", s.Items, n)
	}
	for _, i := range []uint64{0, 1, 4999, 9998, 9999} {
		m.Bytes()[i*kvmaccess.PageSize+5] ^= 1
		if e := wantEvent(t, w, i, kvmaccess.StateDifferent); e.GPA&^7 != gpa+i*kvmaccess.PageSize {
			t.Errorf("%+v", e)
		}
	}
	// All at once: what the rate does not allow for comes later, none is lost.
	want := map[uint64]bool{}
	for i := range uint64(2000) {
		m.Bytes()[(i+2)*kvmaccess.PageSize] ^= 1
		want[i+2] = true
	}
	start := time.Now()
	for len(want) > 0 {
		e := nextEvent(t, w)
		if !want[e.Cookie] || e.State != kvmaccess.StateDifferent {
			t.Fatalf("%+v", e)
		}
		delete(want, e.Cookie)
	}
	if took := time.Since(start); took < time.Second {
		t.Errorf("2000 events in %v, more than the rate allows for", took)
	}
	for i := range uint64(n) {
		items[i].Cookie = 77
	}
	s = addItems(t, watch, items[:kvmaccess.WatchMaxItems-n]...)
	if s.Items != kvmaccess.WatchMaxItems {
		t.Errorf("%+v", s)
	}
	if _, err := watch.Add(t.Context(), items[0]); !errors.Is(err, kvmaccess.ErrTooBig) {
		t.Errorf("one more than there may be: %v", err)
	}
	if s, err := watch.Remove(t.Context(), 77); err != nil || s.Items != n-1 {
		t.Errorf("%+v, %v", s, err) // item 77 went, too
	}
}

// An owner that does not read for a while is answered nonetheless, and then told
// of everything: what its buffer has no room for waits.
func TestWatchUnreadEvents(t *testing.T) {
	const items = 512
	c, k := newClient(t), openKVM(t)
	_, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	m := dialModule(t)
	if err := m.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := m.SetReadBuffer(64 << 10); err != nil {
		t.Fatal(err)
	}
	reply, _ := m.answer(t, cmdWatchNew, func(e *netlink.AttributeEncoder) {
		e.Uint64(aWatchVMID, uint64(vm.ID))
		e.Uint64(aWatchPeriod, uint64(kvmaccess.WatchMinPeriod))
	})
	d, err := netlink.NewAttributeDecoder(reply.Data)
	if err != nil {
		t.Fatal(err)
	}
	var watch uint64
	for d.Next() {
		if d.Type() == aWatchID {
			watch = d.Uint64()
		}
	}
	if err := d.Err(); err != nil || watch == 0 {
		t.Fatalf("watch %d, %v", watch, err)
	}
	named := func(e *netlink.AttributeEncoder) { e.Uint64(aWatchID, watch) }
	_, events := m.answer(t, cmdWatchAdd, func(e *netlink.AttributeEncoder) {
		named(e)
		for i := range uint64(items) {
			e.Nested(aWatchItem, func(e *netlink.AttributeEncoder) error {
				e.Uint64(aItemCookie, i)
				e.Uint32(aItemKind, kindEntry)
				e.Uint64(aItemGPA, tinyvm.Code+i/8*8)
				e.Uint64(aItemValue, 1<<63|i)
				return nil
			})
		}
	})
	for range 3 {
		time.Sleep(20 * time.Millisecond)
		_, more := m.answer(t, cmdWatchGet, named)
		events = append(events, more...)
	}
	// What was there before the last answer is but a part of all.
	if len(events) >= items {
		t.Errorf("%d events of %d had room", len(events), items)
	}
	told := map[uint64]bool{}
	for len(told) < items {
		for _, event := range events {
			d, err := netlink.NewAttributeDecoder(event.Data)
			if err != nil {
				t.Fatal(err)
			}
			for d.Next() {
				switch d.Type() {
				case aEventCookie:
					told[d.Uint64()] = true
				case aEventLost:
					if lost := d.Uint64(); lost > 0 {
						t.Fatalf("%d events lost", lost)
					}
				}
			}
			if err := d.Err(); err != nil {
				t.Fatal(err)
			}
		}
		if len(told) == items {
			break
		}
		if events, _, err = m.Receive(); err != nil {
			t.Fatalf("%d of %d items: %v", len(told), items, err)
		}
	}
}

// More than a period has time for: it is stretched, and says so; the host goes on.
func TestWatchStretched(t *testing.T) {
	const gpa, size = 1 << 30, 16 << 20
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	m := newMemory(t, size, tinyvm.Anonymous)
	t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
	setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
	copy(m.Bytes(), pattern(9, size))
	put64(t, g, watchedEntry, 0)
	item := kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: gpa, Data: slices.Clone(m.Bytes())}
	var watches []*kvmaccess.Watch
	for range 2 {
		watches = append(watches, newWatch(t, w, vm, kvmaccess.WatchConfig{Period: kvmaccess.WatchMinPeriod}, item))
	}
	small := newWatch(t, w, vm, kvmaccess.WatchConfig{}, kvmaccess.Item{Cookie: 2, Kind: kvmaccess.KindEntry, GPA: watchedEntry})
	before, err := c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	wantQuiet(t, w, watches[0], 20)
	took := time.Since(start)
	after, err := c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if share := float64(after.Worker-before.Worker) / float64(took); share > 0.75 {
		t.Errorf("the ticks take %.0f%% of a CPU", 100*share)
	}
	for _, watch := range watches {
		s := watchStats(t, watch)
		t.Logf("%+v", s)
		if mean := s.Time / time.Duration(s.Ticks); s.Effective < mean || s.Period != kvmaccess.WatchMinPeriod || s.Effective == s.Period {
			t.Errorf("effective period %v of ticks that take %v", s.Effective, mean)
		}
	}
	// Others have their turn in between.
	put64(t, g, watchedEntry, 1)
	wantEvent(t, w, 2, kvmaccess.StateDifferent)
	s := watchStats(t, small)
	t.Logf("%+v", s)
	// The last byte of all.
	m.Bytes()[size-1] ^= 1
	for range 2 {
		if e := wantEvent(t, w, 1, kvmaccess.StateDifferent); e.GPA != gpa+size-1 {
			t.Errorf("%+v", e)
		}
	}
	for _, watch := range watches {
		if _, err := watch.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	// A tick that the emulator was kept from counts for a while.
	eventually(t, time.Minute, func() error {
		if s := watchStats(t, small); s.Effective != s.Period {
			return fmt.Errorf("alone it is still stretched: %+v", s)
		}
		return nil
	})
}

// A guest that changes what is watched as fast as it can, and one who does not
// listen: events are few, and the last of them is right.
func TestWatchRestlessGuest(t *testing.T) {
	a := tinyvm.Assembler{Base: tinyvm.Code}
	a.Bytes(binary.LittleEndian.AppendUint32([]byte{0x48, 0xff, 0x04, 0x25}, watchedEntry)...) // inc qword [watchedEntry]
	a.Jmp(a.Base)
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: a.Code})
	put64(t, g, watchedEntry, 0)
	var items []kvmaccess.Item
	for i := range uint64(100) {
		items = append(items, kvmaccess.Item{Cookie: i, Kind: kvmaccess.KindBytes, GPA: watchedEntry, Data: make([]byte, 4096)})
	}
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: time.Millisecond}, items...)
	wantQuiet(t, w, watch, 3)
	started(t, g)
	start := time.Now()
	// Nobody receives meanwhile but the client's reader.
	time.Sleep(3 * time.Second)
	s := watchStats(t, watch)
	limit := uint64(512 + 1000*(time.Since(start)+time.Second)/time.Second)
	t.Logf("%+v", s)
	// On a machine that is so busy that few ticks took place there is nothing to coalesce.
	if s.Events > limit || s.Coalesced == 0 && 100*s.Ticks > 2*limit || s.Different != 100 {
		t.Errorf("%d events in %v, want %d at most: %+v", s.Events, time.Since(start), limit, s)
	}
	stopped(t, g)
	b, err := g.Bytes(watchedEntry, 8)
	if err != nil {
		t.Fatal(err)
	}
	last := map[uint64][]byte{}
	// Until nothing has come for long enough that all may have been told.
	for {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		e, err := w.Receive(ctx)
		cancel()
		if err != nil {
			break
		}
		last[e.Cookie] = e.Data
	}
	right := 0
	for _, data := range last {
		// Data begins at the first byte that differs.
		if len(data) > 8 && bytes.Contains(append(slices.Clone(b), make([]byte, 64)...), data[:8]) {
			right++
		}
	}
	if right != 100 {
		t.Errorf("%d of 100 items were told of as they are: %x", right, b)
	}
}

// The module goes while watches are set, and comes back without them.
func TestWatchUnload(t *testing.T) {
	k := openKVM(t)
	guests, err := k.StartGuests(tinyvm.Spinning, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := guests[0].Close(); err != nil {
			t.Error(err)
		}
	}()
	for range 5 {
		c := newClient(t)
		vm := newestVM(t, c, selfPID)
		w := newWatcher(t)
		var watch *kvmaccess.Watch
		for range 10 {
			watch = newWatch(t, w, vm, kvmaccess.WatchConfig{Period: kvmaccess.WatchMinPeriod},
				kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: tinyvm.Code, Data: make([]byte, 20000)},
				kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR0})
		}
		time.Sleep(20 * time.Millisecond)
		start := time.Now()
		if err := unloadModule(5 * time.Second); err != nil {
			t.Fatal(err)
		}
		t.Logf("unloaded in %v", time.Since(start))
		for ended := 0; ended < 10; {
			if nextEvent(t, w).State == kvmaccess.StateEnded {
				ended++
			}
		}
		if _, err := watch.Stats(t.Context()); err == nil {
			t.Error("a watch without the module")
		}
		if err := loadModule(); err != nil {
			t.Fatal(err)
		}
		if all, err := newClient(t).Watches(t.Context()); err != nil || len(all) != 0 {
			t.Errorf("%+v, %v", all, err)
		}
	}
}

// A guest with a kernel: nothing is said of one that is honest, however busy it
// is; a register that is turned is told of at once, on the vCPU where it is.
func TestWatchLinux(t *testing.T) {
	ctx, c, w := testContext(t), newClient(t), newWatcher(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	pages, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	vcpus, err := c.VCPUs(ctx, vm.ID)
	if err != nil {
		t.Fatal(err)
	}
	items := []kvmaccess.Item{{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: pages.GPA, Data: pages.Content()}}
	for _, v := range vcpus {
		for _, r := range integrity.WatchedRegisters() {
			it := r.Item(&v.Registers)
			it.Cookie, it.VCPU = 100*uint64(v.ID)+uint64(r.Register), new(v.ID)
			items = append(items, it)
		}
	}
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{Period: time.Millisecond}, items...)
	if err := g.Spin(ctx, 2); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Spin(context.Background(), 0); err != nil {
			t.Error(err)
		}
	})
	wantQuiet(t, w, watch, 300)
	s := watchStats(t, watch)
	t.Logf("%+v", s)
	if s.Captures == 0 {
		t.Error("a busy guest that never ran")
	}

	changes, err := g.Attack(ctx, "lstar_redirect", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", changes)
	told := map[uint32]bool{}
	for len(told) < len(vcpus) {
		e := nextEvent(t, w)
		if e.Register != kvmaccess.RegisterLSTAR || e.State != kvmaccess.StateDifferent {
			t.Fatalf("%+v", e)
		}
		told[e.VCPU] = true
	}
	if err := g.EndAttack(ctx, "lstar_redirect"); err != nil {
		t.Fatal(err)
	}
	for range vcpus {
		if e := nextEvent(t, w); e.Register != kvmaccess.RegisterLSTAR || e.State != kvmaccess.StateExpected {
			t.Fatalf("%+v", e)
		}
	}
}

// VMs come and go, memslots and vCPUs too, and watches with them: for 10 s, and
// until a VM has gone while its watch's owner was listening.
func TestWatchChurn(t *testing.T) {
	k := openKVM(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var made, watched, told, ended atomic.Int64
	late := time.Now().Add(patience * time.Minute)
	goesOn := func() bool {
		return ctx.Err() == nil || ended.Load() == 0 && !t.Failed() && time.Now().Before(late)
	}
	var wg sync.WaitGroup
	for n := range 3 {
		wg.Go(func() {
			for goesOn() {
				kind := []tinyvm.Kind{tinyvm.Spinning, tinyvm.Halting}[n%2]
				guests, err := k.StartGuests(kind, 1)
				if err != nil {
					t.Error(err)
					return
				}
				made.Add(1)
				time.Sleep(time.Duration(n) * 3 * time.Millisecond)
				if err := guests[0].Close(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	c := newClient(t)
	for range 2 {
		wg.Go(func() {
			for goesOn() {
				w, err := kvmaccess.NewWatcher()
				if err != nil {
					t.Error(err)
					return
				}
				vms, err := c.VMs(t.Context())
				if err != nil {
					t.Error(err)
				}
				for _, vm := range vms {
					watch, err := w.New(t.Context(), vm.ID, kvmaccess.WatchConfig{Period: kvmaccess.WatchMinPeriod})
					if err == nil {
						_, err = watch.Add(t.Context(),
							kvmaccess.Item{Kind: kvmaccess.KindBytes, GPA: tinyvm.Code, Data: make([]byte, 100_000)},
							kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterCR0})
					}
					if err != nil && !errors.Is(err, kvmaccess.ErrNoVM) && !errors.Is(err, kvmaccess.ErrDying) {
						t.Errorf("%v", err)
					}
					watched.Add(1)
				}
				wait, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
				for {
					e, err := w.Receive(wait)
					if err != nil {
						break
					}
					told.Add(1)
					if e.State == kvmaccess.StateEnded {
						ended.Add(1)
					}
				}
				stop()
				if err := w.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d VMs, %d watches, %d events, %d ends", made.Load(), watched.Load(), told.Load(), ended.Load())
	if made.Load() == 0 || watched.Load() == 0 || told.Load() == 0 || ended.Load() == 0 {
		t.Error("nothing was shown")
	}
	if all, err := c.Watches(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
}
