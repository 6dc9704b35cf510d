// SPDX-License-Identifier: MIT

package stress

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// ReloadConfig says what Reload does.
type ReloadConfig struct {
	Rounds int
	Module string // kvmaccess.ko
}

// Reload unloads and loads the module, which is loaded before and after,
// while requests are under way, VMs come and go, and subscribers listen.
func Reload(ctx context.Context, c ReloadConfig) (*Report, error) {
	r := newReport("reload")
	k, err := tinyvm.Open()
	if err != nil {
		return r, err
	}
	defer k.Close()
	stay, err := k.StartGuests(tinyvm.Halting, 2)
	if err != nil {
		return r, err
	}
	warm := newReport("")
	err = reload(ctx, k, ReloadConfig{Rounds: c.Rounds / 10, Module: c.Module}, warm)
	if err == nil {
		var f flat
		if f, err = newFlat(r); err == nil {
			err = reload(ctx, k, c, r)
		}
		if err == nil {
			err = f.check(r)
		}
	}
	for _, g := range stay {
		err = errors.Join(err, g.Close())
	}
	return r, err
}

func reload(ctx context.Context, k *tinyvm.KVM, c ReloadConfig, r *Report) error {
	read := startReaders(ctx, r, 3)
	stop := make(chan struct{})
	churned := make(chan error, 1)
	go func() { churned <- churn(k, stop, r, func() error { return nil }) }()
	err := reloads(ctx, c, r, read)
	close(stop)
	return errors.Join(err, <-churned, read.stop())
}

func reloads(ctx context.Context, c ReloadConfig, r *Report, read *readers) error {
	for range c.Rounds {
		// Each of the module's lives sees requests.
		for start := read.reads.Load(); read.reads.Load() < start+10; time.Sleep(time.Millisecond) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if read.failed() {
				return errors.New("reading failed")
			}
		}
		start := time.Now()
		if err := Unload(10 * time.Second); err != nil {
			return err
		}
		unloaded := time.Now()
		if err := boot.LoadModule(c.Module, ""); err != nil {
			return err
		}
		r.Add("times loaded and unloaded", 1)
		r.Add("ms of unloading", unloaded.Sub(start).Milliseconds())
		r.Add("ms of loading", time.Since(unloaded).Milliseconds())
	}
	return nil
}

// Unload unloads the module, and waits as long as limit for those that use it.
func Unload(limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		err := unix.DeleteModule("kvmaccess", unix.O_NONBLOCK)
		if err == nil {
			return nil
		}
		if time.Now().After(end) || !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("unload the module: %w", err)
		}
	}
}
