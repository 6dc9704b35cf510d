// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// lane runs ticks at their deadlines, all in one goroutine. Deadlines are
// absolute: they do not drift. Those of equal periods coincide, and so do those
// of a period and its multiples: one wake-up serves them all.
type lane struct {
	newClock func() (clock, error)
	clock    clock
	epoch    time.Duration // all deadlines are whole periods after it
	jobs     []*job        // of the lane's goroutine alone

	changed atomic.Bool // there are joining or leaving jobs
	mu      sync.Mutex
	joining []*job
	leaving []*job
	closed  bool

	wakeups atomic.Uint64
}

// job is a periodic task of a lane.
type job struct {
	period  time.Duration
	account *account
	// tick does the work. It returns false to leave the lane.
	tick func(ctx context.Context) bool
	// next deadline; 0: none yet. It is kept while a job is in no lane, so
	// that the ticks it has not done meanwhile count as missed.
	next time.Duration
	left chan struct{} // receives when the job has left the lane
}

func newJob(period time.Duration, account *account, tick func(context.Context) bool) *job {
	return &job{period: period, account: account, tick: tick, left: make(chan struct{}, 1)}
}

func (l *lane) Name() string { return "schedule" }

// Init starts the clock.
func (l *lane) Init(context.Context) error {
	c, err := l.newClock()
	if err != nil {
		return fmt.Errorf("schedule: %w", err)
	}
	l.clock = c
	if l.epoch == 0 {
		l.epoch = c.Now()
	}
	return nil
}

// Shutdown stops the clock.
func (l *lane) Shutdown() error {
	if l.clock == nil {
		return nil
	}
	return l.clock.Close()
}

// Run runs ticks until ctx ends or the clock fails. Jobs that are in the lane
// then leave it.
func (l *lane) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, l.clock.Wake)
	defer stop()
	defer l.close()
	for {
		deadline, repeat := l.earliest()
		if err := l.clock.Wait(deadline, repeat); err != nil {
			return fmt.Errorf("schedule: %w", err)
		}
		if ctx.Err() != nil {
			return nil
		}
		l.wakeups.Store(l.wakeups.Load() + 1)
		if l.changed.Load() {
			l.change()
		}
		l.due(ctx)
	}
}

// earliest finds the next deadline and the period that it is of.
func (l *lane) earliest() (deadline, repeat time.Duration) {
	deadline = noDeadline
	for _, j := range l.jobs {
		if j.next < deadline || j.next == deadline && j.period < repeat {
			deadline, repeat = j.next, j.period
		}
	}
	return deadline, repeat
}

// due runs the ticks whose deadline has come. What the ticks of one job delay
// of the next one's counts as late there.
func (l *lane) due(ctx context.Context) {
	now := l.clock.Now()
	for i := 0; i < len(l.jobs); {
		j := l.jobs[i]
		if j.next > now {
			i++
			continue
		}
		var missed uint64
		late := now - j.next
		if late >= j.period {
			// These ticks are left out: catching up would come in bursts.
			missed = uint64(late / j.period)
			late %= j.period
		}
		j.next += time.Duration(missed+1) * j.period
		stays := j.tick(ctx)
		end := l.clock.Now()
		j.account.tick(late, end-now, missed)
		now = end
		if !stays {
			l.jobs = append(l.jobs[:i], l.jobs[i+1:]...)
			j.left <- struct{}{}
			continue
		}
		i++
	}
}

// change takes up jobs that join and lets go those that leave.
func (l *lane) change() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.changed.Store(false)
	now := l.clock.Now()
	for _, j := range l.joining {
		if j.next == 0 {
			periods := (now - l.epoch) / j.period
			j.next = l.epoch + (periods+1)*j.period
		}
		l.jobs = append(l.jobs, j)
	}
	for _, j := range l.leaving {
		for i := range l.jobs {
			if l.jobs[i] == j {
				l.jobs = append(l.jobs[:i], l.jobs[i+1:]...)
				j.left <- struct{}{}
				break
			}
		}
	}
	l.joining, l.leaving = nil, nil
}

func (l *lane) close() {
	l.change()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, j := range l.jobs {
		j.left <- struct{}{}
	}
	l.jobs = nil
}

// hold keeps a job in the lane until its tick says that it leaves, ctx ends,
// or the lane stops. The job is the caller's own before and after.
func (l *lane) hold(ctx context.Context, j *job) {
	if !l.ask(&l.joining, j) {
		return
	}
	select {
	case <-j.left:
	case <-ctx.Done():
		l.ask(&l.leaving, j)
		<-j.left
		l.forget(j)
	}
}

// forget drops a request to leave that came after the job had left by itself:
// it would end the job's next stay.
func (l *lane) forget(j *job) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leaving = slices.DeleteFunc(l.leaving, func(k *job) bool { return k == j })
}

func (l *lane) ask(list *[]*job, j *job) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	*list = append(*list, j)
	l.changed.Store(true)
	l.clock.Wake()
	return true
}
