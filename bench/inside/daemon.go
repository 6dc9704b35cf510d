// SPDX-License-Identifier: MIT

package inside

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

const (
	// startLimit is for the daemon to watch the guest, askLimit to answer,
	// stopLimit to end.
	startLimit = time.Minute
	askLimit   = 30 * time.Second
	stopLimit  = 30 * time.Second
	// settle is how long the daemon runs before its window: what it needs
	// once, at the start, is no cost of a period.
	settle = 500 * time.Millisecond
)

// daemonRun is one run of kvmaccessd, at one period.
type daemonRun struct {
	mode    daemon.Mode
	dir     string // its own; made by start
	symbols string // file with the guest's symbols
	period  time.Duration

	cmd    *exec.Cmd
	output bytes.Buffer
	exit   chan struct{} // closed when it has ended
	err    error         // how, once exit is closed
	client *daemon.Client
}

// start starts the daemon and returns once it has watched the guest for a
// while.
func (d *daemonRun) start(ctx context.Context) error {
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return err
	}
	config := daemon.Default()
	config.Mode, config.Period = d.mode, d.period
	config.Text = 0 // none of the five kinds of objects
	config.Socket = filepath.Join(d.dir, "socket")
	config.StateDir = filepath.Join(d.dir, "state")
	config.Symbols = d.symbols
	config.VMs = map[string]daemon.VMConfig{
		guestName: {Ranges: []integrity.MemoryRange{{Symbol: "entry_SYSCALL_64", Length: sample.MemoryRange}}},
	}
	text, err := yaml.Marshal(config)
	if err != nil {
		return err
	}
	file := filepath.Join(d.dir, "kvmaccessd.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	d.cmd = exec.Command("kvmaccessd", "--config", file)
	d.cmd.Stdout, d.cmd.Stderr = &d.output, &d.output
	if err := d.cmd.Start(); err != nil {
		return err
	}
	d.exit = make(chan struct{})
	go func() {
		d.err = d.cmd.Wait()
		close(d.exit)
	}()
	if err := d.watching(ctx); err != nil {
		return d.explain(errors.Join(err, d.abort()))
	}
	return nil
}

// watching waits until the guest is watched and the daemon has settled.
func (d *daemonRun) watching(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	last := errors.New("it does not watch the guest")
	for {
		select {
		case <-limited.Done():
			return fmt.Errorf("after %v: %w", startLimit, last)
		case <-d.exit:
			return fmt.Errorf("it ended: %v", d.err)
		case <-time.After(20 * time.Millisecond):
		}
		if d.client == nil {
			if d.client, last = daemon.Dial(filepath.Join(d.dir, "socket")); last != nil {
				continue
			}
		}
		vms, err := d.client.VMs(limited)
		if err != nil {
			last = err
			continue
		}
		if len(vms) != 1 {
			last = fmt.Errorf("it knows %d VMs", len(vms))
			continue
		}
		vm := vms[0]
		if vm.State != daemon.StateWatching || vm.Reason != "" {
			last = fmt.Errorf("the guest is %q: %s", vm.State, vm.Reason)
			continue
		}
		if vm.Findings != 0 {
			return fmt.Errorf("%d findings on a guest that nobody attacks", vm.Findings)
		}
		if ticksOf(vm.Account, vm.Watch) > 0 {
			break
		}
	}
	if err := Pause(ctx, settle); err != nil {
		return err
	}
	return d.betweenTicks(ctx)
}

// betweenTicks returns a good while before the next check, where checks are
// rare enough for it to matter in which window one falls.
func (d *daemonRun) betweenTicks(ctx context.Context) error {
	// The first request takes more than those to come.
	first, err := d.stats(ctx)
	if err != nil || d.period < 50*time.Millisecond {
		return err
	}
	for {
		if err := Pause(ctx, d.period/20); err != nil {
			return err
		}
		now, err := d.stats(ctx)
		if err != nil {
			return err
		}
		if now.Ticks != first.Ticks {
			return Pause(ctx, d.period/4)
		}
		if now.Time-first.Time > 3*d.period {
			return fmt.Errorf("no check in %v", now.Time-first.Time)
		}
	}
}

// stats asks the daemon for its account.
func (d *daemonRun) stats(ctx context.Context) (daemon.Stats, error) {
	limited, cancel := context.WithTimeoutCause(ctx, askLimit, fmt.Errorf("no answer after %v", askLimit))
	defer cancel()
	stats, err := d.client.Stats(limited)
	if err != nil && limited.Err() != nil {
		err = context.Cause(limited)
	}
	if err == nil && d.mode == daemon.ModeWatch {
		// The checks are the module's; the daemon's own ticks are few.
		stats.Ticks, stats.Missed = 0, 0
		for _, vm := range stats.VMs {
			if vm.Watch == nil {
				return stats, fmt.Errorf("it does not watch VM %s by the module", vm.Name)
			}
			stats.Ticks += vm.Watch.Ticks
			stats.Missed += vm.Watch.Missed
			stats.TickMax = max(stats.TickMax, vm.Watch.Longest)
		}
	}
	return stats, err
}

// ticksOf is how often a VM was checked, by the daemon or by the module.
func ticksOf(a daemon.Account, watch *daemon.WatchAccount) uint64 {
	if watch != nil {
		return watch.Ticks
	}
	return a.Ticks
}

// look asks the daemon for its account.
func (d *daemonRun) look(ctx context.Context) (*look, error) {
	stats, err := d.stats(ctx)
	if err != nil {
		return nil, d.explain(errors.Join(err, d.abort()))
	}
	n, err := switches(d.cmd.Process.Pid)
	if err != nil {
		return nil, d.explain(err)
	}
	return &look{Stats: stats, switches: n}, nil
}

// stop ends the daemon as a service manager would.
func (d *daemonRun) stop(ctx context.Context) error {
	d.client.Close()
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return d.explain(err)
	}
	select {
	case <-d.exit:
		if d.err != nil {
			return d.explain(d.err)
		}
		return os.RemoveAll(d.dir)
	case <-time.After(stopLimit):
		return d.explain(errors.Join(fmt.Errorf("it still runs %v after SIGTERM", stopLimit), d.abort()))
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), d.kill())
	}
}

// abort ends a daemon that does not do what it should, and lets it say what it
// is about: SIGQUIT makes Go programs do so.
func (d *daemonRun) abort() error {
	if err := d.cmd.Process.Signal(syscall.SIGQUIT); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.exit:
		return nil
	case <-time.After(stopLimit):
		return errors.Join(errors.New("SIGQUIT does not end it"), d.kill())
	}
}

// kill ends the daemon whatever it does.
func (d *daemonRun) kill() error {
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-d.exit
	return nil
}

// explain adds what the daemon said to an error.
func (d *daemonRun) explain(err error) error {
	return fmt.Errorf("kvmaccessd: %w; it said:\n%s", err, bytes.TrimSpace(d.output.Bytes()))
}
