//go:build kvmhost

// SPDX-License-Identifier: MIT

package tests

import (
	"context"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

func TestGuest(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	start := time.Now()
	g, err := guest.Start(ctx, guest.Config{Name: "web1", CPUs: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.LoadProbe(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("up after %v", time.Since(start))
	for _, a := range []string{"syscall_redirect", "idt_redirect", "gdt_callgate", "lstar_redirect", "cr0_wp", "cr4_protection"} {
		c, err := g.Attack(ctx, a, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range c {
			t.Logf("%s: %s cpu %d entry %d %#x -> %#x", a, c.Object, c.CPU, c.Entry, c.Old, c.New)
		}
		time.Sleep(time.Second)
		if _, err := g.Exec(ctx, "/bin/busybox", "ls", "/"); err != nil {
			t.Fatal(err)
		}
		cpus, err := g.CPUs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("cr0 %#x cr4 %#x lstar %#x", cpus[1].CR0, cpus[1].CR4, cpus[1].LSTAR)
		if err := g.EndAttack(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	t.Log(g.Console())
	if err := g.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("%v", time.Since(start))
}
