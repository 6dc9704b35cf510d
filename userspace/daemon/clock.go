// SPDX-License-Identifier: MIT

package daemon

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// clock is time as a lane sees it. Wait is for one goroutine; Wake is for any.
type clock interface {
	// Now is CLOCK_MONOTONIC.
	Now() time.Duration
	// Wait returns at the deadline, or before it after a Wake. repeat is when,
	// after this deadline, the next one is likely; a wrong guess only costs.
	// A deadline of noDeadline waits for Wake alone.
	Wait(deadline, repeat time.Duration) error
	// Wake ends the Wait that goes on or, if none does, the next one.
	Wake()
	Close() error
}

const noDeadline = time.Duration(1<<63 - 1)

// monotonic reads CLOCK_MONOTONIC without a system call: the clock that
// time.Since goes by is this one. It is never behind it, and ahead of it by no
// more than the shortest time between two readings.
var monotonic = func() func() time.Duration {
	var start time.Time
	var base, ahead time.Duration
	for i := range 100 {
		var ts unix.Timespec
		before := time.Now()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			panic(fmt.Sprintf("clock_gettime(CLOCK_MONOTONIC): %v", err))
		}
		if gap := time.Since(before); i == 0 || gap < ahead {
			start, base, ahead = before, time.Duration(ts.Nano()), gap
		}
	}
	return func() time.Duration { return base + time.Since(start) }
}()

// timer is the clock of the host, a timerfd(2) that repeats in the kernel: in
// steady state waiting takes one read and arms nothing.
//
// Why so: a time.Timer wakes two threads at each expiry, the one that polls
// and the runtime's monitor, and the former only to the millisecond. A thread
// that blocks in clock_nanosleep(2) keeps the monitor polling. A goroutine
// that waits for a descriptor wakes one thread, its own, as long as it makes no
// system call by which the runtime wakes the monitor: hence the raw ones here.
// Locking the goroutine to its thread would add a hand-over between threads.
type timer struct {
	file *os.File
	raw  syscall.RawConn
	fd   int

	read  func(fd uintptr) bool // kept: no allocation for each wait
	count [8]byte               // expirations
	errno syscall.Errno         // of the last read

	expiry   time.Duration // what is armed; 0: nothing known
	interval time.Duration

	woken  atomic.Bool
	waking sync.Mutex // held from when woken is set until the timer is
}

func newTimer() (*timer, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("timerfd_create: %w", err)
	}
	t := &timer{fd: fd, file: os.NewFile(uintptr(fd), "timerfd")}
	if t.raw, err = t.file.SyscallConn(); err != nil {
		t.file.Close()
		return nil, fmt.Errorf("timerfd: %w", err)
	}
	t.read = func(fd uintptr) bool {
		_, _, t.errno = unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&t.count)), unsafe.Sizeof(t.count))
		return t.errno != unix.EAGAIN
	}
	return t, nil
}

func (t *timer) Now() time.Duration { return monotonic() }

func (t *timer) Wait(deadline, repeat time.Duration) error {
	if t.expiry != deadline || t.interval != repeat {
		if err := t.set(deadline, repeat); err != nil {
			return err
		}
		t.expiry, t.interval = deadline, repeat
	}
	// Either this sees that Wake was called, or Wake sets the timer after it
	// was set here.
	if t.wasWoken() {
		return nil
	}
	if err := t.raw.Read(t.read); err != nil {
		return fmt.Errorf("timerfd: %w", err)
	}
	if t.errno != 0 {
		return fmt.Errorf("timerfd: read: %w", t.errno)
	}
	if t.wasWoken() {
		return nil
	}
	expirations := *(*uint64)(unsafe.Pointer(&t.count))
	t.expiry += time.Duration(expirations) * t.interval
	return nil
}

// wasWoken says whether Wake was called since it last said so. If so, what the
// timer is set to is not what Wait set any more. It lets Wake finish first: the
// timer, once Wake has set it, expires no second time.
func (t *timer) wasWoken() bool {
	if !t.woken.Load() {
		return false
	}
	t.waking.Lock()
	defer t.waking.Unlock()
	t.woken.Store(false)
	t.expiry = 0
	return true
}

// set arms the timer at an absolute time and every repeat from then on.
func (t *timer) set(deadline, repeat time.Duration) error {
	var spec unix.ItimerSpec
	if deadline != noDeadline {
		// A time of 0 would disarm it.
		spec.Value = unix.NsecToTimespec(max(int64(deadline), 1))
		spec.Interval = unix.NsecToTimespec(int64(repeat))
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_TIMERFD_SETTIME, uintptr(t.fd), unix.TFD_TIMER_ABSTIME,
		uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("timerfd_settime: %w", errno)
	}
	return nil
}

func (t *timer) Wake() {
	t.waking.Lock()
	defer t.waking.Unlock()
	t.woken.Store(true)
	// In the past: it expires at once. Its only failure would be a closed
	// descriptor, and then nobody waits.
	_ = t.set(1, 0)
}

func (t *timer) Close() error { return t.file.Close() }
