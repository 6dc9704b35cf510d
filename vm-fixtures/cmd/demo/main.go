// SPDX-License-Identifier: MIT

// Command demo shows the whole chain on running guests: module, programs,
// daemon, findings. It runs on a KVM host, under "vmfixture run" or "vmfixture
// here", and fails if anything that it shows is not as it should be.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
)

// period is that of the daemon; a finding has to come within two of them.
const period = time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is one demonstration.
type demo struct {
	out     string // directory of what it leaves
	dir     string // of what it does not
	say     io.Writer
	web, db *guest.Guest
	daemon  *monitor.Daemon
	changes int // that attacks made, each of which was found
}

func run(ctx context.Context) (err error) {
	d := demo{out: os.Getenv(host.OutEnv)}
	if d.out == "" {
		return fmt.Errorf("%s is not set: this runs under 'vmfixture run' (make demo)", host.OutEnv)
	}
	transcript, err := os.Create(filepath.Join(d.out, "transcript.txt"))
	if err != nil {
		return err
	}
	d.say = io.MultiWriter(os.Stdout, transcript)
	if d.dir, err = os.MkdirTemp("", "kvmaccess-demo-"); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.end(), os.RemoveAll(d.dir), transcript.Close())
	}()
	for _, step := range []func(context.Context) error{
		d.startGuests, d.startMonitor, d.showGuests, d.stayQuiet, d.attack, d.showCost,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return d.stopMonitor(ctx)
}

func (d *demo) title(format string, args ...any) {
	fmt.Fprintf(d.say, "\n== "+format+"\n", args...)
}

func (d *demo) line(format string, args ...any) { fmt.Fprintf(d.say, format+"\n", args...) }

func (d *demo) startGuests(ctx context.Context) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	d.title("Two guests on a KVM host with Linux %s", unix.ByteSliceToString(u.Release[:]))
	start := time.Now()
	var wg sync.WaitGroup
	var errs [2]error
	wg.Go(func() {
		d.web, errs[0] = guest.Start(ctx, guest.Config{Name: "web1", UUID: "0d5f3c1e-52ab-4c66-9a0e-1b6f20a7e001", CPUs: 2})
	})
	wg.Go(func() {
		d.db, errs[1] = guest.Start(ctx, guest.Config{Name: "db1", UUID: "0d5f3c1e-52ab-4c66-9a0e-1b6f20a7e002", CPUs: 1})
	})
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	d.line("web1 (2 vCPUs, process %d) and db1 (1 vCPU, process %d) are up after %.1f s", d.web.PID, d.db.PID, time.Since(start).Seconds())
	return nil
}

func (d *demo) startMonitor(ctx context.Context) error {
	d.title("The module is loaded, the daemon started at a period of %v", period)
	if err := boot.LoadModule(filepath.Join(os.Getenv(host.Env), host.ModuleFile), ""); err != nil {
		return err
	}
	d.line("insmod %s", host.ModuleFile)
	d.line("kvmaccessd --period %v", period)
	var err error
	if d.daemon, err = monitor.Start(ctx, d.dir, "--period", period.String()); err != nil {
		return err
	}
	if err := d.daemon.Watching(ctx, d.web.Name, d.db.Name); err != nil {
		return err
	}
	return d.showWatches(ctx)
}

// showWatches says what the module compares by itself.
func (d *demo) showWatches(ctx context.Context) error {
	for {
		vms, err := d.daemon.Client.VMs(ctx)
		if err != nil {
			return err
		}
		up := 0
		for _, vm := range vms {
			if vm.Watch != nil && vm.Watch.Ticks > 0 {
				up++
			}
		}
		if up == 2 {
			for _, vm := range vms {
				d.line("%s: mode %s: every %v the module compares %d items in place, %d bytes and registers", vm.Name, vm.Mode, vm.Watch.Effective, vm.Watch.Items, vm.Watch.Bytes)
			}
			return nil
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// kvmaccess runs the program, shows the first lines that it prints (0: all)
// and leaves all that it prints in a file, with -o json if that is asked for.
func (d *demo) kvmaccess(ctx context.Context, file string, lines int, args ...string) error {
	full := args
	if strings.HasSuffix(file, ".json") {
		full = append(args[:len(args):len(args)], "-o", "json")
		lines = -1
	}
	cmd := exec.CommandContext(ctx, "kvmaccess", full...)
	cmd.Dir = d.dir // where the daemon's socket is
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("kvmaccess %s: %w: %s", strings.Join(full, " "), err, stderr.String())
	}
	if len(out) == 0 {
		return fmt.Errorf("kvmaccess %s prints nothing", strings.Join(full, " "))
	}
	if lines >= 0 {
		text := strings.SplitAfter(string(out), "\n")
		rest := 0
		if lines > 0 && len(text) > lines+1 {
			text, rest = text[:lines], len(text)-1-lines
		}
		d.line("\n$ kvmaccess %s\n%s", strings.Join(args, " "), strings.TrimRight(strings.Join(text, ""), "\n"))
		if rest > 0 {
			d.line("... and %d lines more in %s", rest, file)
		}
	}
	return os.WriteFile(filepath.Join(d.out, file), out, 0o644)
}

func (d *demo) showGuests(ctx context.Context) error {
	d.title("What can be seen from outside, with nothing known of the guests")
	for _, show := range []struct {
		file  string
		lines int
		args  []string
	}{
		{"vms.txt", 0, []string{"vms"}},
		{"vms.json", 0, []string{"vms"}},
		{"guest.txt", 0, []string{"guest", "web1"}},
		{"ps.txt", 12, []string{"ps", "web1"}},
		{"modules.txt", 0, []string{"modules", "web1"}},
		{"regs.txt", 0, []string{"regs", "web1"}},
		{"regs.json", 0, []string{"regs", "web1"}},
		{"gdt.txt", 20, []string{"gdt", "web1"}},
		{"idt.txt", 12, []string{"idt", "web1"}},
		{"syscalls.txt", 12, []string{"syscalls", "web1"}},
		{"check.txt", 0, []string{"check", "web1"}},
	} {
		if err := d.kvmaccess(ctx, show.file, show.lines, show.args...); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) findings(ctx context.Context) ([]daemon.Record, error) {
	return d.daemon.Client.Findings(ctx, daemon.Query{})
}

func (d *demo) stayQuiet(ctx context.Context) error {
	d.title("Honest guests: no findings in 3 periods")
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(3 * period):
	}
	all, err := d.findings(ctx)
	if err != nil {
		return err
	}
	if len(all) > 0 {
		return fmt.Errorf("%d findings on honest guests: %s", len(all), all[0].Message)
	}
	vms, err := d.daemon.Client.VMs(ctx)
	if err != nil {
		return err
	}
	for _, vm := range vms {
		d.line("%s: none; so far %d ticks of the module, and %d looks of the daemon", vm.Name, vm.Watch.Ticks, vm.Ticks)
	}
	return nil
}

// attack has web1 attacked, one way after another.
func (d *demo) attack(ctx context.Context) error {
	seen := uint64(0)
	for i, attack := range monitor.Attacks {
		d.title("Attack on web1: insmod %s.ko in the guest", attack)
		changes, err := d.web.Attack(ctx, attack, "")
		if err != nil {
			return err
		}
		done := time.Now()
		found, err := d.found(ctx, monitor.Expect(changes), seen, done)
		if err != nil {
			return fmt.Errorf("%s: %w", attack, err)
		}
		for _, r := range found {
			d.line("%v later: %s", max(0, r.Time.Sub(done)).Round(10*time.Millisecond), r.Message)
			seen = max(seen, r.Seq)
		}
		d.changes += len(found)
		if i == 0 {
			text, err := json.MarshalIndent(found[0], "", "  ")
			if err != nil {
				return err
			}
			d.line("%s", text)
		}
		if err := d.web.EndAttack(ctx, attack); err != nil {
			return err
		}
		if err := d.cleared(ctx, len(found), seen); err != nil {
			return fmt.Errorf("%s: %w", attack, err)
		}
	}
	d.title("And db1, which nobody attacked")
	all, err := d.findings(ctx)
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.VM.Name != d.web.Name {
			return fmt.Errorf("a finding on %s: %s", r.VM.Name, r.Message)
		}
	}
	d.line("no findings")
	return nil
}

// found waits for what has to be found, after the finding with the number
// after, and checks it.
func (d *demo) found(ctx context.Context, want []monitor.Expected, after uint64, done time.Time) ([]daemon.Record, error) {
	for {
		all, err := d.findings(ctx)
		if err != nil {
			return nil, err
		}
		var found []daemon.Record
		for _, e := range want {
			for _, r := range all {
				if r.Seq <= after || r.Kind != integrity.KindChanged || r.VM.Name != d.web.Name || !e.Same(r.Finding) {
					continue
				}
				if err := e.Check(r.Finding); err != nil {
					return nil, fmt.Errorf("finding %q: %w", r.Message, err)
				}
				if late := r.Time.Sub(done); late > 2*period {
					return nil, fmt.Errorf("finding %q came %v after the attack, later than two periods", r.Message, late)
				}
				found = append(found, r)
				break
			}
		}
		if len(found) == len(want) {
			return found, nil
		}
		// A finding is told some time after it was made.
		if time.Since(done) > 5*period {
			return nil, fmt.Errorf("%d of %d changes were found: want %+v, have %+v", len(found), len(want), want, all)
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

// cleared waits until n findings are said not to hold any more.
func (d *demo) cleared(ctx context.Context, n int, after uint64) error {
	for start := time.Now(); ; {
		all, err := d.findings(ctx)
		if err != nil {
			return err
		}
		cleared := 0
		for _, r := range all {
			if r.Seq > after && r.Kind == integrity.KindCleared {
				cleared++
			}
		}
		if cleared >= n {
			d.line("rmmod: all is as it was again")
			return nil
		}
		if time.Since(start) > 10*period {
			return fmt.Errorf("%d of %d findings were cleared after the attack had ended", cleared, n)
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(50 * time.Millisecond):
		return nil
	}
}

func (d *demo) showCost(ctx context.Context) error {
	d.title("What the module and the daemon say they cost")
	return d.kvmaccess(ctx, "stats.txt", 0, "stats", "--socket", filepath.Base(monitor.Socket(d.dir)))
}

func (d *demo) stopMonitor(ctx context.Context) error {
	d.title("The end: SIGTERM, rmmod")
	if err := d.daemon.Stop(ctx); err != nil {
		return err
	}
	d.daemon = nil
	text, err := os.ReadFile(monitor.Findings(d.dir))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(d.out, "findings.jsonl"), text, 0o644); err != nil {
		return err
	}
	if err := unix.DeleteModule("kvmaccess", unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("rmmod kvmaccess: %w", err)
	}
	d.line("kvmaccessd ended by itself, the module is unloaded, %d findings are in findings.jsonl", strings.Count(string(text), "\n"))
	d.title("In short")
	d.line("%d attacks made %d changes: each was found within two periods. Nothing was found where", len(monitor.Attacks), d.changes)
	d.line("nobody attacked. The guests were neither changed nor stopped, nothing runs in them, and")
	d.line("nothing was known of their kernel: no symbol file, no debug info, no profile.")
	return nil
}

// end ends what is still there.
func (d *demo) end() error {
	var err error
	if d.daemon != nil {
		err = d.daemon.Kill()
	}
	for _, g := range []*guest.Guest{d.web, d.db} {
		if g != nil {
			err = errors.Join(err, g.Kill())
		}
	}
	return err
}
