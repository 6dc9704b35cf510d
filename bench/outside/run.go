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
	Timeout time.Duration // for all of it
	Log     *slog.Logger
}

// Result is what a run gave.
type Result struct {
	Host    inside.Host
	Samples []sample.Sample // in the order in which they were taken
	// Elsewhere is how many CPUs of this machine were busy with other things
	// than the run, on average.
	Elsewhere float64
}

// Take boots a host and has the samples taken there. If all of them are there
// but the host then ends badly, the result comes with an error.
func (r *Run) Take(ctx context.Context) (*Result, error) {
	plan, err := json.Marshal(r.Plan)
	if err != nil {
		return nil, err
	}
	args := []string{"run", "--timeout", r.Timeout.String()}
	if r.Plan.Clock == sample.Icount {
		args = append(args, "--icount")
	} else {
		// The emulator's time stamp counters run on the machine's own: they
		// are in step, and cheaper to read than any other clock there is.
		args = append(args, "--smp", strconv.Itoa(r.CPUs), "--append", "tsc=reliable")
	}
	args = append(args,
		"--file", filepath.Join(r.Dir, "kvmaccessd"),
		"--", filepath.Join(r.Dir, "benchinside"), string(plan))
	args = append([]string{filepath.Join(r.Dir, "vmfixture")}, args...)
	if r.Plan.Clock == sample.Wall {
		// What else runs on this machine would take time from the host's
		// clock. Where this is not allowed, nice(1) says so and goes on.
		args = append([]string{"nice", "-n", strconv.Itoa(wallNice)}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if r.Plan.Clock == sample.Wall {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	}
	// It takes its emulator down with it.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	before, err := busy()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
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
	host, samples, err := r.receive(out)
	end := cmd.Wait()
	if err != nil {
		return nil, errors.Join(err, end)
	}
	after, err := busy()
	if err != nil {
		return nil, errors.Join(err, end)
	}
	// What it waited for, the emulator, counts as its own.
	own := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return &Result{
		Host:      *host,
		Samples:   samples,
		Elsewhere: max(0, float64(after-before-own)/float64(time.Since(start))),
	}, end
}

// receive reads messages to the last.
func (r *Run) receive(from io.Reader) (host *inside.Host, samples []sample.Sample, err error) {
	defer func() { // so that the sender does not wait for a reader
		if _, drain := io.Copy(io.Discard, from); drain != nil {
			err = errors.Join(err, drain)
		}
	}()
	want := len(r.Plan.Steps())
	start := time.Now()
	decoder := json.NewDecoder(from)
	for {
		var m inside.Message
		switch err := decoder.Decode(&m); {
		case err == io.EOF:
			return host, samples, fmt.Errorf("the run ended after %d of %d samples", len(samples), want)
		case err != nil:
			rest, _ := io.ReadAll(io.LimitReader(decoder.Buffered(), 200))
			return host, samples, fmt.Errorf("after %d of %d samples: %w, before %q", len(samples), want, err, bytes.TrimSpace(rest))
		}
		switch {
		case m.Host != nil:
			host = m.Host
			start = time.Now()
		case m.Sample != nil:
			samples = append(samples, *m.Sample)
			if every := len(r.Plan.Periods); len(samples)%every == 0 {
				took := time.Since(start)
				left := took / time.Duration(len(samples)) * time.Duration(want-len(samples))
				r.Log.Info("repetition is done", "clock", r.Plan.Clock, "number", len(samples)/every, "of", r.Plan.Repetitions,
					"left", left.Round(time.Second))
			}
		case m.Done:
			if host == nil || len(samples) != want {
				return host, samples, fmt.Errorf("the run says it is done after %d of %d samples", len(samples), want)
			}
			return host, samples, nil
		}
	}
}
