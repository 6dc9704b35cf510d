// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// running is a whole daemon on a fake host, in real time.
type running struct {
	*Client
	host   *fakeHost
	config Config
	done   chan error
	stop   context.CancelFunc
}

func newDaemon(t *testing.T, h *fakeHost, dir string, change func(*Config)) *Daemon {
	t.Helper()
	c := Default()
	c.StateDir, c.Socket, c.Period = filepath.Join(dir, "state"), filepath.Join(dir, "run", "sock"), 5*time.Millisecond
	c.Mode = ModePoll // but for those that change it
	if change != nil {
		change(&c)
	}
	d, err := New(c, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	h.clock = func() (clock, error) { return newTimer() }
	d.host = h.host()
	return d
}

func start(t *testing.T, h *fakeHost, dir string, change func(*Config)) *running {
	t.Helper()
	d := newDaemon(t, h, dir, change)
	ctx, stop := context.WithCancel(context.Background())
	r := &running{host: h, config: d.config, done: make(chan error, 1), stop: stop}
	go func() { r.done <- d.Run(ctx) }()
	eventually(t, "the daemon to answer", func() bool {
		var err error
		r.Client, err = Dial(d.config.Socket)
		return err == nil
	})
	return r
}

func (r *running) end(t *testing.T) {
	t.Helper()
	r.Close()
	r.stop()
	if err := <-r.done; err != nil {
		t.Errorf("the daemon ended with %v", err)
	}
	if _, err := os.Lstat(r.config.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// eventually waits for what comes on its own, however slow the machine is.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if is() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}

func (r *running) watching(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d VMs to be watched", n), func() bool {
		vms, err := r.VMs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		up := 0
		for _, vm := range vms {
			if vm.State == StateWatching && vm.Ticks > 0 {
				up++
			}
		}
		return up == n
	})
}

func TestAPI(t *testing.T) {
	h := newFakeHost()
	web := h.start(1, 10, "web")
	h.start(2, 20, "twin")
	h.start(3, 30, "twin")
	r := start(t, h, t.TempDir(), nil)
	defer r.end(t)
	r.watching(t, 3)
	ctx := t.Context()

	for path, want := range map[string]os.FileMode{r.config.Socket: 0o600, r.config.StateDir: 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v (%v)", path, info.Mode(), want, err)
		}
	}

	health, err := r.Health(ctx)
	if err != nil || !health.OK || health.PID != os.Getpid() || health.VMs != 3 || health.Module.Version != "1.0" || health.Period != r.config.Period {
		t.Errorf("health: %+v, %v", health, err)
	}

	before, err := r.Stats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "ticks", func() bool {
		after, err := r.Stats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if after.Time <= before.Time || after.CPU <= before.CPU || after.Uptime <= before.Uptime {
			t.Errorf("clocks stand still: %+v, then %+v", before, after)
		}
		if after.Module == nil || len(after.VMs) != 3 {
			t.Errorf("stats: %+v", after)
		}
		return after.Ticks >= before.Ticks+3 && after.Wakeups > before.Wakeups
	})

	baseline, err := r.Baseline(ctx, "web")
	if err != nil || baseline.VM.Name != "web" || len(baseline.Items) != 1 {
		t.Errorf("baseline: %+v, %v", baseline, err)
	}

	start := time.Now()
	web.set(func(g *fakeGuest) { g.value = 2 })
	var found []Record
	eventually(t, "a finding", func() bool {
		found, err = r.Findings(ctx, Query{})
		return err != nil || len(found) > 0
	})
	if err != nil || len(found) != 1 || found[0].VM.Name != "web" || found[0].New.Value != 2 {
		t.Fatalf("findings: %+v, %v", found, err)
	}
	for _, q := range []struct {
		Query
		want int
	}{
		{Query{VM: "web"}, 1}, {Query{VM: "1"}, 1}, {Query{VM: found[0].VM.UUID}, 1}, {Query{VM: "twin"}, 0}, {Query{VM: "absent"}, 0},
		{Query{After: 1}, 0}, {Query{Since: start.Add(-time.Second)}, 1}, {Query{Since: time.Now().Add(time.Hour)}, 0},
	} {
		if found, err := r.Findings(ctx, q.Query); err != nil || len(found) != q.want {
			t.Errorf("%+v: %d findings, %v, want %d", q.Query, len(found), err, q.want)
		}
	}

	if err := r.Rebaseline(ctx, "web"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new baseline", func() bool {
		b, err := r.Baseline(ctx, "web")
		return err == nil && b.Items[0].Value.Value == 2 && len(b.Open) == 0
	})

	for _, bad := range []struct {
		err    error
		status int
		text   string
	}{
		{r.Rebaseline(ctx, "absent"), http.StatusNotFound, "absent"},
		{r.Rebaseline(ctx, "twin"), http.StatusConflict, "give the id or the UUID"},
		{second(r.Baseline(ctx, "twin")), http.StatusConflict, "give the id or the UUID"},
		{second(r.Baseline(ctx, "a/b")), http.StatusNotFound, "a/b"},
		{second(raw(r, "GET", "/v1/findings?since=yesterday")), http.StatusBadRequest, "RFC 3339"},
		{second(raw(r, "GET", "/v1/findings?follow=maybe")), http.StatusBadRequest, "follow"},
		{second(raw(r, "GET", "/v2")), http.StatusNotFound, "no such resource"},
		{second(raw(r, "POST", "/v1/vms")), http.StatusNotFound, "no such resource"},
	} {
		var refused *APIError
		if !errors.As(bad.err, &refused) || refused.Status != bad.status || !strings.Contains(refused.Message, bad.text) {
			t.Errorf("%v, want status %d and %q", bad.err, bad.status, bad.text)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func raw(r *running, method, path string) (string, error) {
	path, query, _ := strings.Cut(path, "?")
	values, err := http.NewRequest(method, "http://x/?"+query, nil)
	if err != nil {
		return "", err
	}
	resp, err := r.do(context.Background(), method, path, values.URL.Query())
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// Answers are JSON by the names that the documentation gives.
func TestAPINames(t *testing.T) {
	h := newFakeHost()
	h.start(1, 10, "web")
	r := start(t, h, t.TempDir(), nil)
	defer r.end(t)
	r.watching(t, 1)
	for path, names := range map[string][]string{
		"/v1/health": {"ok", "problems", "pid", "started", "mode", "period", "module", "vms", "unwritten"},
		"/v1/stats": {"time", "uptime", "cpu", "user", "system", "module", "wakeups", "ticks", "missed", "failed", "accepted",
			"late_max", "late_sum", "tick_max", "tick_sum", "reads", "findings", "vms"},
	} {
		text, err := raw(r, "GET", path)
		if err != nil {
			t.Fatal(err)
		}
		var object map[string]any
		if err := json.Unmarshal([]byte(text), &object); err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if _, ok := object[name]; !ok {
				t.Errorf("%s has no %q: %s", path, name, text)
			}
		}
		if len(object) != len(names) {
			t.Errorf("%s has %d members, want %d: %s", path, len(object), len(names), text)
		}
	}
	if text, err := raw(r, "GET", "/v1/findings"); err != nil || text != "[]\n" {
		t.Errorf("no findings: %q, %v", text, err)
	}
}

func TestFollow(t *testing.T) {
	h := newFakeHost()
	web, mail := h.start(1, 10, "web"), h.start(2, 20, "mail")
	r := start(t, h, t.TempDir(), nil)
	r.watching(t, 2)
	web.set(func(g *fakeGuest) { g.value = 2 })
	eventually(t, "a finding", func() bool {
		found, err := r.Findings(t.Context(), Query{})
		return err != nil || len(found) == 1
	})

	var got []uint64
	for record, err := range r.Follow(t.Context(), Query{VM: "web"}) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, uint64(record.New.Value))
		if len(got) == 5 {
			break
		}
		mail.set(func(g *fakeGuest) { g.value++ })
		web.set(func(g *fakeGuest) { g.value++ })
	}
	if diff := cmp.Diff([]uint64{2, 3, 4, 5, 6}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range r.Follow(ctx, Query{}) {
		if err != nil {
			t.Errorf("a follower that ends by itself: %v", err)
		}
		cancel()
	}

	// The daemon's end ends the stream, with a word.
	ended := make(chan error)
	go func() {
		var last error
		for _, err := range r.Follow(t.Context(), Query{VM: "nobody"}) {
			last = err
		}
		ended <- last
	}()
	time.Sleep(10 * time.Millisecond)
	r.end(t)
	if err := <-ended; err == nil {
		t.Error("the end of the stream is no error")
	}
}

// Streams without findings have a sign of life.
func TestFollowBlankLines(t *testing.T) {
	h := newFakeHost()
	d := newDaemon(t, h, t.TempDir(), nil)
	services, err := d.services()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	defer func() { cancel(); <-done }()
	for _, s := range services {
		if s, ok := s.(*server); ok {
			s.alive = time.Millisecond
		}
		if err := s.Init(ctx); err != nil {
			t.Fatal(err)
		}
		defer s.Shutdown()
	}
	go func() {
		defer close(done)
		services[len(services)-1].Run(ctx)
	}()
	c, err := Dial(d.config.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	resp, err := c.do(ctx, "GET", "/v1/findings", map[string][]string{"follow": {"1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b := make([]byte, 3)
	if _, err := io.ReadFull(resp.Body, b); err != nil || string(b) != "\n\n\n" {
		t.Errorf("%q, %v", b, err)
	}
}

// SIGTERM and SIGINT end the daemon, with nothing lost and nothing left.
func TestSignals(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			h, dir := newFakeHost(), t.TempDir()
			web := h.start(1, 10, "web")
			r := start(t, h, dir, nil)
			r.watching(t, 1)
			web.set(func(g *fakeGuest) { g.value = 2 })
			eventually(t, "a finding", func() bool {
				found, err := r.Findings(t.Context(), Query{})
				return err != nil || len(found) == 1
			})
			if err := syscall.Kill(os.Getpid(), signal); err != nil {
				t.Fatal(err)
			}
			if err := <-r.done; err != nil {
				t.Errorf("the daemon ended with %v", err)
			}
			r.Close()
			if n := len(messages(t, r.config.Findings)); n != 1 {
				t.Errorf("%d findings are written", n)
			}
			if _, err := Dial(r.config.Socket); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "systemctl start kvmaccessd") {
				t.Errorf("asking a daemon that is gone: %v", err)
			}

			r = start(t, h, dir, nil)
			defer r.end(t)
			r.watching(t, 1)
			found, err := r.Findings(t.Context(), Query{})
			if err != nil || len(found) != 1 {
				t.Errorf("after a restart: %d findings, %v", len(found), err)
			}
		})
	}
}

// TestLeaks starts and ends daemons: what they open, they close.
func TestLeaks(t *testing.T) {
	descriptors := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	cycle := func() {
		h := newFakeHost()
		h.start(1, 10, "web")
		h.start(2, 20, "mail").set(func(g *fakeGuest) { g.up = false })
		r := start(t, h, t.TempDir(), nil)
		r.watching(t, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.Sleep(20 * time.Millisecond)
			cancel()
		}()
		for range r.Follow(ctx, Query{}) {
		}
		r.end(t)
	}
	cycle() // what is made once: poller, signals
	files, goroutines := descriptors(), runtime.NumGoroutine()
	for range 3 {
		cycle()
	}
	eventually(t, "goroutines to end", func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, "files to be closed", func() bool { return descriptors() <= files })
}

func TestStartRefused(t *testing.T) {
	refused := func(t *testing.T, d *Daemon, want ...string) {
		t.Helper()
		err := d.Run(t.Context())
		if err == nil {
			t.Fatal("it ran")
		}
		for _, text := range want {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%q does not say %q", err, text)
			}
		}
	}
	t.Run("no module", func(t *testing.T) {
		h := newFakeHost()
		h.module = false
		refused(t, newDaemon(t, h, t.TempDir(), nil), "modprobe kvmaccess")
	})
	t.Run("another module", func(t *testing.T) {
		h := newFakeHost()
		h.openErr = &kvmaccess.VersionError{Client: 1, Module: 2}
		refused(t, newDaemon(t, h, t.TempDir(), nil), "version 2", "update this program")
	})
	t.Run("not root", func(t *testing.T) {
		h := newFakeHost()
		h.openErr = &kvmaccess.Error{Op: "info", Errno: syscall.EPERM}
		refused(t, newDaemon(t, h, t.TempDir(), nil), "must run as root")
	})
	t.Run("second daemon", func(t *testing.T) {
		h, dir := newFakeHost(), t.TempDir()
		r := start(t, h, dir, nil)
		refused(t, newDaemon(t, newFakeHost(), dir, nil), fmt.Sprintf("another kvmaccessd (pid %d)", os.Getpid()))
		refused(t, newDaemon(t, newFakeHost(), t.TempDir(), func(c *Config) { c.Socket = r.config.Socket }), "another process listens on")
		if _, err := r.Health(t.Context()); err != nil {
			t.Errorf("the first daemon suffered: %v", err)
		}
		r.end(t)
	})
	t.Run("no socket", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, newDaemon(t, newFakeHost(), t.TempDir(), func(c *Config) { c.Socket = path }), "is no socket")
		if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
			t.Errorf("the file is %q (%v)", text, err)
		}
	})
	t.Run("findings", func(t *testing.T) {
		dir := t.TempDir()
		refused(t, newDaemon(t, newFakeHost(), dir, func(c *Config) { c.Findings = dir }), "neither a regular file nor")
	})
	t.Run("state", func(t *testing.T) {
		refused(t, newDaemon(t, newFakeHost(), t.TempDir(), func(c *Config) { c.StateDir = "/dev/null/x" }), "state directory")
	})
}

// A socket that a killed daemon has left is in nobody's way.
func TestStaleSocket(t *testing.T) {
	h, dir := newFakeHost(), t.TempDir()
	path := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(path); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("the socket is not stale: %v", err)
	}
	r := start(t, h, dir, func(c *Config) { c.Socket = path })
	r.end(t)
}

// Findings wait for room, and health says so.
func TestFullFindings(t *testing.T) {
	h := newFakeHost()
	web := h.start(1, 10, "web")
	r := start(t, h, t.TempDir(), func(c *Config) { c.Findings = "/dev/full" })
	defer r.end(t)
	r.watching(t, 1)
	web.set(func(g *fakeGuest) { g.value = 2 })
	eventually(t, "the problem", func() bool {
		health, err := r.Health(t.Context())
		return err == nil && !health.OK && health.Unwritten == 1 && len(health.Problems) == 1 &&
			strings.Contains(health.Problems[0].Message, "no space left on device")
	})
	if found, err := r.Findings(t.Context(), Query{}); err != nil || len(found) != 1 {
		t.Errorf("findings: %+v, %v", found, err)
	}
}
