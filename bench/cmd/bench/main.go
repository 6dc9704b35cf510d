// SPDX-License-Identifier: MIT

// Command bench measures what monitoring a VM costs, on emulated KVM hosts that
// it boots, and writes results/overhead.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/outside"
	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	o := parse(os.Args[1:])
	if err := run(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	mode    mode
	out     string
	seed    uint64
	command string // for the report
}

const usage = `Usage: bench [flags]

Measures what monitoring a VM costs, at periods from 1 s to 1 ms: the claim on a
host whose clock counts instructions, the check by wall clock on a host with
two CPUs. Both hosts are emulated: neither hardware virtualization nor loadable
modules are needed. It takes up to 40 minutes.

The exit code is 1 if samples are lacking, if the product's account of itself
and the counting loop differ by more than 10% where the cost is above 0.05%,
or if ticks went missing without being reported.

`

// parse reads the command line; it does not return if that is wrong.
func parse(args []string) options {
	f := flag.NewFlagSet("bench", flag.ExitOnError)
	f.Usage = func() {
		fmt.Fprint(f.Output(), usage)
		f.PrintDefaults()
	}
	quick := f.Bool("quick", false, "fewer and shorter measurements: within 4 minutes")
	demo := f.Bool("demo", false, "a few periods, on the instruction clock alone: about a minute")
	out := f.String("out", "results/overhead", "`directory` for the results")
	seed := f.Uint64("seed", 0, "of the random order (default: a random one; the report has it)")
	f.Parse(args) // ends the program on an error
	fail := func(text string) {
		fmt.Fprintln(os.Stderr, "bench:", text)
		os.Exit(2)
	}
	o := options{mode: full, out: *out, seed: *seed, command: strings.Join(append([]string{"go run ./bench/cmd/bench"}, args...), " ")}
	switch {
	case f.NArg() > 0:
		fail(fmt.Sprintf("unexpected argument %q: see -help", f.Arg(0)))
	case *quick && *demo:
		fail("either -quick or -demo")
	case *quick:
		o.mode = fast
	case *demo:
		o.mode = short
	}
	for o.seed == 0 {
		o.seed = rand.Uint64()
	}
	return o
}

func run(ctx context.Context, o options, stdout io.Writer) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	h, err := outside.NewHost(ctx, log, o.mode.timeout)
	if err != nil {
		return err
	}
	defer h.Close()

	r := &report.Report{Plans: o.mode.plans(o.seed), Machine: report.ThisMachine()}
	if r.Machine.Emulator, err = host.QEMUVersion(ctx, log); err != nil {
		return err
	}
	var samples []sample.Sample
	var curves []*overhead.Curve
	var trouble []error
	for _, plan := range r.Plans {
		log.Info("measuring", "clock", plan.Clock, "samples", len(plan.Steps()), "seed", plan.Seed,
			"host's time", plan.Duration().Round(time.Second))
		take := outside.Run{Host: *h, Plan: plan, CPUs: 2}
		result, err := take.Take(ctx)
		if result == nil {
			return fmt.Errorf("%s: %w", plan.Clock, err)
		}
		if err != nil {
			trouble = append(trouble, fmt.Errorf("%s: after the last sample: %w", plan.Clock, err))
		}
		r.Machine.Kernel = result.Host.Kernel
		curve, err := overhead.NewCurve(plan.Clock, result.Samples)
		if err != nil {
			return err
		}
		curve.Elsewhere, curve.Restarts = result.Elsewhere, result.Restarts
		samples = append(samples, result.Samples...)
		curves = append(curves, curve)
	}
	r.Summary = &overhead.Summary{
		PaperPercent: overhead.PaperPercent,
		Curve:        *curves[0],
		Seed:         o.seed,
		Quick:        o.mode.quick,
		Command:      o.command,
		Date:         start.UTC().Format(time.DateOnly),
	}
	if len(curves) > 1 {
		r.Summary.Check = curves[1]
	}
	if err := report.WriteFiles(o.out, r, samples); err != nil {
		return err
	}
	if err := show(stdout, curves); err != nil {
		return err
	}
	log.Info("results are written", "directory", o.out, "took", time.Since(start).Round(time.Second))
	return errors.Join(append(trouble, judge(curves))...)
}

// show prints the curves as tables.
func show(w io.Writer, curves []*overhead.Curve) error {
	for _, c := range curves {
		fmt.Fprintf(w, "\n%s, %d CPUs, in percent of one CPU:\n", c.Clock, c.CPUs)
		table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(table, "period\taccount\t95% interval\tcounting loop\t95% interval\tdifference\tagree\tns a check\tmissed\t")
		for _, p := range c.Periods {
			fmt.Fprintf(table, "%v\t%.4f\t%.4f .. %.4f\t%.4f\t%.4f .. %.4f\t%+.1f%%\t%s\t%.0f\t%d\t\n",
				time.Duration(p.PeriodS*1e9), p.CPUPercent, p.CILow, p.CIHigh, p.SoakerPercent, p.SoakerCILow, p.SoakerCIHigh,
				100*p.Difference, p.Agreement, p.NanosecondsPerTick, p.MissedTicks)
		}
		if err := table.Flush(); err != nil {
			return err
		}
		if c.IsoCostPeriodS != nil {
			fmt.Fprintf(w, "%g%% at a period of %.3g ms\n", overhead.PaperPercent, *c.IsoCostPeriodS*1e3)
		} else {
			fmt.Fprintln(w, c.IsoCostNote)
		}
	}
	return nil
}

// judge is an error for each thing that a run may not show. The claim has to
// be resolved; noise of the wall clock may hide an agreement of the check, not
// fake one.
func judge(curves []*overhead.Curve) error {
	var problems []error
	for _, c := range curves {
		bad := []overhead.Agreement{overhead.AgreementNo}
		if c.Clock == sample.Icount {
			bad = append(bad, overhead.AgreementUnresolved)
		}
		for _, p := range c.With(bad...) {
			problems = append(problems, fmt.Errorf("%s at %gs: the account says %.4f%%, the counting loop %.4f%%: more than %g%% apart",
				c.Clock, p.PeriodS, p.CPUPercent, p.SoakerPercent, 100*overhead.AgreeWithin))
		}
		if n := c.Unaccounted(); n > 0 {
			problems = append(problems, fmt.Errorf("%s: %d ticks were neither done nor reported as missed", c.Clock, n))
		}
	}
	return errors.Join(problems...)
}
