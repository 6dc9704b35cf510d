// SPDX-License-Identifier: MIT

package report

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/perf/benchfmt"
	"gonum.org/v1/plot/cmpimg"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/sample"
)

var update = flag.Bool("update", false, "write the golden files anew")

// made are samples as no run gives them: a check costs the same in each, but
// for a little that depends on the repetition.
func made(clock sample.Clock, cpus int, check, taken time.Duration) []sample.Sample {
	const window = 10 * time.Second
	var out []sample.Sample
	for repetition := 1; repetition <= 10; repetition++ {
		for _, period := range sample.Periods {
			ticks := uint64(window / period)
			spread := 1 + float64(repetition-5)/100
			out = append(out, sample.Sample{
				Clock: clock, Repetition: repetition, Order: len(out) + 1, Period: period, CPUs: cpus,
				Off: sample.Window{Elapsed: window, Loops: uint64(cpus) * 10_000_000_000},
				On: sample.Window{Elapsed: window,
					Loops: uint64(cpus)*10_000_000_000 - ticks*uint64(spread*float64(taken.Nanoseconds()))},
				Account: sample.Account{Elapsed: window, Ticks: ticks,
					Daemon: time.Duration(float64(ticks) * spread * float64(check))},
			})
		}
	}
	return out
}

// example is a report of made samples.
func example(t *testing.T) (*Report, []sample.Sample) {
	t.Helper()
	samples := append(made(sample.Icount, 1, 60*time.Microsecond, 64*time.Microsecond),
		made(sample.Wall, 2, 900*time.Microsecond, 930*time.Microsecond)...)
	samples[9].Account.Missed = 3
	claim, err := overhead.NewCurve(sample.Icount, samples)
	if err != nil {
		t.Fatal(err)
	}
	check, err := overhead.NewCurve(sample.Wall, samples)
	if err != nil {
		t.Fatal(err)
	}
	return &Report{
		Summary: &overhead.Summary{PaperPercent: overhead.PaperPercent, Curve: *claim, Check: check,
			Seed: 42, Command: "go run ./bench/cmd/bench -seed 42", Date: "2026-01-02"},
		Plans: []sample.Plan{
			{Clock: sample.Icount, Repetitions: 10, MinTicks: 10, MaxTicks: 10000, Window: 10 * time.Second},
			{Clock: sample.Wall, Repetitions: 10, MinTicks: 10, MaxTicks: 10000, Window: 10 * time.Second},
		},
		Machine: Machine{Processor: "a processor", CPUs: 2, System: "a system", Emulator: "an emulator", Kernel: "1.2.3", Go: "go1", Revision: "abc"},
	}, samples
}

// golden compares with a file of testdata, or writes it with -update.
func golden(t *testing.T, name string, got []byte, equal func(want, got []byte) (bool, error)) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	ok, err := equal(want, got)
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		t.Errorf("differs from %s (go test -update writes it anew)", name)
	}
}

func TestPlot(t *testing.T) {
	r, _ := example(t)
	for _, format := range []string{"png", "svg"} {
		var out bytes.Buffer
		if err := WritePlot(&out, format, r.Summary); err != nil {
			t.Fatal(err)
		}
		golden(t, "overhead."+format, out.Bytes(), func(want, got []byte) (bool, error) {
			return cmpimg.EqualApprox(format, want, got, 0.01)
		})
		// Another curve is another picture.
		r.Summary.Periods[0].CPUPercent *= 3
		var other bytes.Buffer
		if err := WritePlot(&other, format, r.Summary); err != nil {
			t.Fatal(err)
		}
		r.Summary.Periods[0].CPUPercent /= 3
		if same, err := cmpimg.EqualApprox(format, out.Bytes(), other.Bytes(), 0.01); err != nil || same {
			t.Errorf("%s: the picture does not show the curve (%v)", format, err)
		}
	}
}

// What has no place on a logarithmic axis does not break the picture.
func TestPlotEdges(t *testing.T) {
	r, _ := example(t)
	for name, change := range map[string]func(*overhead.Summary){
		"no cost":          func(s *overhead.Summary) { s.Periods[0].SoakerPercent, s.Periods[1].SoakerPercent = 0, -0.01 },
		"interval below 0": func(s *overhead.Summary) { s.Periods[0].SoakerCILow = -1 },
		"no iso-cost":      func(s *overhead.Summary) { s.IsoCostPeriodS = nil },
		"no check":         func(s *overhead.Summary) { s.Check = nil },
		"one period":       func(s *overhead.Summary) { s.Periods = s.Periods[:1] },
		"nothing":          func(s *overhead.Summary) { s.Periods, s.Check = nil, nil },
	} {
		s := *r.Summary
		s.Periods = slices.Clone(s.Periods)
		change(&s)
		var out bytes.Buffer
		if err := WritePlot(&out, "png", &s); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := WritePlot(new(bytes.Buffer), "crayon", r.Summary); err == nil {
		t.Error("no error on an unknown format")
	}
}

// Programs rely on these names and types.
func TestSummarySchema(t *testing.T) {
	r, _ := example(t)
	var text bytes.Buffer
	if err := r.Summary.WriteJSON(&text); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Clock   string   `json:"clock"`
		Paper   float64  `json:"paper_percent"`
		Iso     *float64 `json:"iso_cost_period_s"`
		Periods []map[string]any
	}
	if err := json.Unmarshal(text.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Clock != "icount" || got.Paper != 0.35 || got.Iso == nil || *got.Iso < 0.01 || *got.Iso > 0.02 || len(got.Periods) != 10 {
		t.Errorf("%s", text.Bytes())
	}
	for _, p := range got.Periods {
		for _, key := range []string{"period_s", "cpu_percent", "ci_low", "ci_high", "n", "soaker_percent"} {
			if v, ok := p[key].(float64); !ok || v <= 0 {
				t.Errorf("%s is %v", key, p[key])
			}
		}
	}
	// Without a crossing it is null, not a number.
	r.Summary.IsoCostPeriodS = nil
	text.Reset()
	if err := r.Summary.WriteJSON(&text); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text.String(), `"iso_cost_period_s": null`) {
		t.Errorf("%s", text.Bytes())
	}
}

func TestBench(t *testing.T) {
	_, samples := example(t)
	var text bytes.Buffer
	if err := WriteBench(&text, samples); err != nil {
		t.Fatal(err)
	}
	reader := benchfmt.NewReader(&text, BenchFile)
	n := 0
	for reader.Scan() {
		result, ok := reader.Result().(*benchfmt.Result)
		if !ok {
			if bad, ok := reader.Result().(*benchfmt.SyntaxError); ok {
				t.Fatal(bad)
			}
			continue
		}
		s := samples[n]
		n++
		if want := "Monitor/clock=" + string(s.Clock) + "/period=" + s.Period.String(); string(result.Name) != want {
			t.Errorf("name %s, want %s", result.Name, want)
		}
		if got, _ := result.Value("cpu-percent"); got != s.CPUPercent() {
			t.Errorf("%s: %v, want %v", result.Name, got, s.CPUPercent())
		}
		tick := s.Account.CPU().Seconds() / float64(s.Account.Ticks)
		if got, _ := result.Value("sec/op"); cmp.Diff(got, tick, closeTo) != "" {
			t.Errorf("%s: %v, want %v", result.Name, got, tick)
		}
	}
	if err := reader.Err(); err != nil || n != len(samples) {
		t.Errorf("%d of %d samples, %v", n, len(samples), err)
	}
	samples[0].Account.Ticks = 0
	if err := WriteBench(&text, samples); err == nil {
		t.Error("no error on a sample without a tick")
	}
}

var closeTo = cmp.Comparer(func(a, b float64) bool { return a-b < 1e-12 && b-a < 1e-12 })

func TestMarkdown(t *testing.T) {
	r, _ := example(t)
	var text bytes.Buffer
	if err := r.WriteMarkdown(&text); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.md", text.Bytes(), func(want, got []byte) (bool, error) {
		diff := cmp.Diff(string(want), string(got))
		if diff != "" {
			t.Log(diff)
		}
		return diff == "", nil
	})
	for _, want := range []string{
		"0.00603% of one CPU at a period of 1 s", "every **17.2 ms**", "seed 42", "3 of 100003 ticks missed",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("it lacks %q", want)
		}
	}
	// A quick run without a check and a crossing says so.
	r.Summary.Quick, r.Summary.Check, r.Summary.IsoCostPeriodS = true, nil, nil
	r.Summary.IsoCostNote = "no period costs that"
	text.Reset()
	if err := r.WriteMarkdown(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"This is a quick run", "There is no iso-cost period: no period costs that."} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("it lacks %q", want)
		}
	}
	if strings.Contains(text.String(), "the check\n") {
		t.Error("it speaks of a check that was not made")
	}
}

func TestWriteFiles(t *testing.T) {
	r, samples := example(t)
	dir := filepath.Join(t.TempDir(), "results")
	if err := WriteFiles(dir, r, samples); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	want := []string{"bench.txt", "overhead.png", "overhead.svg", "report.md", "samples.csv", "summary.json"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	f, err := os.Open(filepath.Join(dir, SamplesFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := sample.ReadCSV(f)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(samples, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	// What cannot be made in full leaves what was there alone.
	samples[0].Account.Ticks = 0
	r.Summary.Seed++
	if err := WriteFiles(dir, r, samples); err == nil {
		t.Error("no error on a sample without a tick")
	}
	text, err := os.ReadFile(filepath.Join(dir, SummaryFile))
	if err != nil || !strings.Contains(string(text), `"seed": 42`) {
		t.Errorf("the summary was replaced (%v)", err)
	}
}

func TestThisMachine(t *testing.T) {
	m := ThisMachine()
	if m.CPUs < 1 || m.Processor == "" || m.System == "" || m.Go == "" {
		t.Errorf("%+v", m)
	}
}

func TestCommand(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, "go run ./bench/cmd/benchx"},
		{[]string{"-quick", "-out", "/somewhere", "-peers", ""}, "go run ./bench/cmd/benchx -quick -peers ''"},
		{[]string{"--out=/somewhere", "-n", "3"}, "go run ./bench/cmd/benchx -n 3"},
	} {
		if got := command("benchx", tt.args); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.args, got, tt.want)
		}
	}
}
