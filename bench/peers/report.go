// SPDX-License-Identifier: MIT

package peers

import (
	_ "embed"
	"fmt"
	"strconv"
	"text/template"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/report"
)

// Reach is what a look by a watch may cost of one by QMP.
const Reach = 0.01

// Cost is what a peer costs.
type Cost struct {
	Peer         string             `json:"peer"`
	Instructions overhead.Statistic `json:"instructions_per_look"`
	OfQMP        float64            `json:"of_qmp"`           // of the cheaper of both ways by QMP
	Slowdown     overhead.Statistic `json:"slowdown_percent"` // of the guest's work, with a look each 100 ms
	HeldS        float64            `json:"held_s,omitempty"` // for which the guest is stopped at a look, median
	Looks        uint64             `json:"looks"`
}

// Summary is the outcome of a run.
type Summary struct {
	QMPCostRatio float64           `json:"qmp_cost_ratio"` // of a watch's look to the cheaper of both ways by QMP
	Clocks       map[string]string `json:"clocks"`
	Quick        bool              `json:"quick"`
	Costs        []Cost            `json:"costs"`
	Kernel       string            `json:"kernel"`
	QEMU         string            `json:"guest_qemu"`
	Bytes        int               `json:"bytes"`
	Objects      []Size            `json:"objects"`
	report.Origin
}

// Summarize works out what a run says.
func Summarize(run *Run) (*Summary, error) {
	s := &Summary{Clocks: map[string]string{"qmp_cost_ratio": report.Instructions}, Kernel: run.Kernel, QEMU: run.QEMU, Bytes: run.Bytes, Objects: run.Objects}
	of := map[string]float64{}
	for _, r := range run.Rows {
		c := Cost{Peer: r.Peer, Looks: r.Looks}
		var slow, held []float64
		for i := range r.With {
			slow = append(slow, 100*(float64(r.With[i])/float64(r.Without[i])-1))
		}
		for _, ns := range r.Held {
			held = append(held, float64(ns)/1e9)
		}
		var err error
		if c.Instructions, err = overhead.Spread(r.Instructions); err == nil {
			c.Slowdown, err = overhead.Spread(slow)
		}
		if err == nil && len(held) > 0 {
			var h overhead.Statistic
			h, err = overhead.Spread(held)
			c.HeldS = h.Median
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.Peer, err)
		}
		of[r.Peer] = c.Instructions.Median
		s.Costs = append(s.Costs, c)
	}
	qmp := min(of[QMPSave], of[QMPPrint])
	if qmp <= 0 || of[Watch] <= 0 {
		return nil, fmt.Errorf("nothing to compare: QMP %g, watch %g", qmp, of[Watch])
	}
	for i := range s.Costs {
		s.Costs[i].OfQMP = s.Costs[i].Instructions.Median / qmp
	}
	s.QMPCostRatio = of[Watch] / qmp
	return s, nil
}

//go:embed report.md.tmpl
var text string

var page = template.Must(template.New("report").Funcs(report.Funcs).Parse(text))

// Write writes all forms of the report into a directory.
func (s *Summary) Write(dir string, run *Run) error {
	table := [][]string{{"peer", "repetition", "instructions_per_look", "work_without_ns", "work_with_ns"}}
	for _, r := range run.Rows {
		for i := range r.Instructions {
			table = append(table, []string{r.Peer, strconv.Itoa(i + 1), report.Float(r.Instructions[i]),
				strconv.FormatInt(r.Without[i], 10), strconv.FormatInt(r.With[i], 10)})
		}
	}
	var bars []report.Bar
	for _, c := range s.Costs {
		bars = append(bars, report.Bar{Name: c.Peer, Parts: []float64{c.Instructions.Median}})
	}
	return report.WriteAll(dir,
		report.Markdown(page, s),
		report.JSON(report.SummaryFile, s),
		report.CSV(report.SamplesFile, table),
		report.Bars{Title: "What one look at a guest's registers, GDT, IDT, system call table and 4 KiB costs", Label: "instructions", Log: true, Bars: bars}.PNG("peers.png"),
	)
}

// Met reports whether the reach is met.
func (s *Summary) Met() bool { return s.QMPCostRatio <= Reach }
