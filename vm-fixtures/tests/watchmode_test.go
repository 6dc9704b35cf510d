// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
)

// watchesOf are the module's watches of a VM.
func watchesOf(t *testing.T, c *kvmaccess.Client, vm kvmaccess.VMID) []kvmaccess.WatchStats {
	t.Helper()
	all, err := c.Watches(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	var of []kvmaccess.WatchStats
	for _, w := range all {
		if w.VM == vm {
			of = append(of, w)
		}
	}
	return of
}

// In steady state the module ticks, and the daemon does nothing.
func TestWatchModeRests(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	web := sharedGuest(t, "web1")
	d := startDaemon(t, t.TempDir(), "--period", "20ms", "--symbols", symbolFile(t, web))
	watching(t, d, web.Name)
	requests := func() (n uint64) {
		s, err := c.Stats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, op := range s.Ops {
			if op.Command == "vcpu_get" || op.Command == "mem_read" {
				n += op.Count
			}
		}
		return n
	}
	// It may still be at what it does after it has attached.
	eventually(t, 20*time.Second, func() error {
		a, before := statusOf(t, d, web.Name), requests()
		time.Sleep(2 * time.Second)
		after, b := requests(), statusOf(t, d, web.Name)
		if b.Ticks != a.Ticks || after != before {
			return fmt.Errorf("%d rounds and %d requests while nothing happened; before %+v, after %+v\n%s", b.Ticks-a.Ticks, after-before, a.Watch, b.Watch, d.Output())
		}
		if b.Watch.Ticks == a.Watch.Ticks || b.Watch.Items == 0 || b.Watch.Different+b.Watch.NotResident+b.Watch.NoMemslot != 0 {
			return fmt.Errorf("the module does not watch as it should: %+v, then %+v", a.Watch, b.Watch)
		}
		t.Logf("%d ticks, %d items of %d bytes, no rounds, no requests", b.Watch.Ticks-a.Watch.Ticks, b.Watch.Items, b.Watch.Bytes)
		return nil
	})
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// Watches end with a daemon that is killed, and the next one sets them up anew.
func TestWatchModeKilled(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	web := sharedGuest(t, "web1")
	vm := vmOf(t, c, web).ID
	dir, symbols := t.TempDir(), symbolFile(t, web)
	for range 2 {
		d := startDaemon(t, dir, "--period", "20ms", "--symbols", symbols)
		watching(t, d, web.Name)
		eventually(t, 10*time.Second, func() error {
			if w := watchesOf(t, c, vm); len(w) != 1 || w[0].Items == 0 || w[0].Ticks == 0 {
				return fmt.Errorf("the watches while the daemon runs: %+v", w)
			}
			return nil
		})
		if err := d.Kill(); err != nil {
			t.Fatal(err)
		}
		if w := watchesOf(t, c, vm); len(w) != 0 {
			t.Errorf("the watches of a daemon that was killed: %+v", w)
		}
	}
	d := startDaemon(t, dir, "--period", "20ms", "--symbols", symbols)
	watching(t, d, web.Name)
	changes, err := web.Attack(ctx, "lstar_redirect", "")
	if err != nil {
		t.Fatal(err)
	}
	want := monitor.Expect(changes)
	matching(t, d, daemon.Query{VM: web.Name}, want, integrity.KindChanged)
	if err := web.EndAttack(ctx, "lstar_redirect"); err != nil {
		t.Fatal(err)
	}
	matching(t, d, daemon.Query{VM: web.Name}, want, integrity.KindCleared)
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
	if w := watchesOf(t, c, vm); len(w) != 0 {
		t.Errorf("the watches of a daemon that has ended: %+v", w)
	}
}

// What a guest does lawfully is no finding: modules that come and go, and its
// processors.
func TestWatchModeLawful(t *testing.T) {
	ctx := testContext(t)
	g, err := fixture.Start(ctx, fixture.Config{Name: "lawful", CPUs: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Kill(); err != nil {
			t.Error(err)
		}
	})
	d := startDaemon(t, t.TempDir(), "--period", "20ms")
	watching(t, d, g.Name)
	if err := g.LoadProbe(ctx); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		for _, online := range []string{"0", "1"} {
			if err := g.Write(ctx, "/sys/devices/system/cpu/cpu1/online", []byte(online)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(300 * time.Millisecond)
		}
	}
	if all := findings(t, d, daemon.Query{}); len(all) != 0 {
		t.Errorf("findings on an honest guest: %+v", all)
	}
	eventually(t, 10*time.Second, func() error {
		if s := statusOf(t, d, g.Name); s.State != daemon.StateWatching || s.Watch.Different != 0 {
			return fmt.Errorf("after its processor went and came: %+v, %+v", s, s.Watch)
		}
		return nil
	})
	// What comes then is found, on the processor that went and came, too.
	changes, err := g.Attack(ctx, "gdt_callgate", "")
	if err != nil {
		t.Fatal(err)
	}
	want := monitor.Expect(changes)
	matching(t, d, daemon.Query{}, want, integrity.KindChanged)
	if err := g.EndAttack(ctx, "gdt_callgate"); err != nil {
		t.Fatal(err)
	}
	matching(t, d, daemon.Query{}, want, integrity.KindCleared)
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// All of a kernel's code is compared: what the guest's own tables explain is no
// finding, and what they do not is.
func TestWatchModeCode(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := startGuest(t, fixture.Config{Name: "code"})
	t.Cleanup(func() {
		if err := g.Kill(); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	args := []string{"--period", "20ms", "--text", "2s", "--log-level", "debug"}
	d := startDaemon(t, dir, args...)
	watching(t, d, g.Name)
	code := func() daemon.CodeAccount { return *statusOf(t, d, g.Name).Watch.Code }
	passes := func(n uint64) {
		t.Helper()
		last := code().Passes
		eventually(t, time.Minute, func() error {
			if a := code(); a.Passes < last+n {
				return fmt.Errorf("%d passes over the code, want %d more: %+v", a.Passes, last+n-a.Passes, a)
			}
			return nil
		})
	}
	passes(2)
	a := code()
	t.Logf("%d bytes of code, %d passes, each tick %v and a pass %v; %d looks", a.Bytes, a.Passes,
		a.Time/time.Duration(a.Ticks), time.Duration(float64(a.Time)/float64(a.Compared)*float64(a.Bytes)), a.Looks)
	if a.Bytes < 8<<20 || a.Looks != 1 || a.Reason != "" {
		t.Errorf("the code: %+v", a)
	}

	// A static key, and a probe.
	if _, err := g.Exec(ctx, "/bin/busybox", "mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"); err != nil {
		t.Fatal(err)
	}
	lawful := []struct{ file, on, off string }{
		{"/proc/sys/kernel/sched_schedstats", "1", "0"},
		{"/sys/kernel/tracing/kprobe_events", "p:kvmaccess/swapoff __x64_sys_swapoff", ""},
		{"/sys/kernel/tracing/events/kvmaccess/swapoff/enable", "1", "0"},
	}
	for _, l := range lawful {
		if err := g.Write(ctx, l.file, []byte(l.on)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, time.Minute, func() error {
		if s := statusOf(t, d, g.Name); s.Accepted == 0 {
			return fmt.Errorf("what the guest changed of its code was not noticed: %+v, %+v", s, s.Watch.Code)
		}
		return nil
	})
	passes(2)
	if all := findings(t, d, daemon.Query{}); len(all) != 0 {
		t.Errorf("findings on an honest guest: %+v", all)
	}

	// What nobody calls is overwritten, and restored; and so while no daemon runs.
	k, err := guest.Attach(ctx, live(t, c, vmOf(t, c, g)), guest.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	at, ok := k.Image.Lookup("__x64_sys_acct")
	if !ok {
		t.Fatal("the guest has no __x64_sys_acct")
	}
	at += 16
	truth := make([]byte, 3)
	if err := k.Space.Read(ctx, at, truth); err != nil {
		t.Fatal(err)
	}
	lie := []byte{truth[0] ^ 0xff, truth[1] ^ 0xff, truth[2] ^ 0xff}
	told := func(kind integrity.Kind) {
		t.Helper()
		eventually(t, time.Minute, func() error {
			all := findings(t, d, daemon.Query{})
			for _, r := range all {
				if r.Check == "text" && r.Kind == kind && (kind == integrity.KindCleared || strings.Contains(r.Message, "__x64_sys_acct+0x10")) {
					t.Log(r.Message)
					return nil
				}
			}
			return fmt.Errorf("no finding (%s) about code among %+v", kind, all)
		})
	}
	if err := g.Poke(ctx, at, lie); err != nil {
		t.Fatal(err)
	}
	told(integrity.KindChanged)
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
	if err := g.Poke(ctx, at, truth); err != nil {
		t.Fatal(err)
	}
	d = startDaemon(t, dir, args...)
	told(integrity.KindCleared)
	for _, l := range []int{0, 2} {
		if err := g.Write(ctx, lawful[l].file, []byte(lawful[l].off)); err != nil {
			t.Fatal(err)
		}
	}
	passes(2)
	for _, r := range findings(t, d, daemon.Query{}) {
		if r.Check != "text" && r.Object != "cr0" {
			t.Errorf("found besides: %s", r.Message)
		}
	}
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// A CPU budget chooses periods, and others when another VM comes.
func TestWatchModeBudget(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	d := startDaemon(t, t.TempDir(), "--cpu-budget", "1%", "--symbols", symbolFile(t, web))
	watching(t, d, web.Name)
	c := newClient(t)
	spent := func() (sum time.Duration) {
		t.Helper()
		all, err := c.Watches(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range all {
			sum += w.Time
		}
		return sum
	}
	// What ticks take changes with what else the machine does, and the periods
	// with it; that they take what they may does not, by the module's account.
	takes := func(vms func(int) bool) int {
		t.Helper()
		var b daemon.BudgetStatus
		eventually(t, time.Minute, func() error {
			s, err := d.Client.Stats(ctx)
			if err != nil {
				return err
			}
			if b = *s.Budget; !vms(b.VMs) || b.Cost > b.Share || !b.Fits {
				return fmt.Errorf("the budget: %+v", b)
			}
			for _, vm := range s.VMs {
				if vm.Watch.Period != b.Period || vm.Period != b.Period {
					return fmt.Errorf("%s is watched every %v (%v), %+v is chosen", vm.Name, vm.Watch.Period, vm.Period, b)
				}
			}
			start, before := time.Now(), spent()
			time.Sleep(5 * time.Second)
			took := daemon.Share(float64(spent()-before) / float64(time.Since(start)))
			if s, err = d.Client.Stats(ctx); err != nil || s.Budget.VMs != b.VMs || s.Budget.Period != b.Period {
				return fmt.Errorf("of %+v another choice was made: %+v, %v", b, s.Budget, err)
			}
			if took < b.Share/4 || took > b.Share*3/2 {
				return fmt.Errorf("watches took %v with %+v", took, b)
			}
			t.Logf("watches took %v with %+v", took, b)
			return nil
		})
		return b.VMs
	}
	others := takes(func(vms int) bool { return vms > 0 })
	g := startGuest(t, fixture.Config{Name: "second"})
	watching(t, d, g.Name)
	takes(func(vms int) bool { return vms == others+1 })
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	takes(func(vms int) bool { return vms == others })
	if all := findings(t, d, daemon.Query{}); len(all) != 0 {
		t.Errorf("findings on honest guests: %+v", all)
	}
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
	if said := d.Output(); !strings.Contains(said, "chosen by the CPU budget") {
		t.Errorf("the daemon does not say what it chose:\n%s", said)
	}
}

// A VM that dies under its watch is no finding and leaves none behind.
func TestWatchModeDies(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := startGuest(t, fixture.Config{Name: "dies"})
	d := startDaemon(t, t.TempDir(), "--period", "1ms", "--symbols", symbolFile(t, g))
	watching(t, d, g.Name)
	vm := vmOf(t, c, g).ID
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		vms, err := d.Client.VMs(ctx)
		for _, vm := range vms {
			if vm.Name == g.Name {
				err = errors.New("it is still listed")
			}
		}
		if w := watchesOf(t, c, vm); len(w) != 0 {
			err = errors.Join(err, fmt.Errorf("watches are left: %+v", w))
		}
		return err
	})
	if all := findings(t, d, daemon.Query{}); len(all) != 0 {
		t.Errorf("findings on a guest that died: %+v", all)
	}
	health(t, d)
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}
