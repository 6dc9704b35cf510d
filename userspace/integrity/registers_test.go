// SPDX-License-Identifier: MIT

package integrity

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// losses are ways in which a guest's memory cannot be read any more; back undoes
// one.
var losses = []struct {
	name string
	lose func(w *world, f *faulty) (back func())
}{
	{"encrypted", func(_ *world, f *faulty) func() {
		f.physical, f.rangeErr = kvmaccess.ErrProtected, kvmaccess.ErrProtected
		return func() { f.physical, f.rangeErr = nil, nil }
	}},
	{"not in the host's memory", func(_ *world, f *faulty) func() {
		f.physical, f.rangeErr = kvmaccess.ErrNotResident, kvmaccess.ErrNotResident
		return func() { f.physical, f.rangeErr = nil, nil }
	}},
	{"in no memslot", func(w *world, _ *faulty) func() {
		return w.lose(func(page []byte) bool { return false })
	}},
	{"all zero", func(w *world, _ *faulty) func() {
		return w.lose(func(page []byte) bool {
			clear(page)
			return true
		})
	}},
	{"ciphertext", func(w *world, _ *faulty) func() {
		return w.lose(func(page []byte) bool {
			for i := range page {
				page[i] ^= byte(i)*13 + 0x5a
			}
			return true
		})
	}},
}

// lose changes all memory; pages that change does not keep are there no more.
func (w *world) lose(change func(page []byte) (keep bool)) (back func()) {
	old := guest.Pages{}
	for gpa, p := range w.pages {
		c := *p
		old[gpa] = &c
		if !change(p[:]) {
			delete(w.pages, gpa)
		}
	}
	return func() {
		clear(w.pages)
		for gpa, p := range old {
			w.pages[gpa] = p
		}
	}
}

// rest lets time pass without a tick.
func (w *world) rest(d time.Duration) { w.clock = w.clock.Add(d) }

func (w *world) state(m *Monitor, want State, says ...string) {
	w.t.Helper()
	s := m.Status()
	for _, word := range says {
		if !strings.Contains(s.Reason, word) {
			w.t.Errorf("%s: no %q in %q", s.State, word, s.Reason)
		}
	}
	if s.State != want || m.State() != want {
		w.t.Fatalf("state %s, want %s: %+v", m.State(), want, s)
	}
}

// readAgain ticks until memory has been looked at that can be read again.
func (w *world) readAgain(m *Monitor) []Finding {
	w.t.Helper()
	m.Accepted()
	w.rest(lastProbe)
	found := w.tick(m)
	w.state(m, StateWaiting, "can be read again")
	found = append(found, w.tick(m)...)
	w.state(m, StateWatching)
	all := m.Accepted()
	if len(all) != 1 || all[0].Rule != "memory readable" {
		w.t.Errorf("accepted: %+v", all)
	}
	return found
}

// registersAttacked are attacks that registers alone tell of, on the last vCPU.
var registersAttacked = []struct {
	name string
	do   func(v *kvmaccess.VCPU)
	want []string // keys
}{
	{"LSTAR", func(v *kvmaccess.VCPU) { v.LSTAR += 0x40 }, []string{"changed msr/lstar@1/LSTAR"}},
	{"STAR", func(v *kvmaccess.VCPU) { v.STAR ^= 1 << 48 }, []string{"changed msr/star@1/STAR"}},
	{"SFMASK", func(v *kvmaccess.VCPU) { v.SFMASK = 0 }, []string{"changed msr/sfmask@1/SFMASK"}},
	{"IDTR", func(v *kvmaccess.VCPU) { v.IDTR.Base += 0x200000 }, []string{"changed idt/idtr@1/IDTR"}},
	{"GDTR", func(v *kvmaccess.VCPU) { v.GDTR.Base += 0x200000 }, []string{"changed gdt/gdtr@1/GDTR"}},
	{"TR", func(v *kvmaccess.VCPU) { v.TR.Selector = 0x50 }, []string{"changed gdt/tr@1/TR"}},
	{"CR0", func(v *kvmaccess.VCPU) { v.CR0 &^= guest.CR0WP }, []string{"changed control/cr0@1/CR0.WP"}},
	{"CR4", func(v *kvmaccess.VCPU) { v.CR4 &^= guest.CR4SMEP | guest.CR4SMAP }, []string{"changed control/cr4@1/CR4.SMAP", "changed control/cr4@1/CR4.SMEP"}},
	{"EFER", func(v *kvmaccess.VCPU) { v.EFER &^= guest.EFERNXE }, []string{"changed control/efer@1/EFER.NXE"}},
}

func cleared(keys []string) []string {
	var out []string
	for _, k := range keys {
		out = append(out, strings.Replace(k, "changed", "cleared", 1))
	}
	return out
}

// TestRegistersOnly: a guest whose memory cannot be read has its registers
// watched, from the start, by ticks and by the module, until it can.
func TestRegistersOnly(t *testing.T) {
	for _, loss := range losses {
		t.Run(loss.name, func(t *testing.T) {
			w := made(t, true, 0x1000000, 2)
			f := &faulty{world: w}
			back := loss.lose(w, f)
			m := w.monitorOf(f, Options{Symbols: w.symbols, Settle: time.Minute})
			w.quiet(m)
			w.state(m, StateWaiting, "cannot be read", "stayed the same for 1m")
			w.rest(30 * time.Second)
			w.CPUs[0].CR4 |= guest.CR4UMIP // as it boots
			w.CPUs[1].CR4 |= guest.CR4UMIP
			w.quiet(m)
			w.rest(59 * time.Second)
			w.quiet(m)
			w.state(m, StateWaiting, "cannot be read")
			w.rest(time.Second)
			w.quiet(m)
			w.state(m, StateRegisters, "cannot be read", "memory is not looked at, only registers are")
			if s := m.Status(); s.VCPUs != 2 || s.Bytes != 0 || len(s.Problems) != 0 || s.Symbols != 0 || s.Kernel != nil {
				t.Errorf("%+v", s)
			}
			for _, a := range registersAttacked {
				before := w.items(m)
				if len(before.Items) < len(watchedRegisters) || before.Again <= 0 || len(w.differing(before)) != 0 ||
					slices.ContainsFunc(before.Items, func(it WatchItem) bool { return it.Kind != kvmaccess.KindRegister }) {
					t.Errorf("%s: to be watched: %+v", a.name, before)
				}
				old := w.CPUs[1]
				a.do(&w.CPUs[1])
				if e := w.differing(before); len(e) == 0 || slices.ContainsFunc(e, func(e kvmaccess.WatchEvent) bool { return e.VCPU != 1 }) {
					t.Errorf("%s: events %+v", a.name, e)
				}
				if diff := cmp.Diff(a.want, keys(w.tick(m))); diff != "" {
					t.Errorf("%s: -want +got\n%s", a.name, diff)
				}
				w.quiet(m)
				now := w.items(m)
				if len(w.differing(now)) != 0 {
					t.Errorf("%s: after it was seen %+v differ", a.name, w.differing(now))
				}
				w.CPUs[1] = old
				if diff := cmp.Diff(cleared(a.want), keys(w.tick(m))); diff != "" {
					t.Errorf("%s: -want +got\n%s", a.name, diff)
				}
				w.state(m, StateRegisters)
				// For a moment, that no tick sees.
				a.do(&w.CPUs[1])
				events := w.differing(before)
				w.CPUs[1] = old
				var seen []Finding
				for _, e := range events {
					found, err := m.See(t.Context(), e)
					if err != nil {
						t.Fatal(err)
					}
					seen = append(seen, found...)
				}
				if diff := cmp.Diff(a.want, keys(seen)); diff != "" {
					t.Errorf("%s: by its event: -want +got\n%s", a.name, diff)
				}
				w.tick(m)
				if open := m.Findings(); len(open) != 0 {
					t.Errorf("%s: left over %q", a.name, texts(open))
				}
			}
			back()
			if found := w.readAgain(m); len(found) != 0 {
				t.Errorf("%q", texts(found))
			}
			if s := m.Status(); s.Reason != "" || s.Bytes == 0 || s.Symbols == 0 {
				t.Errorf("%+v", s)
			}
			w.put(w.at("sys_call_table"), 0xffffffffc0123450)
			if diff := cmp.Diff([]string{"changed syscalls/sys_call_table/0"}, keys(w.tick(m))); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}

// TestMemoryLost: memory that goes while the guest is watched leaves the
// registers, compared with what they were, and what was found in it.
func TestMemoryLost(t *testing.T) {
	for _, symbols := range []bool{true, false} {
		w := made(t, true, 0x1000000, 2)
		opts := Options{Settle: time.Hour}
		if symbols {
			opts.Symbols = w.symbols
		}
		m := w.monitor(opts)
		w.quiet(m)
		w.watching(m)
		old := w.put(w.CPUs[0].IDTR.Base+14*16, 0xc0128e0000103450)
		if found := w.tick(m); len(found) != 1 {
			t.Errorf("%q", texts(found))
		}
		back := w.lose(func([]byte) bool { return false })
		w.quiet(m)
		w.state(m, StateWaiting)
		w.rest(settleTables)
		w.quiet(m)
		w.state(m, StateRegisters)
		if s := m.Status(); s.Open != 1 {
			t.Errorf("%+v", s)
		}
		w.CPUs[1].LSTAR += 0x40
		w.CPUs[0].CR0 &^= guest.CR0WP
		want := []string{
			fmt.Sprintf("changed: LSTAR of vCPU 1 of guest web1 now points to %#x, was %#x%s", w.CPUs[1].LSTAR, w.CPUs[0].LSTAR, map[bool]string{true: " entry_SYSCALL_64"}[symbols]),
			"changed: CR0.WP of vCPU 0 of guest web1 is now clear (the kernel can write its read-only memory), was set",
		}
		if diff := cmp.Diff(want, texts(w.tick(m))); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
		// The daemon starts anew meanwhile.
		b, err := json.Marshal(m.Baseline())
		if err != nil {
			t.Fatal(err)
		}
		opts.Baseline = &Baseline{}
		if err := json.Unmarshal(b, opts.Baseline); err != nil {
			t.Fatal(err)
		}
		m = w.monitor(opts)
		w.CPUs[0].CR0 |= guest.CR0WP
		w.rest(time.Second)
		w.quiet(m)
		w.rest(settleTables)
		found := w.tick(m)
		w.state(m, StateRegisters)
		if diff := cmp.Diff([]string{"cleared control/cr0@0/CR0.WP"}, keys(found)); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
		back()
		w.put(w.CPUs[0].IDTR.Base+14*16, old)
		w.CPUs[1].LSTAR -= 0x40
		if diff := cmp.Diff([]string{"cleared idt/idt/14", "cleared msr/lstar@1/LSTAR"}, keys(w.readAgain(m))); diff != "" {
			t.Errorf("-want +got\n%s", diff)
		}
		w.quiet(m)
		// Another time, with registers that have not changed for long.
		back = w.lose(func([]byte) bool { return false })
		w.quiet(m)
		w.rest(settleTables)
		w.quiet(m)
		w.state(m, StateRegisters)
		back()
		if found := w.readAgain(m); len(found) != 0 {
			t.Errorf("%q", texts(found))
		}
	}
}

// blindWorld is a guest of which only registers can be watched, and are.
func blindWorld(t *testing.T, opts Options) (*world, *faulty, *Monitor) {
	w := made(t, true, 0x1000000, 2)
	f := &faulty{world: w, physical: kvmaccess.ErrProtected, rangeErr: kvmaccess.ErrProtected}
	opts.Settle = 10 * time.Second
	m := w.monitorOf(f, opts)
	w.quiet(m)
	w.rest(10 * time.Second)
	w.quiet(m)
	w.state(m, StateRegisters)
	return w, f, m
}

// TestRegistersRestart: a restart that was seen is told as one, and nothing
// else; ways into the kernel that move without one are an attack.
func TestRegistersRestart(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(w *world)
		quick  bool // no tick sees the guest not running
		want   []string
		says   string
	}{
		{name: "moved", change: func(w *world) { w.reboot(0x2400000) }, want: []string{"restarted guest/kernel"}, says: "0x1400000 bytes higher"},
		{name: "at the same place", change: func(w *world) {
			for i := range w.CPUs {
				w.CPUs[i].SysenterESP += 0x3000
				w.CPUs[i].GDTR.Base += 0x3000
			}
		}, want: []string{"restarted guest/kernel"}, says: "no elsewhere"},
		{name: "another kernel", change: func(w *world) {
			for i := range w.CPUs {
				w.CPUs[i].LSTAR += 0x123400
				w.CPUs[i].CSTAR += 0x124400
			}
		}, want: []string{"restarted guest/kernel"}, says: "another kernel"},
		{name: "both ways moved, no restart", quick: true, change: func(w *world) { w.CPUs[0].LSTAR += 0x200000; w.CPUs[0].CSTAR += 0x200000 },
			want: []string{"changed msr/cstar@0/CSTAR", "changed msr/lstar@0/LSTAR"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, _, m := blindWorld(t, Options{})
			if !tt.quick {
				up := slices.Clone(w.CPUs)
				w.CPUs[0].CR0 = 0x60000010
				w.quiet(m)
				w.state(m, StateWaiting, "real mode")
				copy(w.CPUs, up)
			}
			tt.change(w)
			found := w.tick(m)
			w.rest(10 * time.Second)
			found = append(found, w.tick(m)...)
			w.state(m, StateRegisters)
			if diff := cmp.Diff(tt.want, keys(found)); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
			if len(found) > 0 && !strings.Contains(found[0].Message, tt.says) {
				t.Errorf("%q", texts(found))
			}
			w.quiet(m)
			w.CPUs[1].LSTAR ^= 0x40
			if diff := cmp.Diff([]string{"changed msr/lstar@1/LSTAR"}, keys(w.tick(m))); diff != "" {
				t.Errorf("afterwards: -want +got\n%s", diff)
			}
		})
	}
}

// TestRegistersThenMoved: the guest was restarted unseen, and its memory can be
// read then.
func TestRegistersThenMoved(t *testing.T) {
	w, f, m := blindWorld(t, Options{})
	m = w.monitorOf(f, Options{Symbols: w.symbols, Baseline: ref(m.Baseline())})
	w.reboot(0x2400000)
	f.physical, f.rangeErr = nil, nil
	if diff := cmp.Diff([]string{"restarted guest/kernel"}, keys(w.tick(m))); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	w.quiet(m)
	w.watching(m)
}

// TestRegistersFaults: of Linux it is known what some registers should be, with
// no baseline and no memory.
func TestRegistersFaults(t *testing.T) {
	for _, long := range []bool{true, false} {
		w := made(t, long, 0, 2)
		w.lose(func([]byte) bool { return false })
		want := []string{"invariant control/cr0@1/CR0.WP", "invariant control/cr4@1/CR4.SMEP", "invariant gdt/gdtr@0/GDTR"}
		w.CPUs[1].CR0 &^= guest.CR0WP
		w.CPUs[1].CR4 &^= guest.CR4SMEP
		w.CPUs[0].GDTR.Base = 0x7000
		if long {
			w.CPUs[1].SFMASK, w.CPUs[1].LSTAR = 0, 0x401000
			want = append(want, "invariant msr/lstar@1/LSTAR", "invariant msr/sfmask@1/SFMASK")
		}
		m := w.monitor(Options{Settle: -1})
		if diff := cmp.Diff(want, keys(w.tick(m))); diff != "" {
			t.Errorf("64 bits %t: -want +got\n%s", long, diff)
		}
		w.state(m, StateRegisters)
		w.quiet(m)
	}
	// Another system, of which nothing is known.
	w := made(t, true, 0, 1)
	w.lose(func([]byte) bool { return false })
	v := &w.CPUs[0]
	v.LSTAR, v.CSTAR, v.SFMASK = 0xfffff80012345678, 0xfffff80012345000, 0x4700
	v.IDTR, v.GDTR = kvmaccess.TableRegister{Base: 0xfffff80011111000, Limit: 0xfff}, kvmaccess.TableRegister{Base: 0xfffff80011112000, Limit: 0x57}
	m := w.monitor(Options{Settle: -1})
	w.quiet(m)
	w.state(m, StateRegisters)
	if diff := cmp.Diff([]string{notLinux}, m.Status().Problems); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	v.LSTAR += 8
	if diff := cmp.Diff([]string{"changed msr/lstar@0/LSTAR"}, keys(w.tick(m))); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// TestRegistersUser: a guest that runs a program is up.
func TestRegistersUser(t *testing.T) {
	w := made(t, true, 0, 1)
	w.lose(func([]byte) bool { return false })
	w.CPUs[0].CPL = 3
	m := w.monitor(Options{Settle: time.Hour})
	w.quiet(m)
	w.state(m, StateWaiting, "for 2s")
	w.rest(settleTables)
	w.quiet(m)
	w.state(m, StateRegisters)
}

// TestProbe: memory of which no more than the interrupt table can be read is
// tried ever less often, and registers are watched all the while; a VM that goes
// is no matter of memory.
func TestProbe(t *testing.T) {
	w, f, m := blindWorld(t, Options{})
	f.physical, f.rangeErr = nil, nil
	text := 0x3000 + (made64+w.image.Slide)>>21&511*8
	w.pages.WritePhysical(text, make([]byte, 8))
	var tried []int // in which minute
	for tick := range 10 * 60 * 10 {
		if found := w.tick(m); len(found) != 0 {
			t.Fatalf("%q", texts(found))
		}
		if m.State() == StateWaiting {
			tried = append(tried, tick/600)
			w.tick(m)
			w.state(m, StateRegisters, "page tables cannot be read")
		}
	}
	if diff := cmp.Diff([]int{0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, tried); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if all := m.Accepted(); len(all) != 0 {
		t.Errorf("accepted: %+v", all)
	}
	w.CPUs[1].LSTAR += 0x40
	if diff := cmp.Diff([]string{"changed msr/lstar@1/LSTAR"}, keys(w.tick(m))); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	w.rest(lastProbe)
	f.virtual = kvmaccess.ErrNoVM
	if _, err := m.Tick(t.Context()); !errors.Is(err, kvmaccess.ErrNoVM) {
		t.Errorf("%v", err)
	}
}
