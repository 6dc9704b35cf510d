// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

func startTimer(t *testing.T) *timer {
	t.Helper()
	c, err := newTimer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// TestTimer only says what must hold on any machine, however busy.
func TestTimer(t *testing.T) {
	c := startTimer(t)
	const period = 2 * time.Millisecond
	deadline := c.Now() + period
	for range 20 {
		if err := c.Wait(deadline, period); err != nil {
			t.Fatal(err)
		}
		if now := c.Now(); now < deadline {
			t.Fatalf("it returned %v before the deadline", deadline-now)
		}
		deadline += period
	}
	// Deadlines that the repetition does not hit.
	for _, d := range []time.Duration{time.Microsecond, 5 * time.Millisecond, -time.Second, 3 * time.Millisecond} {
		deadline = c.Now() + d
		if err := c.Wait(deadline, period); err != nil {
			t.Fatal(err)
		}
		if now := c.Now(); now < deadline {
			t.Fatalf("it returned %v before the deadline", deadline-now)
		}
	}
}

func TestTimerWake(t *testing.T) {
	c := startTimer(t)
	// Before the wait.
	c.Wake()
	if err := c.Wait(noDeadline, 0); err != nil {
		t.Fatal(err)
	}
	// During the wait: without the wake it would never end.
	for range 100 {
		go c.Wake()
		if err := c.Wait(noDeadline, 0); err != nil {
			t.Fatal(err)
		}
	}
	// A deadline is kept after a wake.
	go c.Wake()
	deadline := c.Now() + 3*time.Millisecond
	for c.Now() < deadline {
		if err := c.Wait(deadline, 0); err != nil {
			t.Fatal(err)
		}
	}
}

// A wake that takes its time does not disarm what Wait arms after it.
func TestTimerSlowWake(t *testing.T) {
	c := startTimer(t)
	const period = time.Millisecond
	deadline := c.Now() + period

	c.waking.Lock() // Wake, half done
	c.woken.Store(true)
	waited := make(chan error, 1)
	go func() { waited <- c.Wait(deadline, period) }()
	select {
	case err := <-waited:
		t.Fatalf("Wait returned (%v) before Wake had set the timer", err)
	case <-time.After(20 * period):
	}
	if err := c.set(1, 0); err != nil {
		t.Error(err)
	}
	c.waking.Unlock()
	if err := <-waited; err != nil {
		t.Fatal(err)
	}

	// Nobody wakes any more: the timer alone ends these.
	for range 3 {
		go func() { waited <- c.Wait(deadline, period) }()
		select {
		case err := <-waited:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("the timer does not expire any more")
		}
		deadline += period
	}
}

func TestTimerClosed(t *testing.T) {
	c := startTimer(t)
	c.Close()
	if err := c.Wait(c.Now()+time.Second, 0); err == nil {
		t.Error("waiting on a closed timer succeeded")
	}
}

// quietMonitor never finds anything.
type quietMonitor struct{ monitor }

func (quietMonitor) Tick(context.Context) ([]integrity.Finding, error) { return nil, nil }
func (quietMonitor) State() integrity.State                            { return integrity.StateWatching }
func (quietMonitor) Accepted() []integrity.Accepted                    { return nil }

// BenchmarkTick is what the schedule itself takes at its shortest period.
func BenchmarkTick(b *testing.B) {
	l := &lane{newClock: func() (clock, error) { return newTimer() }}
	if err := l.Init(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer l.Shutdown()
	k := &keeper{monitor: quietMonitor{}, attached: integrity.StateWatching, memory: &coldMemory{shared: true}}
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	k.job = newJob(MinPeriod, &k.account, func(ctx context.Context) bool {
		return k.tick(ctx) && k.account.ticks.Load()+1 < uint64(b.N)
	})
	_, before, _, _, err := usage()
	if err != nil {
		b.Fatal(err)
	}
	go l.Run(ctx)
	l.hold(ctx, k.job)
	_, after, _, _, err := usage()
	if err != nil {
		b.Fatal(err)
	}
	a := k.account.snapshot()
	b.ReportMetric(float64(after-before)/float64(a.Ticks), "cpu-ns/op")
	b.ReportMetric(float64(a.LateSum)/float64(a.Ticks), "late-ns/op")
	b.ReportMetric(float64(a.Missed), "missed")
}
