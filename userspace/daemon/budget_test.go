// SPDX-License-Identifier: MIT

package daemon

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestChoose(t *testing.T) {
	const us = time.Microsecond
	many := func(n int, one need) (all []need) {
		for range n {
			all = append(all, one)
		}
		return all
	}
	for name, test := range map[string]struct {
		share, own Share
		needs      []need
		text       time.Duration
		want       BudgetStatus
	}{
		"one VM": {0.0035, 0, many(1, need{tick: 5 * us}), 0,
			BudgetStatus{VMs: 1, Period: 1600 * us, Cost: 0.003125, Fits: true}},
		"ten VMs": {0.0035, 0, many(10, need{tick: 5 * us}), 0,
			BudgetStatus{VMs: 10, Period: 16 * time.Millisecond, Cost: 0.003125, Fits: true}},
		"with the daemon's part": {0.0035, 0.001, many(1, need{tick: 9 * us}), 0,
			BudgetStatus{VMs: 1, Period: 4 * time.Millisecond, Daemon: 0.001, Cost: 0.00325, Fits: true}},
		"plenty": {1, 0, many(1, need{tick: 5 * us}), 0,
			BudgetStatus{VMs: 1, Period: MinWatchPeriod, Cost: 0.01, Fits: true}},
		"ticks that take long": {1, 0, many(1, need{tick: time.Millisecond}), 0,
			BudgetStatus{VMs: 1, Period: 2 * time.Millisecond, Cost: 0.5, Fits: true}},
		"code, too": {0.01, 0, many(1, need{tick: 9 * us, text: 20 * time.Millisecond}), 10 * time.Second,
			BudgetStatus{VMs: 1, Period: 1300 * us, Text: 10 * time.Second, Cost: 0.00892, Fits: true}},
		"code, less often": {0.0035, 0, many(1, need{tick: 5 * us, text: 40 * time.Millisecond}), 10 * time.Second,
			BudgetStatus{VMs: 1, Period: 2800 * us, Text: 30 * time.Second, Cost: 0.00312, Fits: true,
				Reason: "kernels' code is compared less often than asked for: there is not enough for that"}},
		"no code": {0.0001, 0, many(1, need{tick: 9 * us, text: time.Second}), 10 * time.Second,
			BudgetStatus{VMs: 1, Period: 100 * time.Millisecond, Cost: 0.00009, Fits: true,
				Reason: "kernels' code is not compared: there is not enough for that"}},
		"not enough": {0.0001, 0, many(1000, need{tick: 5 * us}), 0,
			BudgetStatus{VMs: 1000, Period: 10 * time.Second, Cost: 0.0005, Fits: false, Reason: "it is not enough for one look each 10s"}},
		"no VMs": {0.0001, 0, nil, 0, BudgetStatus{Period: MinWatchPeriod, Fits: true}},
	} {
		t.Run(name, func(t *testing.T) {
			got := choose(test.share, test.own, test.needs, test.text)
			test.want.Share = test.share
			round := cmp.Comparer(func(a, b Share) bool { return a-b < 0.00001 && b-a < 0.00001 })
			if diff := cmp.Diff(test.want, got, round); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if got.Fits && len(test.needs) > 0 && got.Cost > test.share {
				t.Errorf("it costs %v of %v", got.Cost, test.share)
			}
			if got.VMs > 0 && !keeps(got, got, test.needs) {
				t.Error("what was just chosen is not kept")
			}
		})
	}
}

// Small changes of what is measured change nothing.
func TestBudgetHolds(t *testing.T) {
	now := choose(0.0035, 0, []need{{tick: 10 * time.Microsecond}}, 0)
	for tick, keep := range map[time.Duration]bool{
		9 * time.Microsecond:  true,
		11 * time.Microsecond: true,
		5 * time.Microsecond:  false,
		20 * time.Microsecond: false,
	} {
		needs := []need{{tick: tick}}
		if next := choose(0.0035, 0, needs, 0); keeps(now, next, needs) != keep {
			t.Errorf("ticks of %v instead of 10µs: period %v instead of %v, kept %v", tick, next.Period, now.Period, !keep)
		}
	}
}

func TestShare(t *testing.T) {
	for text, want := range map[string]Share{"0.35%": 0.0035, "100%": 1, " 1 % ": 0.01} {
		s, err := ParseShare(text)
		if err != nil || math.Abs(float64(s-want)) > 1e-12 {
			t.Errorf("%q: %v, %v", text, float64(s), err)
		}
		if again, err := ParseShare(s.String()); err != nil || math.Abs(float64(again-s)) > 1e-12 {
			t.Errorf("%q does not come back from %q: %v", text, s, err)
		}
	}
	for _, text := range []string{"", "0.35", "%", "-1%", "NaN%", "x%", "1%%"} {
		if _, err := ParseShare(text); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

// Periods follow the VMs that there are.
func TestBudgetAdapts(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		costly := func(g *fakeGuest) { g.tick = 10 * time.Microsecond }
		h.start(1, 10, "web", costly)
		r := newRig(t, h, dir, func(c *Config) { watchMode(c); c.CPUBudget = 0.0035 })
		defer r.stop()
		minutes := func() { time.Sleep(3 * time.Minute); synctest.Wait() }
		minutes()
		one := r.status(1)
		if b := r.watcher.budgetStatus(); !b.Fits || b.VMs != 1 || b.Cost > 0.0035 || one.Period != b.Period || one.Watch.Period != b.Period {
			t.Fatalf("one VM: %+v, %+v", b, one)
		}
		h.start(2, 20, "mail", costly)
		minutes()
		two := r.status(1)
		if b := r.watcher.budgetStatus(); b.VMs != 2 || b.Cost > 0.0035 || two.Watch.Period != b.Period || r.status(2).Watch.Period != b.Period {
			t.Errorf("two VMs: %+v", b)
		}
		if two.Period < 2*one.Period*9/10 {
			t.Errorf("with one VM the period is %v, with two %v", one.Period, two.Period)
		}
		h.end(2, true)
		minutes()
		if again := r.status(1); again.Period > one.Period*5/4 || again.Watch.Period != again.Period {
			t.Errorf("with one VM the period is %v, and %v when it is alone again", one.Period, again.Period)
		}
	})
}
