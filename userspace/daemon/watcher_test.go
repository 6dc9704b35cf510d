// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// daemonTest runs in a bubble, in which time passes when nothing else does.
func daemonTest(t *testing.T, f func(t *testing.T, h *fakeHost, dir string)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) { f(t, newFakeHost(), dir) })
}

// settleDown lets everything happen that is due, and some ticks after.
func settleDown() {
	time.Sleep(2500 * time.Millisecond)
	synctest.Wait()
}

func TestFinding(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		web := h.start(1, 10, "web")
		r := newRig(t, h, dir, nil)
		defer r.stop()
		settleDown()
		mail := h.start(2, 20, "mail") // after the daemon
		settleDown()
		for id := kvmaccess.VMID(1); id <= 2; id++ {
			if s := r.status(id); s.State != StateWatching || s.Ticks < 2 || s.Missed != 0 || s.Baseline == nil {
				t.Errorf("VM %d: %+v", id, s)
			}
		}

		web.set(func(g *fakeGuest) { g.value = 6 })
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		want := []string{"value 0 of guest web is 6, was 1"}
		if diff := cmp.Diff(want, r.findings()); diff != "" {
			t.Errorf("within a period: -want +got:\n%s", diff)
		}
		web.set(func(g *fakeGuest) { g.value = 1 })
		mail.set(func(g *fakeGuest) { g.value = 7 })
		settleDown()
		all := records(t, r.config.Findings)
		if len(all) != 3 || all[1].Kind == all[2].Kind {
			t.Fatalf("findings: %+v", all)
		}
		if n := r.status(1).Findings; n != 2 {
			t.Errorf("VM 1 has %d findings, want 2", n)
		}
		if n := r.status(2).Findings; n != 1 {
			t.Errorf("VM 2 has %d findings, want 1", n)
		}
	})
}

func TestManyFindings(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		g := h.start(1, 10, "web")
		r := newRig(t, h, dir, nil)
		settleDown()
		g.set(func(g *fakeGuest) { g.burst, g.value = 20, 2 }) // held back, two at a time
		settleDown()
		if n := len(records(t, r.config.Findings)); n != 21 {
			t.Errorf("%d findings, want 21", n)
		}
		r.stop()
	})
}

func TestRestart(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		web, mail := h.start(1, 10, "web"), h.start(2, 20, "mail")
		db := h.start(3, 30, "db")
		r := newRig(t, h, dir, nil)
		settleDown()
		web.set(func(g *fakeGuest) { g.value = 2 })
		settleDown()
		before := *r.status(1).Baseline
		r.stop()

		mail.set(func(g *fakeGuest) { g.value = 3 }) // while the daemon is down
		h.end(3, false)
		db = h.start(4, 30, "db") // another VMM, with the same pid and name
		h.vmms[30] = kvmaccess.VMM{Name: "db", UUID: h.vmms[30].UUID, Start: 7777}
		db.set(func(g *fakeGuest) { g.value = 9 })
		r = newRig(t, h, dir, nil)
		settleDown()
		want := []string{"value 0 of guest web is 2, was 1", "value 0 of guest mail is 3, was 1"}
		if diff := cmp.Diff(want, r.findings()); diff != "" {
			t.Errorf("what is open is not raised again, and what changed meanwhile is: -want +got:\n%s", diff)
		}
		if after := r.status(1); !after.Baseline.Equal(before) || after.Findings != 1 {
			t.Errorf("the baseline of %v was not used again: %+v", before, after)
		}
		web.set(func(g *fakeGuest) { g.value = 1 })
		settleDown()
		want = append(want, "value 0 of guest web is 1, was 2")
		if diff := cmp.Diff(want, r.findings()); diff != "" {
			t.Errorf("cleared: -want +got:\n%s", diff)
		}
		guests, _, err := r.journal.store.guests()
		if err != nil || len(guests) != 3 {
			t.Errorf("%d guests are stored, want 3: the VM that is gone is to be dropped (%v)", len(guests), err)
		}
		r.stop()
	})
}

func TestVMGone(t *testing.T) {
	for name, told := range map[string]bool{"told": true, "not told": false} {
		t.Run(name, func(t *testing.T) {
			daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
				h.start(1, 10, "web")
				h.start(2, 20, "mail")
				r := newRig(t, h, dir, nil)
				defer r.stop()
				settleDown()
				h.end(1, told)
				settleDown()
				if !told {
					time.Sleep(r.config.Relist)
					synctest.Wait()
				}
				if all := r.watcher.all(); len(all) != 1 || all[0].id.Name != "mail" {
					t.Errorf("%d VMs are watched, want mail alone", len(all))
				}
				if f := r.findings(); len(f) != 0 {
					t.Errorf("findings of a VM that went away: %q", f)
				}
				if diff := cmp.Diff([]string{}, r.problems()); diff != "" {
					t.Errorf("problems: -want +got:\n%s", diff)
				}
				guests, _, err := r.journal.store.guests()
				if err != nil || len(guests) != 1 {
					t.Errorf("%d guests are stored, want 1 (%v)", len(guests), err)
				}
				stats, err := r.watcher.stats(t.Context())
				if err != nil || stats.Failed != 0 || stats.Ticks < 4 {
					t.Errorf("stats: %+v, %v", stats, err)
				}
			})
		})
	}
}

// A VM that dies while it is read is no finding, even if what was read last
// looks like one.
func TestVMDiesInTick(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		g := h.start(1, 10, "web")
		r := newRig(t, h, dir, nil)
		defer r.stop()
		settleDown()
		g.set(func(g *fakeGuest) {
			g.err = fmt.Errorf("read memory: %w", kvmaccess.ErrDying)
			g.value = 66
		})
		settleDown()
		h.end(1, true)
		settleDown()
		if f := r.findings(); len(f) != 0 {
			t.Errorf("findings: %q", f)
		}
		if n := len(r.watcher.all()); n != 0 {
			t.Errorf("%d VMs are watched", n)
		}
	})
}

func TestEventsLost(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		h.start(9, 90, "db")
		r := newRig(t, h, dir, nil)
		defer r.stop()
		settleDown()
		h.mu.Lock()
		subs := h.subs
		h.subs = nil // the next event is lost
		h.mu.Unlock()
		h.start(1, 10, "web")
		settleDown()
		if n := len(r.watcher.all()); n != 1 {
			t.Fatalf("%d VMs are watched before anything tells of one", n)
		}
		h.mu.Lock()
		h.subs = subs
		h.tell(kvmaccess.ErrEventsLost)
		h.mu.Unlock()
		synctest.Wait()
		if n := len(r.watcher.all()); n != 2 {
			t.Errorf("%d VMs are watched, want 2", n)
		}

		// The subscription fails, and so does the next one.
		h.mu.Lock()
		h.subErr = errBroken
		h.tell(errBroken)
		h.subs = nil
		h.mu.Unlock()
		synctest.Wait()
		if diff := cmp.Diff([]string{"events"}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
		h.start(2, 20, "mail")
		h.mu.Lock()
		h.subErr = nil
		h.mu.Unlock()
		settleDown()
		if n := len(r.watcher.all()); n != 3 {
			t.Errorf("%d VMs are watched, want 3", n)
		}
		if diff := cmp.Diff([]string{}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
	})
}

// Events that never come are made up for by lists.
func TestRelist(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		h.start(1, 10, "web")
		r := newRig(t, h, dir, nil)
		defer r.stop()
		settleDown()
		h.mu.Lock()
		h.subs = nil
		h.mu.Unlock()
		h.start(2, 20, "mail")
		time.Sleep(r.config.Relist)
		synctest.Wait()
		if n := len(r.watcher.all()); n != 2 {
			t.Errorf("%d VMs are watched, want 2", n)
		}
	})
}

func TestModuleRemoved(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		g := h.start(1, 10, "web")
		r := newRig(t, h, dir, nil)
		settleDown()
		h.setModule(false)
		g.set(func(g *fakeGuest) { g.value = 5 }) // unseen
		settleDown()
		if diff := cmp.Diff([]string{"module"}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
		if stats, err := r.watcher.stats(t.Context()); err != nil || stats.Module != nil || stats.ModuleError == "" {
			t.Errorf("stats without a module: %+v, %v", stats, err)
		}
		time.Sleep(time.Hour)
		h.setModule(true)
		settleDown()
		if diff := cmp.Diff([]string{}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
		if s := r.status(101); s.State != StateWatching {
			t.Errorf("the VM is not watched under its new id: %+v", s)
		}
		want := []string{"value 0 of guest web is 5, was 1"}
		if diff := cmp.Diff(want, r.findings()); diff != "" {
			t.Errorf("by the baseline from before: -want +got:\n%s", diff)
		}
		r.stop()
	})
}

func TestModuleRemovedWithoutVMs(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		r := newRig(t, h, dir, nil)
		defer r.stop()
		settleDown()
		h.setModule(false)
		time.Sleep(idleRelist)
		synctest.Wait()
		if diff := cmp.Diff([]string{"module"}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
		h.setModule(true)
		settleDown()
		h.start(1, 10, "web")
		settleDown()
		if n := len(r.watcher.all()); n != 1 {
			t.Errorf("%d VMs are watched, want 1", n)
		}
	})
}

func TestWaiting(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		r := newRig(t, h, dir, func(c *Config) { c.Period = 10 * time.Millisecond })
		defer r.stop()
		g := h.start(1, 10, "web", func(g *fakeGuest) { g.up = false })
		settleDown()
		if s := r.status(1); s.State != StateWaiting || s.Reason != "not up" || s.Ticks != 0 {
			t.Errorf("a guest that is not up: %+v", s)
		}
		g.set(func(g *fakeGuest) { g.up = true })
		settleDown()
		if s := r.status(1); s.State != StateWatching || s.Ticks < 100 || s.Missed != 0 {
			t.Errorf("a guest that came up: %+v", s)
		}
		g.set(func(g *fakeGuest) { g.up = false })
		settleDown()
		before := r.status(1)
		if before.State != StateWaiting {
			t.Errorf("a guest that restarts: %+v", before)
		}
		g.set(func(g *fakeGuest) { g.up = true })
		settleDown()
		if s := r.status(1); s.State != StateWatching || s.Ticks <= before.Ticks || s.Missed != 0 {
			t.Errorf("a guest that has restarted: %+v", s)
		}
	})
}

func TestFailing(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		g := h.start(1, 10, "web")
		other := h.start(2, 20, "mail")
		r := newRig(t, h, dir, func(c *Config) { c.Period = 100 * time.Millisecond })
		defer r.stop()
		settleDown()
		g.set(func(g *fakeGuest) { g.err = kvmaccess.ErrUnsettled })
		settleDown()
		if s := r.status(1); s.State != StateWatching || s.Failed < 20 || s.Missed != 0 {
			t.Errorf("a vCPU that does not come to rest: %+v", s)
		}
		g.set(func(g *fakeGuest) { g.err = errBroken })
		settleDown()
		if s := r.status(1); s.State != StateFailing || s.Reason != "broken" {
			t.Errorf("a VM that cannot be read: %+v", s)
		}
		g.set(func(g *fakeGuest) { g.err = nil; g.value = 4 })
		settleDown()
		s := r.status(1)
		if s.State != StateWatching {
			t.Errorf("a VM that can be read again: %+v", s)
		}
		if o := r.status(2); s.Ticks+s.Missed != o.Ticks+o.Missed || s.Missed == 0 || o.Missed != 0 {
			t.Errorf("ticks that were left out are to be counted: %+v, another VM's: %+v", s, o)
		}
		if f := r.findings(); len(f) != 1 {
			t.Errorf("findings: %q", f)
		}
		_ = other
	})
}

func TestProtected(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		h.start(1, 10, "web")
		vm := h.vms[1]
		vm.Flags |= kvmaccess.VMProtected
		h.vms[1] = vm
		g := h.start(2, 20, "late") // known only when it is read
		g.set(func(g *fakeGuest) { g.err = fmt.Errorf("vcpu: %w", kvmaccess.ErrProtected) })
		r := newRig(t, h, dir, nil)
		settleDown()
		for id := kvmaccess.VMID(1); id <= 2; id++ {
			if s := r.status(id); s.State != StateProtected || s.Reason != encrypted {
				t.Errorf("%+v", s)
			}
		}
		r.stop()
	})
}

// A guest whose memory cannot be read has its registers checked, and that is
// said, until it can.
func TestRegisters(t *testing.T) {
	for _, mode := range []Mode{ModePoll, ModeWatch} {
		daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
			g := h.start(1, 10, "web", func(g *fakeGuest) { g.blind, g.again = true, time.Second })
			r := newRig(t, h, dir, func(c *Config) { c.Mode = mode })
			defer r.stop()
			settleDown()
			state := func(want State, reason string) VMStatus {
				t.Helper()
				s := r.status(1)
				if s.State != want || s.Reason != reason {
					t.Errorf("%s: %+v", mode, s)
				}
				return s
			}
			before := state(StateRegisters, "no memory")
			if before.Baseline == nil || mode == ModeWatch && before.Watch.Items != 1 {
				t.Errorf("%s: %+v", mode, before)
			}
			g.set(func(g *fakeGuest) { g.value = 6 })
			settleDown()
			r.found(is6)
			if after := state(StateRegisters, "no memory"); after.Ticks == before.Ticks || after.Missed != before.Missed {
				t.Errorf("%s: %+v, then %+v", mode, before, after)
			}
			g.set(func(g *fakeGuest) { g.blind = false })
			settleDown()
			state(StateWatching, "")
			g.set(func(g *fakeGuest) { g.value, g.blind = 1, true })
			settleDown()
			r.found(is6, is1)
			state(StateRegisters, "no memory")
		})
	}
}

// Reads of one VM that take long do not delay another VM's ticks.
func TestSlowMemory(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		slow, quick := h.start(1, 10, "slow"), h.start(2, 20, "quick")
		r := newRig(t, h, dir, func(c *Config) { c.Period = 10 * time.Millisecond })
		defer r.stop()
		settleDown()
		slow.set(func(g *fakeGuest) {
			g.work = func(ctx context.Context, m guest.Memory) {
				if m.ReadPhysical(ctx, 0, nil) == nil {
					time.Sleep(35 * time.Millisecond) // from the host's disk
				}
			}
		})
		settleDown()
		s, q := r.status(1), r.status(2)
		if q.Missed != 0 || q.TickMax > 0 || q.LateMax >= r.config.Period {
			t.Errorf("the quick VM suffered: %+v", q)
		}
		if s.State != StateWatching || s.Missed == 0 || s.TickMax != 35*time.Millisecond {
			t.Errorf("the slow VM: %+v", s)
		}
		slow.set(func(g *fakeGuest) { g.work = nil })
		settleDown()
		before, wakeups := r.status(1), r.lane.wakeups.Load()
		settleDown()
		after := r.status(1)
		if after.Missed != before.Missed || after.Ticks-before.Ticks != 250 || r.lane.wakeups.Load()-wakeups != 250 {
			t.Errorf("it is not back on the shared lane: before %+v, after %+v", before, after)
		}
		_ = quick
	})
}

func TestRebaseline(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		g := h.start(1, 10, "web")
		r := newRig(t, h, dir, nil)
		settleDown()
		g.set(func(g *fakeGuest) { g.value = 2 })
		settleDown()
		k, err := r.watcher.find("web")
		if err != nil {
			t.Fatal(err)
		}
		if !k.rebase(t.Context()) {
			t.Fatal("the VM is said to be gone")
		}
		settleDown()
		g.set(func(g *fakeGuest) { g.value = 1 })
		settleDown()
		all := records(t, r.config.Findings)
		if len(all) != 2 || all[1].Kind != "changed" || all[1].Old.Value != 2 {
			t.Errorf("the value of the new baseline is 2: %+v", all)
		}
		h.end(1, true)
		settleDown()
		if k.rebase(t.Context()) {
			t.Error("a VM that is gone took a new baseline")
		}
		r.stop()
	})
}

func TestFind(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		h.start(1, 10, "web")
		h.start(2, 20, "twin")
		h.start(3, 30, "twin")
		r := newRig(t, h, dir, nil)
		defer r.stop()
		settleDown()
		for selector, want := range map[string]any{
			"web": kvmaccess.VMID(1), "2": kvmaccess.VMID(2), "00000000-0000-0000-0000-000000000030": kvmaccess.VMID(3),
			"twin": errAmbiguousVM, "4": errUnknownVM, "": errUnknownVM,
		} {
			k, err := r.watcher.find(selector)
			if e, ok := want.(error); ok {
				if !errors.Is(err, e) {
					t.Errorf("%q: %v, want %v", selector, err, e)
				}
			} else if err != nil || k.vm.ID != want {
				t.Errorf("%q: %v, want VM %v", selector, err, want)
			}
		}
	})
}

// One VMM may have several VMs, each with a baseline of its own.
func TestTwoVMsOfOneProcess(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		h.start(1, 10, "web")
		vm := h.vms[1]
		vm.ID = 2
		h.vms[2] = vm
		r := newRig(t, h, dir, nil)
		defer r.stop()
		settleDown()
		guests, _, err := r.journal.store.guests()
		if err != nil || len(guests) != 2 {
			t.Errorf("%d guests are stored, want 2 (%v)", len(guests), err)
		}
	})
}

func TestSymbols(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		good, bad := filepath.Join(dir, "good"), filepath.Join(dir, "bad")
		for path, text := range map[string]string{
			good: "ffffffff81000000 T _text\nffffffff82000000 D sys_call_table\n",
			bad:  "0000000000000000 T _text\n",
		} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for i, name := range []string{"good", "bad", "absent", "none"} {
			h.start(kvmaccess.VMID(i+1), 10*(i+1), name)
		}
		r := newRig(t, h, dir, func(c *Config) {
			c.VMs = map[string]VMConfig{"good": {Symbols: good}, "bad": {Symbols: bad}, "absent": {Symbols: dir + "/absent"}}
		})
		defer r.stop()
		settleDown()
		for i, want := range []string{"", "every address is zero", "no such file", ""} {
			s := r.status(kvmaccess.VMID(i + 1))
			if s.State != StateWatching || s.Reason != "" != (want != "") || !strings.Contains(s.Reason, want) {
				t.Errorf("%s: %q in state %s, want %q", s.Name, s.Reason, s.State, want)
			}
			if (s.Symbols != "") != (s.Name == "good") {
				t.Errorf("%s: symbols %q", s.Name, s.Symbols)
			}
		}
		if diff := cmp.Diff([]string{"symbols of absent", "symbols of bad"}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
		for _, m := range h.monitors {
			if (m.options.Symbols != nil) != (m.vm.Name == "good") {
				t.Errorf("%s: monitor with symbols %v", m.vm.Name, m.options.Symbols)
			}
		}
		h.end(2, true)
		h.end(3, true)
		settleDown()
		if diff := cmp.Diff([]string{}, r.problems()); diff != "" {
			t.Errorf("problems of VMs that are gone: -want +got:\n%s", diff)
		}
	})
}

func TestStatsAddUp(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		h.start(1, 10, "a")
		h.start(2, 20, "b")
		r := newRig(t, h, dir, func(c *Config) {
			c.VMs = map[string]VMConfig{"b": {Period: 250 * time.Millisecond}}
		})
		defer r.stop()
		time.Sleep(10*time.Second + time.Millisecond)
		h.end(1, true)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		s, err := r.watcher.stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(s.VMs) != 1 || s.VMs[0].Ticks != 80 || s.Ticks != 90 || s.Missed != 0 {
			t.Errorf("10 s of one VM at 1 s and 20 s of another at 250 ms: %+v", s)
		}
		if s.Wakeups < 80 || s.Wakeups > 86 {
			t.Errorf("%d wake-ups for 80 deadlines", s.Wakeups)
		}
		if s.Module == nil || s.Module.Worker != 5 || s.Module.Interrupt != 7 {
			t.Errorf("module: %+v", s.Module)
		}
		if s.CPU <= 0 || s.User+s.System <= 0 {
			t.Errorf("own CPU time: %+v", s)
		}
	})
}
