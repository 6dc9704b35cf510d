//go:build kvmhost

// SPDX-License-Identifier: MIT

package tests

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

func TestGuest(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	start := time.Now()
	g, err := guest.Start(ctx, guest.Config{Name: "web1", UUID: "6b1d1e0e-6d1e-4f5e-8a0e-000000000001", CPUs: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("up after %v", time.Since(start))
	if err := g.LoadProbe(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("probe after %v", time.Since(start))
	cpus, err := g.CPUs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", cpus)
	syms, err := g.Symbols(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes of symbols, %d lines after %v", len(syms), bytes.Count(syms, []byte("\n")), time.Since(start))
	pages, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", pages)
	text, err := g.Monitor(ctx, "info registers")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(text)
	if err := g.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("%v", time.Since(start))
}
