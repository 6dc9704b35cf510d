// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"syscall"
	"time"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/oklog/run"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Daemon watches the VMs of this host.
type Daemon struct {
	config Config
	host   host
	log    *slog.Logger
}

// service is a part of the daemon. All are brought up one after the other,
// run side by side, and are shut down in the reverse order once none runs.
type service interface {
	Name() string
	// Init fails on what would keep the service from its work. What it left
	// behind then, Shutdown takes away.
	Init(ctx context.Context) error
	// Run works until ctx ends, which is no error.
	Run(ctx context.Context) error
	Shutdown() error
}

// New makes a daemon. The error says what is wrong with the configuration.
func New(config Config, log *slog.Logger) (*Daemon, error) {
	if err := config.Check(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return &Daemon{config: config, host: thisHost(), log: log}, nil
}

// services makes all parts, in the order in which they come up: the one first
// that most likely fails.
func (d *Daemon) services() ([]service, error) {
	boot, err := d.host.bootID()
	if err != nil {
		return nil, err
	}
	p := newProblems(d.log)
	l := &lane{newClock: d.host.newClock}
	j := newJournal(&d.config, d.log, p)
	w := &watcher{
		config: &d.config, host: &d.host, boot: boot, lane: l, journal: j, problems: p, log: d.log,
		keepers: map[kvmaccess.VMID]*keeper{},
	}
	if d.config.CPUBudget != 0 {
		w.budget = newBudget(d.config.CPUBudget, d.config.Text, d.log)
	}
	s := &server{
		path: d.config.Socket, watcher: w, journal: j, problems: p, log: d.log,
		started: time.Now(), mode: d.config.Mode, period: d.config.Period, alive: 15 * time.Second,
	}
	return []service{w, j, l, s}, nil
}

// Run watches all VMs until ctx ends or the process gets SIGINT or SIGTERM,
// which is no error. It fails at once on whatever would keep it from its work:
// no module, no permission, another daemon.
func (d *Daemon) Run(ctx context.Context) (err error) {
	// There is no work for more threads than that. And told a number, the
	// runtime does not look every second whether it should be another one.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(min(2, runtime.NumCPU())))

	services, err := d.services()
	if err != nil {
		return err
	}
	var group run.Group
	group.Add(run.SignalHandler(ctx, os.Interrupt, syscall.SIGTERM))
	for _, s := range services {
		defer func() {
			if serr := s.Shutdown(); serr != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", s.Name(), serr))
			}
		}()
		if err := s.Init(ctx); err != nil {
			return err
		}
		running, stop := context.WithCancel(context.Background())
		group.Add(func() error {
			if err := s.Run(running); err != nil {
				return fmt.Errorf("%s: %w", s.Name(), err)
			}
			return nil
		}, func(error) { stop() })
	}
	_, _ = sd.SdNotify(false, sd.SdNotifyReady)
	d.log.Info("started", "pid", os.Getpid(), "mode", d.config.Mode, "period", d.config.Period, "budget", d.config.CPUBudget, "socket", d.config.Socket, "findings", d.config.Findings)
	err = group.Run()
	_, _ = sd.SdNotify(false, sd.SdNotifyStopping)
	if errors.Is(err, run.ErrSignal) || ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		d.log.Info("stopping", "reason", err)
		err = nil
	}
	return err
}
