// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

func TestMain(m *testing.M) {
	tinyvm.Main()
	if role := os.Getenv(roleEnv); role != "" {
		os.Exit(playRole(role))
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "tests:", err)
		code = 1
	}
	os.Exit(code)
}

// run loads the module, runs the tests, and unloads it: nothing may hold it then.
func run(m *testing.M) (code int, err error) {
	if err := loadModule(); err != nil {
		return 0, err
	}
	code = m.Run()
	if err := stopShared(); err != nil {
		return code, err
	}
	return code, unloadModule(5 * time.Second)
}

func payload(name string) string { return filepath.Join(os.Getenv(host.Env), name) }

func loadModule() error { return boot.LoadModule(payload(host.ModuleFile), "") }

// unloadModule waits as long as limit for those that use the module.
func unloadModule(limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		err := unix.DeleteModule("kvmaccess", unix.O_NONBLOCK)
		if err == nil {
			return nil
		}
		if time.Now().After(end) || !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("unload the module: %w", err)
		}
	}
}

// shared guests are started by the first test that asks for them and serve
// all tests; a test puts back what it changes in them.
var shared = map[string]*guest.Guest{}

var sharedConfigs = map[string]guest.Config{
	"web1": {Name: "web1", UUID: "1f0c7e52-6f0a-4b6e-9d25-3c1f5ad9a001", CPUs: 2},
	"db1":  {Name: "db1", UUID: "1f0c7e52-6f0a-4b6e-9d25-3c1f5ad9a002", CPUs: 1, Memory: 192},
}

func stopShared() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience*30*time.Second)
	defer cancel()
	var err error
	for name, g := range shared {
		err = errors.Join(err, g.Stop(ctx))
		delete(shared, name)
	}
	return err
}

// testContext ends before the test's time does.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience*2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// sharedGuest returns a running guest with its probe loaded. Of one that ended
// though nobody ended it the test that finds it so fails; the next has a new one.
func sharedGuest(t *testing.T, name string) *guest.Guest {
	t.Helper()
	if g, ok := shared[name]; ok {
		if err := g.Ended(); err != nil {
			delete(shared, name)
			t.Fatal(err)
		}
		return g
	}
	g := startGuest(t, sharedConfigs[name])
	shared[name] = g
	return g
}

// startGuest starts a guest with its probe loaded; the caller ends it.
func startGuest(t *testing.T, c guest.Config) *guest.Guest {
	t.Helper()
	ctx := testContext(t)
	start := time.Now()
	g, err := guest.Start(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.LoadProbe(ctx); err != nil {
		t.Fatal(errors.Join(err, g.Kill()))
	}
	t.Logf("guest %s is up after %.1f s", c.Name, time.Since(start).Seconds())
	return g
}

func newClient(t *testing.T) *kvmaccess.Client {
	t.Helper()
	c, err := kvmaccess.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// vmOf finds a guest among the host's VMs.
func vmOf(t *testing.T, c *kvmaccess.Client, g *guest.Guest) kvmaccess.VM {
	t.Helper()
	vms, err := c.VMs(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, vm := range vms {
		if vm.PID == g.PID {
			return vm
		}
	}
	t.Fatalf("no VM of process %d (%s) among %+v", g.PID, g.Name, vms)
	return kvmaccess.VM{}
}

// paused stops a guest's vCPUs for the rest of the test.
func paused(t *testing.T, g *guest.Guest) {
	t.Helper()
	if err := g.Pause(testContext(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience*10*time.Second)
		defer cancel()
		if err := g.Resume(ctx); err != nil {
			t.Error(err)
		}
	})
}
