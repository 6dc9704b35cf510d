// SPDX-License-Identifier: MIT

package inside

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/bench/soaker"
)

// Soakers are the counting loops, one on each CPU.
type Soakers []*soaker.Soaker

// StartSoakers starts them. Stop them.
func StartSoakers() (Soakers, error) {
	var all Soakers
	for cpu := range runtime.NumCPU() {
		s, err := soaker.Start(cpu)
		if err != nil {
			return nil, errors.Join(err, all.Stop())
		}
		all = append(all, s)
	}
	return all, nil
}

// Stop ends the loops.
func (all Soakers) Stop() error {
	var err error
	for _, s := range all {
		err = errors.Join(err, s.Stop())
	}
	return err
}

// Count is how many turns they made, all CPUs together.
func (all Soakers) Count() uint64 {
	var sum uint64
	for _, s := range all {
		sum += s.Count()
	}
	return sum
}

// Window lets a time pass and returns what counting loops counted in it, all of
// them together.
func Window(ctx context.Context, count func() uint64, length time.Duration) (sample.Window, error) {
	start, err := Monotonic()
	if err != nil {
		return sample.Window{}, err
	}
	before := count()
	select {
	case <-ctx.Done():
		return sample.Window{}, context.Cause(ctx)
	case <-time.After(length):
	}
	end, err := Monotonic()
	if err != nil {
		return sample.Window{}, err
	}
	return sample.Window{Elapsed: end - start, Loops: count() - before}, nil
}

// Monotonic is CLOCK_MONOTONIC.
func Monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("CLOCK_MONOTONIC: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// Lacks is how many turns are missing from a window, by the rate in another.
func Lacks(off, on sample.Window) float64 {
	return float64(off.Loops)/float64(off.Elapsed)*float64(on.Elapsed) - float64(on.Loops)
}
