// SPDX-License-Identifier: MIT

// Package overhead works out what monitoring costs from samples: medians with
// intervals, whether the two measures agree, and at which period the cost is
// that of the paper.
package overhead

import (
	"errors"
	"fmt"
	"math"

	"github.com/montanaflynn/stats"
	"golang.org/x/perf/benchmath"
)

// Confidence is the level of all intervals.
const Confidence = 0.95

// Statistic is a median with its interval.
type Statistic struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"` // of the interval, at least at the level Confidence
	High   float64 `json:"high"`
	N      int     `json:"n"`
}

// ErrTooFew says that an interval cannot be had from so few values.
var ErrTooFew = errors.New("too few values for an interval")

// Summarize returns the median of the values and its interval by rank (order
// statistics; no assumption on the distribution). Fewer than 6 values have no
// interval at this level: ErrTooFew comes with the median and the range of the
// values for an interval.
func Summarize(values []float64) (Statistic, error) {
	median, err := stats.Median(values)
	if err != nil {
		return Statistic{}, fmt.Errorf("%w: %v", ErrTooFew, err)
	}
	for _, v := range values {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return Statistic{}, fmt.Errorf("not a number to compute with: %v", v)
		}
	}
	sample := benchmath.NewSample(append([]float64(nil), values...), &benchmath.DefaultThresholds)
	summary := benchmath.AssumeNothing.Summary(sample, Confidence)
	s := Statistic{Median: median, Low: summary.Lo, High: summary.Hi, N: len(values)}
	if math.IsInf(s.Low, 0) || math.IsInf(s.High, 0) || math.IsNaN(s.Low) || math.IsNaN(s.High) {
		s.Low, s.High = sample.Values[0], sample.Values[len(values)-1]
		return s, fmt.Errorf("%w: %d", ErrTooFew, len(values))
	}
	return s, nil
}

// Spread is Summarize for any number of values but none: too few have their
// range for an interval.
func Spread(values []float64) (Statistic, error) {
	s, err := Summarize(values)
	if errors.Is(err, ErrTooFew) && len(values) > 0 {
		err = nil
	}
	return s, err
}
