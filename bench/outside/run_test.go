// SPDX-License-Identifier: MIT

package outside

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// lines are messages as a host sends them.
func lines(t *testing.T, messages ...inside.Message) string {
	t.Helper()
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	for _, m := range messages {
		if err := encoder.Encode(m); err != nil {
			t.Fatal(err)
		}
	}
	return text.String()
}

var (
	aHost   = inside.Message{Host: &inside.Host{Kernel: "1.2.3", CPUs: 1, Clocksource: "tsc"}}
	aSample = inside.Message{Sample: &sample.Sample{Clock: sample.Icount, Repetition: 1, Order: 1, Period: time.Second, CPUs: 1,
		Account: sample.Account{Ticks: 7}}}
	theEnd = inside.Message{Done: true}
)

func newRun() *Run {
	return &Run{
		Host: Host{Log: slog.New(slog.DiscardHandler)},
		Plan: sample.Plan{Clock: sample.Icount, Periods: []time.Duration{time.Second}, Repetitions: 2, MinTicks: 10, MaxTicks: 10},
	}
}

func TestReceive(t *testing.T) {
	var got Result
	words := 0
	if err := newRun().receive(strings.NewReader(lines(t, aHost, aSample, aSample, theEnd)), &got, func() { words++ }); err != nil {
		t.Fatal(err)
	}
	want := Result{Host: *aHost.Host, Samples: []sample.Sample{*aSample.Sample, *aSample.Sample}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if words != 4 {
		t.Errorf("%d signs of life, want 4", words)
	}
}

func TestReceiveTrouble(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"nothing", "", "ended after 0 of 2 samples"},
		{"it breaks off", lines(t, aHost, aSample), "ended after 1 of 2 samples"},
		{"done too early", lines(t, aHost, aSample, theEnd), "done after 1 of 2 samples"},
		{"too many", lines(t, aHost, aSample, aSample, aSample), "more than 2 samples"},
		{"no host", lines(t, aSample, aSample, theEnd), "done after 2 of 2 samples"},
		{"not JSON", lines(t, aHost, aSample) + "panic: trouble", "after 1 of 2 samples: invalid character"},
	} {
		from := strings.NewReader(test.text)
		if err := newRun().receive(from, new(Result), func() {}); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want one with %q", test.name, err, test.want)
		}
	}
}

// The runner's words come through, its exit code counts, and what it was told
// is what the plan says.
func TestTake(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\necho \"$@\" >" + dir + "/arguments\ncat " + dir + "/messages\nexit $(cat " + dir + "/code)\n"
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("vmfixture", script, 0o755)
	write("messages", lines(t, aHost, aSample, aSample, theEnd), 0o644)
	write("code", "0", 0o644)
	r := newRun()
	r.Dir, r.Timeout, r.CPUs = dir, time.Minute, 3

	result, err := r.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Samples) != 2 || result.Host.Kernel != "1.2.3" || result.Elsewhere < 0 {
		t.Errorf("%+v", result)
	}
	arguments := func() string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, "arguments"))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if got := arguments(); !strings.HasPrefix(got, "run --timeout 1m0s --icount --file "+dir+"/kvmaccessd -- "+dir+"/benchinside {") {
		t.Errorf("arguments %s", got)
	}

	// All samples, but a host that ends badly: both are told.
	write("code", "125", 0o644)
	if result, err = r.Take(t.Context()); result == nil || err == nil {
		t.Errorf("%+v, %v; want a result and an error", result, err)
	}
	// No samples.
	write("messages", lines(t, aHost), 0o644)
	if result, err = r.Take(t.Context()); result != nil || err == nil || !strings.Contains(err.Error(), "0 of 2") {
		t.Errorf("%+v, %v; want an error", result, err)
	}
	// By the wall's clock.
	r.Plan.Clock = sample.Wall
	write("messages", lines(t, aHost, aSample, aSample, theEnd), 0o644)
	write("code", "0", 0o644)
	if _, err = r.Take(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := arguments(); !strings.Contains(got, "--smp 3") || strings.Contains(got, "icount ") {
		t.Errorf("arguments %s", got)
	}
	// No runner.
	r.Dir = filepath.Join(dir, "nowhere")
	if _, err = r.Take(t.Context()); err == nil {
		t.Error("no error without a runner")
	}
}

// A host that stands still is given up, and another one goes on.
func TestTakeStall(t *testing.T) {
	dir := t.TempDir()
	// The first host sends one sample and stands still, the second the rest.
	script := `#!/bin/sh
cd ` + dir + `
echo "$@" >>arguments
if [ -e second ]; then cat rest; exit 0; fi
touch second
cat first
exec sleep 100
`
	for name, text := range map[string]string{
		"vmfixture": script, "first": lines(t, aHost, aSample), "rest": lines(t, aHost, aSample, theEnd),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r := newRun()
	r.Dir, r.Timeout, r.Stall = dir, time.Minute, 2*time.Second
	result, err := r.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Samples) != 2 || result.Restarts != 1 {
		t.Errorf("%d samples, %d restarts", len(result.Samples), result.Restarts)
	}
	arguments, err := os.ReadFile(filepath.Join(dir, "arguments"))
	if err != nil {
		t.Fatal(err)
	}
	if first, second, _ := strings.Cut(string(arguments), "\n"); !strings.Contains(first, `"done":0`) || !strings.Contains(second, `"done":1`) {
		t.Errorf("%s", arguments)
	}

	// One that always does is an error in the end.
	if err := os.Remove(filepath.Join(dir, "rest")); err != nil {
		t.Fatal(err)
	}
	always := "#!/bin/sh\nexec sleep 100\n"
	if err := os.WriteFile(filepath.Join(dir, "vmfixture"), []byte(always), 0o755); err != nil {
		t.Fatal(err)
	}
	r.Stall = 50 * time.Millisecond
	if result, err := r.Take(t.Context()); result != nil || !errors.Is(err, errStall) {
		t.Errorf("%+v, %v; want %v", result, err, errStall)
	}
}

func TestParseBusy(t *testing.T) {
	got, err := parseBusy("cpu  100 20 3 9999 500 4 5 60 7 0\n")
	if want := 1320 * time.Millisecond; err != nil || got != want {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"", "cpu0 1 2 3 4 5 6 7 8", "cpu 1 2 3", "cpu a b c d e f g h"} {
		if _, err := parseBusy(bad); err == nil {
			t.Errorf("no error on %q", bad)
		}
	}
	before, err := busy()
	if err != nil {
		t.Fatal(err)
	}
	if before <= 0 {
		t.Errorf("this machine has never done a thing: %v", before)
	}
	var line bytes.Buffer // a little work
	for range 1000 {
		line.WriteByte('x')
	}
	if after, err := busy(); err != nil || after < before {
		t.Errorf("%v after %v, %v", after, before, err)
	}
}
