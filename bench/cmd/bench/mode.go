// SPDX-License-Identifier: MIT

package main

import (
	"time"

	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// mode is how thoroughly to measure.
type mode struct {
	quick   bool
	claim   sample.Plan
	check   sample.Plan // no repetitions: none
	timeout time.Duration
}

var (
	// full is within 40 minutes on two cores.
	full = mode{
		claim:   sample.Plan{Clock: sample.Icount, Periods: sample.Periods, Repetitions: 15, MinTicks: 10, MinWindow: 2 * time.Second},
		check:   sample.Plan{Clock: sample.Wall, Periods: sample.Periods, Repetitions: 10, MinTicks: 10, MinWindow: time.Second},
		timeout: time.Hour,
	}
	// fast is within 4 minutes. On the instruction clock waiting costs next to
	// nothing, so that only the windows are shorter there.
	fast = mode{
		quick: true,
		claim: sample.Plan{Clock: sample.Icount, Periods: sample.Periods, Repetitions: 10, MinTicks: 10, MinWindow: time.Second},
		check: sample.Plan{Clock: sample.Wall, Periods: []time.Duration{100 * time.Millisecond, 10 * time.Millisecond, time.Millisecond},
			Repetitions: 6, MinTicks: 5, MinWindow: 500 * time.Millisecond},
		timeout: 10 * time.Minute,
	}
	// short is for a demonstration.
	short = mode{
		quick: true,
		claim: sample.Plan{Clock: sample.Icount, Periods: []time.Duration{time.Second, 100 * time.Millisecond, 10 * time.Millisecond, time.Millisecond},
			Repetitions: 6, MinTicks: 10, MinWindow: time.Second},
		timeout: 5 * time.Minute,
	}
)

// plans returns what is to be measured, the claim first.
func (m mode) plans(seed uint64) []sample.Plan {
	m.claim.Seed, m.check.Seed = seed, seed
	if m.check.Repetitions == 0 {
		return []sample.Plan{m.claim}
	}
	return []sample.Plan{m.claim, m.check}
}
