// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

var errEnd = errors.New("the end of the script")

// scriptClock has its own time: waiting moves it to the deadline, plus what
// the script says the wake-up is late.
type scriptClock struct {
	now   time.Duration
	end   time.Duration
	late  []time.Duration
	waits int
}

func (c *scriptClock) Now() time.Duration { return c.now }

func (c *scriptClock) Wait(deadline, _ time.Duration) error {
	if deadline >= c.end && deadline != noDeadline {
		return errEnd
	}
	if deadline != noDeadline {
		c.now = max(c.now, deadline)
		if c.waits > 0 && c.waits <= len(c.late) {
			c.now += c.late[c.waits-1]
		}
	}
	c.waits++
	return nil
}

func (c *scriptClock) Wake()        {}
func (c *scriptClock) Close() error { return nil }

// TestSchedule runs jobs on a clock that the test moves.
func TestSchedule(t *testing.T) {
	const ms = time.Millisecond
	type script struct {
		period time.Duration
		takes  []time.Duration // of each tick; then 0
	}
	type result struct {
		At      []time.Duration // when its ticks began, after the epoch
		Account Account
	}
	for _, test := range []struct {
		name    string
		jobs    []script
		late    []time.Duration // of each wake-up
		until   time.Duration
		want    []result
		wakeups uint64
	}{
		{
			name: "no drift", until: 50 * ms,
			jobs: []script{{period: 10 * ms, takes: []time.Duration{3 * ms, 4 * ms, 3 * ms}}},
			late: []time.Duration{ms, 2 * ms},
			want: []result{{At: []time.Duration{11 * ms, 22 * ms, 30 * ms, 40 * ms}, Account: Account{
				Ticks: 4, LateMax: 2 * ms, LateSum: 3 * ms, TickMax: 4 * ms, TickSum: 10 * ms}}},
			wakeups: 5,
		},
		{
			name: "equal periods share wake-ups, and so do multiples", until: 41 * ms,
			jobs: []script{{period: 10 * ms}, {period: 20 * ms}, {period: 10 * ms}},
			want: []result{
				{At: []time.Duration{10 * ms, 20 * ms, 30 * ms, 40 * ms}, Account: Account{Ticks: 4}},
				{At: []time.Duration{20 * ms, 40 * ms}, Account: Account{Ticks: 2}},
				{At: []time.Duration{10 * ms, 20 * ms, 30 * ms, 40 * ms}, Account: Account{Ticks: 4}},
			},
			wakeups: 5,
		},
		{
			name: "a tick delays the next job's, which counts as late", until: 20 * ms,
			jobs: []script{{period: 10 * ms, takes: []time.Duration{4 * ms}}, {period: 10 * ms}},
			want: []result{
				{At: []time.Duration{10 * ms}, Account: Account{Ticks: 1, TickMax: 4 * ms, TickSum: 4 * ms}},
				{At: []time.Duration{14 * ms}, Account: Account{Ticks: 1, LateMax: 4 * ms, LateSum: 4 * ms}},
			},
			wakeups: 2,
		},
		{
			name: "a tick of 2.5 periods misses two, without a burst", until: 61 * ms,
			jobs: []script{{period: 10 * ms, takes: []time.Duration{25 * ms}}},
			want: []result{{At: []time.Duration{10 * ms, 35 * ms, 40 * ms, 50 * ms, 60 * ms}, Account: Account{
				Ticks: 5, Missed: 1, LateMax: 5 * ms, LateSum: 5 * ms, TickMax: 25 * ms, TickSum: 25 * ms}}},
			wakeups: 6,
		},
		{
			name: "late by exactly a period is a missed tick", until: 40 * ms,
			jobs:    []script{{period: 10 * ms}},
			late:    []time.Duration{10 * ms},
			want:    []result{{At: []time.Duration{20 * ms, 30 * ms}, Account: Account{Ticks: 2, Missed: 1}}},
			wakeups: 3,
		},
		{
			name: "late by less is not", until: 30 * ms,
			jobs:    []script{{period: 10 * ms}},
			late:    []time.Duration{9 * ms},
			want:    []result{{At: []time.Duration{19 * ms, 20 * ms}, Account: Account{Ticks: 2, LateMax: 9 * ms, LateSum: 9 * ms}}},
			wakeups: 3,
		},
		{
			name: "late by a hundred periods", until: 1020 * ms,
			jobs:    []script{{period: 10 * ms}},
			late:    []time.Duration{1003 * ms},
			want:    []result{{At: []time.Duration{1013 * ms}, Account: Account{Ticks: 1, Missed: 100, LateMax: 3 * ms, LateSum: 3 * ms}}},
			wakeups: 2,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &scriptClock{now: 7 * time.Second}
			c.end = c.now + test.until
			c.late = test.late
			l := &lane{newClock: func() (clock, error) { return c, nil }}
			if err := l.Init(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := make([]result, len(test.jobs))
			accounts := make([]account, len(test.jobs))
			for i, s := range test.jobs {
				j := newJob(s.period, &accounts[i], func(context.Context) bool {
					n := len(got[i].At)
					got[i].At = append(got[i].At, c.now-l.epoch)
					if n < len(s.takes) {
						c.now += s.takes[n]
					}
					return true
				})
				if !l.ask(&l.joining, j) {
					t.Fatal("the lane is closed")
				}
			}
			if err := l.Run(t.Context()); !errors.Is(err, errEnd) {
				t.Fatalf("Run: %v", err)
			}
			for i := range got {
				got[i].Account = accounts[i].snapshot()
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if n := l.wakeups.Load(); n != test.wakeups {
				t.Errorf("%d wake-ups, want %d", n, test.wakeups)
			}
			for i := range accounts {
				a := &accounts[i]
				asked := uint64((c.end - l.epoch - 1) / test.jobs[i].period)
				if done := a.ticks.Load() + a.missed.Load(); done != asked {
					t.Errorf("job %d: ticks and missed ones are %d, the period asks for %d", i, done, asked)
				}
			}
		})
	}
}

func startLane(t *testing.T) (l *lane, stop func()) {
	l = &lane{newClock: newBubbleClock}
	if err := l.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- l.Run(ctx) }()
	return l, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func TestHoldEnds(t *testing.T) {
	t.Run("by its tick", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, stop := startLane(t)
			defer stop()
			var a account
			j := newJob(time.Millisecond, &a, nil)
			j.tick = func(context.Context) bool { return a.ticks.Load() < 4 }
			l.hold(t.Context(), j)
			if n := a.ticks.Load(); n != 5 {
				t.Errorf("%d ticks, want 5", n)
			}
		})
	})
	t.Run("by its context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, stop := startLane(t)
			defer stop()
			var a account
			j := newJob(time.Millisecond, &a, func(context.Context) bool { return true })
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond+time.Microsecond)
			defer cancel()
			l.hold(ctx, j)
			n := a.ticks.Load()
			if n != 10 {
				t.Errorf("%d ticks, want 10", n)
			}
			time.Sleep(time.Second)
			if more := a.ticks.Load(); more != n {
				t.Errorf("%d ticks after it left", more-n)
			}
		})
	})
	t.Run("by the lane's end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, stop := startLane(t)
			var a account
			j := newJob(time.Millisecond, &a, func(context.Context) bool { return true })
			held := make(chan struct{})
			go func() {
				defer close(held)
				l.hold(context.Background(), j)
			}()
			time.Sleep(time.Second)
			stop()
			<-held
			l.hold(context.Background(), j) // returns at once
		})
	})
}

// A job that leaves by its tick just when its context ends may stay again.
func TestHoldLeavesOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, stop := startLane(t)
		defer stop()
		var a account
		ctx, cancel := context.WithCancel(t.Context())
		j := newJob(time.Millisecond, &a, func(context.Context) bool {
			cancel()
			return false
		})
		l.hold(ctx, j)
		j.tick = func(context.Context) bool { return a.ticks.Load() < 9 }
		l.hold(t.Context(), j)
		if n := a.ticks.Load(); n != 10 {
			t.Errorf("%d ticks, want 10: a request to leave outlived the stay", n)
		}
	})
}

// What a job misses while it is in no lane counts when it is back.
func TestMissedOutsideOfLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, stop := startLane(t)
		defer stop()
		var a account
		j := newJob(10*time.Millisecond, &a, func(context.Context) bool { return false })
		l.hold(t.Context(), j)
		time.Sleep(75 * time.Millisecond)
		l.hold(t.Context(), j)
		want := Account{Ticks: 2, Missed: 6, LateMax: 5 * time.Millisecond, LateSum: 5 * time.Millisecond}
		if diff := cmp.Diff(want, a.snapshot()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

func TestTickAllocatesNothing(t *testing.T) {
	c := &scriptClock{now: time.Second}
	l := &lane{clock: c, epoch: c.now}
	k := &keeper{monitor: &quietMonitor{}, attached: integrity.StateWatching, memory: &coldMemory{shared: true}}
	k.job = newJob(time.Millisecond, &k.account, k.tick)
	k.job.next = c.now
	l.jobs = []*job{k.job}
	ctx := t.Context()
	if n := testing.AllocsPerRun(1000, func() {
		deadline, _ := l.earliest()
		c.now = deadline
		l.due(ctx)
	}); n != 0 {
		t.Errorf("%v allocations for each tick", n)
	}
	if k.account.ticks.Load() < 1000 {
		t.Errorf("only %d ticks were done", k.account.ticks.Load())
	}
}
