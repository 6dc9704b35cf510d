// SPDX-License-Identifier: MIT

package inside

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// guestName is the name of the guest that is watched.
const guestName = "watched"

// Run carries out a plan on this host and emits what it finds. The host is one
// that vmfixture booted.
func Run(ctx context.Context, plan sample.Plan, log *slog.Logger, emit func(Message) error) (err error) {
	payload := os.Getenv(host.Env)
	if payload == "" {
		return fmt.Errorf("%s is not set: this runs under 'vmfixture run'", host.Env)
	}
	if err := LoadModule(); err != nil {
		return err
	}
	about, err := Describe()
	if err != nil {
		return err
	}
	if err := emit(Message{Host: about}); err != nil {
		return err
	}

	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	log.Info("starting the guest")
	g, err := guest.Start(ctx, guest.Config{Name: guestName})
	if err != nil {
		return err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
		defer cancel()
		err = errors.Join(err, g.Stop(stop))
	}()
	symbols := filepath.Join(dir, guestName+".kallsyms")
	text, err := g.Symbols(ctx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(symbols, brief(text), 0o600); err != nil {
		return err
	}
	loops, err := StartSoakers()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loops.Stop()) }()

	if err := emit(Message{Guest: true}); err != nil {
		return err
	}
	if err := Pause(ctx, warmUp); err != nil {
		return err
	}
	steps := plan.Steps()
	if plan.Done < 0 || plan.Done > len(steps) {
		return fmt.Errorf("%d of %d steps are said to be done", plan.Done, len(steps))
	}
	for i, step := range steps {
		if i < plan.Done {
			continue
		}
		d := &daemonRun{mode: plan.Mode, dir: filepath.Join(dir, fmt.Sprint("sample-", i+1)), symbols: symbols, period: step.Period}
		s, err := take(ctx, plan, step, d, loops)
		if err != nil {
			return fmt.Errorf("repetition %d at %v: %w", step.Repetition, step.Period, err)
		}
		s.Order = i + 1
		if err := s.Validate(); err != nil {
			return err
		}
		if err := emit(Message{Sample: s}); err != nil {
			return err
		}
	}
	return emit(Message{Done: true})
}

const (
	// warmUp is from the start of the guest to the first window: a kernel
	// that has just booted has things left to do.
	warmUp = 5 * time.Second
	// margin is between a look at the product's account and the monitored
	// window, at both ends: time for the request to be over.
	margin = 10 * time.Millisecond
	// rest is from the end of the daemon to the next window: time for the
	// kernel to clear up after it.
	rest = 300 * time.Millisecond
)

// take takes one sample.
func take(ctx context.Context, plan sample.Plan, step sample.Step, d *daemonRun, loops Soakers) (_ *sample.Sample, err error) {
	s := &sample.Sample{Clock: plan.Clock, Repetition: step.Repetition, Period: step.Period, CPUs: len(loops)}
	if s.Off, err = Window(ctx, loops.Count, step.Window()/2); err != nil {
		return nil, err
	}
	if err := d.start(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.kill())
		}
	}()
	before, err := d.look(ctx)
	if err != nil {
		return nil, err
	}
	if err := Pause(ctx, margin); err != nil {
		return nil, err
	}
	if s.On, err = Window(ctx, loops.Count, step.Window()); err != nil {
		return nil, err
	}
	if err := Pause(ctx, margin); err != nil {
		return nil, err
	}
	after, err := d.look(ctx)
	if err != nil {
		return nil, err
	}
	again, err := d.look(ctx)
	if err != nil {
		return nil, err
	}
	if s.Account, err = account(before, after, again); err != nil {
		return nil, err
	}
	if err := d.stop(ctx); err != nil {
		return nil, err
	}
	if err := Pause(ctx, rest); err != nil {
		return nil, err
	}
	off, err := Window(ctx, loops.Count, step.Window()/2)
	if err != nil {
		return nil, err
	}
	s.Off = s.Off.Add(off)
	return s, nil
}

// brief is a symbol list (/proc/kallsyms) without functions that are local to
// their file: half of it. The daemon reads the list once at its start, before
// anything is measured, but on the instruction clock that would take the
// larger part of a run.
func brief(list []byte) []byte {
	out := make([]byte, 0, len(list))
	for line := range bytes.Lines(list) {
		if fields := bytes.Fields(line); len(fields) >= 3 && string(fields[1]) != "t" {
			out = append(out, line...)
		}
	}
	return out
}

// Pause lets a time pass.
func Pause(ctx context.Context, length time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(length):
		return nil
	}
}

// Describe describes the host that this runs on.
func Describe() (*Host, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	clock, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		return nil, err
	}
	return &Host{
		Kernel:      unix.ByteSliceToString(u.Release[:]),
		CPUs:        runtime.NumCPU(),
		Clocksource: strings.TrimSpace(string(clock)),
	}, nil
}
