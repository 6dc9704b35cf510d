// SPDX-License-Identifier: MIT

package tinyvm

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Thread runs a vCPU on an operating system thread of its own.
type Thread struct {
	vcpu *VCPU
	tid  int
	stop atomic.Bool
	done chan struct{}
	err  error
}

// Handler is called on the vCPU's thread for each exit; false ends the run.
type Handler func(*Exit) (more bool, err error)

// Ignore is a Handler that lets port accesses and MMIO pass, reads giving
// zeros, and fails at everything else.
func Ignore(e *Exit) (more bool, err error) {
	if e.Reason != ExitIO && e.Reason != ExitMMIO {
		return false, fmt.Errorf("the guest ended: %v", e)
	}
	if !e.Write {
		clear(e.Data)
	}
	return true, nil
}

// Start runs the vCPU until Stop, or until the handler ends it. The thread
// keeps to the host CPUs given, if any are. It returns once the thread is
// about to enter the guest.
func (v *VCPU) Start(h Handler, cpus ...int) (*Thread, error) {
	t := &Thread{vcpu: v, done: make(chan struct{})}
	ready := make(chan error)
	go func() {
		// Not unlocked: the thread ends with this function.
		runtime.LockOSThread()
		defer close(t.done)
		t.tid = unix.Gettid()
		err := t.Pin(cpus...)
		ready <- err
		if err == nil {
			t.err = t.loop(h)
		}
	}()
	if err := <-ready; err != nil {
		return nil, err
	}
	return t, nil
}

func (t *Thread) loop(h Handler) error {
	for !t.stop.Load() {
		e, err := t.vcpu.Run()
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if more, err := h(e); !more || err != nil {
			return err
		}
	}
	return nil
}

// Pin limits the thread to host CPUs. None means no change.
func (t *Thread) Pin(cpus ...int) error {
	if len(cpus) == 0 {
		return nil
	}
	return Pin(t.tid, cpus...)
}

// Pin limits a thread to host CPUs; thread 0 is the caller's own.
func Pin(tid int, cpus ...int) error {
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
	}
	if err := unix.SchedSetaffinity(tid, &set); err != nil {
		return fmt.Errorf("thread %d to CPUs %v: %w", tid, cpus, err)
	}
	return nil
}

// TID is the thread's id in its own pid namespace.
func (t *Thread) TID() int { return t.tid }

// Done is closed when the thread has ended.
func (t *Thread) Done() <-chan struct{} { return t.done }

// Err is why the thread ended by itself; call it after Done.
func (t *Thread) Err() error { return t.err }

// Stop makes the thread leave the guest and end, and waits for that. The error
// is that of a thread that had ended before, or failed.
func (t *Thread) Stop() error {
	t.stop.Store(true)
	t.vcpu.setImmediate(true)
	defer t.vcpu.setImmediate(false)
	for {
		// Go's runtime uses this signal for itself and expects that others
		// send it. One alone may come just before KVM_RUN; the flag makes that
		// return, but a vCPU that waits in it needs the signal.
		err := unix.Tgkill(unix.Getpid(), t.tid, unix.SIGURG)
		select {
		case <-t.done:
			return t.err
		case <-time.After(time.Millisecond):
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal thread %d: %w", t.tid, err)
		}
	}
}
