// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
)

// ownedBy are the module's watches of a VM.
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
	time.Sleep(time.Second)
	a := statusOf(t, d, web.Name)
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
	before := requests()
	time.Sleep(2 * time.Second)
	after := requests()
	b := statusOf(t, d, web.Name)
	t.Logf("%d ticks, %d items of %d bytes, %d rounds, %d requests", b.Watch.Ticks-a.Watch.Ticks, b.Watch.Items, b.Watch.Bytes, b.Ticks-a.Ticks, after-before)
	if b.Watch.Ticks == a.Watch.Ticks || b.Watch.Items == 0 || b.Watch.Different+b.Watch.NotResident+b.Watch.NoMemslot != 0 {
		t.Errorf("the module does not watch as it should: %+v, then %+v", a.Watch, b.Watch)
	}
	if b.Ticks != a.Ticks || after != before {
		t.Errorf("%d rounds and %d requests while nothing happened; before %+v, after %+v\n%s", b.Ticks-a.Ticks, after-before, a.Watch, b.Watch, d.Output())
	}
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
	g := startGuest(t, guest.Config{Name: "lawful", CPUs: 2})
	t.Cleanup(func() {
		if err := g.Kill(); err != nil {
			t.Error(err)
		}
	})
	d := startDaemon(t, t.TempDir(), "--period", "20ms")
	watching(t, d, g.Name)
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

// A VM that dies under its watch is no finding and leaves none behind.
func TestWatchModeDies(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := startGuest(t, guest.Config{Name: "dies"})
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
