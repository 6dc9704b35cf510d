// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
)

// patience is how many times as long as on any machine of today something may
// take: under an emulator, on a busy machine, on a kernel with sanitizers.
const patience = 6

// eventually tries until it works or limit, with patience, is over.
func eventually(t *testing.T, limit time.Duration, try func() error) {
	t.Helper()
	for end := time.Now().Add(patience * limit); ; time.Sleep(50 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// health waits until what is wrong with the daemon names all of words.
func health(t *testing.T, d *monitor.Daemon, words ...string) daemon.Health {
	t.Helper()
	var h daemon.Health
	eventually(t, 10*time.Second, func() (err error) {
		if h, err = d.Client.Health(testContext(t)); err != nil {
			return err
		}
		text, err := json.Marshal(h)
		if err != nil {
			return err
		}
		if h.OK != (len(words) == 0) {
			return errors.New("health is " + string(text))
		}
		for _, w := range words {
			if !strings.Contains(string(text), w) {
				return errors.New("health does not name " + w + ": " + string(text))
			}
		}
		return nil
	})
	return h
}

// lines are the findings in a daemon's file.
func lines(t *testing.T, d *monitor.Daemon) []daemon.Record {
	t.Helper()
	text, err := os.ReadFile(monitor.Findings(d.Dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var all []daemon.Record
	for line := range bytes.Lines(text) {
		var r daemon.Record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, r)
	}
	return all
}

// sameRecords compares by number and message.
func sameRecords(a, b []daemon.Record) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Seq != b[i].Seq || a[i].Message != b[i].Message {
			return false
		}
	}
	return true
}

// Findings and baselines outlast the daemon, however it ends: an attack while
// it is away is a change against the baseline from before.
func TestRestart(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	dir := t.TempDir()
	args := []string{"--period", "200ms", "--symbols", symbolFile(t, web)}
	d := startDaemon(t, dir, args...)
	watching(t, d, web.Name)

	attack := func(name string) (want []monitor.Expected) {
		t.Helper()
		changes, err := web.Attack(ctx, name, "")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience*10*time.Second)
			defer cancel()
			if err := web.EndAttack(ctx, name); err != nil {
				t.Error(err)
			}
		})
		return monitor.Expect(changes)
	}
	matching(t, d, daemon.Query{VM: web.Name}, attack("syscall_redirect"), integrity.KindChanged)
	for _, tt := range []struct {
		how, attack string
		end         func() error
	}{
		{"SIGTERM", "idt_redirect", func() error { return d.Stop(ctx) }},
		{"SIGKILL", "lstar_redirect", func() error { return d.Kill() }},
	} {
		before := findings(t, d, daemon.Query{})
		eventually(t, 10*time.Second, func() error {
			if !sameRecords(before, lines(t, d)) {
				return errors.New("the file lacks findings that were told")
			}
			return nil
		})
		if err := tt.end(); err != nil {
			t.Fatal(err)
		}
		want := attack(tt.attack)
		d = startDaemon(t, dir, args...)
		for i, r := range matching(t, d, daemon.Query{After: lastSeq(before)}, want, integrity.KindChanged) {
			t.Logf("%s: %s", tt.how, r.Message)
			if err := want[i].Check(r.Finding); err != nil {
				t.Errorf("%s: %s: %v", tt.how, r.Message, err)
			}
		}
		after := findings(t, d, daemon.Query{})
		if len(after) < len(before) || !sameRecords(before, after[:len(before)]) {
			t.Errorf("%s: findings before %+v, after %+v", tt.how, before, after)
		}
		for _, r := range after[len(before):] {
			if r.Object == before[0].Object {
				t.Errorf("%s: found again: %s", tt.how, r.Message)
			}
		}
	}
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// A second daemon says what is wrong and does the first no harm.
func TestSecondDaemon(t *testing.T) {
	web := sharedGuest(t, "web1")
	d := startDaemon(t, t.TempDir(), "--period", "200ms", "--symbols", symbolFile(t, web))
	watching(t, d, web.Name)
	other := t.TempDir()
	for name, cmd := range map[string]*exec.Cmd{
		"the same":        monitor.Command(d.Dir),
		"the same socket": monitor.Command(other, "--socket", monitor.Socket(d.Dir)),
		"the same state":  monitor.Command(other, "--state-dir", monitor.State(d.Dir)),
	} {
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Errorf("%s: %v, want an exit code other than 0: %s", name, err, out)
		}
		if !strings.Contains(string(out), "another") || !strings.Contains(string(out), "stop it") {
			t.Errorf("%s: %q does not say what to do", name, out)
		}
	}
	watching(t, d, web.Name)
	if err := d.Stop(testContext(t)); err != nil {
		t.Error(err)
	}
}

// With the disk full, nothing is lost: the daemon says so, goes on, and writes
// what waits as soon as there is room.
func TestFullDisk(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the disk: %v, want %v", err, unix.ENOSPC)
	}
	file := filepath.Join(disk, "findings.jsonl")
	d := startDaemon(t, t.TempDir(), "--period", "200ms", "--symbols", symbolFile(t, web), "--findings", file)
	watching(t, d, web.Name)
	changes, err := web.Attack(ctx, "syscall_redirect", "")
	if err != nil {
		t.Fatal(err)
	}
	matching(t, d, daemon.Query{VM: web.Name}, monitor.Expect(changes), integrity.KindChanged)
	if h := health(t, d, file, "no space left"); h.Unwritten == 0 {
		t.Errorf("nothing waits to be written: %+v", h)
	}
	if err := web.EndAttack(ctx, "syscall_redirect"); err != nil {
		t.Fatal(err)
	}
	matching(t, d, daemon.Query{VM: web.Name}, monitor.Expect(changes), integrity.KindCleared)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, func() error {
		h, err := d.Client.Health(ctx)
		if err == nil && (h.Unwritten > 0 || !h.OK) {
			text, _ := json.Marshal(h)
			err = errors.New("with room again: " + string(text))
		}
		return err
	})
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := bytes.Count(text, []byte("\n")), len(findings(t, d, daemon.Query{})); got != want {
		t.Errorf("%d findings in the file, %d told:\n%s", got, want, text)
	}
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// Without the module the daemon does not start and says why; it outlasts a
// reload of the module.
func TestDaemonAndModule(t *testing.T) {
	web := sharedGuest(t, "web1")
	symbols := symbolFile(t, web)
	if err := unloadModule(0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := loadModule(); err != nil {
			t.Error(err)
		}
	})
	out, err := monitor.Command(t.TempDir()).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(string(out), "modprobe kvmaccess") {
		t.Errorf("%v, %q: want an exit code other than 0, and modprobe named", err, out)
	}
	if err := loadModule(); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, t.TempDir(), "--period", "200ms", "--symbols", symbols)
	for range 2 {
		if err := loadModule(); err != nil {
			t.Fatal(err)
		}
		watching(t, d, web.Name)
		health(t, d)
		if err := unloadModule(10 * time.Second); err != nil {
			t.Error(err)
		}
		health(t, d, "modprobe kvmaccess")
	}
	if err := loadModule(); err != nil {
		t.Fatal(err)
	}
	watching(t, d, web.Name)
	if all := findings(t, d, daemon.Query{}); len(all) != 0 {
		t.Errorf("findings on an honest guest: %+v", all)
	}
	if err := d.Stop(testContext(t)); err != nil {
		t.Error(err)
	}
}

// Guests come and go under the daemon.
func TestGuestsComeAndGo(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	d := startDaemon(t, t.TempDir(), "--period", "50ms", "--symbols", symbolFile(t, web))
	watching(t, d, web.Name)
	for _, name := range []string{"guest1", "guest2"} {
		g := startGuest(t, guest.Config{Name: name})
		watching(t, d, name)
		if err := g.Kill(); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, func() error {
			vms, err := d.Client.VMs(ctx)
			for _, vm := range vms {
				if vm.Name == name {
					err = errors.New(name + " is still listed after its end")
				}
			}
			return err
		})
	}
	// A guest's boot is no attack, nor is its end.
	if all := findings(t, d, daemon.Query{}); len(all) != 0 {
		t.Errorf("findings on honest guests: %+v", all)
	}
	health(t, d)
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// Ticks come at the period that was asked for, and those that do not are counted.
func TestPeriods(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	symbols := symbolFile(t, web)
	for _, period := range []time.Duration{time.Millisecond, 20 * time.Millisecond} {
		d := startDaemon(t, t.TempDir(), "--mode", "poll", "--period", "db1=1s", "--period", period.String(), "--symbols", symbols)
		watching(t, d, web.Name)
		// Each status is of some time while it was asked for.
		before := time.Now()
		a, from := statusOf(t, d, web.Name), time.Now()
		time.Sleep(2 * time.Second)
		to := time.Now()
		b, after := statusOf(t, d, web.Name), time.Now()
		least, most := to.Sub(from), after.Sub(before)
		if a.Period != period {
			t.Errorf("period %v, want %v", a.Period, period)
		}
		got := b.Ticks + b.Missed - a.Ticks - a.Missed
		t.Logf("period %v: in %v to %v %d ticks, %d missed", period, least, most, b.Ticks-a.Ticks, b.Missed-a.Missed)
		if got < uint64(least/period)*9/10 || got > uint64(most/period)*11/10+1 {
			t.Errorf("period %v: %d ticks done and missed in %v to %v", period, got, least, most)
		}
		if b.Ticks == a.Ticks || b.Failed != a.Failed {
			t.Errorf("period %v: %d ticks, of them %d failed", period, b.Ticks-a.Ticks, b.Failed-a.Failed)
		}
		if all := findings(t, d, daemon.Query{}); len(all) != 0 {
			t.Errorf("findings on honest guests: %+v", all)
		}
		if err := d.Stop(ctx); err != nil {
			t.Error(err)
		}
	}
}

func TestDaemonRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		uid  uint32
		want string
	}{
		{"period too short", []string{"--period", "10us"}, 0, "500µs"},
		{"period too short to poll", []string{"--mode", "poll", "--period", "600us"}, 0, "1ms"},
		{"no such mode", []string{"--mode", "guess"}, 0, "watch or poll"},
		{"budget and period", []string{"--cpu-budget", "0.35%", "--period", "1s"}, 0, "--period"},
		{"no budget", []string{"--cpu-budget", "0.35"}, 0, "0.35%"},
		{"budget in poll mode", []string{"--cpu-budget", "0.35%", "--mode", "poll"}, 0, "mode watch"},
		{"no period", []string{"--period", "often"}, 0, "duration"},
		{"no such configuration", []string{"--config", "/nonexistent.yaml"}, 0, "/nonexistent.yaml"},
		{"unknown setting", []string{"--config", func() string {
			name := filepath.Join(t.TempDir(), "bad.yaml")
			if err := os.WriteFile(name, []byte("perriod: 1s\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			return name
		}()}, 0, "perriod"},
		{"not root", nil, 65534, "root"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			cmd := monitor.Command(dir, tt.args...)
			if tt.uid != 0 {
				// The daemon may get as far as asking the module.
				for d := dir; len(d) > len(os.TempDir()); d = filepath.Dir(d) {
					if err := os.Chmod(d, 0o777); err != nil {
						t.Fatal(err)
					}
				}
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tt.uid, Gid: tt.uid}}
			}
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
			defer timer.Stop()
			err := cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || !exit.Exited() {
				t.Errorf("%v, want an exit code other than 0: %s", err, out.String())
			}
			if !strings.Contains(out.String(), tt.want) {
				t.Errorf("%q does not name %q", out.String(), tt.want)
			}
			t.Log(strings.TrimSpace(out.String()))
		})
	}
}
