// SPDX-License-Identifier: MIT

package inside

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Sleep lets a time pass to within some 50 µs, the kernel's slack. Go's own
// timers wait in whole milliseconds where nothing else is to be done, and what
// they time is at random times by the millisecond only.
func Sleep(ctx context.Context, length time.Duration) error {
	now, err := Monotonic()
	if err != nil {
		return err
	}
	until := unix.NsecToTimespec(int64(now + length))
	for ctx.Err() == nil {
		switch err := unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &until, nil); {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EINTR):
			return fmt.Errorf("sleep: %w", err)
		}
	}
	return context.Cause(ctx)
}
