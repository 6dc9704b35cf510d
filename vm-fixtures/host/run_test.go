// SPDX-License-Identifier: MIT

package host

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"io"
	"log/slog"
)

func encode(t *testing.T, records ...record) string {
	t.Helper()
	var b bytes.Buffer
	for _, r := range records {
		if err := json.NewEncoder(&b).Encode(r); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func TestReceive(t *testing.T) {
	out := record{Kind: kindStdout, Data: []byte("hello\x00\xff\n")}
	for _, tt := range []struct {
		name string
		from string
		code int
		bad  string // part of the error; empty: none
	}{
		{"done", encode(t, record{Kind: kindReady}, out, record{Kind: kindDone}), 0, ""},
		{"exit code", encode(t, out, record{Kind: kindDone, Code: 7}), 7, ""},
		{"ended early", encode(t, record{Kind: kindReady}, out), 0, "without its closing record"},
		{"nothing", "", 0, "without its closing record"},
		{"cut short", `{"kind":"stdout","data":"aGVs`, 0, "without its closing record"},
		{"the host failed", encode(t, out, record{Kind: kindError, Data: []byte("no /dev/vda")}), 0, "no /dev/vda"},
		{"unknown", encode(t, record{Kind: "surprise"}), 0, "surprise"},
		{"file outside", encode(t, record{Kind: kindFile, Name: "../escape", Mode: 0o644}), 0, "../escape"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			c := Config{Stdout: &stdout, Stderr: &stderr, Out: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
			code, err := receive(strings.NewReader(tt.from), c, time.Now(), func() {})
			if tt.bad == "" && err != nil || tt.bad != "" && (err == nil || !strings.Contains(err.Error(), tt.bad)) {
				t.Errorf("error %v, want %q", err, tt.bad)
			}
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			if strings.Contains(tt.from, string(out.Kind)) && tt.bad == "" && stdout.String() != string(out.Data) {
				t.Errorf("stdout %q, want %q", stdout.String(), out.Data)
			}
		})
	}
}

func TestReceivePulses(t *testing.T) {
	pulses := 0
	_, err := receive(strings.NewReader(encode(t, record{Kind: kindReady}, record{Kind: kindPulse},
		record{Kind: kindStdout}, record{Kind: kindPulse}, record{Kind: kindDone})),
		Config{Stdout: io.Discard, Log: slog.New(slog.DiscardHandler)}, time.Now(), func() { pulses++ })
	if err != nil || pulses != 2 {
		t.Errorf("%d pulses, %v", pulses, err)
	}
}

func TestReceiveFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "old"), []byte("from an earlier run"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := Config{Out: dir, Log: slog.New(slog.DiscardHandler)}
	_, err := receive(strings.NewReader(encode(t,
		record{Kind: kindFile, Name: "sub/file", Mode: 0o755, Data: []byte("one ")},
		record{Kind: kindFile, Name: "old", Mode: 0o644, Data: []byte("new")},
		record{Kind: kindFile, Name: "sub/file", Mode: 0o755, Data: []byte("two")},
		record{Kind: kindFile, Name: "empty", Mode: 0o644},
		record{Kind: kindDone},
	)), c, time.Now(), func() {})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"sub/file": "one two", "old": "new", "empty": ""} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestAlarm(t *testing.T) {
	for _, line := range []string{
		"[   11.2] BUG: kernel NULL pointer dereference, address: 0000000000000000",
		"[    3.1] WARNING: CPU: 1 PID: 77 at kernel/smp.c:912 smp_call_function_many_cond",
		"[    3.1] Oops: 0000 [#1] PREEMPT SMP",
		"[    3.1] general protection fault, probably for non-canonical address",
		"[    3.1] WARNING: possible circular locking dependency detected",
		"[    3.1] refcount_t: underflow; use-after-free.",
		"[    3.1] Kernel panic - not syncing: Attempted to kill init!",
		"[   61.0] watchdog: BUG: soft lockup - CPU#0 stuck for 52s!",
		"[   61.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks",
		"[   61.0] INFO: task kvmaccess:88 blocked for more than 120 seconds.",
		"[    3.1] unchecked MSR access error: RDMSR from 0xc0011029",
		"[    3.1] BUG: KASAN: slab-use-after-free in vm_doit+0x10/0x20 [kvmaccess]",
		"[    3.1] WARNING: suspicious RCU usage",
		"[    3.1] INFO: trying to register non-static key.",
		"[    3.1] ODEBUG: Out of memory. ODEBUG disabled",
		"[    3.1] kmemleak: Cannot allocate a kmemleak_object structure",
		"[   61.0] kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
	} {
		if !alarm.MatchString(line) {
			t.Errorf("not an alarm: %s", line)
		}
	}
	for _, line := range []string{
		"[    0.0] Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)",
		"[   11.2] kvm [91]: vcpu0, guest rIP: 0xffffffffafa73744 Unhandled WRMSR(0xc0010007) = 0xffff",
		"[    1.0] kvmaccess: loading out-of-tree module taints kernel.",
		"[    0.5] acpi PNP0A03:00: fail to add MMCONFIG information, can't access extended configuration space under this bridge",
		"[    9.1] kvmaccess: version 0.1.0, registers kvm_amd",
	} {
		if m := alarm.FindString(line); m != "" {
			t.Errorf("%q is an alarm in: %s", m, line)
		}
	}
}

func TestQuote(t *testing.T) {
	got := quote([]string{"qemu", "-append", "console=ttyS0 panic=-1", "it's", ""})
	if want := `qemu -append 'console=ttyS0 panic=-1' 'it'\''s' ''`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestTail(t *testing.T) {
	if got, want := tail([]byte("a\r\nb\r\nc\r\n"), 2), "b\nc"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
