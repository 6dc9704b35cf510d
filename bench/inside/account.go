// SPDX-License-Identifier: MIT

package inside

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/userspace/daemon"
)

// look is what the product says of itself at one moment.
type look struct {
	daemon.Stats
	switches uint64
}

// account is what the product used between two looks, without what looking
// costs: one request's worth, which a third look right after the second shows.
//
// With T checks between the first two looks and k between the last two, a
// check costs x and a request r: the first difference is T·x + r, the second
// k·x + r. The account is T·x.
func account(before, after, again *look) (sample.Account, error) {
	for _, l := range []*look{before, after, again} {
		if l.Module == nil {
			return sample.Account{}, fmt.Errorf("the daemon has no account of the module: %s", l.ModuleError)
		}
	}
	if after.Failed != before.Failed {
		return sample.Account{}, fmt.Errorf("%d checks failed", after.Failed-before.Failed)
	}
	if after.Findings != before.Findings {
		return sample.Account{}, fmt.Errorf("%d findings on a guest that nobody attacks", after.Findings-before.Findings)
	}
	ticks, more := after.Ticks-before.Ticks, again.Ticks-after.Ticks
	if ticks <= more {
		return sample.Account{}, fmt.Errorf("%d checks in the window, %d while looking: the daemon does not check", ticks, more)
	}
	scale := float64(ticks) / float64(ticks-more)
	own := func(of func(*look) time.Duration) time.Duration {
		window, request := of(after)-of(before), of(again)-of(after)
		return max(0, time.Duration(scale*float64(window-request)))
	}
	return sample.Account{
		Elapsed:   after.Time - before.Time,
		Daemon:    own(func(l *look) time.Duration { return l.CPU }),
		Worker:    own(func(l *look) time.Duration { return l.Module.Worker }),
		Interrupt: own(func(l *look) time.Duration { return l.Module.Interrupt }),
		Longest:   after.TickMax,
		Ticks:     ticks,
		Missed:    after.Missed - before.Missed,
		Switches:  after.switches - before.switches,
	}, nil
}

// switches is how many times a thread of a process was put on a CPU: the third
// field of /proc/PID/task/TID/schedstat (Documentation/scheduler/sched-stats.rst).
func switches(pid int) (uint64, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	var sum uint64
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has just ended
		}
		if err != nil {
			return 0, err
		}
		var running, waiting, times uint64
		if _, err := fmt.Sscan(string(text), &running, &waiting, &times); err != nil {
			return 0, fmt.Errorf("%s: %q: %w", file, text, err)
		}
		sum += times
	}
	return sum, nil
}
