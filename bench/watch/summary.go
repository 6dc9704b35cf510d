// SPDX-License-Identifier: MIT

package watch

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/montanaflynn/stats"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/peers"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/bench/scale"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Results are all that was measured.
type Results struct {
	Samples   []sample.Sample
	Restarts  int // of the host that these are from
	Ticks     []Tick
	Latency   []Changes
	Transient []Transient
	Bulk      []Bulk
	Linux     *Linux
	// Peers and Scale are of runs of their own; nil: there was none.
	Peers *peers.Summary
	Scale *scale.Summary
}

// Reaches.
const (
	ReachCPU1s    = 0.0035 // percent
	ReachIso      = 0.002  // s
	ReachSlowdown = 0.1    // percent, of the interval's upper end
	ReachBulk     = 0.8
	ReachExcess   = 0.001 // s
)

// Summary is the outcome: the numbers that have a reach by name, then what they
// are made of.
type Summary struct {
	CPUPercent1s  float64    `json:"cpu_percent_1s"`
	IsoCostPeriod *float64   `json:"iso_cost_period_s"` // null: none was found
	QMPCostRatio  *float64   `json:"qmp_cost_ratio"`    // ours to QMP's; null: no run of benchpeers
	ScaleRatio    *float64   `json:"scale_cost_ratio"`  // of a VM among 1,000 to one alone; null: no run of benchscale
	Slowdown      [2]float64 `json:"guest_slowdown_10ms_ci"`
	BulkRatio     float64    `json:"bulk_read_memcpy_ratio"`
	LatencyMedian float64    `json:"latency_median_periods_excess_s"` // over half a period
	LatencyMax    float64    `json:"latency_max_periods_excess_s"`    // over a period
	Missed        int        `json:"changes_missed"`

	Clocks   map[string]string `json:"clocks"`   // by the names above
	Commands map[string]string `json:"commands"` // that made each
	Reaches  []Reached         `json:"reaches"`
	Quick    bool              `json:"quick"`
	Curve    *overhead.Curve   `json:"curve"`
	// Beside is what a tick costs beside the account, in instructions: the
	// interrupt around it, and the setting of the timer.
	Beside float64 `json:"beside_account_instructions"`
	// Lookup is what it takes to find one page of the host, in instructions.
	Lookup     float64       `json:"lookup_instructions"`
	Costs      []TickCost    `json:"ticks"`
	Changes    []ChangeCost  `json:"latency"`
	Undone     []Probability `json:"transient"`
	Changed    int           `json:"changes"`
	SlowdownOf Slow          `json:"guest_slowdown_10ms"`
	BulkOf     []BulkCost    `json:"bulk"`
	Pass       PassCost      `json:"pass"`
	report.Origin
}

// Reached says of a metric whether it is where it is to be.
type Reached struct {
	Metric string `json:"metric"`
	Value  string `json:"value"`
	Reach  string `json:"reach"`
	Met    bool   `json:"met"`
	Why    string `json:"why,omitempty"` // not
}

// TickCost is what a tick costs, in instructions.
type TickCost struct {
	VCPU         string             `json:"vcpu"`
	Items        string             `json:"items"`
	Instructions overhead.Statistic `json:"instructions"`
	Ticks        uint64             `json:"ticks"`
	Captures     uint64             `json:"captures"`
	Skipped      uint64             `json:"skipped"`
	Parts        []float64          `json:"parts"` // as Parts has them; medians
}

// Parts are the parts of a tick.
var Parts = []string{"interrupt, timer found", "hold and account", "compare", "vCPU", "timer set anew"}

// Indices of Parts.
const (
	partTimer = iota
	partHold
	partCompare
	partVCPU
	partRearm
)

// ChangeCost is how soon changes are found, in s.
type ChangeCost struct {
	By      string             `json:"by"`
	VCPU    string             `json:"vcpu"`
	PeriodS float64            `json:"period_s"`
	N       int                `json:"n"`
	Missed  int                `json:"missed"`
	Found   overhead.Statistic `json:"found_s"`
	Max     float64            `json:"max_s"`
	Noticed float64            `json:"noticed_s,omitempty"` // by the module, median
}

// Probability is how many changes of lengths in a range were seen.
type Probability struct {
	PeriodS float64 `json:"period_s"`
	LengthS float64 `json:"length_s"` // mean, of those
	N       int     `json:"n"`
	Seen    float64 `json:"seen"` // part of them
	Low     float64 `json:"low"`  // of the 95% interval
	High    float64 `json:"high"`
	Theory  float64 `json:"theory"` // mean of min(1, length / period)
}

// Slow is by how much the guest's work took longer, in percent.
type Slow struct {
	PeriodS float64            `json:"period_s"`
	Percent overhead.Statistic `json:"percent"`
	WorkS   float64            `json:"work_s"`        // median
	Busy    float64            `json:"busy_percent"`  // of a guest that only computes: Tick's
	Tick    float64            `json:"tick_of_curve"` // instructions of a tick with these items
}

// BulkCost is what reading and copying as much cost, in instructions.
type BulkCost struct {
	Pages  string             `json:"pages"`
	Ratio  float64            `json:"ratio"` // of memcpy's to that of reading
	Bytes  int                `json:"bytes"`
	Read   overhead.Statistic `json:"read"`
	Memcpy overhead.Statistic `json:"memcpy"`
	GoCopy overhead.Statistic `json:"go_copy"`
}

// PassCost is what it costs to walk the kernel's text and read-only data.
type PassCost struct {
	Text       uint64             `json:"text_bytes"`
	Rodata     uint64             `json:"rodata_bytes"`
	EachS      float64            `json:"each_s"`
	PeriodS    float64            `json:"period_s"`
	Budget     int                `json:"budget_bytes"`
	Passes     uint64             `json:"passes"`
	Different  int                `json:"different"`
	CPUPercent overhead.Statistic `json:"cpu_percent"`
	Account    overhead.Statistic `json:"account_percent"`
}

// Summarize works out what the results say.
func Summarize(r *Results, origin report.Origin, quick bool) (*Summary, error) {
	s := &Summary{Origin: origin, Quick: quick, Clocks: map[string]string{}, Commands: map[string]string{}}
	for _, name := range []string{"cpu_percent_1s", "iso_cost_period_s", "qmp_cost_ratio", "scale_cost_ratio", "guest_slowdown_10ms_ci",
		"bulk_read_memcpy_ratio", "latency_median_periods_excess_s", "latency_max_periods_excess_s", "changes_missed"} {
		s.Clocks[name], s.Commands[name] = report.Instructions, origin.Command
	}
	for _, do := range []func(*Results) error{s.curve, s.ticks, s.latency, s.transient, s.bulk, s.linux, s.others} {
		if err := do(r); err != nil {
			return nil, err
		}
	}
	s.reach()
	return s, nil
}

func (s *Summary) curve(r *Results) (err error) {
	if s.Curve, err = overhead.NewCurve(sample.Icount, r.Samples); err != nil {
		return err
	}
	s.Curve.Restarts = r.Restarts
	one := slices.IndexFunc(s.Curve.Periods, func(p overhead.Period) bool { return p.PeriodS == 1 })
	dense := slices.IndexFunc(s.Curve.Periods, func(p overhead.Period) bool { return p.PeriodS == 0.001 })
	if one < 0 || dense < 0 {
		return errors.New("the curve lacks 1 s or 1 ms")
	}
	d := s.Curve.Periods[dense]
	s.Beside = (d.SoakerPercent - d.CPUPercent) / 100 * d.PeriodS * 1e9
	s.CPUPercent1s = s.Curve.Periods[one].CPUPercent + 100*s.Beside/1e9
	s.IsoCostPeriod = s.Curve.IsoCostSoakerPeriodS
	s.SlowdownOf.Tick = d.SoakerPercent / 100 * d.PeriodS * 1e9
	return nil
}

func median64(values []int64) (float64, error) {
	return stats.Median(floats(values))
}

func floats[T int64 | time.Duration](values []T) []float64 {
	all := make([]float64, len(values))
	for i, v := range values {
		all[i] = float64(v)
	}
	return all
}

// ticks takes ticks apart. The parts of the account are what it grows by with
// each kind of items; what is around it the trace tells, whose events' own
// instructions are what a traced tick costs more.
func (s *Summary) ticks(r *Results) error {
	accounts := map[string]map[string]float64{}
	for _, t := range r.Ticks {
		c := TickCost{VCPU: t.VCPU, Items: t.Items, Ticks: t.Ticks, Captures: t.Captures, Skipped: t.Skipped, Parts: make([]float64, len(Parts))}
		traced, err1 := stats.Median(t.Trace.Instructions)
		after, err2 := median64(t.Trace.After)
		account, err3 := stats.Median(t.Account)
		var err4 error
		c.Instructions, err4 = overhead.Spread(t.Instructions)
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			return fmt.Errorf("ticks, vCPU %s, items %s: %w", t.VCPU, t.Items, err)
		}
		event := (traced - c.Instructions.Median) / EventsPerTick
		if accounts[t.VCPU] == nil {
			accounts[t.VCPU] = map[string]float64{}
		}
		of := accounts[t.VCPU]
		of[t.Items] = account
		c.Parts[partHold] = of[NoItems]
		if t.Items != NoItems {
			c.Parts[partCompare] = of[BytesItems] - of[NoItems]
			s.Lookup = (c.Parts[partCompare] - 3*compared/8) / (compared / kvmaccess.PageSize)
		}
		if t.Items == RegisterItems {
			c.Parts[partVCPU] = account - of[BytesItems]
		}
		c.Parts[partRearm] = max(0, after-event)
		c.Parts[partTimer] = c.Instructions.Median - account - c.Parts[partRearm]
		s.Costs = append(s.Costs, c)
		if t.VCPU == Busy && t.Items == RegisterItems {
			s.SlowdownOf.Busy = 100 * c.Instructions.Median / float64(slowPeriod)
		}
	}
	return nil
}

func (s *Summary) latency(r *Results) error {
	s.LatencyMedian, s.LatencyMax = math.Inf(-1), math.Inf(-1)
	for _, c := range r.Latency {
		cost := ChangeCost{By: c.By, VCPU: c.VCPU, PeriodS: c.Period.Seconds(), N: len(c.Found) + c.Missed, Missed: c.Missed}
		seconds := func(all []time.Duration) []float64 {
			values := floats(all)
			for i := range values {
				values[i] /= 1e9
			}
			return values
		}
		found := seconds(c.Found)
		var err1, err2 error
		cost.Found, err1 = overhead.Spread(found)
		if len(c.Noticed) > 0 {
			cost.Noticed, err2 = stats.Median(seconds(c.Noticed))
		}
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("latency, vCPU %s: %w", c.VCPU, err)
		}
		cost.Max = slices.Max(found)
		s.Changes = append(s.Changes, cost)
		s.Changed += cost.N
		s.Missed += c.Missed
		s.LatencyMedian = max(s.LatencyMedian, cost.Found.Median-cost.PeriodS/2)
		s.LatencyMax = max(s.LatencyMax, cost.Max-cost.PeriodS)
	}
	return nil
}

// lengths of transient changes are counted by this many ranges.
const lengths = 14

func (s *Summary) transient(r *Results) error {
	for _, t := range r.Transient {
		least, most := slices.Min(t.Length), slices.Max(t.Length)
		span := math.Log(float64(most)/float64(least)) / lengths
		bins := make([]Probability, lengths)
		for i, l := range t.Length {
			bin := &bins[min(lengths-1, int(math.Log(float64(l)/float64(least))/span))]
			bin.N++
			bin.LengthS += l.Seconds()
			bin.Theory += min(1, float64(l)/float64(t.Period))
			if t.Seen[i] {
				bin.Seen++
			}
		}
		for _, b := range bins {
			if b.N == 0 {
				continue
			}
			n := float64(b.N)
			b.PeriodS, b.LengthS, b.Theory = t.Period.Seconds(), b.LengthS/n, b.Theory/n
			b.Seen /= n
			b.Low, b.High = wilson(b.Seen, n)
			s.Undone = append(s.Undone, b)
		}
	}
	return nil
}

// wilson is the 95% score interval of a proportion (Wilson, 1927).
func wilson(p, n float64) (low, high float64) {
	const z = 1.959964
	middle := p + z*z/(2*n)
	spread := z * math.Sqrt(p*(1-p)/n+z*z/(4*n*n))
	return (middle - spread) / (1 + z*z/n), (middle + spread) / (1 + z*z/n)
}

func (s *Summary) bulk(r *Results) error {
	for _, of := range r.Bulk {
		b := BulkCost{Pages: of.Pages, Bytes: of.Bytes}
		var err1, err2, err3 error
		b.Read, err1 = overhead.Spread(floats(of.Read))
		b.Memcpy, err2 = overhead.Spread(floats(of.Memcpy))
		b.GoCopy, err3 = overhead.Spread(floats(of.GoCopy))
		if err := errors.Join(err1, err2, err3); err != nil {
			return fmt.Errorf("bulk, pages of %s: %w", of.Pages, err)
		}
		b.Ratio = b.Memcpy.Median / b.Read.Median
		if of.Pages == HugePages {
			s.BulkRatio = b.Ratio
		}
		s.BulkOf = append(s.BulkOf, b)
	}
	return nil
}

func (s *Summary) linux(r *Results) error {
	l := r.Linux
	s.Machine.Kernel = l.Kernel
	var slow []float64
	for i := range l.Slowdown.With {
		slow = append(slow, 100*(float64(l.Slowdown.With[i])/float64(l.Slowdown.Without[i])-1))
	}
	work, err := median64(l.Slowdown.Without)
	if err != nil {
		return err
	}
	s.SlowdownOf.PeriodS, s.SlowdownOf.WorkS = l.Slowdown.Period.Seconds(), work/1e9
	if s.SlowdownOf.Percent, err = overhead.Spread(slow); err != nil {
		return err
	}
	s.Slowdown = [2]float64{s.SlowdownOf.Percent.Low, s.SlowdownOf.Percent.High}
	s.Pass = PassCost{Text: l.Pass.Text, Rodata: l.Pass.Rodata, EachS: l.Pass.Each.Seconds(), PeriodS: l.Pass.Period.Seconds(),
		Budget: l.Pass.Budget, Passes: l.Pass.Passes, Different: l.Pass.Different}
	if s.Pass.CPUPercent, err = overhead.Spread(l.Pass.CPUPercent); err != nil {
		return err
	}
	s.Pass.Account, err = overhead.Spread(l.Pass.Account)
	return err
}

func (s *Summary) others(r *Results) error {
	if r.Peers != nil {
		s.QMPCostRatio, s.Commands["qmp_cost_ratio"] = &r.Peers.QMPCostRatio, r.Peers.Command
	}
	if r.Scale != nil {
		s.ScaleRatio, s.Commands["scale_cost_ratio"] = &r.Scale.ScaleCostRatio, r.Scale.Command
	}
	return nil
}

// Met reports whether all reaches are met.
func (s *Summary) Met() bool {
	return !slices.ContainsFunc(s.Reaches, func(r Reached) bool { return !r.Met })
}

func (s *Summary) reach() {
	add := func(metric, value, reach string, met bool, why string) {
		if met {
			why = ""
		}
		s.Reaches = append(s.Reaches, Reached{metric, value, reach, met, why})
	}
	add("CPU at 1 s, one VM, five kinds of objects", fmt.Sprintf("%.5f%%", s.CPUPercent1s), fmt.Sprintf("≤ %g%%", ReachCPU1s), s.CPUPercent1s <= ReachCPU1s,
		"see the parts of a tick below")
	if s.IsoCostPeriod != nil {
		add("period at 0.35%", fmt.Sprintf("%.2f ms", 1e3**s.IsoCostPeriod), "≤ 2 ms", *s.IsoCostPeriod <= ReachIso,
			fmt.Sprintf("a tick takes %.0f instructions by the counting loop, and may take 7,000: three for 8 bytes, and %.0f more for each page and each page-table entry on the way to one, to find it through the host's page tables; with so few bytes behind each entry that is about as much again",
				s.SlowdownOf.Tick, s.Lookup))
	} else {
		add("period at 0.35%", "none", "≤ 2 ms", false, s.Curve.IsoCostNote)
	}
	const run = "it has not been measured: run `make %s` first"
	if s.QMPCostRatio != nil {
		add("cost of a look, ours / QMP's", fmt.Sprintf("%.5f", *s.QMPCostRatio), "≤ 0.01", *s.QMPCostRatio <= peers.Reach, "see results/peers")
	} else {
		add("cost of a look, ours / QMP's", "–", "≤ 0.01", false, fmt.Sprintf(run, "bench-peers"))
	}
	if s.ScaleRatio != nil {
		add("cost of a VM among 1,000 / alone", fmt.Sprintf("%.3f", *s.ScaleRatio), "≤ 1.2", *s.ScaleRatio <= scale.Reach, "see results/scale")
	} else {
		add("cost of a VM among 1,000 / alone", "–", "≤ 1.2", false, fmt.Sprintf(run, "bench-scale"))
	}
	low, high := s.Slowdown[0], s.Slowdown[1]
	add("guest slower at 10 ms, 95% interval", fmt.Sprintf("%.4f%% to %.4f%%", low, high), fmt.Sprintf("contains 0, upper end < %g%%", ReachSlowdown),
		low <= 0 && high >= 0 && high < ReachSlowdown,
		fmt.Sprintf("the host has one CPU, so that each tick is taken from the guest: %.0f instructions of each 10 ms are %.3f%% at one a nanosecond, to which the capture of a vCPU that has run and the way out of the guest and back come, and the instruction clock has little noise for that to be lost in",
			s.SlowdownOf.Tick, 100*s.SlowdownOf.Tick/float64(slowPeriod)))
	add("bulk read / memcpy, memory in huge pages", fmt.Sprintf("%.3f", s.BulkRatio), fmt.Sprintf("≥ %g", ReachBulk), s.BulkRatio >= ReachBulk,
		"the kernel finds and maps each page of the VMM's memory before it copies it")
	late := ""
	for _, c := range s.Changes {
		if c.By == Daemon {
			late = fmt.Sprintf("kvmaccessd takes %.1f million instructions, of one a nanosecond, until its stream tells of a change (half a period, %.1f ms, is waited for on average); it dates the finding %.1f ms after the change. The module's event, read again by a Go program, takes about 0.1 ms: see the table below",
				1e3*(c.Found.Median-c.PeriodS/2), 500*c.PeriodS, 1e3*c.Noticed)
		}
	}
	add("change to finding, median over half a period", fmt.Sprintf("%+.3f ms", 1e3*s.LatencyMedian), "≤ 1 ms", s.LatencyMedian <= ReachExcess, late)
	add("change to finding, maximum over a period", fmt.Sprintf("%+.3f ms", 1e3*s.LatencyMax), "≤ 1 ms", s.LatencyMax <= ReachExcess,
		late+"; other work of the daemon may come first")
	add("changes missed", fmt.Sprintf("%d of %d", s.Missed, s.Changed), "0", s.Missed == 0, "see below")
}
