// SPDX-License-Identifier: MIT

package overhead

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// PaperPercent is the CPU cost that the paper gives for a period of 1 s, in
// percent: "0.35%" in the English abstract of "System Integrity Monitoring
// System using Kernel-based Virtual Machine" (2011).
const PaperPercent = 0.35

const (
	// AgreeAbove is the cost in percent from which on the two measures have
	// to agree.
	AgreeAbove = 0.05
	// AgreeWithin is by how much of the counting loop's they may differ.
	AgreeWithin = 0.10
)

// Agreement says whether the two measures agree.
type Agreement string

const (
	// AgreementYes: the medians differ by no more than AgreeWithin.
	AgreementYes Agreement = "yes"
	// AgreementNo: they differ by more, and so do all values in the interval
	// of the difference, sample by sample.
	AgreementNo Agreement = "no"
	// AgreementUnresolved: they differ by more, but that interval has room for
	// agreement.
	AgreementUnresolved Agreement = "unresolved"
	// AgreementNotRequired: both are AgreeAbove or less.
	AgreementNotRequired Agreement = "not required"
)

// Period is what the samples at one period say. Costs are in percent of one
// CPU.
type Period struct {
	PeriodS       float64 `json:"period_s"`
	CPUPercent    float64 `json:"cpu_percent"` // median of the product's own account
	CILow         float64 `json:"ci_low"`
	CIHigh        float64 `json:"ci_high"`
	N             int     `json:"n"`
	SoakerPercent float64 `json:"soaker_percent"` // median of what the counting loop lacks
	SoakerCILow   float64 `json:"soaker_ci_low"`
	SoakerCIHigh  float64 `json:"soaker_ci_high"`
	// Difference is (account - counting loop) / counting loop, of the medians.
	Difference float64 `json:"difference"`
	// DifferenceLow and DifferenceHigh are the interval of account - counting
	// loop, sample by sample, by the median of the counting loop.
	DifferenceLow  float64   `json:"difference_ci_low"`
	DifferenceHigh float64   `json:"difference_ci_high"`
	Agreement      Agreement `json:"agreement"`
	// NanosecondsPerTick is the median of the product's account of one check.
	NanosecondsPerTick float64 `json:"ns_per_tick"`
	Ticks              uint64  `json:"ticks"`
	MinTicks           uint64  `json:"min_ticks"` // in one repetition
	MissedTicks        uint64  `json:"missed_ticks"`
	UnaccountedTicks   uint64  `json:"unaccounted_ticks"` // neither done nor reported as missed
}

// Curve is the cost against the period on one clock.
type Curve struct {
	Clock   sample.Clock `json:"clock"`
	CPUs    int          `json:"cpus"`
	Periods []Period     `json:"periods"`
	// IsoCostPeriodS is where the product's account crosses PaperPercent, in
	// seconds; absent if it does not, see IsoCostNote.
	IsoCostPeriodS *float64 `json:"iso_cost_period_s"`
	IsoCostNote    string   `json:"iso_cost_note,omitempty"`
	// IsoCostSoakerPeriodS is the same for the counting loop.
	IsoCostSoakerPeriodS *float64 `json:"iso_cost_soaker_period_s"`
	// Elsewhere is how many CPUs of the machine that emulates were busy with
	// other things, on average: noise of a wall clock.
	Elsewhere float64 `json:"elsewhere_cpus"`
	// Restarts is how often the emulated host had come to a standstill and
	// another one went on with the samples that were left.
	Restarts int `json:"restarts"`
	// Notes say what limits the numbers, for a reader.
	Notes []string `json:"notes,omitempty"`
}

// Summary is the outcome of a run: the claim at the top, the check beside it.
type Summary struct {
	PaperPercent float64 `json:"paper_percent"`
	Curve
	Check   *Curve `json:"check,omitempty"`
	Seed    uint64 `json:"seed"`
	Quick   bool   `json:"quick"`
	Command string `json:"command"`
	Date    string `json:"date"`
}

// WriteJSON writes the summary for programs.
func (s *Summary) WriteJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(s)
}

// NewCurve works out the curve of the samples on one clock. Samples that
// cannot be computed with are an error; what merely limits the result becomes
// a note.
func NewCurve(clock sample.Clock, samples []sample.Sample) (*Curve, error) {
	byPeriod := make(map[time.Duration][]sample.Sample)
	curve := &Curve{Clock: clock}
	for _, s := range samples {
		if s.Clock != clock {
			continue
		}
		if err := s.Validate(); err != nil {
			return nil, err
		}
		if curve.CPUs != 0 && curve.CPUs != s.CPUs {
			return nil, fmt.Errorf("samples of hosts with %d and with %d CPUs", curve.CPUs, s.CPUs)
		}
		curve.CPUs = s.CPUs
		byPeriod[s.Period] = append(byPeriod[s.Period], s)
	}
	if len(byPeriod) == 0 {
		return nil, fmt.Errorf("no samples on the clock %q", clock)
	}
	periods := make([]time.Duration, 0, len(byPeriod))
	for period := range byPeriod {
		periods = append(periods, period)
	}
	slices.Sort(periods)
	slices.Reverse(periods)

	var account, soaker []Point
	for _, period := range periods {
		p, err := newPeriod(byPeriod[period])
		if errors.Is(err, ErrTooFew) {
			curve.Notes = append(curve.Notes, fmt.Sprintf(
				"%v: %d repetitions are too few for a 95%% interval: the range of the values stands in for it", period, p.N))
		} else if err != nil {
			return nil, fmt.Errorf("%v: %w", period, err)
		}
		if p.MissedTicks > 0 {
			curve.Notes = append(curve.Notes, fmt.Sprintf("%v: %d of %d ticks missed", period, p.MissedTicks, p.Ticks+p.MissedTicks))
		}
		if p.UnaccountedTicks > 0 {
			curve.Notes = append(curve.Notes, fmt.Sprintf(
				"%v: %d ticks were neither done nor reported as missed", period, p.UnaccountedTicks))
		}
		curve.Periods = append(curve.Periods, p)
		account = append(account, Point{p.PeriodS, p.CPUPercent})
		soaker = append(soaker, Point{p.PeriodS, p.SoakerPercent})
	}
	if iso, err := IsoPeriod(account, PaperPercent); err != nil {
		curve.IsoCostNote = fmt.Sprintf("no period costs %g%%: %v", PaperPercent, err)
	} else {
		curve.IsoCostPeriodS = &iso
	}
	if iso, err := IsoPeriod(soaker, PaperPercent); err == nil {
		curve.IsoCostSoakerPeriodS = &iso
	}
	return curve, nil
}

// newPeriod summarizes the samples at one period.
func newPeriod(samples []sample.Sample) (Period, error) {
	p := Period{PeriodS: samples[0].Period.Seconds(), MinTicks: math.MaxUint64}
	var account, soaker, apart, tick []float64
	for _, s := range samples {
		account = append(account, s.CPUPercent())
		soaker = append(soaker, s.SoakerPercent())
		apart = append(apart, s.CPUPercent()-s.SoakerPercent())
		if s.Account.Ticks == 0 {
			return p, fmt.Errorf("repetition %d has no tick at all", s.Repetition)
		}
		tick = append(tick, float64(s.Account.CPU())/float64(s.Account.Ticks))
		p.Ticks += s.Account.Ticks
		p.MinTicks = min(p.MinTicks, s.Account.Ticks)
		p.MissedTicks += s.Account.Missed
		p.UnaccountedTicks += s.Unaccounted()
	}
	a, errAccount := Summarize(account)
	l, errSoaker := Summarize(soaker)
	d, errApart := Summarize(apart)
	t, errTick := Summarize(tick)
	p.CPUPercent, p.CILow, p.CIHigh, p.N = a.Median, a.Low, a.High, a.N
	p.SoakerPercent, p.SoakerCILow, p.SoakerCIHigh = l.Median, l.Low, l.High
	p.NanosecondsPerTick = t.Median
	p.Difference = relative(p.CPUPercent-p.SoakerPercent, p.SoakerPercent)
	p.DifferenceLow, p.DifferenceHigh = relative(d.Low, p.SoakerPercent), relative(d.High, p.SoakerPercent)
	p.Agreement = agreement(p)
	return p, errors.Join(errAccount, errSoaker, errApart, errTick)
}

// relative is difference / |of|, kept within what JSON can say where there is
// nothing to relate to.
func relative(difference, of float64) float64 {
	if difference == 0 {
		return 0
	}
	return min(max(difference/math.Abs(of), -math.MaxFloat64), math.MaxFloat64)
}

// agreement judges the medians and intervals of a period.
func agreement(p Period) Agreement {
	switch {
	case max(p.CPUPercent, p.SoakerPercent) <= AgreeAbove:
		return AgreementNotRequired
	case math.Abs(p.Difference) <= AgreeWithin:
		return AgreementYes
	case p.DifferenceLow > AgreeWithin || p.DifferenceHigh < -AgreeWithin:
		return AgreementNo
	}
	return AgreementUnresolved
}

// With returns the periods with one of these judgements.
func (c *Curve) With(judgements ...Agreement) []Period {
	var out []Period
	for _, p := range c.Periods {
		if slices.Contains(judgements, p.Agreement) {
			out = append(out, p)
		}
	}
	return out
}

// Unaccounted returns how many ticks went missing without a word.
func (c *Curve) Unaccounted() uint64 {
	var n uint64
	for _, p := range c.Periods {
		n += p.UnaccountedTicks
	}
	return n
}
