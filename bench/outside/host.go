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
)

// wallNice is the priority of an emulator that runs by the wall's clock.
const wallNice = -10

// A host that says nothing for stallLimit stands still. QEMU does that to some
// hosts while their guests boot by the instruction clock: it interrupts the
// nested guest where interrupts are off, and the guest waits for a lock that it
// holds itself (why, and what makes that rarer: package guest). Another host
// begins anew, or goes on with what is still to be done, maxRestarts times. Each
// is given twice as long as the one before, in case this machine is merely slow.
const (
	stallLimit  = 75 * time.Second
	maxRestarts = 5
)

var errStall = errors.New("the host stands still")

// Host is how programs are run on hosts that are booted for them, one each.
type Host struct {
	Dir     string        // with the programs, of Build
	Flags   []string      // of "vmfixture run"
	Urgent  bool          // it goes before what else runs on this machine
	Timeout time.Duration // for each host
	Stall   time.Duration // without a word of a host until it is given up; 0: stallLimit
	Log     *slog.Logger
}

// NewHost builds the programs and returns a Host that runs them. Close it.
func NewHost(ctx context.Context, log *slog.Logger, timeout time.Duration, flags ...string) (*Host, error) {
	dir, err := os.MkdirTemp("", "kvmaccess-bench-")
	if err != nil {
		return nil, err
	}
	log.Info("building")
	if err := Build(ctx, dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &Host{Dir: dir, Flags: flags, Timeout: timeout, Log: log}, nil
}

// Close removes the programs.
func (h *Host) Close() error { return os.RemoveAll(h.Dir) }

// program is the path of one of the programs.
func (h *Host) program(name string) string { return filepath.Join(h.Dir, name) }

// boot runs a program on a host, hands what it writes to receive, which calls
// alive at each sign of life, and returns the CPU time that all of it took. The
// error is errStall if there was none for too long: twice as long with each of
// the restarts so far.
func (h *Host) boot(ctx context.Context, restarts int, program string, args []string, receive func(from io.Reader, alive func()) error) (time.Duration, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	line := []string{h.program("vmfixture"), "run", "--timeout", h.Timeout.String()}
	if h.Urgent {
		// What else runs on this machine would take time from the host's
		// clock. Where this is not allowed, nice(1) says so and goes on.
		line = append([]string{"nice", "-n", strconv.Itoa(wallNice)}, line...)
	}
	line = append(line, h.Flags...)
	line = append(line, "--file", h.program("kvmaccessd"), "--", h.program(program))
	line = append(line, args...)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	if h.Urgent {
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
	if h.Urgent {
		// Where the kernel groups processes by session, priorities count
		// within a group only: the group has one of its own (sched(7)). Where
		// it does not, or does not allow it, there is nothing to do.
		group := fmt.Sprintf("/proc/%d/autogroup", cmd.Process.Pid)
		if err := os.WriteFile(group, []byte(strconv.Itoa(wallNice)), 0); err != nil {
			h.Log.Info("the emulator's priority stays as it is", "why", err)
		}
	}
	limit := h.Stall
	if limit == 0 {
		limit = stallLimit
	}
	limit <<= restarts
	watchdog := time.AfterFunc(limit, func() { stop(errStall) })
	received := receive(out, func() { watchdog.Reset(limit) })
	watchdog.Stop()
	// So that the sender does not wait for a reader.
	_, drained := io.Copy(io.Discard, out)
	received = errors.Join(received, drained)
	end := cmd.Wait()
	// What it waited for, the emulator, counts as its own.
	cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if errors.Is(context.Cause(ctx), errStall) {
		return cpu, errStall
	}
	return cpu, errors.Join(received, end)
}

// Measure runs a program that calls inside.Serve on a host, and returns its
// result. If the host comes to a standstill, another one begins anew.
func Measure[T any](ctx context.Context, h *Host, program string, args ...string) (*T, error) {
	for restarts := 0; ; restarts++ {
		result := new(T)
		_, err := h.boot(ctx, restarts, program, args, func(from io.Reader, alive func()) error {
			return receive(from, result, alive)
		})
		if errors.Is(err, errStall) && restarts < maxRestarts {
			h.Log.Warn("starting another host", "why", err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", program, err)
		}
		return result, nil
	}
}

// receive reads what inside.Serve writes, up to the result.
func receive(from io.Reader, result any, alive func()) error {
	decoder := json.NewDecoder(from)
	for {
		var line inside.Line
		switch err := decoder.Decode(&line); {
		case err == io.EOF:
			return errors.New("the run ended without a result")
		case err != nil:
			rest, _ := io.ReadAll(io.LimitReader(decoder.Buffered(), 200))
			return fmt.Errorf("%w, before %q", err, bytes.TrimSpace(rest))
		}
		alive()
		if line.Result != nil {
			strict := json.NewDecoder(bytes.NewReader(line.Result))
			strict.DisallowUnknownFields()
			return strict.Decode(result)
		}
	}
}
