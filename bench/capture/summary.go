// SPDX-License-Identifier: MIT

package capture

import (
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/montanaflynn/stats"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Clock is what a host's time counts.
type Clock string

// Values of Clock.
const (
	QEMUInstructions  Clock = "instructions, QEMU"  // one a nanosecond, one CPU
	BochsInstructions Clock = "instructions, Bochs" // one a tick of the time stamp counter, while no other CPU sleeps
	Wall              Clock = "wall"                // of the emulating machine, as far as it comes to run
)

// Cost is a median with its 95% interval, in instructions or, by the wall's
// clock, in multiples of what the same takes in condition "user".
type Cost struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

// Row is the cost of one capture in one condition by one method.
type Row struct {
	Clock     Clock               `json:"clock"`
	Vendor    kvmaccess.Vendor    `json:"vendor"`
	Kernel    string              `json:"kernel"`
	CPUs      int                 `json:"cpus"`
	Condition kvmaccess.Condition `json:"condition"`
	Method    kvmaccess.Method    `json:"method"`
	N         int                 `json:"n"`
	Retries   float64             `json:"retries"` // mean
	Handler   Cost                `json:"handler"`
	Duration  Cost                `json:"duration"`
	Request   Cost                `json:"request"`
}

// Summarize makes the rows of a run.
func Summarize(clock Clock, r *Run) ([]Row, error) {
	type key struct {
		kvmaccess.Condition
		kvmaccess.Method
	}
	groups := map[key][]Sample{}
	var user []Sample
	for _, s := range r.Samples {
		k := key{s.Condition, s.Method}
		groups[k] = append(groups[k], s)
		if s.Condition == kvmaccess.ConditionUser {
			user = append(user, s)
		}
	}
	if len(user) == 0 && clock == Wall {
		return nil, errors.New("the run has no capture in condition \"user\"")
	}
	unit := func(of func(Sample) int64) (float64, error) {
		switch clock {
		case QEMUInstructions:
			return 1, nil
		case BochsInstructions:
			return 1000 / r.MHz, nil
		}
		return stats.Median(pick(user, of))
	}
	var rows []Row
	for k, samples := range groups {
		row := Row{Clock: clock, Vendor: r.Vendor, Kernel: r.Kernel, CPUs: r.CPUs, Condition: k.Condition, Method: k.Method, N: len(samples)}
		for _, s := range samples {
			row.Retries += float64(s.Retries) / float64(len(samples))
		}
		for _, part := range []struct {
			to *Cost
			of func(Sample) int64
		}{
			{&row.Handler, func(s Sample) int64 { return s.Handler }},
			{&row.Duration, func(s Sample) int64 { return s.Duration }},
			{&row.Request, func(s Sample) int64 { return s.Request }},
		} {
			u, err := unit(part.of)
			if err != nil {
				return nil, err
			}
			// A method that a few captures were taken by has no interval, but a range.
			st, err := overhead.Spread(pick(samples, part.of))
			if err != nil {
				return nil, fmt.Errorf("%v by %v: %w", k.Condition, k.Method, err)
			}
			*part.to = Cost{Median: st.Median / u, Low: st.Low / u, High: st.High / u}
		}
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.Method, b.Method), cmp.Compare(a.Condition, b.Condition))
	})
	return rows, nil
}

func pick(samples []Sample, of func(Sample) int64) []float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = float64(of(s))
	}
	return values
}

// WriteCSV writes all samples of the runs, by clock.
func WriteCSV(w io.Writer, clocks []Clock, runs []*Run) error {
	c := csv.NewWriter(w)
	if err := c.Write([]string{"clock", "vendor", "kernel", "cpus", "mhz", "condition", "method", "retries", "handler_ns", "duration_ns", "request_ns"}); err != nil {
		return err
	}
	for i, r := range runs {
		for _, s := range r.Samples {
			if err := c.Write([]string{
				string(clocks[i]), r.Vendor.String(), r.Kernel, strconv.Itoa(r.CPUs), strconv.FormatFloat(r.MHz, 'f', -1, 64),
				s.Condition.String(), s.Method.String(), strconv.Itoa(s.Retries),
				strconv.FormatInt(s.Handler, 10), strconv.FormatInt(s.Duration, 10), strconv.FormatInt(s.Request, 10),
			}); err != nil {
				return err
			}
		}
	}
	c.Flush()
	return c.Error()
}
