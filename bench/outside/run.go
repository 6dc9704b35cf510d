// SPDX-License-Identifier: MIT

package outside

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// wallNice is the priority of an emulator that runs by the wall's clock.
const wallNice = -10

// Run is one run of a plan on an emulated host.
type Run struct {
	Plan    sample.Plan
	CPUs    int           // of the host; the instruction clock has one
	Dir     string        // with the programs
	Timeout time.Duration // for each host
	Stall   time.Duration // without a word of a host until it is given up; 0: stallLimit
	Log     *slog.Logger
}

// Result is what a run gave.
type Result struct {
	Host    inside.Host
	Samples []sample.Sample // in the order in which they were taken
	// Elsewhere is how many CPUs of this machine were busy with other things
	// than the run, on average.
	Elsewhere float64
	// Restarts is how often the host had come to a standstill.
	Restarts int
}

// A host that says nothing for stallLimit stands still. QEMU 7.2 does that to
// about one host in four while its guest boots by the instruction clock: it
// interrupts the nested guest where interrupts are off, and the guest waits for
// a lock that it holds itself. Another host goes on with the samples that are
// still to be taken, maxRestarts times. Each is given twice as long as the one
// before, in case this machine is merely slow.
const (
	stallLimit  = 45 * time.Second
	maxRestarts = 5
)

var errStall = errors.New("the host stands still")

// Take boots a host and has the samples taken there. If all of them are there
// but the host then ends badly, the result comes with an error.
func (r *Run) Take(ctx context.Context) (*Result, error) {
	result := new(Result)
	start := time.Now()
	before, err := busy()
	if err != nil {
		return nil, err
	}
	var own time.Duration
	for {
		cpu, err := r.boot(ctx, result)
		own += cpu
		complete := len(result.Samples) == len(r.Plan.Steps())
		switch {
		case errors.Is(err, errStall) && !complete && result.Restarts < maxRestarts:
			result.Restarts++
			r.Log.Warn("starting another host", "why", err, "samples", len(result.Samples))
			continue
		case err != nil && !complete:
			return nil, err
		}
		after, busyErr := busy()
		if busyErr != nil {
			return nil, errors.Join(err, busyErr)
		}
		result.Elsewhere = max(0, float64(after-before-own)/float64(time.Since(start)))
		return result, err
	}
}

// boot boots one host, adds the samples that it takes to the result, and
// returns the CPU time that all of it took.
func (r *Run) boot(ctx context.Context, result *Result) (time.Duration, error) {
	plan := r.Plan
	plan.Done = len(result.Samples)
	text, err := json.Marshal(plan)
	if err != nil {
		return 0, err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	args := []string{filepath.Join(r.Dir, "vmfixture"), "run", "--timeout", r.Timeout.String()}
	if plan.Clock == sample.Icount {
		args = append(args, "--icount")
	} else {
		// The emulator's time stamp counters run on the machine's own: they
		// are in step, and cheaper to read than any other clock there is.
		args = append(args, "--smp", strconv.Itoa(r.CPUs), "--append", "tsc=reliable")
		// What else runs on this machine would take time from the host's
		// clock. Where this is not allowed, nice(1) says so and goes on.
		args = append([]string{"nice", "-n", strconv.Itoa(wallNice)}, args...)
	}
	args = append(args,
		"--file", filepath.Join(r.Dir, "kvmaccessd"),
		"--", filepath.Join(r.Dir, "benchinside"), string(text))
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if plan.Clock == sample.Wall {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	}
	// It takes its emulator down with it.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if cmd.SysProcAttr != nil {
		// Where the kernel groups processes by session, priorities count
		// within a group only: the group has one of its own (sched(7)). Where
		// it does not, or does not allow it, there is nothing to do.
		group := fmt.Sprintf("/proc/%d/autogroup", cmd.Process.Pid)
		if err := os.WriteFile(group, []byte(strconv.Itoa(wallNice)), 0); err != nil {
			r.Log.Info("the emulator's priority stays as it is", "why", err)
		}
	}
	limit := r.stall() << result.Restarts
	watchdog := time.AfterFunc(limit, func() { stop(errStall) })
	received := r.receive(out, result, func() { watchdog.Reset(limit) })
	watchdog.Stop()
	end := cmd.Wait()
	// What it waited for, the emulator, counts as its own.
	cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if errors.Is(context.Cause(ctx), errStall) {
		return cpu, errStall
	}
	return cpu, errors.Join(received, end)
}

func (r *Run) stall() time.Duration {
	if r.Stall != 0 {
		return r.Stall
	}
	return stallLimit
}

// receive adds samples to the result until the last message, and calls alive
// for each.
func (r *Run) receive(from io.Reader, result *Result, alive func()) (err error) {
	defer func() { // so that the sender does not wait for a reader
		if _, drain := io.Copy(io.Discard, from); drain != nil {
			err = errors.Join(err, drain)
		}
	}()
	want, first := len(r.Plan.Steps()), len(result.Samples)
	start := time.Now()
	decoder := json.NewDecoder(from)
	for {
		var m inside.Message
		switch err := decoder.Decode(&m); {
		case err == io.EOF:
			return fmt.Errorf("the run ended after %d of %d samples", len(result.Samples), want)
		case err != nil:
			rest, _ := io.ReadAll(io.LimitReader(decoder.Buffered(), 200))
			return fmt.Errorf("after %d of %d samples: %w, before %q", len(result.Samples), want, err, bytes.TrimSpace(rest))
		}
		alive()
		switch {
		case m.Host != nil:
			result.Host = *m.Host
			start = time.Now()
		case m.Sample != nil:
			if len(result.Samples) == want {
				return fmt.Errorf("more than %d samples", want)
			}
			result.Samples = append(result.Samples, *m.Sample)
			n := len(result.Samples)
			if every := len(r.Plan.Periods); n%every == 0 {
				left := time.Since(start) / time.Duration(n-first) * time.Duration(want-n)
				r.Log.Info("repetition is done", "clock", r.Plan.Clock, "number", n/every, "of", r.Plan.Repetitions,
					"left", left.Round(time.Second))
			}
		case m.Done:
			if result.Host.CPUs == 0 || len(result.Samples) != want {
				return fmt.Errorf("the run says it is done after %d of %d samples", len(result.Samples), want)
			}
			return nil
		}
	}
}
