// SPDX-License-Identifier: MIT

// Package peers measures what other ways to look at a guest's objects cost, in
// the same run and with the same guest and objects as KvmAccess.
package peers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/objects"
	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/bench/soaker"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// Row is what a peer costs, repetition by repetition.
type Row struct {
	Peer         string    `json:"peer"`
	Looks        uint64    `json:"looks"`        // in all repetitions
	Instructions []float64 `json:"instructions"` // of one look: what the counting loop lacks
	// Without and With are how long the guest's work took, in ns, in pairs,
	// without and with looks each WorkPeriod.
	Without []int64 `json:"without_ns"`
	With    []int64 `json:"with_ns"`
	// Held is for how long the guest was stopped at a look, in ns: of peers
	// that stop it.
	Held []int64 `json:"held_ns,omitempty"`
}

// Run is what was measured on one host.
type Run struct {
	Kernel  string `json:"kernel"`
	QEMU    string `json:"qemu"`  // the guest's
	Bytes   int    `json:"bytes"` // of memory in a look
	Rows    []Row  `json:"rows"`
	Objects []Size `json:"objects"`
}

// Size is one of the objects that are looked at.
type Size struct {
	Name  string `json:"name"`
	Bytes int    `json:"bytes"`
}

// Periods of looks: while costs are counted, and while the guest works.
const (
	Period     = 50 * time.Millisecond
	WorkPeriod = 100 * time.Millisecond
)

// watchPeriod is that of the watch while its cost is counted: what is so small
// needs more of it.
const watchPeriod = 5 * time.Millisecond

// calm is before the guest works, and before looks are counted.
const calm = 300 * time.Millisecond

// looksInWindow is how many looks a window has.
const looksInWindow = 40

// workMiB is what the guest works on each time.
const workMiB = 8

func now() int64 {
	t, err := inside.Monotonic()
	if err != nil {
		panic(err) // CLOCK_MONOTONIC is always there
	}
	return int64(t)
}

// Measure measures all peers n times each, on a host with one CPU.
func Measure(ctx context.Context, n int, alive func(string)) (run *Run, err error) {
	if err := inside.LoadModule(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "peers-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s := &site{dir: dir, gdb: filepath.Join(dir, "gdb")}
	s.guest, err = fixture.Start(ctx, fixture.Config{Name: "watched", Args: []string{"-gdb", "unix:" + s.gdb + ",server=on,wait=off"}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.guest.Kill()) }()
	alive("the guest is up")
	if s.client, err = kvmaccess.New(); err != nil {
		return nil, err
	}
	defer s.client.Close()
	if s.found, err = objects.Find(ctx, s.client, s.guest.PID); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.found.Memory.Close()) }()
	if s.slots, err = s.client.Memslots(ctx, s.found.VM.ID); err != nil {
		return nil, err
	}
	alive("the objects are found")
	run = &Run{}
	if err := s.describe(ctx, run); err != nil {
		return nil, err
	}
	for _, p := range append(s.peers(), peer{name: Watch}) {
		row := Row{Peer: p.name}
		s.held = nil
		if err := s.measure(ctx, p, n, &row, alive); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		row.Held = s.held
		run.Rows = append(run.Rows, row)
	}
	return run, nil
}

func (s *site) describe(ctx context.Context, run *Run) error {
	host, err := inside.Describe()
	if err != nil {
		return err
	}
	run.Kernel = host.Kernel
	version, err := s.guest.Monitor(ctx, "info version")
	if err != nil {
		return err
	}
	run.QEMU = strings.TrimSpace(version)
	for _, r := range s.found.Regions {
		run.Objects = append(run.Objects, Size{r.Name, r.Length})
		run.Bytes += r.Length
	}
	return nil
}

func (s *site) measure(ctx context.Context, p peer, n int, row *Row, alive func(string)) (err error) {
	loops, err := inside.StartSoakers()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loops.Stop()) }()
	if err := inside.Pause(ctx, 3*time.Second); err != nil {
		return err
	}
	period := Period
	if p.name == Watch {
		period = watchPeriod
	}
	for range n {
		const window = looksInWindow * Period
		off, err := inside.Window(ctx, loops.Count, window/2)
		if err != nil {
			return err
		}
		var on sample.Window
		looks, err := s.looking(ctx, p, period, func() (err error) {
			on, err = inside.Window(ctx, loops.Count, window)
			return err
		})
		if err != nil {
			return err
		}
		if err := inside.Pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
		again, err := inside.Window(ctx, loops.Count, window/2)
		if err != nil {
			return err
		}
		if looks == 0 {
			return errors.New("no look in a window")
		}
		row.Looks += looks
		row.Instructions = append(row.Instructions, inside.Lacks(off.Add(again), on)*soaker.LoopInstructions/float64(looks))
		alive(p.name)
	}
	for range n {
		// Those without and with looks begin alike.
		if err := inside.Pause(ctx, calm); err != nil {
			return err
		}
		without, err := inside.Work(ctx, s.guest, workMiB)
		if err != nil {
			return err
		}
		var with time.Duration
		if _, err := s.looking(ctx, p, WorkPeriod, func() (err error) {
			with, err = inside.Work(ctx, s.guest, workMiB)
			return err
		}); err != nil {
			return err
		}
		row.Without, row.With = append(row.Without, int64(without)), append(row.With, int64(with))
		alive(p.name + ", at work")
	}
	return nil
}

// looking lets a peer look at the guest each period while do runs, and returns
// how often it did.
func (s *site) looking(ctx context.Context, p peer, period time.Duration, do func() error) (looks uint64, err error) {
	if p.name == Watch {
		return s.watching(ctx, period, do)
	}
	if p.start != nil {
		if err := p.start(ctx); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, p.stop(ctx)) }()
	}
	// Once for what is needed only once.
	if err := p.look(ctx); err != nil {
		return 0, err
	}
	var count atomic.Uint64
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		ticker := time.NewTicker(period)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				done <- nil
				return
			case <-ticker.C:
			}
			if err := p.look(ctx); err != nil {
				done <- err
				return
			}
			count.Add(1)
		}
	}()
	err = inside.Pause(ctx, calm)
	before := count.Load()
	if err == nil {
		err = do()
	}
	looks = count.Load() - before
	close(stop)
	return looks, errors.Join(err, <-done)
}

func (s *site) watching(ctx context.Context, period time.Duration, do func() error) (looks uint64, err error) {
	// QEMU writes registers back after others have looked at them, and an AMD
	// processor's KVM keeps the lower halves of SYSENTER_* then.
	if s.found.VCPU, err = s.client.VCPU(ctx, s.found.VM.ID, 0); err != nil {
		return 0, err
	}
	items, err := s.found.Items(ctx)
	if err != nil {
		return 0, err
	}
	watcher, err := kvmaccess.NewWatcher()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, watcher.Close()) }()
	w, err := watcher.New(ctx, s.found.VM.ID, kvmaccess.WatchConfig{Period: period})
	if err != nil {
		return 0, err
	}
	if _, err := w.Add(ctx, items...); err != nil {
		return 0, err
	}
	// The first ticks are the worker's.
	if err := inside.Pause(ctx, calm); err != nil {
		return 0, err
	}
	before, err := w.Stats(ctx)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	after, err := w.Stats(ctx)
	if err == nil && (after.Events > 0 || after.Different+after.NotResident+after.NoMemslot > 0) {
		e, _ := watcher.Receive(ctx)
		err = fmt.Errorf("a guest that nobody attacks is not as expected: %+v, %+v", after, e)
	}
	return after.Ticks - before.Ticks, err
}
