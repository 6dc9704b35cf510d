// SPDX-License-Identifier: MIT

package overhead

import (
	"cmp"
	"errors"
	"math"
	"slices"
)

// Point is one point of a cost curve.
type Point struct {
	Period float64 // seconds
	Cost   float64 // percent of one CPU
}

// Errors of IsoPeriod.
var (
	ErrAlwaysCheaper = errors.New("the cost is below that at every period measured")
	ErrAlwaysDearer  = errors.New("the cost is above that at every period measured")
)

// IsoPeriod returns the period, in seconds, at which a curve costs so much: by
// interpolation on logarithmic axes, on which a constant cost per check is a
// straight line. Of several crossings it returns the one at the longest
// period: from there on the curve stays below. Points without a positive cost
// cannot be drawn on such axes; they count as below.
func IsoPeriod(curve []Point, cost float64) (float64, error) {
	points := slices.Clone(curve)
	slices.SortFunc(points, func(a, b Point) int { return cmp.Compare(b.Period, a.Period) })
	for i, p := range points {
		if p.Cost < cost {
			continue
		}
		if p.Cost == cost {
			return p.Period, nil
		}
		if i == 0 {
			return 0, ErrAlwaysDearer
		}
		longer := points[i-1]
		if longer.Cost <= 0 {
			return p.Period, nil // no line to interpolate on; dearer here, not there
		}
		part := math.Log(cost/p.Cost) / math.Log(longer.Cost/p.Cost)
		return p.Period * math.Pow(longer.Period/p.Period, part), nil
	}
	return 0, ErrAlwaysCheaper
}
