// SPDX-License-Identifier: MIT

package integrity

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// differing compares items with the guest, by the contract of the module
// (kmod/uapi/kvmaccess.h, "Watches"), and returns the events that it would send.
func (w *world) differing(list WatchList) []kvmaccess.WatchEvent {
	w.t.Helper()
	var events []kvmaccess.WatchEvent
	for _, it := range list.Items {
		mask := it.Mask
		if mask == 0 {
			mask = ^uint64(0)
		}
		e := kvmaccess.WatchEvent{State: kvmaccess.StateDifferent, Kind: it.Kind, GPA: it.GPA, Register: it.Register}
		switch it.Kind {
		case kvmaccess.KindRegister:
			for i := range w.CPUs {
				if it.VCPU != nil && *it.VCPU != w.CPUs[i].ID {
					continue
				}
				if value := w.CPUs[i].Get(it.Register); value&mask != it.Value {
					e.VCPU, e.Data = w.CPUs[i].ID, binary.LittleEndian.AppendUint64(nil, value)
					events = append(events, e)
				}
			}
		case kvmaccess.KindEntry:
			var p [8]byte
			if err := w.pages.ReadPhysical(context.Background(), it.GPA, p[:]); err != nil {
				w.t.Fatalf("%s: %v", it.What, err)
			}
			if it.GPA%8 != 0 || it.Value&^mask != 0 {
				w.t.Errorf("%s: the module refuses %+v", it.What, it.Item)
			}
			if binary.LittleEndian.Uint64(p[:])&mask != it.Value {
				e.Data = p[:]
				events = append(events, e)
			}
		case kvmaccess.KindBytes:
			p := make([]byte, len(it.Data))
			if err := w.pages.ReadPhysical(context.Background(), it.GPA, p); err != nil {
				w.t.Fatalf("%s: %v", it.What, err)
			}
			if it.GPA&4095+uint64(len(p)) > 4096 {
				w.t.Errorf("%s: the module refuses %d bytes at %#x", it.What, len(p), it.GPA)
			}
			for i := range p {
				if p[i] != it.Data[i] {
					e.GPA, e.Data = it.GPA+uint64(i), p[i:min(len(p), i+kvmaccess.WatchEventBytes)]
					events = append(events, e)
					break
				}
			}
		default:
			w.t.Fatalf("an item of kind %v", it.Kind)
		}
	}
	return events
}

func (w *world) items(m *Monitor) WatchList {
	w.t.Helper()
	list, err := m.WatchItems(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	return list
}

// Whatever a Monitor finds, an item differs that it gave before, and none of
// those that it gives then; and so it is when the attack ends.
func TestWatchItemsFollow(t *testing.T) {
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			w := debian(t)
			m := w.monitor(Options{Symbols: w.symbols, Ranges: entryRange, Settle: -1})
			w.quiet(m)
			before := w.items(m)
			if e := w.differing(before); len(e) != 0 {
				t.Fatalf("of a guest at rest: %+v", e)
			}
			undo := a.do(w)
			if e := w.differing(before); len(e) == 0 {
				t.Errorf("no item differs among %d", len(before.Items))
			}
			found := w.tick(m)
			if len(a.changed) > 0 && len(found) == 0 {
				t.Error("nothing is found")
			}
			if m.State() != StateWatching {
				return
			}
			now := w.items(m)
			if e := w.differing(now); len(e) != 0 {
				t.Errorf("after it was seen: %+v", e)
			}
			undo()
			if e := w.differing(now); len(e) == 0 {
				t.Errorf("no item differs at the end of the attack, among %d", len(now.Items))
			}
			w.tick(m)
			if diff := cmp.Diff(keysOf(before), keysOf(w.items(m))); diff != "" {
				t.Errorf("after the attack the items are others: -before +after\n%s", diff)
			}
		})
	}
}

func keysOf(list WatchList) []string {
	var all []string
	for i := range list.Items {
		all = append(all, fmt.Sprintf("%+v", list.Items[i].Key()))
	}
	slices.Sort(all)
	return all
}

// Items cover what a tick reads, in few pieces, however the guest is made.
func TestWatchItems(t *testing.T) {
	for _, tt := range []struct {
		name  string
		world func() *world
	}{
		{"Debian 12", func() *world { return recorded(t, "debian12") }},
		{"Debian 12, isolated, 5-level paging", func() *world { return debian(t) }},
		{"made, 3 vCPUs", func() *world { return made(t, true, 0x1fe00000, 3) }},
		{"made, 32-bit, 2 vCPUs", func() *world { return made(t, false, 0x400000, 2) }},
	} {
		for _, symbols := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, symbols %t", tt.name, symbols), func(t *testing.T) {
				w := tt.world()
				w.t = t
				opts := Options{Settle: -1}
				if symbols {
					opts.Symbols = w.symbols
				}
				m := w.monitor(opts)
				if list := w.items(m); len(list.Items) != 0 {
					t.Errorf("items before there is a baseline: %+v", list)
				}
				w.quiet(m)
				list := w.items(m)
				size, entries, registers := 0, 0, 0
				for i := range list.Items {
					it := &list.Items[i]
					size += len(it.Data)
					switch {
					case it.Kind == kvmaccess.KindEntry:
						entries++
						if !strings.HasPrefix(it.What, "page tables of ") || it.Mask&0x60 != 0 {
							t.Errorf("%s: %+v", it.What, it.Item)
						}
					case it.Place().Register():
						registers++
					}
				}
				if size != m.Status().Bytes {
					t.Errorf("%d bytes, a tick reads %d", size, m.Status().Bytes)
				}
				if n := len(watchedRegisters); registers < n || registers > n+8*(len(w.CPUs)-1) || entries < 2 || len(list.Items) > 128 {
					t.Errorf("%d items, %d of them registers and %d page-table entries", len(list.Items), registers, entries)
				}
				if list.Again != 0 || len(w.differing(list)) != 0 {
					t.Errorf("again in %v, %+v differ", list.Again, w.differing(list))
				}
				t.Logf("%d items: %d registers, %d page-table entries, %d bytes", len(list.Items), registers, entries, size)
			})
		}
	}
}

// What a program may have as it likes is told apart from the rest of a GDT.
func TestWatchItemsVolatile(t *testing.T) {
	w := made(t, true, 0, 1)
	m := w.monitor(Options{Symbols: w.symbols, Settle: -1})
	w.quiet(m)
	list := w.items(m)
	w.put(descriptor(0, 12)(w), 0x00cff3000000ffff) // TLS
	events := w.differing(list)
	if len(events) != 1 {
		t.Fatalf("%+v", events)
	}
	for i := range list.Items {
		if it := &list.Items[i]; it.What == "gdt of vCPU 0" && it.GPA <= events[0].GPA && events[0].GPA < it.GPA+uint64(len(it.Data)) && len(it.Data) != 40 {
			t.Errorf("it is %d bytes of the GDT", len(it.Data))
		}
	}
	w.quiet(m)
	if len(w.differing(w.items(m))) != 0 {
		t.Error("after a round it is still not as expected")
	}
}

// The way to what is watched is watched: a page that is put in its place.
func TestWatchItemsRemap(t *testing.T) {
	w := debian(t)
	m := w.monitor(Options{Symbols: w.symbols, Settle: -1})
	w.quiet(m)
	list := w.items(m)
	i := slices.IndexFunc(list.Items, func(it WatchItem) bool {
		return it.Kind == kvmaccess.KindEntry && it.What == "page tables of "+tableSyscalls
	})
	if i < 0 {
		t.Fatal("no page-table entry of the system call table")
	}
	var p [8]byte
	if err := w.pages.ReadPhysical(t.Context(), list.Items[i].GPA, p[:]); err != nil {
		t.Fatal(err)
	}
	entry := binary.LittleEndian.Uint64(p[:])
	write := func(v uint64) {
		w.pages.WritePhysical(list.Items[i].GPA, binary.LittleEndian.AppendUint64(nil, v))
	}
	write(entry ^ 0x60) // accessed and dirty
	if e := w.differing(list); len(e) != 0 {
		t.Errorf("accessed and dirty bits: %+v", e)
	}
	write(entry ^ 0x200000)
	if e := w.differing(list); len(e) != 1 || e[0].GPA != list.Items[i].GPA {
		t.Errorf("another page: %+v", e)
	}
}

// A vCPU that comes up is told by its registers, and looked at again soon.
func TestWatchItemsVCPU(t *testing.T) {
	w := made(t, true, 0, 3)
	up := w.CPUs[2]
	w.CPUs[2].CR0, w.CPUs[2].Condition = 0x60000010, kvmaccess.ConditionNew
	m := w.monitor(Options{Symbols: w.symbols, Settle: -1})
	w.quiet(m)
	list := w.items(m)
	if e := w.differing(list); len(e) != 0 {
		t.Errorf("before: %+v", e)
	}
	w.CPUs[2] = up
	if e := w.differing(list); len(e) == 0 || slices.ContainsFunc(e, func(e kvmaccess.WatchEvent) bool { return e.VCPU != 2 }) {
		t.Errorf("as it comes up: %+v", e)
	}
	w.tick(m)
	if list = w.items(m); list.Again == 0 || len(w.differing(list)) != 0 {
		t.Errorf("again %v, differing %+v", list.Again, w.differing(list))
	}
	w.quiet(m)
	if list = w.items(m); list.Again != 0 || len(w.differing(list)) != 0 {
		t.Errorf("when it has settled: again %v, differing %+v", list.Again, w.differing(list))
	}
	all := m.Accepted()
	if len(all) != 1 || all[0].Rule != "vCPU up" || !strings.Contains(all[0].What, "vCPU 2") {
		t.Errorf("accepted: %+v", all)
	}
}

// A change that is undone before the round is found by its event.
func TestSee(t *testing.T) {
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			w := debian(t)
			m := w.monitor(Options{Symbols: w.symbols, Ranges: entryRange, Settle: -1})
			w.quiet(m)
			list := w.items(m)
			undo := a.do(w)
			events := w.differing(list)
			undo()
			w.quiet(m)
			var found []Finding
			seen := false
			for _, e := range events {
				f, err := m.See(t.Context(), e)
				if err != nil {
					t.Fatal(err)
				}
				found = append(found, f...)
				seen = seen || e.Kind != kvmaccess.KindEntry
			}
			// What lies elsewhere for a moment, and where a guest restarts, is
			// beyond what an event tells.
			if seen && len(a.changed) > 0 && len(found) == 0 && !strings.Contains(strings.Join(a.changed, ""), "restarted") {
				t.Errorf("nothing was seen of %d events; a round finds %q", len(events), a.changed)
			}
			for _, f := range found {
				if f.Kind == KindCleared {
					t.Errorf("seen: %s", f.Message)
				}
			}
			cleared := w.tick(m)
			if m.State() == StateWatching && m.Status().Open != 0 {
				t.Errorf("still open after a round: %q", texts(m.Findings()))
			}
			if len(found) > 0 && m.State() == StateWatching && len(cleared) == 0 {
				t.Errorf("not cleared: %q", texts(found))
			}
			w.quiet(m)
		})
	}
}

// What events are of is told first, and with the round that follows it is what a
// round alone tells.
func TestReread(t *testing.T) {
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			w := debian(t)
			opts := Options{Symbols: w.symbols, Ranges: entryRange, Settle: -1}
			m, alone := w.monitor(opts), w.monitor(opts)
			w.quiet(m)
			w.quiet(alone)
			round := func() {
				t.Helper()
				events := w.differing(w.items(m))
				memory := len(events) > 0 && !slices.ContainsFunc(events, func(e kvmaccess.WatchEvent) bool { return e.Kind != kvmaccess.KindBytes })
				first, _, err := m.Reread(t.Context(), events)
				if err != nil {
					t.Fatal(err)
				}
				rest, whole := w.tick(m), w.tick(alone)
				if memory && len(rest) > 0 {
					t.Errorf("left to the round by %+v: %q", events, texts(rest))
				}
				if diff := cmp.Diff(sorted(texts(whole)), sorted(texts(append(first, rest...)))); diff != "" {
					t.Errorf("-round alone +by events first\n%s", diff)
				}
				if again, told, err := m.Reread(t.Context(), events); len(again) > 0 || len(told) > 0 || err != nil {
					t.Errorf("twice: %q, %v", texts(again), err)
				}
				if diff := cmp.Diff(alone.Baseline(), m.Baseline(), cmpopts.IgnoreTypes(time.Time{})); diff != "" {
					t.Errorf("baseline -round alone +by events first\n%s", diff)
				}
			}
			undo := a.do(w)
			round()
			undo()
			round()
		})
	}
}

// Where registers are others, or the guest does not run its kernel, memory alone
// tells nothing: it may be a restart.
func TestRereadLeavesRestarts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(v *kvmaccess.VCPU)
	}{
		{"reset", func(v *kvmaccess.VCPU) { v.CR0 &^= guest.CR0PE | guest.CR0PG }},
		{"another entry", func(v *kvmaccess.VCPU) { v.LSTAR += 0x1000000 }},
		{"another table", func(v *kvmaccess.VCPU) { v.IDTR.Base += 0x1000 }},
		{"nested", func(v *kvmaccess.VCPU) { v.Flags |= kvmaccess.VCPUNested }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := debian(t)
			m := w.monitor(Options{Symbols: w.symbols, Settle: -1})
			w.quiet(m)
			list := w.items(m)
			at, was := w.at("sys_call_table")+8*59, w.CPUs[0]
			old := w.put(at, w.at("sys_call_table"))
			events := slices.DeleteFunc(w.differing(list), func(e kvmaccess.WatchEvent) bool { return e.Kind != kvmaccess.KindBytes })
			tt.change(&w.CPUs[0])
			if found, told, err := m.Reread(t.Context(), events); len(events) == 0 || len(found) > 0 || len(told) > 0 || err != nil {
				t.Errorf("of %d events: %q, %v", len(events), texts(found), err)
			}
			w.CPUs[0] = was
			if found, told, err := m.Reread(t.Context(), events); len(found) != 1 || len(told) == 0 || !told[0] || err != nil {
				t.Errorf("with the registers as they were: %q, %v", texts(found), err)
			}
			w.put(at, old)
			if found, _, err := m.Reread(t.Context(), events); len(found) != 1 || found[0].Kind != KindCleared || err != nil {
				t.Errorf("as before: %q, %v", texts(found), err)
			}
			w.quiet(m)
		})
	}
}

// wholeCheck is a Check of which all items are made anew at each change.
type wholeCheck struct{ Check }

func (c wholeCheck) Objects(g *Guest) []Object {
	all := c.Check.Objects(g)
	for i := range all {
		all[i].Changed = nil
	}
	return all
}

// To make the items of what changed is to make all items.
func TestChanged(t *testing.T) {
	w := debian(t)
	opts := Options{Symbols: w.symbols, Ranges: entryRange, Settle: -1}
	m := w.monitor(opts)
	for _, c := range Checks() {
		opts.Checks = append(opts.Checks, wholeCheck{c})
	}
	whole := w.monitor(opts)
	w.quiet(m)
	w.quiet(whole)
	const size = 8
	idt, table := w.CPUs[0].IDTR.Base, w.at("sys_call_table")
	length := uint64(0)
	for i, o := range m.objects {
		if o.Name == tableSyscalls {
			length = uint64(len(m.data[m.objects[i].index]))
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	place := func() uint64 {
		if random.IntN(3) == 0 {
			return idt + size*random.Uint64N(512)
		}
		if random.IntN(4) == 0 {
			return table + length - size*(1+random.Uint64N(4)) // entries come and go
		}
		return table + size*random.Uint64N(length/size)
	}
	old := map[uint64]uint64{}
	total := 0
	for range 400 {
		for range 1 + random.IntN(3) {
			at := place()
			value := w.put(at, 0)
			if _, ok := old[at]; !ok {
				old[at] = value
			}
			switch random.IntN(5) {
			case 0: // stays so
			case 1:
				w.put(at, random.Uint64())
			case 2:
				w.put(at, value^1<<random.IntN(64))
			case 3:
				w.put(at, w.at("__x64_sys_kill"))
			case 4:
				w.put(at, old[at])
			}
		}
		if random.IntN(20) == 0 {
			for at, value := range old {
				w.put(at, value)
			}
		}
		found, err1 := m.Tick(t.Context())
		all, err2 := whole.Tick(t.Context())
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		total += len(found)
		if diff := cmp.Diff(sorted(texts(all)), sorted(texts(found))); diff != "" {
			t.Fatalf("-of all items +of what changed\n%s", diff)
		}
		if diff := cmp.Diff(whole.Baseline(), m.Baseline(), cmpopts.IgnoreFields(Baseline{}, "Taken")); diff != "" {
			t.Fatalf("baseline -of all items +of what changed\n%s", diff)
		}
		w.clock = w.clock.Add(time.Millisecond)
	}
	if total < 400 {
		t.Errorf("%d findings", total)
	}
}

// A Baseline that was returned stays as it is, and says whether its items are
// those of the next one.
func TestBaselineItems(t *testing.T) {
	w := debian(t)
	m := w.monitor(Options{Symbols: w.symbols, Settle: -1})
	w.quiet(m)
	before := m.Baseline()
	old := w.put(w.at("sys_call_table")+8*59, 0x1234)
	if found := w.tick(m); len(found) != 1 {
		t.Fatalf("%q", texts(found))
	}
	during := m.Baseline()
	if !during.SameItems(&before) || len(before.Open) != 0 || len(during.Open) != 1 {
		t.Errorf("same %t, open %d, then %d", during.SameItems(&before), len(before.Open), len(during.Open))
	}
	w.put(w.at("sys_call_table")+8*59, old)
	w.CPUs[0].CR4 |= guest.CR4CET // a guard is added
	w.tick(m)
	after := m.Baseline()
	if after.SameItems(&before) || len(after.Open) != 0 {
		t.Errorf("after a guard was added: same %t, open %d", after.SameItems(&before), len(after.Open))
	}
	if diff := cmp.Diff(before.Items, during.Items); diff != "" {
		t.Errorf("-before +during\n%s", diff)
	}
}

// memoryScratch is a Scratch in memory.
type memoryScratch struct{ data []byte }

func (s *memoryScratch) ReadAt(p []byte, at int64) (int, error) {
	if at >= int64(len(s.data)) {
		return 0, io.EOF
	}
	n := copy(p, s.data[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (s *memoryScratch) WriteAt(p []byte, at int64) (int, error) {
	if grow := at + int64(len(p)) - int64(len(s.data)); grow > 0 {
		s.data = append(s.data, make([]byte, grow)...)
	}
	return copy(s.data[at:], p), nil
}

func (s *memoryScratch) Truncate(n int64) error {
	s.data = s.data[:n]
	return nil
}

func TestNoText(t *testing.T) {
	w := debian(t)
	m := w.monitor(Options{Symbols: w.symbols, Settle: -1, Scratch: &memoryScratch{}})
	d := kvmaccess.NewDigester(kvmaccess.WatchKey{1})
	if look, err := m.StartText(t.Context(), d); look != nil || err != nil {
		t.Errorf("before there is a baseline: %v, %v", look, err)
	}
	w.quiet(m)
	if _, err := m.StartText(t.Context(), d); !errors.Is(err, ErrNoText) {
		t.Errorf("with symbols of a file: %v, want %v", err, ErrNoText)
	}
	if list := m.WatchText(); len(list.Items) != 0 {
		t.Errorf("%+v", list)
	}
}

// codeWorld is a kernel of whose code some pages are there.
func codeWorld(t *testing.T) (*world, *Code, *guest.Kernel) {
	w := made(t, true, 0, 1)
	mode := guest.ModeOf(&w.CPUs[0].Registers)
	k := &guest.Kernel{Space: &guest.Space{Memory: w.pages, Mode: mode, Root: w.root()}, Image: w.image}
	start := w.at("_stext") &^ 4095
	k.Text = guest.Extent{Start: start, End: start + 64<<12}
	for gva := start; gva < k.Text.End; gva += 4096 {
		tr, err := guest.Translate(t.Context(), w.pages, mode, k.Space.Root, gva)
		if err != nil {
			t.Fatal(err)
		}
		w.pages.WritePhysical(tr.GPA, bytes.Repeat([]byte{byte(gva >> 12), 0x90}, 2048))
	}
	c := &Code{key: "this kernel", areas: []area{{"text", k.Text}}, size: k.Text.Size()}
	return w, c, k
}

// The copy is of one kernel, and pages that change are told by their digests.
func TestCodeLook(t *testing.T) {
	w, c, k := codeWorld(t)
	s, d := &memoryScratch{}, kvmaccess.NewDigester(kvmaccess.WatchKey{7})
	look := func(want ...uint64) {
		t.Helper()
		changed, err := c.look(t.Context(), k, s, d)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, changed); diff != "" {
			t.Errorf("changed pages: -want +got\n%s", diff)
		}
	}
	if c.isTaken(s) {
		t.Error("an empty copy is taken for one")
	}
	look()
	if !c.isTaken(s) {
		t.Error("the copy is not known again")
	}
	if other := (&Code{key: "that kernel", size: c.size}); other.isTaken(s) {
		t.Error("the copy is taken for that of another kernel")
	}
	before := slices.Clone(c.pages)
	at := k.Text.Start + 0x3010
	old := w.put(at, 0x1122334455667788)
	look(k.Text.Start + 0x3000)
	for i := range c.pages {
		if (c.pages[i].digest != before[i].digest) != (i == 3) {
			t.Errorf("page %d has digest %#x, before %#x", i, c.pages[i].digest, before[i].digest)
		}
	}
	w.put(at, old)
	look()
	s.data = s.data[:len(s.data)-1]
	if c.isTaken(s) {
		t.Error("a copy that ends too soon is taken for one")
	}
}

// What no table explains is found, told again by nobody, and in order again
// when it is; a Monitor that comes later has the same copy.
func TestText(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 2))
	s, d := &memoryScratch{}, kvmaccess.NewDigester(kvmaccess.WatchKey{3})
	// BTF of one type, which no table of the kernel is of.
	raw := []byte{0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 16, 0, 0, 0, 5, 0, 0, 0}
	raw = append(raw, 1, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, 32, 0, 0, 0)
	raw = append(raw, "\x00int\x00"...)
	types, err := guest.ParseTypes(raw, nil)
	if err != nil {
		t.Fatal(err)
	}
	attach := func(b *Baseline) *Monitor {
		m := w.monitor(Options{Settle: -1, Scratch: s, Baseline: b})
		w.quiet(m)
		w.watching(m)
		m.g.Kernel.Types = types
		return m
	}
	look := func(m *Monitor) []string {
		t.Helper()
		l, err := m.StartText(t.Context(), d)
		if err != nil || l == nil {
			t.Fatalf("%v, %v", l, err)
		}
		if err := l.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		found, err := m.FinishText(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		w.quiet(m)
		return texts(found)
	}
	m := attach(nil)
	want := func(m *Monitor, want ...string) {
		t.Helper()
		if diff := cmp.Diff(append([]string{}, want...), look(m)); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
	}
	want(m)
	before := m.WatchText()
	digests := 0
	for _, it := range before.Items {
		digests += len(it.Digests)
	}
	if uint64(digests)*kvmaccess.PageSize != m.g.Code.Bytes() || len(before.Items) == digests || len(m.Accepted()) != 0 {
		t.Errorf("%d digests of %d bytes in %d items", digests, m.g.Code.Bytes(), len(before.Items))
	}
	at := w.at("__x64_sys_kill_other") + 8
	old := w.put(at, 0xc3c3c3c3c3c3c3c3)
	message := fmt.Sprintf("changed: kernel code of guest web1 is now overwritten (at %#x __x64_sys_kill_other+0x8 is c3 c3 c3 c3 c3 c3 c3 c3, was 90 90 90 90 90 90 90 90, which no table of the kernel explains), was as it was", at)
	want(m, message)
	want(m)
	if diff := cmp.Diff(keysOf(before), keysOf(m.WatchText())); diff == "" {
		t.Error("the module is to expect what was there before")
	}

	b := m.Baseline()
	m = attach(&b)
	want(m)
	w.put(at, old)
	want(m, "cleared: kernel code of guest web1 is as it was again")
	if diff := cmp.Diff(keysOf(before), keysOf(m.WatchText())); diff != "" {
		t.Errorf("digests: -before +after\n%s", diff)
	}

	// What changes while nobody looks is found, too.
	b = m.Baseline()
	w.put(at, 0xc3c3c3c3c3c3c3c3)
	m = attach(&b)
	want(m, message)
	w.put(at, old)
	want(m, "cleared: kernel code of guest web1 is as it was again")

	// A kernel that runs no more says nothing.
	l, err := m.StartText(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	w.put(at, 1)
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.CPUs[0].CR0 = 0x60000010
	if found, err := m.FinishText(t.Context(), l); len(found) != 0 || err != nil {
		t.Errorf("of a guest that restarts: %q, %v", texts(found), err)
	}
}

// BenchmarkWatchItems has nothing change, as most rounds have.
func BenchmarkWatchItems(b *testing.B) {
	w := recorded(b, "debian12")
	m := w.monitor(Options{Symbols: w.symbols, Settle: -1})
	if _, err := m.Tick(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		list, err := m.WatchItems(b.Context())
		if err != nil || len(list.Items) == 0 {
			b.Fatal(len(list.Items), err)
		}
		for i := range list.Items {
			list.Items[i].Key()
		}
	}
}
