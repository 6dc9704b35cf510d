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

// soakers are the counting loops, one on each CPU.
type soakers []*soaker.Soaker

func startSoakers() (soakers, error) {
	var all soakers
	for cpu := range runtime.NumCPU() {
		s, err := soaker.Start(cpu)
		if err != nil {
			return nil, errors.Join(err, all.stop())
		}
		all = append(all, s)
	}
	return all, nil
}

func (all soakers) stop() error {
	var err error
	for _, s := range all {
		err = errors.Join(err, s.Stop())
	}
	return err
}

func (all soakers) count() uint64 {
	var sum uint64
	for _, s := range all {
		sum += s.Count()
	}
	return sum
}

// window lets a time pass and returns what the loops counted in it.
func (all soakers) window(ctx context.Context, length time.Duration) (sample.Window, error) {
	start, err := monotonic()
	if err != nil {
		return sample.Window{}, err
	}
	before := all.count()
	select {
	case <-ctx.Done():
		return sample.Window{}, context.Cause(ctx)
	case <-time.After(length):
	}
	end, err := monotonic()
	if err != nil {
		return sample.Window{}, err
	}
	return sample.Window{Elapsed: end - start, Loops: all.count() - before}, nil
}

// monotonic is CLOCK_MONOTONIC.
func monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("CLOCK_MONOTONIC: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
