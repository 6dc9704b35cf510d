// SPDX-License-Identifier: MIT

package scale

import (
	_ "embed"
	"errors"
	"fmt"
	"strconv"
	"text/template"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// Reach is what the cost of a VM among a thousand may be of that of one alone.
const Reach = 1.2

// Cost is what a number of VMs cost.
type Cost struct {
	Kind         tinyvm.Kind        `json:"kind"`
	VMs          int                `json:"vms"`
	PeriodS      float64            `json:"period_s"`
	EffectiveS   float64            `json:"effective_period_s"` // the longest that a watch was stretched to
	CPUPercent   overhead.Statistic `json:"cpu_percent"`        // of one CPU, all VMs together
	Instructions overhead.Statistic `json:"instructions_per_tick"`
	Ratio        float64            `json:"ratio"` // of the cost of a VM to that of one alone
	Ticks        uint64             `json:"ticks"`
	Missed       uint64             `json:"missed"`
	Late         uint64             `json:"late"`
	Captures     uint64             `json:"captures"`
	Skipped      uint64             `json:"skipped"`
}

// Summary is the outcome of a run.
type Summary struct {
	ScaleCostRatio float64           `json:"scale_cost_ratio"` // the larger of both kinds', of the largest number of VMs
	VMs            int               `json:"vms"`              // that number
	Clocks         map[string]string `json:"clocks"`
	Quick          bool              `json:"quick"`
	Costs          []Cost            `json:"costs"`
	Bytes          int               `json:"bytes_per_vm"`
	report.Origin
}

// Summarize works out what the rows say.
func Summarize(rows []Row) (*Summary, error) {
	s := &Summary{Clocks: map[string]string{"scale_cost_ratio": report.Instructions}, Bytes: compared}
	alone := map[tinyvm.Kind]float64{}
	for _, r := range rows {
		c := Cost{Kind: r.Kind, VMs: r.VMs, PeriodS: r.Period.Seconds(), EffectiveS: r.Effective.Seconds(),
			Ticks: r.Ticks, Missed: r.Missed, Late: r.Late, Captures: r.Captures, Skipped: r.Skipped}
		var err1, err2 error
		c.CPUPercent, err1 = overhead.Spread(r.CPUPercent)
		c.Instructions, err2 = overhead.Spread(r.Instructions)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("%d VMs: %w", r.VMs, err)
		}
		if r.VMs == 1 {
			alone[r.Kind] = c.Instructions.Median
		}
		if alone[r.Kind] <= 0 {
			return nil, fmt.Errorf("%d VMs that %s: there is nothing to compare with: one alone costs %g", r.VMs, r.Kind, alone[r.Kind])
		}
		c.Ratio = c.Instructions.Median / alone[r.Kind]
		s.Costs = append(s.Costs, c)
		s.VMs = max(s.VMs, r.VMs)
	}
	for _, c := range s.Costs {
		if c.VMs == s.VMs {
			s.ScaleCostRatio = max(s.ScaleCostRatio, c.Ratio)
		}
	}
	return s, nil
}

//go:embed report.md.tmpl
var text string

var page = template.Must(template.New("report").Funcs(report.Funcs).Parse(text))

// Write writes all forms of the report into a directory.
func (s *Summary) Write(dir string, rows []Row) error {
	table := [][]string{{"kind", "vms", "period_ns", "repetition", "cpu_percent", "instructions_per_tick"}}
	for _, r := range rows {
		for i := range r.Instructions {
			table = append(table, []string{string(r.Kind), strconv.Itoa(r.VMs), strconv.FormatInt(int64(r.Period), 10), strconv.Itoa(i + 1),
				report.Float(r.CPUPercent[i]), report.Float(r.Instructions[i])})
		}
	}
	chart := report.Chart{
		Title: "What a watch of one VM costs among others",
		X:     report.Axis{Label: "VMs, each watched every " + report.Seconds(Period.Seconds()), Log: true, Min: 0.8, Max: 1.3 * float64(s.VMs), Text: report.Number},
		Y:     report.Axis{Label: "instructions a tick", Min: 0},
	}
	names := map[tinyvm.Kind]string{tinyvm.Halting: "guests that halt", tinyvm.Spinning: "guests that spin"}
	for i, kind := range []tinyvm.Kind{tinyvm.Halting, tinyvm.Spinning} {
		of := report.Series{Name: names[kind], Line: true, Colour: i}
		for _, c := range s.Costs {
			if c.Kind == kind {
				of.Points = append(of.Points, report.Value{X: float64(c.VMs), Y: c.Instructions.Median, Low: c.Instructions.Low, High: c.Instructions.High})
				chart.Y.Max = max(chart.Y.Max, 1.4*c.Instructions.High)
			}
		}
		chart.Series = append(chart.Series, of)
	}
	return report.WriteAll(dir,
		report.Markdown(page, s),
		report.JSON(report.SummaryFile, s),
		report.CSV(report.SamplesFile, table),
		chart.PNG("scale.png"),
	)
}

// Met reports whether the reach is met.
func (s *Summary) Met() bool { return s.ScaleCostRatio <= Reach && s.VMs >= 1000 }

// Reach is Reach.
func (s *Summary) Reach() float64 { return Reach }
