// SPDX-License-Identifier: MIT

package sample

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// example is a sample with a different value in each field.
func example() Sample {
	return Sample{
		Clock: Icount, Repetition: 2, Order: 13, Period: 100 * time.Millisecond, CPUs: 1,
		Off: Window{Elapsed: 2 * time.Second, Loops: 3_900_000},
		On:  Window{Elapsed: 2*time.Second + 7, Loops: 3_880_500},
		Account: Account{
			Elapsed: 2*time.Second + 40*time.Millisecond, Daemon: 6_000_000, Worker: 3_000_000, Interrupt: 1_200_000, Longest: 300_000,
			Ticks: 20, Missed: 1, Switches: 44,
		},
	}
}

func TestPercent(t *testing.T) {
	s := example()
	if got, want := s.CPUPercent(), 100*10.2e6/2040e6; math.Abs(got-want) > 1e-12 {
		t.Errorf("account %v, want %v", got, want)
	}
	s.On.Elapsed = s.Off.Elapsed
	if got, want := s.SoakerPercent(), 0.5; math.Abs(got-want) > 1e-12 {
		t.Errorf("counting loop %v, want %v", got, want)
	}
	// Two loops: each lacks 0.5% of its CPU.
	s.CPUs = 2
	if got, want := s.SoakerPercent(), 1.0; math.Abs(got-want) > 1e-12 {
		t.Errorf("counting loops %v, want %v", got, want)
	}
}

func TestUnaccounted(t *testing.T) {
	for _, test := range []struct {
		name          string
		ticks, missed uint64
		want          uint64
	}{
		{"all done", 20, 0, 0},
		{"one at the edge and one under way", 18, 0, 0},
		{"reported as missed", 10, 10, 0},
		{"more than expected", 25, 0, 0},
		{"lost", 10, 3, 5},
		{"none", 0, 0, 18},
	} {
		s := example()
		s.Account.Ticks, s.Account.Missed = test.ticks, test.missed
		if got := s.Unaccounted(); got != test.want {
			t.Errorf("%s: %d of %d, want %d", test.name, got, s.Expected(), test.want)
		}
	}
}

func TestCSV(t *testing.T) {
	second := example()
	second.Clock, second.Order, second.Period = Wall, 14, time.Millisecond
	want := []Sample{example(), second}
	var text strings.Builder
	if err := WriteCSV(&text, want); err != nil {
		t.Fatal(err)
	}
	const first = "clock,repetition,order,period_ns,cpus,off_ns,off_loops,on_ns,on_loops," +
		"account_ns,daemon_ns,worker_ns,interrupt_ns,longest_ns,ticks,missed,switches\n" +
		"icount,2,13,100000000,1,2000000000,3900000,2000000007,3880500,2040000000,6000000,3000000,1200000,300000,20,1,44\n"
	if !strings.HasPrefix(text.String(), first) {
		t.Errorf("%s\nwant it to begin with\n%s", text.String(), first)
	}
	got, err := ReadCSV(strings.NewReader(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestReadCSVErrors(t *testing.T) {
	var text strings.Builder
	if err := WriteCSV(&text, []Sample{example()}); err != nil {
		t.Fatal(err)
	}
	good := text.String()
	for _, test := range []struct{ name, old, new, want string }{
		{"nothing", good, "", "header"},
		{"another table", "clock,", "watch,", `want ["clock"`},
		{"a field lacks", ",20,1,44", ",20,1", "wrong number of fields"},
		{"not a number", "100000000", "fast", "line 2: period_ns"},
		{"negative", "6000000", "-6", "line 2: daemon_ns: negative: -6"},
		{"clock", "icount", "sundial", `line 2: sample 13: unknown clock "sundial"`},
		{"period", "100000000", "0", "period 0s"},
		{"empty window", "2000000007", "0", "an empty window"},
		{"no loops", "3900000", "0", "did not count"},
		{"no CPU", "100000000,1,", "100000000,0,", "0 CPUs"},
		{"repetition", "icount,2", "icount,0", "count from 1"},
	} {
		bad := strings.Replace(good, test.old, test.new, 1)
		if _, err := ReadCSV(strings.NewReader(bad)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want one with %q", test.name, err, test.want)
		}
	}
}

func FuzzReadCSV(f *testing.F) {
	var text strings.Builder
	if err := WriteCSV(&text, []Sample{example()}); err != nil {
		f.Fatal(err)
	}
	f.Add(text.String())
	f.Add("clock\nicount\n")
	f.Fuzz(func(t *testing.T, text string) {
		samples, err := ReadCSV(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, s := range samples {
			if v := s.CPUPercent(); math.IsNaN(v) || math.IsInf(v, 0) {
				t.Errorf("%+v costs %v", s, v)
			}
		}
	})
}

func TestSteps(t *testing.T) {
	plan := Plan{Clock: Icount, Periods: Periods, Repetitions: 12, MinTicks: 10, MaxTicks: 500, Window: 2 * time.Second, Seed: 42}
	steps := plan.Steps()
	if len(steps) != 12*len(Periods) {
		t.Fatalf("%d steps", len(steps))
	}
	if diff := cmp.Diff(steps, plan.Steps()); diff != "" {
		t.Errorf("the same seed gives another order:\n%s", diff)
	}
	other := plan
	other.Seed++
	if cmp.Equal(steps, other.Steps()) {
		t.Error("another seed gives the same order")
	}
	lengths := map[time.Duration]int{time.Second: 10, 200 * time.Millisecond: 10, 20 * time.Millisecond: 100, time.Millisecond: 500}
	orders := make(map[string]bool)
	for r := range 12 {
		seen := make(map[time.Duration]bool)
		var order []string
		for _, s := range steps[r*len(Periods) : (r+1)*len(Periods)] {
			if s.Repetition != r+1 {
				t.Errorf("repetition %d among those of %d", s.Repetition, r+1)
			}
			if want, ok := lengths[s.Period]; ok && (s.Ticks != want || s.Window() != time.Duration(want)*s.Period) {
				t.Errorf("%v: %d ticks, %v; want %d ticks", s.Period, s.Ticks, s.Window(), want)
			}
			seen[s.Period] = true
			order = append(order, s.Period.String())
		}
		if len(seen) != len(Periods) {
			t.Errorf("repetition %d has %d periods", r+1, len(seen))
		}
		orders[strings.Join(order, " ")] = true
	}
	if len(orders) < 10 {
		t.Errorf("%d different orders in 12 repetitions", len(orders))
	}
	one := Plan{Periods: []time.Duration{time.Second, time.Millisecond}, Repetitions: 1, MinTicks: 10, MaxTicks: 1000, Window: time.Second}
	if got, want := one.Duration(), 22*time.Second; got != want {
		t.Errorf("it lasts %v, want %v", got, want)
	}
}
