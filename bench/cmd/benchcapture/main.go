// SPDX-License-Identifier: MIT

// Command benchcapture measures what it costs to take the state of a vCPU once,
// in each condition, on AMD and Intel, and writes results/capture. On the
// emulated hosts that it boots it takes the measurements itself.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/capture"
	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/outside"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	out := flag.String("out", "results/capture", "`directory` for the results")
	suite := flag.String("suite", "bookworm", "Debian suite of the hosts")
	n := flag.Int("n", 1000, "captures in each condition; a tenth of that under Bochs")
	cpus := flag.Int("cpus", 1, "on a host: only conditions that need so many CPUs of it")
	flag.Parse()
	if flag.NArg() > 0 || *n < 60 {
		fmt.Fprintln(os.Stderr, "benchcapture: no arguments, and at least 60 captures: see -help")
		os.Exit(2)
	}
	var err error
	if inside.OnHost() {
		err = inside.Serve(func(func(string)) (*capture.Run, error) { return capture.Measure(ctx, *n, *cpus) })
	} else {
		err = measure(ctx, *out, *suite, *n)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchcapture:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, out, suite string, n int) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	rep := new(capture.Report)
	var err error
	if rep.Origin, err = report.ThisRun(ctx, log, "benchcapture", os.Args[1:]); err != nil {
		return err
	}
	h, err := outside.NewHost(ctx, log, 15*time.Minute)
	if err != nil {
		return err
	}
	defer h.Close()
	h.Stall = h.Timeout // it says nothing before the end
	var clocks []capture.Clock
	var runs []*capture.Run
	for _, c := range []struct {
		clock capture.Clock
		n     int
		cpus  int // that conditions need at least
		flags []string
	}{
		{capture.QEMUInstructions, n, 1, []string{"--icount"}},
		{capture.BochsInstructions, n / 10, 1, []string{"--vendor", host.VMX, "--smp", "1"}},
		{capture.BochsInstructions, n / 10, 2, []string{"--vendor", host.VMX, "--smp", "2"}},
		{capture.Wall, n, 1, []string{"--smp", "2"}},
	} {
		log.Info("measuring", "clock", c.clock, "captures in each condition", c.n)
		h.Flags = append([]string{"--suite", suite}, c.flags...)
		r, err := outside.Measure[capture.Run](ctx, h, "benchcapture", "-n", strconv.Itoa(c.n), "-cpus", strconv.Itoa(c.cpus))
		if err == nil && len(r.Samples) == 0 {
			err = errors.New("no capture was taken")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.clock, err)
		}
		rows, err := capture.Summarize(c.clock, r)
		if err != nil {
			return fmt.Errorf("%s: %w", c.clock, err)
		}
		rep.Rows = append(rep.Rows, rows...)
		clocks, runs = append(clocks, c.clock), append(runs, r)
	}
	if err := rep.Write(out, clocks, runs); err != nil {
		return err
	}
	log.Info("results are written", "directory", out, "took", time.Since(start).Round(time.Second))
	return show(rep.Rows)
}

func show(rows []capture.Row) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "CLOCK\tVENDOR\tCONDITION\tMETHOD\tN\tRETRIES\tINTERRUPTED\tMODULE\tREQUEST")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%v\t%v\t%v\t%d\t%.1f\t%.4g\t%.4g\t%.4g\n",
			r.Clock, r.Vendor, r.Condition, r.Method, r.N, r.Retries, r.Handler.Median, r.Duration.Median, r.Request.Median)
	}
	return w.Flush()
}
