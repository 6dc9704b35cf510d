// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
)

// period is the product's default, and the promise: found within two of them.
const period = time.Second

// symbolFile is a guest's own symbol list in a file; another guest's kernel
// of the same build lies elsewhere, but differs in nothing else.
func symbolFile(t *testing.T, g *guest.Guest) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "kallsyms")
	if err := g.WriteSymbols(testContext(t), name); err != nil {
		t.Fatal(err)
	}
	return name
}

// startDaemon starts a daemon that the end of the test ends, too.
func startDaemon(t *testing.T, dir string, args ...string) *monitor.Daemon {
	t.Helper()
	d, err := monitor.Start(testContext(t), dir, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kvmaccessd said:\n%s", d.Output())
		}
		if err := d.Kill(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func watching(t *testing.T, d *monitor.Daemon, names ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(testContext(t), patience*30*time.Second)
	defer cancel()
	if err := d.Watching(ctx, names...); err != nil {
		t.Fatal(err)
	}
}

// statusOf is what the daemon says of one guest.
func statusOf(t *testing.T, d *monitor.Daemon, name string) daemon.VMStatus {
	t.Helper()
	vms, err := d.Client.VMs(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, vm := range vms {
		if vm.Name == name {
			return vm
		}
	}
	t.Fatalf("no %s in %+v", name, vms)
	return daemon.VMStatus{}
}

func findings(t *testing.T, d *monitor.Daemon, q daemon.Query) []daemon.Record {
	t.Helper()
	all, err := d.Client.Findings(testContext(t), q)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// lastSeq is the newest finding's number; 0: there is none.
func lastSeq(all []daemon.Record) uint64 {
	if len(all) == 0 {
		return 0
	}
	return all[len(all)-1].Seq
}

// matching waits until there is a finding for each of what is expected.
func matching(t *testing.T, d *monitor.Daemon, q daemon.Query, want []monitor.Expected, kinds ...integrity.Kind) []daemon.Record {
	t.Helper()
	for end := time.Now().Add(patience * 20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		all := findings(t, d, q)
		var found []daemon.Record
		missing := ""
	next:
		for _, e := range want {
			for _, r := range all {
				for _, kind := range kinds {
					if r.Kind == kind && e.Same(r.Finding) {
						found = append(found, r)
						continue next
					}
				}
			}
			missing += fmt.Sprintf("%+v\n", e)
		}
		if missing == "" {
			return found
		}
		if time.Now().After(end) {
			t.Fatalf("no finding (%v) for\n%samong %d: %+v", kinds, missing, len(all), all)
		}
	}
}

// ticks are how often the guest was compared, by whoever does that.
func ticks(s daemon.VMStatus) uint64 {
	if s.Watch != nil {
		return s.Watch.Ticks
	}
	return s.Ticks
}

func TestAttacks(t *testing.T) {
	for _, mode := range []daemon.Mode{daemon.ModeWatch, daemon.ModePoll} {
		t.Run(string(mode), func(t *testing.T) { attacksInMode(t, mode) })
	}
}

func attacksInMode(t *testing.T, mode daemon.Mode) {
	web, db := sharedGuest(t, "web1"), sharedGuest(t, "db1")
	d := startDaemon(t, t.TempDir(), "--mode", string(mode), "--period", period.String(), "--symbols", symbolFile(t, web))
	watching(t, d, web.Name, db.Name)
	if s := statusOf(t, d, web.Name); s.Mode != mode || (s.Watch != nil) != (mode == daemon.ModeWatch) {
		t.Fatalf("the status in mode %s: %+v", mode, s)
	}
	time.Sleep(2 * period)
	if all := findings(t, d, daemon.Query{}); len(all) != 0 {
		t.Fatalf("findings on honest guests: %+v", all)
	}
	for _, attack := range monitor.Attacks {
		t.Run(attack, func(t *testing.T) {
			ctx := testContext(t)
			q := daemon.Query{VM: web.Name, After: lastSeq(findings(t, d, daemon.Query{}))}
			before := time.Now()
			changes, err := web.Attack(ctx, attack, "")
			if err != nil {
				t.Fatal(err)
			}
			after, first := time.Now(), ticks(statusOf(t, d, web.Name))
			want := monitor.Expect(changes)
			found := matching(t, d, q, want, integrity.KindChanged)
			done := ticks(statusOf(t, d, web.Name)) - first
			for i, r := range found {
				t.Log(r.Message)
				if err := want[i].Check(r.Finding); err != nil {
					t.Errorf("%s: %v", r.Message, err)
				}
				if r.VM.Name != web.Name || r.VM.UUID != sharedConfigs["web1"].UUID || r.VM.PID != web.PID {
					t.Errorf("%s: guest %+v", r.Message, r.VM)
				}
				// On a machine that stands still for a while, ticks do, too.
				if r.Time.Before(before) || r.Time.Sub(after) > 2*period && done > 2 {
					t.Errorf("%s: found %v and %d ticks after the attack was done", r.Message, r.Time.Sub(after), done)
				}
			}
			for _, r := range findings(t, d, q) {
				if r.Object != changes[0].Object {
					t.Errorf("found besides: %s", r.Message)
				}
			}
			q.After = lastSeq(findings(t, d, daemon.Query{}))
			if err := web.EndAttack(ctx, attack); err != nil {
				t.Fatal(err)
			}
			matching(t, d, q, want, integrity.KindCleared)
		})
	}
	if all := findings(t, d, daemon.Query{VM: db.Name}); len(all) != 0 {
		t.Errorf("findings on the guest that was not attacked: %+v", all)
	}
	if err := d.Stop(testContext(t)); err != nil {
		t.Error(err)
	}
}

// A guest that was attacked before anyone looked is found out all the same.
func TestAttackedBeforeFirstSight(t *testing.T) {
	ctx := testContext(t)
	web, db := sharedGuest(t, "web1"), sharedGuest(t, "db1")
	symbols := symbolFile(t, web)
	for _, attack := range monitor.Attacks {
		t.Run(attack, func(t *testing.T) {
			changes, err := web.Attack(ctx, attack, "")
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := web.EndAttack(ctx, attack); err != nil {
					t.Error(err)
				}
			}()
			d := startDaemon(t, t.TempDir(), "--period", "200ms", "--symbols", symbols)
			want := monitor.Expect(changes)
			for i, r := range matching(t, d, daemon.Query{VM: web.Name}, want, integrity.KindInvariant) {
				t.Log(r.Message)
				if err := want[i].Check(r.Finding); err != nil {
					t.Errorf("%s: %v", r.Message, err)
				}
			}
			watching(t, d, db.Name)
			if all := findings(t, d, daemon.Query{VM: db.Name}); len(all) != 0 {
				t.Errorf("findings on the guest that was not attacked: %+v", all)
			}
			if err := d.Stop(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}
