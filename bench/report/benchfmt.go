// SPDX-License-Identifier: MIT

// Package report writes the outcome of an overhead run for people and for
// other tools.
package report

import (
	"fmt"
	"io"

	"golang.org/x/perf/benchfmt"

	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// Units of the Go benchmark format.
const (
	unitTick   = "ns/op"          // the product's account of one check
	unitCPU    = "cpu-percent"    // the product's account
	unitSoaker = "soaker-percent" // what the counting loop lacks
	unitMissed = "missed-ticks"
)

// WriteBench writes each sample as a line of the Go benchmark format
// (https://golang.org/design/14313-benchmark-format), as benchstat reads it:
// one operation is one check.
func WriteBench(w io.Writer, samples []sample.Sample) error {
	out := benchfmt.NewWriter(w)
	for _, unit := range []string{unitCPU, unitSoaker, unitMissed} {
		meta := &benchfmt.UnitMetadata{
			UnitMetadataKey: benchfmt.UnitMetadataKey{Unit: unit, Key: "better"},
			OrigUnit:        unit,
			Value:           "lower",
		}
		if err := out.Write(meta); err != nil {
			return err
		}
	}
	for _, s := range samples {
		if s.Account.Ticks == 0 {
			return fmt.Errorf("repetition %d at %v has no tick", s.Repetition, s.Period)
		}
		result := &benchfmt.Result{
			Config: []benchfmt.Config{
				{Key: "goos", Value: []byte("linux"), File: true},
				{Key: "goarch", Value: []byte("amd64"), File: true},
				{Key: "pkg", Value: []byte("github.com/kvmaccess/kvmaccess/bench"), File: true},
			},
			Name:  benchfmt.Name(fmt.Sprintf("Monitor/clock=%s/period=%v", s.Clock, s.Period)),
			Iters: int(s.Account.Ticks),
			Values: []benchfmt.Value{
				{Value: float64(s.Account.CPU()) / float64(s.Account.Ticks), Unit: unitTick},
				{Value: s.CPUPercent(), Unit: unitCPU},
				{Value: s.SoakerPercent(), Unit: unitSoaker},
				{Value: float64(s.Account.Missed), Unit: unitMissed},
			},
		}
		if err := out.Write(result); err != nil {
			return err
		}
	}
	return nil
}
