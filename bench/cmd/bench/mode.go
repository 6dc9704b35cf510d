// SPDX-License-Identifier: MIT

package main

import (
	"time"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/userspace/daemon"
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
		claim: sample.Plan{Mode: daemon.ModePoll, Clock: sample.Icount, Periods: sample.Periods,
			Repetitions: 12, MinTicks: 10, MaxTicks: 1000, Window: 10 * time.Second},
		check: sample.Plan{Mode: daemon.ModePoll, Clock: sample.Wall, Periods: sample.Periods,
			Repetitions: 10, MinTicks: 10, MaxTicks: 1000, Window: 2 * time.Second},
		timeout: 25 * time.Minute,
	}
	// fast is within 4 minutes. Waiting costs next to nothing on the
	// instruction clock, so that the claim has all periods here too.
	fast = mode{
		quick: true,
		claim: sample.Plan{Mode: daemon.ModePoll, Clock: sample.Icount, Periods: sample.Periods,
			Repetitions: 7, MinTicks: 10, MaxTicks: 300, Window: 3 * time.Second},
		check: sample.Plan{Mode: daemon.ModePoll, Clock: sample.Wall, Periods: []time.Duration{100 * time.Millisecond, 20 * time.Millisecond},
			Repetitions: 6, MinTicks: 10, MaxTicks: 500, Window: time.Second},
		timeout: 10 * time.Minute,
	}
	// short is for a demonstration.
	short = mode{
		quick: true,
		claim: sample.Plan{Mode: daemon.ModePoll, Clock: sample.Icount,
			Periods:     []time.Duration{time.Second, 100 * time.Millisecond, 10 * time.Millisecond, time.Millisecond},
			Repetitions: 6, MinTicks: 10, MaxTicks: 200, Window: 5 * time.Second},
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
