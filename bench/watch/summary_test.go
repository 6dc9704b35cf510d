// SPDX-License-Identifier: MIT

package watch

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/bench/peers"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/bench/scale"
)

func TestTrace(t *testing.T) {
	const text = `# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
          <idle>-0       [000] d.h.. 1000: local_timer_entry: vector=236
          <idle>-0       [000] d.h.. 1100: hrtimer_expire_entry: hrtimer=000000001 function=timer_fn [kvmaccess] now=5
          <idle>-0       [000] d.h.. 1350: hrtimer_expire_exit: hrtimer=000000001
          <idle>-0       [000] d.h.. 1420: local_timer_exit: vector=236
          <idle>-0       [000] d.h.. 2000: local_timer_entry: vector=236
          <idle>-0       [000] d.h.. 2100: hrtimer_expire_entry: hrtimer=000000002 function=tick_sched_timer now=5
          <idle>-0       [000] d.h.. 2200: hrtimer_expire_exit: hrtimer=000000002
          <idle>-0       [000] d.h.. 2300: local_timer_exit: vector=236
          <idle>-0       [000] d.h.. 3000: local_timer_entry: vector=236
          <idle>-0       [000] d.h.. 3100: hrtimer_expire_entry: hrtimer=000000001 function=timer_fn [kvmaccess] now=5
          <idle>-0       [000] d.h.. 3200: hrtimer_expire_exit: hrtimer=000000001
          <idle>-0       [000] d.h.. 3300: hrtimer_expire_entry: hrtimer=000000002 function=tick_sched_timer now=5
          <idle>-0       [000] d.h.. 3400: hrtimer_expire_exit: hrtimer=000000002
          <idle>-0       [000] d.h.. 3500: local_timer_exit: vector=236
`
	var got Trace
	if err := got.add([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Trace{Before: []int64{100}, Function: []int64{250}, After: []int64{70}}, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if err := got.add([]byte(text[strings.Index(text, " 2000:"):strings.Index(text, " 3000:")])); err == nil {
		t.Error("a trace without a tick is no error")
	}
}

// results are as if each tick took 5,000 instructions and 1,000 around them.
func results() *Results {
	r := &Results{Bulk: []Bulk{{Pages: HugePages, Bytes: 1000, Read: []int64{1250}, Memcpy: []int64{1000}, GoCopy: []int64{50}},
		{Pages: SmallPages, Bytes: 1000, Read: []int64{1400}, Memcpy: []int64{1000}, GoCopy: []int64{50}}},
		Peers: &peers.Summary{QMPCostRatio: 0.005, Origin: report.Origin{Command: "peers"}},
		Scale: &scale.Summary{ScaleCostRatio: 1.5, Origin: report.Origin{Command: "scale"}},
		Linux: &Linux{Kernel: "1.2.3",
			Slowdown: Slowdown{Period: slowPeriod, Without: []int64{1000000, 1000000, 1000000}, With: []int64{1000500, 1000000, 999900}},
			Pass:     Pass{Text: 3 << 20, Rodata: 1 << 20, Each: passEach, Period: passPeriod, Budget: 4096, CPUPercent: []float64{0.2}, Account: []float64{0.1}},
		},
	}
	for _, period := range []time.Duration{time.Second, 10 * time.Millisecond, time.Millisecond} {
		for n := 1; n <= 6; n++ {
			ticks := uint64(10 * time.Second / period)
			loops := uint64(1e6)
			lost := uint64(float64(ticks) * 6000 / 1e10 * float64(loops))
			r.Samples = append(r.Samples, sample.Sample{Clock: sample.Icount, Repetition: n, Order: n, Period: period, CPUs: 1,
				Off: sample.Window{Elapsed: 10 * time.Second, Loops: loops}, On: sample.Window{Elapsed: 10 * time.Second, Loops: loops - lost},
				Account: sample.Account{Elapsed: 10 * time.Second, Interrupt: time.Duration(ticks * 5000), Ticks: ticks}})
		}
	}
	for _, vcpu := range []string{Idle, Busy} {
		for items, account := range map[string]float64{NoItems: 100, BytesItems: 3100, RegisterItems: 4100} {
			r.Ticks = append(r.Ticks, Tick{VCPU: vcpu, Items: items, Instructions: []float64{account + 1000}, Account: []float64{account},
				Trace: &Trace{Instructions: []float64{account + 1000 + 4*700}, Before: []int64{800}, Function: []int64{1000}, After: []int64{900}}})
		}
		r.Latency = append(r.Latency, Changes{By: Client, VCPU: vcpu, Period: 10 * time.Millisecond,
			Found: []time.Duration{2 * time.Millisecond, 6 * time.Millisecond, 12 * time.Millisecond}, Noticed: []time.Duration{1, 2, 3}, Missed: 1})
	}
	for _, period := range TransientPeriods {
		r.Transient = append(r.Transient, Transient{Period: period, Length: []time.Duration{period / 100, period / 2, 2 * period}, Seen: []bool{false, true, true}})
	}
	return r
}

func TestSummarize(t *testing.T) {
	// The order of ticks is that of the measurement: without items first.
	r := results()
	var sorted []Tick
	for _, vcpu := range []string{Idle, Busy} {
		for _, items := range []string{NoItems, BytesItems, RegisterItems} {
			for _, tick := range r.Ticks {
				if tick.VCPU == vcpu && tick.Items == items {
					sorted = append(sorted, tick)
				}
			}
		}
	}
	r.Ticks = sorted
	s, err := Summarize(r, report.Origin{Command: "watch", Date: "2026-11-23"}, false)
	if err != nil {
		t.Fatal(err)
	}
	near := func(name string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 0.01*math.Abs(want) {
			t.Errorf("%s is %g, want %g", name, got, want)
		}
	}
	near("CPU at 1 s", s.CPUPercent1s, 0.0006)
	near("beside the account", s.Beside, 1000)
	near("median", s.LatencyMedian, 0.001)
	near("maximum", s.LatencyMax, 0.002)
	near("bulk", s.BulkRatio, 0.8)
	if s.Missed != 2 || s.Changed != 8 {
		t.Errorf("%d of %d missed", s.Missed, s.Changed)
	}
	if diff := cmp.Diff([]float64{800, 100, 3000, 1000, 200}, s.Costs[2].Parts); diff != "" {
		t.Errorf("parts: %s", diff)
	}
	if got := s.Largest(); !strings.HasPrefix(got, "compare, 3000 of 5100") {
		t.Errorf("largest part: %s", got)
	}
	met := map[bool]int{}
	for _, r := range s.Reaches {
		met[r.Met]++
		if !r.Met && r.Why == "" {
			t.Errorf("%s is missed, and nothing says why", r.Metric)
		}
	}
	near("period at 0.35%", *s.IsoCostPeriod, 0.001714)
	// Missed: the VMs, the maximum, and changes.
	if met[true] != 6 || met[false] != 3 || s.Met() {
		t.Errorf("%+v", s.Reaches)
	}

	dir := t.TempDir()
	if err := s.Write(dir, r); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"report.md", "samples.csv", "ticks.csv", "latency.csv", "transient.csv", "bulk.csv", "slowdown.csv", "pass.csv",
		"curve.png", "ticks.png", "latency.png", "transient.png"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "summary.json"))
	if err != nil {
		t.Fatal(err)
	}
	var named map[string]any
	if err := json.Unmarshal(text, &named); err != nil {
		t.Fatal(err)
	}
	clocks, commands := named["clocks"].(map[string]any), named["commands"].(map[string]any)
	for _, name := range []string{"cpu_percent_1s", "iso_cost_period_s", "qmp_cost_ratio", "scale_cost_ratio", "guest_slowdown_10ms_ci",
		"bulk_read_memcpy_ratio", "latency_median_periods_excess_s", "latency_max_periods_excess_s", "changes_missed"} {
		if _, ok := named[name]; !ok || clocks[name] == "" || clocks[name] == nil {
			t.Errorf("%s is %v, clock %v", name, named[name], clocks[name])
		}
	}
	if commands["qmp_cost_ratio"] != "peers" || commands["scale_cost_ratio"] != "scale" || commands["changes_missed"] != "watch" {
		t.Errorf("%v", commands)
	}
}

func TestWilson(t *testing.T) {
	low, high := wilson(0.5, 100)
	if math.Abs(low-0.4038) > 1e-4 || math.Abs(high-0.5962) > 1e-4 {
		t.Errorf("%g to %g", low, high)
	}
	if low, high := wilson(0, 10); low < 0 || high < 0.2 || high > 0.4 {
		t.Errorf("%g to %g", low, high)
	}
}
