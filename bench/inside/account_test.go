// SPDX-License-Identifier: MIT

package inside

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// at is what a daemon says after so many checks and requests, when a check
// takes 100 µs of the daemon, 30 of the worker and 10 of interrupts, and a
// request 700 µs of the daemon and 5 of the worker.
func at(time time.Duration, ticks, requests uint64) *look {
	const µs = 1000
	n, r := 1000+ticks, 40+requests
	return &look{
		switches: 3*n + 2*r,
		Stats: daemon.Stats{
			Time:    time,
			CPU:     durationOf(n*100*µs + r*700*µs),
			Module:  &kvmaccess.Stats{Worker: durationOf(n*30*µs + r*5*µs), Interrupt: durationOf(n * 10 * µs)},
			Account: daemon.Account{Ticks: n, Missed: ticks / 50, TickMax: 400 * µs},
		},
	}
}

func durationOf(ns uint64) time.Duration { return time.Duration(ns) }

func TestAccount(t *testing.T) {
	for _, test := range []struct {
		name string
		more uint64 // checks between the second look and the third
	}{{"rare checks", 0}, {"checks while looking", 3}} {
		got, err := account(at(time.Second, 0, 0), at(2*time.Second, 100, 1), at(2*time.Second+time.Millisecond, 100+test.more, 2))
		if err != nil {
			t.Fatal(err)
		}
		want := sample.Account{
			Elapsed: time.Second, Daemon: 10 * time.Millisecond, Worker: 3 * time.Millisecond, Interrupt: time.Millisecond,
			Longest: 400 * time.Microsecond, Ticks: 100, Missed: 2, Switches: 302,
		}
		close := cmp.Comparer(func(a, b time.Duration) bool { return max(a-b, b-a) < 10 })
		if diff := cmp.Diff(want, got, close); diff != "" {
			t.Errorf("%s: -want +got\n%s", test.name, diff)
		}
	}
}

func TestAccountTrouble(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(before, after, again *look)
		want   string
	}{
		{"no module", func(_, after, _ *look) { after.Module, after.ModuleError = nil, "it is gone" }, "it is gone"},
		{"checks fail", func(_, after, _ *look) { after.Failed = 2 }, "2 checks failed"},
		{"findings", func(_, after, _ *look) { after.Findings = 1 }, "nobody attacks"},
		{"no checks", func(before, after, again *look) { after.Ticks, again.Ticks = before.Ticks, before.Ticks }, "does not check"},
	} {
		before, after, again := at(time.Second, 0, 0), at(2*time.Second, 100, 1), at(2*time.Second, 100, 2)
		test.change(before, after, again)
		if _, err := account(before, after, again); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want one with %q", test.name, err, test.want)
		}
	}
}

func TestSwitches(t *testing.T) {
	before, err := switches(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if before == 0 {
		t.Error("this process was never put on a CPU")
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		time.Sleep(time.Millisecond)
		after, err := switches(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if after > before {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still %d after 10 s", after)
		}
	}
}

func TestBrief(t *testing.T) {
	const list = `ffffffff81000000 T _stext
ffffffff81000010 t local
ffffffff81e00320 D sys_call_table
ffffffff81e012c0 d next
ffffffffc0001000 t attack	[attack]
`
	const want = `ffffffff81000000 T _stext
ffffffff81e00320 D sys_call_table
ffffffff81e012c0 d next
`
	if diff := cmp.Diff(want, string(brief([]byte(list)))); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}
