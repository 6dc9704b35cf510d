// SPDX-License-Identifier: MIT

package outside

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// Run is one run of a plan on an emulated host.
type Run struct {
	Host // its Flags and Urgent follow from the plan
	Plan sample.Plan
	CPUs int // of the host; the instruction clock has one
}

// Result is what a run gave.
type Result struct {
	Host    inside.Host
	Samples []sample.Sample // in the order in which they were taken
	// Elsewhere is how many CPUs of this machine were busy with other things
	// than the run, on average.
	Elsewhere float64
	// Restarts is how often the host had come to a standstill.
	Restarts int
}

// Take boots a host and has the samples taken there. If all of them are there
// but the host then ends badly, the result comes with an error.
func (r *Run) Take(ctx context.Context) (*Result, error) {
	result := new(Result)
	start := time.Now()
	before, err := busy()
	if err != nil {
		return nil, err
	}
	if r.Plan.Clock == sample.Icount {
		r.Flags = []string{"--icount"}
	} else {
		// The emulator's time stamp counters run on the machine's own: they
		// are in step, and cheaper to read than any other clock there is.
		r.Flags, r.Urgent = []string{"--smp", strconv.Itoa(r.CPUs), "--append", "tsc=reliable"}, true
	}
	var own time.Duration
	for {
		plan := r.Plan
		plan.Done = len(result.Samples)
		text, err := json.Marshal(plan)
		if err != nil {
			return nil, err
		}
		cpu, err := r.boot(ctx, result.Restarts, "benchinside", []string{string(text)}, func(from io.Reader, alive func()) error {
			return r.receive(from, result, alive)
		})
		own += cpu
		complete := len(result.Samples) == len(r.Plan.Steps())
		switch {
		case !complete && errors.Is(err, errStall) && result.Restarts < maxRestarts:
			result.Restarts++
			r.Log.Warn("starting another host", "why", err, "samples", len(result.Samples))
			continue
		case err != nil && !complete:
			return nil, err
		}
		after, busyErr := busy()
		if busyErr != nil {
			return nil, errors.Join(err, busyErr)
		}
		result.Elsewhere = max(0, float64(after-before-own)/float64(time.Since(start)))
		return result, err
	}
}

// receive adds samples to the result until the last message, and calls alive
// for each.
func (r *Run) receive(from io.Reader, result *Result, alive func()) error {
	want, first := len(r.Plan.Steps()), len(result.Samples)
	start := time.Now()
	decoder := json.NewDecoder(from)
	for {
		var m inside.Message
		switch err := decoder.Decode(&m); {
		case err == io.EOF:
			return fmt.Errorf("the run ended after %d of %d samples", len(result.Samples), want)
		case err != nil:
			rest, _ := io.ReadAll(io.LimitReader(decoder.Buffered(), 200))
			return fmt.Errorf("after %d of %d samples: %w, before %q", len(result.Samples), want, err, bytes.TrimSpace(rest))
		}
		alive()
		switch {
		case m.Host != nil:
			result.Host = *m.Host
			start = time.Now()
		case m.Sample != nil:
			if len(result.Samples) == want {
				return fmt.Errorf("more than %d samples", want)
			}
			result.Samples = append(result.Samples, *m.Sample)
			n := len(result.Samples)
			if every := len(r.Plan.Periods); n%every == 0 {
				left := time.Since(start) / time.Duration(n-first) * time.Duration(want-n)
				r.Log.Info("repetition is done", "clock", r.Plan.Clock, "number", n/every, "of", r.Plan.Repetitions,
					"left", left.Round(time.Second))
			}
		case m.Done:
			if result.Host.CPUs == 0 || len(result.Samples) != want {
				return fmt.Errorf("the run says it is done after %d of %d samples", len(result.Samples), want)
			}
			return nil
		}
	}
}
