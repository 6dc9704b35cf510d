// SPDX-License-Identifier: MIT

package watch

import (
	_ "embed"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// mib is a number of bytes in MiB.
func mib(n any) string {
	switch n := n.(type) {
	case int:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case uint64:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprint(n)
}

//go:embed report.md.tmpl
var text string

var page = template.Must(template.New("report").Funcs(report.Funcs).Funcs(template.FuncMap{
	"parts": func() string { return strings.Join(Parts, " | ") },
	"ms":    func(s float64) string { return fmt.Sprintf("%.3f ms", 1e3*s) },
	"mib":   mib,
	"per":   func(a overhead.Statistic, bytes int) string { return fmt.Sprintf("%.3f", a.Median/float64(bytes)) },
}).Parse(text))

// Write writes all forms of the report into a directory.
func (s *Summary) Write(dir string, r *Results) error {
	return report.WriteAll(dir,
		report.Markdown(page, s),
		report.JSON(report.SummaryFile, s),
		report.File{Name: report.SamplesFile, Write: func(w io.Writer) error { return sample.WriteCSV(w, r.Samples) }},
		report.CSV("ticks.csv", tickTable(r.Ticks)),
		report.CSV("latency.csv", latencyTable(r.Latency)),
		report.CSV("transient.csv", transientTable(r.Transient)),
		report.CSV("bulk.csv", bulkTable(r.Bulk)),
		report.CSV("slowdown.csv", slowdownTable(r.Linux)),
		report.CSV("pass.csv", passTable(r.Linux)),
		s.curveChart().PNG("curve.png"),
		s.tickBars().PNG("ticks.png"),
		latencyChart(r.Latency).PNG("latency.png"),
		s.transientChart().PNG("transient.png"),
	)
}

// Largest is the largest part of the tick with all items of a vCPU that has not
// run.
func (s *Summary) Largest() string {
	for _, c := range s.Costs {
		if c.VCPU == Idle && c.Items == RegisterItems {
			largest := slices.Max(c.Parts)
			return fmt.Sprintf("%s, %.0f of %.0f instructions", Parts[slices.Index(c.Parts, largest)], largest, c.Instructions.Median)
		}
	}
	return "unknown"
}

// At1s is the curve at 1 s.
func (s *Summary) At1s() overhead.Period { return s.Curve.Periods[0] }

func integer(n int64) string { return strconv.FormatInt(n, 10) }

func tickTable(all []Tick) [][]string {
	rows := [][]string{{"vcpu", "items", "repetition", "instructions", "account"}}
	for _, t := range all {
		for i := range t.Instructions {
			rows = append(rows, []string{t.VCPU, t.Items, strconv.Itoa(i + 1), report.Float(t.Instructions[i]), report.Float(t.Account[i])})
		}
	}
	return rows
}

func latencyTable(all []Changes) [][]string {
	rows := [][]string{{"by", "vcpu", "period_ns", "found_ns", "noticed_ns"}}
	for _, c := range all {
		for i := range c.Found {
			noticed := ""
			if len(c.Noticed) > 0 {
				noticed = integer(int64(c.Noticed[i]))
			}
			rows = append(rows, []string{c.By, c.VCPU, integer(int64(c.Period)), integer(int64(c.Found[i])), noticed})
		}
		for range c.Missed {
			rows = append(rows, []string{c.By, c.VCPU, integer(int64(c.Period)), "", ""})
		}
	}
	return rows
}

func transientTable(all []Transient) [][]string {
	rows := [][]string{{"period_ns", "length_ns", "seen"}}
	for _, t := range all {
		for i := range t.Length {
			rows = append(rows, []string{integer(int64(t.Period)), integer(int64(t.Length[i])), strconv.FormatBool(t.Seen[i])})
		}
	}
	return rows
}

func bulkTable(all []Bulk) [][]string {
	rows := [][]string{{"pages", "bytes", "read_ns", "memcpy_ns", "go_copy_ns"}}
	for _, b := range all {
		for i := range b.Read {
			rows = append(rows, []string{b.Pages, strconv.Itoa(b.Bytes), integer(b.Read[i]), integer(b.Memcpy[i]), integer(b.GoCopy[i])})
		}
	}
	return rows
}

func slowdownTable(l *Linux) [][]string {
	rows := [][]string{{"period_ns", "without_ns", "with_ns"}}
	for i := range l.Slowdown.With {
		rows = append(rows, []string{integer(int64(l.Slowdown.Period)), integer(l.Slowdown.Without[i]), integer(l.Slowdown.With[i])})
	}
	return rows
}

func passTable(l *Linux) [][]string {
	rows := [][]string{{"repetition", "cpu_percent", "account_percent"}}
	for i := range l.Pass.CPUPercent {
		rows = append(rows, []string{strconv.Itoa(i + 1), report.Float(l.Pass.CPUPercent[i]), report.Float(l.Pass.Account[i])})
	}
	return rows
}

func (s *Summary) curveChart() *report.Chart {
	account, loop := report.Series{Name: "the product's account", Line: true}, report.Series{Name: "counting loop", Colour: 1}
	for _, p := range s.Curve.Periods {
		account.Points = append(account.Points, report.Value{X: p.PeriodS, Y: p.CPUPercent, Low: p.CILow, High: p.CIHigh})
		loop.Points = append(loop.Points, report.Value{X: p.PeriodS, Y: p.SoakerPercent, Low: p.SoakerCILow, High: p.SoakerCIHigh})
	}
	return &report.Chart{
		Title:  "What watching one VM costs (memory, registers, GDT, IDT, system call table)",
		X:      report.Axis{Label: "period", Log: true, Min: 0.0004, Max: 1.5, Text: report.Seconds},
		Y:      report.Axis{Label: "CPU cost, % of one CPU", Log: true, Min: 0.0001, Max: 10, Text: report.Percent},
		Series: []report.Series{account, loop},
		Levels: []report.Level{{Name: fmt.Sprintf("%g%%, the paper's at 1 s", overhead.PaperPercent), Y: overhead.PaperPercent}},
	}
}

func (s *Summary) tickBars() report.Bars {
	b := report.Bars{Title: "What a tick is made of", Label: "instructions", Parts: Parts}
	for _, c := range slices.Backward(s.Costs) {
		b.Bars = append(b.Bars, report.Bar{Name: "vCPU " + c.VCPU + "; " + c.Items, Parts: c.Parts})
	}
	return b
}

// latencyChart is the part of the changes that are found within a time.
func latencyChart(all []Changes) *report.Chart {
	c := &report.Chart{
		Title: "How soon changes at random times are found", LegendLeft: true,
		X: report.Axis{Label: "from the change to the finding, in periods", Max: 1.1},
		Y: report.Axis{Label: "part of all changes", Max: 1},
	}
	for i, of := range all {
		found := floats(of.Found)
		slices.Sort(found)
		series := report.Series{Name: fmt.Sprintf("%s, period %v, vCPU %s", of.By, of.Period, of.VCPU), Hidden: true, Colour: i}
		n := float64(len(found) + of.Missed)
		for j, ns := range found {
			x := ns / float64(of.Period)
			c.X.Max = max(c.X.Max, 1.05*x)
			series.Points = append(series.Points, report.Value{X: x, Y: float64(j+1) / n})
		}
		c.Series = append(c.Series, series)
	}
	return c
}

func (s *Summary) transientChart() *report.Chart {
	c := &report.Chart{
		Title: "How likely a change that is undone is seen", LegendLeft: true,
		X: report.Axis{Label: "length of the change", Log: true, Min: 4e-5, Max: 3, Text: report.Seconds},
		Y: report.Axis{Label: "part of the changes that was seen", Max: 1.2}, // room for the legend
	}
	for i, period := range TransientPeriods {
		p := period.Seconds()
		series := report.Series{Name: fmt.Sprintf("period %v, with 95%% intervals", period), Colour: i}
		for _, u := range s.Undone {
			if u.PeriodS == p {
				series.Points = append(series.Points, report.Value{X: u.LengthS, Y: u.Seen, Low: u.Low, High: u.High})
			}
		}
		theory := report.Series{Hidden: true, Dashed: true, Colour: i}
		for x := 4e-5; x < 3; x *= math.Sqrt2 {
			theory.Points = append(theory.Points, report.Value{X: x, Y: min(1, x/p)})
		}
		c.Series = append(c.Series, series, theory)
	}
	return c
}
