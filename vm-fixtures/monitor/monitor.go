// SPDX-License-Identifier: MIT

// Package monitor runs kvmaccessd as tests and the demo need it, and holds
// what it finds against what attacks say they did.
package monitor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
)

// Daemon is a running kvmaccessd with a directory of its own, which outlasts it.
type Daemon struct {
	Dir    string
	Client *daemon.Client

	cmd    *exec.Cmd
	output output
	exit   chan struct{}
	err    error // once exit is closed
}

// output is written by the daemon and read meanwhile.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// Socket, State and Findings are where a daemon with this directory has its
// API, its store, and its findings as JSON lines.
func Socket(dir string) string   { return filepath.Join(dir, "socket") }
func State(dir string) string    { return filepath.Join(dir, "state") }
func Findings(dir string) string { return filepath.Join(dir, "findings.jsonl") }

// Command is kvmaccessd with its files in dir and further arguments.
func Command(dir string, args ...string) *exec.Cmd {
	return exec.Command("kvmaccessd", append([]string{
		"--socket", Socket(dir), "--state-dir", State(dir), "--findings", Findings(dir),
	}, args...)...)
}

// Start starts a daemon and returns once its API answers.
func Start(ctx context.Context, dir string, args ...string) (*Daemon, error) {
	d := &Daemon{Dir: dir, cmd: Command(dir, args...), exit: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = &d.output, &d.output
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.exit)
	}()
	err := d.until(ctx, func() (err error) {
		if d.Client, err = daemon.Dial(Socket(dir)); err != nil {
			return err
		}
		h, err := d.Client.Health(ctx)
		if err == nil && h.PID != d.PID() {
			err = fmt.Errorf("process %d answers at %s", h.PID, Socket(dir))
		}
		return err
	})
	if err != nil {
		return nil, errors.Join(err, d.Kill())
	}
	return d, nil
}

// until tries again and again until it works, the daemon ends, or ctx does.
func (d *Daemon) until(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-d.exit:
			return fmt.Errorf("kvmaccessd ended (%v):\n%s", d.err, d.Output())
		case <-ctx.Done():
			return fmt.Errorf("%w: %w; kvmaccessd says:\n%s", ctx.Err(), err, d.Output())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Watching waits until each of the named guests is watched in full and has
// been checked at least once.
func (d *Daemon) Watching(ctx context.Context, names ...string) error {
	return d.until(ctx, func() error {
		vms, err := d.Client.VMs(ctx)
		if err != nil {
			return err
		}
		watched := map[string]bool{}
		for _, vm := range vms {
			watched[vm.Name] = vm.State == daemon.StateWatching && vm.Reason == "" && vm.Ticks > 0
		}
		for _, name := range names {
			if !watched[name] {
				return fmt.Errorf("%s is not watched: %+v", name, vms)
			}
		}
		return nil
	})
}

// Output is what the daemon said so far.
func (d *Daemon) Output() string { return d.output.String() }

// PID is the daemon's.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Stop ends the daemon by SIGTERM: it must end by itself, without complaint.
func (d *Daemon) Stop(ctx context.Context) error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-d.exit:
		if d.err != nil {
			return fmt.Errorf("kvmaccessd: %w:\n%s", d.err, d.Output())
		}
		return nil
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("kvmaccessd does not end: %w:\n%s", ctx.Err(), d.Output()), d.Kill())
	}
}

// Kill ends the daemon by SIGKILL.
func (d *Daemon) Kill() error {
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-d.exit
	return nil
}
