// SPDX-License-Identifier: MIT

package daemon

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// account counts what ticks do. One goroutine at a time writes it; any may
// read it meanwhile.
type account struct {
	ticks, missed, failed atomic.Uint64
	lateMax, lateSum      atomic.Int64
	tickMax, tickSum      atomic.Int64
	findings              atomic.Uint64
}

// tick counts one that began late after its deadline and took so long.
func (a *account) tick(late, took time.Duration, missed uint64) {
	a.ticks.Store(a.ticks.Load() + 1)
	if missed != 0 {
		a.missed.Store(a.missed.Load() + missed)
	}
	a.lateSum.Store(a.lateSum.Load() + int64(late))
	a.tickSum.Store(a.tickSum.Load() + int64(took))
	if int64(late) > a.lateMax.Load() {
		a.lateMax.Store(int64(late))
	}
	if int64(took) > a.tickMax.Load() {
		a.tickMax.Store(int64(took))
	}
}

func (a *account) snapshot() Account {
	return Account{
		Ticks:   a.ticks.Load(),
		Missed:  a.missed.Load(),
		Failed:  a.failed.Load(),
		LateMax: time.Duration(a.lateMax.Load()),
		LateSum: time.Duration(a.lateSum.Load()),
		TickMax: time.Duration(a.tickMax.Load()),
		TickSum: time.Duration(a.tickSum.Load()),
	}
}

// add sums up two accounts.
func (a Account) add(b Account) Account {
	return Account{
		Ticks:   a.Ticks + b.Ticks,
		Missed:  a.Missed + b.Missed,
		Failed:  a.Failed + b.Failed,
		LateMax: max(a.LateMax, b.LateMax),
		LateSum: a.LateSum + b.LateSum,
		TickMax: max(a.TickMax, b.TickMax),
		TickSum: a.TickSum + b.TickSum,
	}
}

// usage reads the CPU time of this process, and when that was.
func usage() (at, cpu, user, system time.Duration, err error) {
	var ru unix.Rusage
	if err = unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		return
	}
	var ts unix.Timespec
	if err = unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		return
	}
	return monotonic(), time.Duration(ts.Nano()), time.Duration(ru.Utime.Nano()), time.Duration(ru.Stime.Nano()), nil
}
