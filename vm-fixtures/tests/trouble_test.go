// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// readers read a VM in all ways at once until it is gone. They return how
// many reads went well, and the first error that a VM's end does not explain.
func readers(ctx context.Context, t *testing.T, vm kvmaccess.VM, pages guest.Pages) (reads func() int64, wait func() error) {
	var (
		wg    sync.WaitGroup
		count atomic.Int64
		mu    sync.Mutex
		first error
	)
	ways := map[string]func(*kvmaccess.Client) error{
		"vm":       func(c *kvmaccess.Client) error { _, err := c.VM(ctx, vm.ID); return err },
		"memslots": func(c *kvmaccess.Client) error { _, err := c.Memslots(ctx, vm.ID); return err },
		"vcpus":    func(c *kvmaccess.Client) error { _, err := c.VCPUs(ctx, vm.ID); return err },
		"table": func(c *kvmaccess.Client) error {
			_, err := c.Table(ctx, vm.ID, 0, kvmaccess.TableIDT)
			return err
		},
		"physical": func(c *kvmaccess.Client) error {
			_, err := c.ReadPhysical(ctx, vm.ID, kvmaccess.Range{Address: pages.GPA, Length: 8192})
			return err
		},
		"virtual": func(c *kvmaccess.Client) error {
			_, err := c.ReadVirtual(ctx, vm.ID, 0, 0, kvmaccess.Range{Address: pages.GVA, Length: 8192})
			return err
		},
	}
	for name, do := range ways {
		c := newClient(t)
		wg.Go(func() {
			for ctx.Err() == nil {
				err := do(c)
				switch {
				case err == nil:
					count.Add(1)
				case errors.Is(err, kvmaccess.ErrNoVM):
					return
				// On its way out, a VM has no memory and its vCPUs move.
				case errors.Is(err, kvmaccess.ErrDying), errors.Is(err, kvmaccess.ErrUnsettled),
					errors.Is(err, kvmaccess.ErrNotResident):
				default:
					mu.Lock()
					if first == nil {
						first = fmt.Errorf("%s: %w", name, err)
					}
					mu.Unlock()
					return
				}
			}
		})
	}
	return count.Load, func() error {
		wg.Wait()
		return first
	}
}

func TestKilledWhileRead(t *testing.T) {
	c := newClient(t)
	for round := range 4 {
		ctx := testContext(t)
		g := startGuest(t, guest.Config{Name: fmt.Sprintf("victim%d", round), CPUs: 1 + round%2})
		vm := vmOf(t, c, g)
		pages, err := g.Pages(ctx)
		if err != nil {
			t.Fatal(err)
		}
		reading, cancel := context.WithTimeout(ctx, 30*time.Second)
		reads, wait := readers(reading, t, vm, pages)
		time.Sleep(200 * time.Millisecond)
		if err := g.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := wait(); err != nil {
			t.Error(err)
		}
		if reading.Err() != nil {
			t.Error("the VM was still there 30 s after its VMM was killed")
		}
		cancel()
		if n := reads(); n == 0 {
			t.Error("not one read went well before the end: nothing was shown")
		} else {
			t.Logf("round %d: %d reads before the end", round, n)
		}
		if _, err := c.VM(ctx, vm.ID); !errors.Is(err, kvmaccess.ErrNoVM) {
			t.Errorf("after the end: %v, want %v", err, kvmaccess.ErrNoVM)
		}
	}
}

// The module may go while requests are under way: those fail, nothing else.
func TestUnloadWhileRead(t *testing.T) {
	ctx := testContext(t)
	g := sharedGuest(t, "web1")
	pages, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 5 {
		vm := vmOf(t, newClient(t), g)
		var wg sync.WaitGroup
		var reads atomic.Int64
		for i := range 4 {
			c := newClient(t)
			wg.Go(func() {
				for {
					var err error
					switch i % 2 {
					case 0:
						_, err = c.VCPUs(ctx, vm.ID)
					case 1:
						_, err = c.ReadVirtual(ctx, vm.ID, 0, 0, kvmaccess.Range{Address: pages.GVA, Length: 4096})
					}
					switch {
					case err == nil:
						reads.Add(1)
					case errors.Is(err, kvmaccess.ErrNotMapped), errors.Is(err, kvmaccess.ErrUnsettled):
					case errors.Is(err, os.ErrNotExist), errors.Is(err, kvmaccess.ErrReloaded),
						errors.Is(err, kvmaccess.ErrNoVM), errors.Is(err, kvmaccess.ErrDying):
						return
					default:
						t.Errorf("during unload: %v", err)
						return
					}
				}
			})
		}
		time.Sleep(100 * time.Millisecond)
		if err := unloadModule(10 * time.Second); err != nil {
			t.Error(err)
		}
		wg.Wait()
		t.Logf("round %d: %d reads before the module went", round, reads.Load())
		if err := loadModule(); err != nil {
			t.Fatal(err)
		}
	}
	// The guest took no harm, and is found again.
	vmOf(t, newClient(t), g)
	if _, err := g.CPUs(ctx); err != nil {
		t.Error(err)
	}
}

// Guests come and go all the time: nothing is left of any of them.
func TestLoadedBeforeAndAfterGuests(t *testing.T) {
	ctx := testContext(t)
	if err := unloadModule(0); err != nil {
		t.Fatal(err)
	}
	g := startGuest(t, guest.Config{Name: "early1"})
	if err := loadModule(); err != nil {
		t.Fatal(err)
	}
	vm := vmOf(t, newClient(t), g)
	if vm.VCPUs != 1 {
		t.Errorf("a guest that was there before the module: %+v", vm)
	}
	if err := g.Stop(ctx); err != nil {
		t.Fatal(err)
	}
}

// What the module says it did is what it did.
func TestStats(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	pages, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	op := func(s kvmaccess.Stats, name string) kvmaccess.Op {
		for _, o := range s.Ops {
			if o.Command == name {
				return o
			}
		}
		return kvmaccess.Op{}
	}
	before, err := c.VMStats(ctx, vm.ID)
	if err != nil {
		t.Fatal(err)
	}
	const n = 10
	for range n {
		if _, err := c.VCPU(ctx, vm.ID, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadPhysical(ctx, vm.ID, kvmaccess.Range{Address: pages.GPA, Length: 1000}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.VCPU(ctx, vm.ID, 77); err == nil {
			t.Fatal("there is a vCPU 77")
		}
	}
	after, err := c.VMStats(ctx, vm.ID)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", after)
	vcpu0, vcpu1 := op(before, "vcpu_get"), op(after, "vcpu_get")
	if got := vcpu1.Count - vcpu0.Count; got != 2*n {
		t.Errorf("%d requests for vCPUs, want %d", got, 2*n)
	}
	if got := vcpu1.Errors - vcpu0.Errors; got != n {
		t.Errorf("%d of them failed, want %d", got, n)
	}
	if vcpu1.Time <= vcpu0.Time {
		t.Error("they took no time")
	}
	memory0, memory1 := op(before, "mem_read"), op(after, "mem_read")
	if got := memory1.Bytes - memory0.Bytes; got != n*1000 {
		t.Errorf("%d bytes of memory read, want %d", got, n*1000)
	}
	if got := after.Captures - before.Captures; got < n {
		t.Errorf("%d captures, want at least %d", got, n)
	}
}
