// SPDX-License-Identifier: MIT

package daemon

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// account counts what ticks do. One goroutine at a time writes it; any may
// read it meanwhile.
type account struct {
	ticks, missed, failed atomic.Uint64
	lateMax, lateSum      atomic.Int64
	tickMax, tickSum      atomic.Int64
	lookSum               atomic.Int64 // of tickSum, in watch mode: when the VM had been attached to
	findings, accepted    atomic.Uint64

	mu    sync.Mutex
	reads kvmaccess.MemoryStats // by memories that are not in use any more
	// memory is the one in use, if it counts.
	memory counted
}

// counted is a memory that knows what was read of it; *kvmaccess.Memory is one.
type counted interface {
	Stats() kvmaccess.MemoryStats
	Close() error
}

// count counts what is read through memory from now on, nil: through none, and
// closes the one before.
func (a *account) count(memory guest.Memory) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.memory != nil {
		a.reads = a.reads.Add(a.memory.Stats())
		_ = a.memory.Close()
	}
	a.memory, _ = memory.(counted)
}

func (a *account) memoryReads() kvmaccess.MemoryStats {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.memory == nil {
		return a.reads
	}
	return a.reads.Add(a.memory.Stats())
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

// look counts a tick in watch mode.
func (a *account) look(late, took time.Duration) {
	a.tick(late, took, 0)
	a.lookSum.Store(a.lookSum.Load() + int64(took))
}

func (a *account) snapshot() Account {
	return Account{
		Ticks:    a.ticks.Load(),
		Missed:   a.missed.Load(),
		Failed:   a.failed.Load(),
		Accepted: a.accepted.Load(),
		LateMax:  time.Duration(a.lateMax.Load()),
		LateSum:  time.Duration(a.lateSum.Load()),
		TickMax:  time.Duration(a.tickMax.Load()),
		TickSum:  time.Duration(a.tickSum.Load()),
		Reads:    a.memoryReads(),
	}
}

// add sums up two accounts.
func (a Account) add(b Account) Account {
	return Account{
		Ticks:    a.Ticks + b.Ticks,
		Missed:   a.Missed + b.Missed,
		Failed:   a.Failed + b.Failed,
		Accepted: a.Accepted + b.Accepted,
		LateMax:  max(a.LateMax, b.LateMax),
		LateSum:  a.LateSum + b.LateSum,
		TickMax:  max(a.TickMax, b.TickMax),
		TickSum:  a.TickSum + b.TickSum,
		Reads:    a.Reads.Add(b.Reads),
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
