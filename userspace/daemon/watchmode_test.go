// SPDX-License-Identifier: MIT

package daemon

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// watchMode is the product's default.
func watchMode(c *Config) { c.Mode = ModeWatch }

// watchTest is a daemon in watch mode that watches one VM.
func watchTest(t *testing.T, f func(t *testing.T, r *rig, g *fakeGuest)) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		g := h.start(1, 10, "web")
		r := newRig(t, h, dir, watchMode)
		defer r.stop()
		settleDown()
		f(t, r, g)
	})
}

func (h *fakeHost) watcher() *fakeWatcher {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.watchers[len(h.watchers)-1]
}

// found fails unless these are all findings.
func (r *rig) found(want ...string) {
	r.t.Helper()
	synctest.Wait()
	if want == nil {
		want = []string{}
	}
	got := r.findings()
	if got == nil {
		got = []string{}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		r.t.Errorf("findings: -want +got:\n%s", diff)
	}
}

const (
	is6 = "value 0 of guest web is 6, was 1"
	is1 = "value 0 of guest web is 1, was 6"
)

func TestWatchMode(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		before := r.status(1)
		if before.Mode != ModeWatch || before.Watch == nil || before.Watch.Items != 1 || before.Watch.Ticks == 0 || before.Watch.Period != before.Period {
			t.Fatalf("%+v, %+v", before, before.Watch)
		}
		time.Sleep(20 * time.Second)
		if after := r.status(1); after.Ticks != before.Ticks || after.Watch.Ticks < before.Watch.Ticks+20 {
			t.Errorf("of a guest at rest, before: %+v, %+v, after: %+v, %+v", before, before.Watch, after, after.Watch)
		}
		g.set(func(g *fakeGuest) { g.value = 6 })
		time.Sleep(time.Second) // one period
		r.found(is6)
		g.set(func(g *fakeGuest) { g.value = 1 })
		time.Sleep(time.Second)
		r.found(is6, is1)
		if s := r.status(1); s.Findings != 2 || s.Watch.Events != 2 || s.Watch.Items != 1 || s.Watch.Rearmed != 0 {
			t.Errorf("%+v, %+v", s, s.Watch)
		}
	})
}

// What was undone before the round is a change no less.
func TestWatchModeMoment(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		g.set(func(g *fakeGuest) {
			g.value = 6
			g.again = 0
		})
		w := r.host.watcher()
		w.mu.Lock()
		x := w.watches[0]
		w.mu.Unlock()
		x.tick()
		g.set(func(g *fakeGuest) { g.value = 1 })
		r.found(is6, is1)
	})
}

// What is undone once it was told is told once.
func TestWatchModeUndone(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		g.set(func(g *fakeGuest) {
			g.value = 6
			g.reread = func(g *fakeGuest) { g.value = 1 }
		})
		time.Sleep(time.Second)
		r.found(is6, is1)
		time.Sleep(time.Minute)
		r.found(is6, is1)
	})
}

// After events that nobody got, all is looked at.
func TestWatchModeEventsLost(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		before := r.status(1).Ticks
		r.host.watcher().events <- kvmaccess.ErrEventsLost
		synctest.Wait()
		if after := r.status(1).Ticks; after != before+1 {
			t.Errorf("%d rounds, want 1", after-before)
		}
		r.found()
	})
}

// A watch that ended although the VM is there is made anew.
func TestWatchModeEnded(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		r.host.watcher().end(1)
		synctest.Wait()
		if s := r.status(1); s.Watch.Items != 1 || s.Watch.Rearmed != 1 {
			t.Errorf("%+v", s.Watch)
		}
		g.set(func(g *fakeGuest) { g.value = 6 })
		time.Sleep(time.Second)
		r.found(is6)
	})
}

// Where it is not known what a watch has, another one is made.
func TestWatchModeAnswerLost(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		w := r.host.watcher()
		w.mu.Lock()
		w.addErr = &kvmaccess.Error{Op: "watch_add", VM: 1, Errno: unix.ENOBUFS}
		w.mu.Unlock()
		g.set(func(g *fakeGuest) { g.value = 6 })
		time.Sleep(time.Second)
		r.found(is6)
		if s := r.status(1); s.Watch.Items != 1 || s.Watch.Rearmed != 1 || s.Watch.Ticks < 3 || len(w.stats()) != 1 {
			t.Errorf("%+v, watches %+v", s.Watch, w.stats())
		}
		g.set(func(g *fakeGuest) { g.value = 1 })
		time.Sleep(time.Second)
		r.found(is6, is1)
	})
}

// While the module takes no watches, the daemon looks by itself and says so.
func TestWatchModeRefused(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		w := r.host.watcher()
		refuse := func(err error) {
			w.mu.Lock()
			w.newErr = err
			w.mu.Unlock()
		}
		refuse(&kvmaccess.Error{Op: "watch_new", VM: 1, Errno: unix.ENOSPC, Message: "there are as many watches as there may be"})
		w.end(1)
		settleDown()
		if s := r.status(1); s.State != StateFailing || s.Reason == "" {
			t.Errorf("%+v", s)
		}
		g.set(func(g *fakeGuest) { g.value = 6 })
		time.Sleep(2 * time.Second)
		r.found(is6)
		refuse(nil)
		settleDown()
		if s := r.status(1); s.State != StateWatching || s.Reason != "" || s.Watch.Items != 1 {
			t.Errorf("%+v, %+v", s, s.Watch)
		}
		g.set(func(g *fakeGuest) { g.value = 1 })
		time.Sleep(time.Second)
		r.found(is6, is1)
	})
}

// A module that cannot watch is polled.
func TestWatchModeMissing(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		h.canWatch = false
		g := h.start(1, 10, "web")
		r := newRig(t, h, dir, watchMode)
		defer r.stop()
		settleDown()
		if s := r.status(1); s.Mode != ModePoll || s.Watch != nil || s.Ticks < 2 {
			t.Errorf("%+v", s)
		}
		if diff := cmp.Diff([]string{"watches"}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
		g.set(func(g *fakeGuest) { g.value = 6 })
		settleDown()
		r.found(is6)
	})
}

// A guest that changes what is watched all the time has so many rounds and no
// more, and each of its findings is told.
func TestWatchModeStorm(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		g := h.start(1, 10, "web")
		mail := h.start(2, 20, "mail")
		r := newRig(t, h, dir, func(c *Config) { watchMode(c); c.Period = time.Millisecond })
		defer r.stop()
		settleDown()
		before := r.status(1).Ticks
		const seconds = 10
		for i := range 1000 * seconds {
			g.set(func(g *fakeGuest) { g.value = uint64(7 + i) })
			time.Sleep(time.Millisecond)
		}
		rounds := r.status(1).Ticks - before
		if most := uint64(roundBurst + seconds*time.Second/roundEvery + 1); rounds < 100 || rounds > most {
			t.Errorf("%d rounds, want up to %d", rounds, most)
		}
		if r.status(2).Findings != 0 {
			t.Error("findings of the other guest")
		}
		mail.set(func(g *fakeGuest) { g.value = 3 })
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if n := r.status(2).Findings; n != 1 {
			t.Errorf("%d findings of the other guest, want 1", n)
		}
	})
}

// The module may go and come under it.
func TestWatchModeReload(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		r.host.setModule(false)
		r.host.watcher().end(1)
		settleDown()
		if diff := cmp.Diff([]string{"module"}, r.problems()); diff != "" {
			t.Errorf("problems: -want +got:\n%s", diff)
		}
		r.host.setModule(true)
		settleDown()
		g.set(func(g *fakeGuest) { g.value = 6 })
		time.Sleep(time.Second)
		r.found(is6)
	})
}

// A VM that ends is no finding, and its watch ends with it.
func TestWatchModeGone(t *testing.T) {
	watchTest(t, func(t *testing.T, r *rig, g *fakeGuest) {
		w := r.host.watcher()
		r.host.end(1, false)
		w.end(1)
		settleDown()
		if n := len(w.stats()); n != 0 {
			t.Errorf("%d watches are left", n)
		}
		r.found()
	})
}

func TestPacer(t *testing.T) {
	p := pacer{burst: 3, every: time.Second}
	now := time.Unix(1000, 0)
	for i, want := range []time.Duration{0, 0, 0, time.Second, time.Second} {
		if got := p.wait(now); got != want {
			t.Errorf("before the %d-th: %v, want %v", i+1, got, want)
		}
		now = now.Add(p.wait(now))
		p.done(now)
	}
	now = now.Add(time.Hour)
	if got := p.wait(now); got != 0 {
		t.Errorf("after a rest: %v", got)
	}
}
