// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// registers is an item on each of so many vCPUs.
func registers(n int, value uint64) []integrity.WatchItem {
	var list []integrity.WatchItem
	for i := range n {
		id := uint32(i)
		list = append(list, integrity.WatchItem{Item: kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterTRBase, VCPU: &id, Value: value}, What: "TR"})
	}
	return list
}

// guardTest is a guard of a VM whose watches are the fake host's.
func guardTest(t *testing.T, f func(t *testing.T, g *guard, w *fakeWatcher)) {
	synctest.Test(t, func(t *testing.T) {
		h := newFakeHost()
		h.start(1, 10, "web")
		w := newFakeWatcher(h)
		g := newGuard(newWatches(w), 1, slog.New(slog.DiscardHandler))
		f(t, g, w)
		g.close()
		if n := len(w.stats()); n != 0 {
			t.Errorf("%d watches are left", n)
		}
		w.Close()
	})
}

func program(t *testing.T, g *guard, period time.Duration, list []integrity.WatchItem) {
	t.Helper()
	if err := g.program(context.Background(), kvmaccess.WatchConfig{Period: period}, list, time.Now()); err != nil {
		t.Fatal(err)
	}
}

// What is the same stays, what is not is exchanged, and more than one watch may
// have goes to others.
func TestGuardPrograms(t *testing.T) {
	guardTest(t, func(t *testing.T, g *guard, w *fakeWatcher) {
		list := registers(4, 1)
		program(t, g, time.Second, list)
		program(t, g, time.Second, list)
		list[2].Value = 2
		program(t, g, time.Second, list)
		if s := w.stats(); len(s) != 1 || s[0].Items != 4 || w.made != 1 {
			t.Errorf("%d made, %+v", w.made, s)
		}
		w.mu.Lock()
		cookies := map[uint64]uint64{}
		for _, it := range w.watches[0].items {
			cookies[it.Cookie] = it.Value
		}
		w.mu.Unlock()
		if len(cookies) != 4 || cookies[5] != 2 || cookies[3] != 0 {
			t.Errorf("values by cookie: %v", cookies)
		}
		program(t, g, 2*time.Second, list) // of another period
		if s := w.stats(); len(s) != 1 || s[0].Items != 4 || s[0].Period != 2*time.Second || w.made != 2 {
			t.Errorf("%d made, %+v", w.made, s)
		}
		program(t, g, 2*time.Second, registers(600, 1))
		s := w.stats()
		if len(s) != 3 || s[0].Items != partRegisters || s[0].Items+s[1].Items+s[2].Items != 600 {
			t.Errorf("%+v", s)
		}
		if a := g.account(s); a.Items != 600 || a.Rearmed != 2 || a.Period != 2*time.Second {
			t.Errorf("%+v", a)
		}
		program(t, g, 2*time.Second, list)
		if s := w.stats(); len(s) != 1 || s[0].Items != 4 {
			t.Errorf("%+v", s)
		}
	})
}

// A place that changes all the time for nothing is left alone, longer and
// longer.
func TestGuardRestless(t *testing.T) {
	guardTest(t, func(t *testing.T, g *guard, w *fakeWatcher) {
		list := registers(2, 1)
		place := list[1].Place()
		program(t, g, time.Second, list)
		pause := firstPause
		for range 8 {
			for i := range noiseCount - 1 {
				if g.vain(place, time.Now()) {
					t.Fatalf("left alone after %d times", i+1)
				}
			}
			if !g.vain(place, time.Now()) {
				t.Fatalf("not left alone after %d times", noiseCount)
			}
			program(t, g, time.Second, list)
			until := g.restlessUntil(time.Now())
			if a := g.account(w.stats()); a.Items != 1 || a.Restless != 1 || until.Sub(time.Now()) != pause {
				t.Errorf("for %v: %+v", until.Sub(time.Now()), a)
			}
			time.Sleep(pause)
			program(t, g, time.Second, list)
			if until := g.restlessUntil(time.Now()); !until.IsZero() || g.account(w.stats()).Items != 2 {
				t.Errorf("until %v: %+v", until, g.account(w.stats()))
			}
			pause = min(2*pause, lastPause)
		}
		// What happens now and then counts for nothing.
		for range 10 * noiseCount {
			if g.vain(list[0].Place(), time.Now()) {
				t.Fatal("left alone, and yet changes seldom")
			}
			time.Sleep(noiseTime / 10)
		}
		time.Sleep(time.Hour)
		g.restlessUntil(time.Now())
		if len(g.noise) != 0 {
			t.Errorf("%d places are still known as noisy", len(g.noise))
		}
	})
}

// Where a kernel's code has no room for its copy, it says what to do.
func TestRoomForCode(t *testing.T) {
	f, err := openCode(t.TempDir(), identity{Boot: "b", PID: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := roomForCode(f); err != nil && !strings.Contains(err.Error(), "--text 0") {
		t.Error(err)
	}
	if _, err := f.Write([]byte("there is one")); err != nil {
		t.Fatal(err)
	}
	if err := roomForCode(f); err != nil {
		t.Errorf("of a copy that is there: %v", err)
	}
}

// Copies of VMs that are no more go.
func TestDropCode(t *testing.T) {
	dir := t.TempDir()
	ids := []identity{{Boot: "b", PID: 1}, {Boot: "b", PID: 2}}
	for _, id := range ids {
		f, err := openCode(dir, id)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	dropCode(dir, ids[1:], slog.New(slog.DiscardHandler))
	for i, want := range []bool{false, true} {
		if _, err := os.Stat(codeFile(dir, ids[i])); (err == nil) != want {
			t.Errorf("the copy of VM %d: %v", i+1, err)
		}
	}
}
