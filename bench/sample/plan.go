// SPDX-License-Identifier: MIT

package sample

import (
	"math/rand/v2"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
)

// MemoryRange is how much guest memory each check compares beside the tables,
// in bytes.
const MemoryRange = 4096

// Periods are those of the overhead curve, longest first. The first is the
// paper's.
var Periods = []time.Duration{
	time.Second,
	500 * time.Millisecond,
	200 * time.Millisecond,
	100 * time.Millisecond,
	50 * time.Millisecond,
	20 * time.Millisecond,
	10 * time.Millisecond,
	5 * time.Millisecond,
	2 * time.Millisecond,
	time.Millisecond,
}

// Plan says which samples to take.
type Plan struct {
	Mode        daemon.Mode     `json:"mode"` // of the daemon
	Clock       Clock           `json:"clock"`
	Periods     []time.Duration `json:"periods_ns"`
	Repetitions int             `json:"repetitions"`
	// A monitored window is Window long, but has no fewer than MinTicks and
	// no more than MaxTicks periods. The former keeps noise down where a
	// period costs little, the latter time where it costs much.
	MinTicks int           `json:"min_ticks"`
	MaxTicks int           `json:"max_ticks"`
	Window   time.Duration `json:"window_ns"`
	Seed     uint64        `json:"seed"` // of the order
	Done     int           `json:"done"` // so many steps have been carried out already
}

// Step is one sample to take.
type Step struct {
	Repetition int // from 1
	Period     time.Duration
	Ticks      int // length of the monitored window, in periods
}

// Window is how long the monitored window lasts.
func (s Step) Window() time.Duration { return time.Duration(s.Ticks) * s.Period }

// Steps returns the plan's samples in the order in which to take them: each
// repetition has all periods, in a random order of its own that the seed
// determines.
func (p Plan) Steps() []Step {
	random := rand.New(rand.NewPCG(p.Seed, 0))
	steps := make([]Step, 0, p.Repetitions*len(p.Periods))
	for repetition := 1; repetition <= p.Repetitions; repetition++ {
		for _, i := range random.Perm(len(p.Periods)) {
			period := p.Periods[i]
			ticks := max(p.MinTicks, min(p.MaxTicks, int(p.Window/period)))
			steps = append(steps, Step{Repetition: repetition, Period: period, Ticks: ticks})
		}
	}
	return steps
}

// Duration is how long the windows of the plan last together, monitored and
// not, by the host's clock.
func (p Plan) Duration() time.Duration {
	var sum time.Duration
	for _, s := range p.Steps() {
		sum += 2 * s.Window()
	}
	return sum
}
