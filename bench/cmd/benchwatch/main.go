// SPDX-License-Identifier: MIT

// Command benchwatch measures what watches in the kernel cost and how soon they
// find a change, and writes results/watch. On the emulated hosts that it boots
// it takes the measurements itself.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/outside"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/bench/watch"
	"github.com/kvmaccess/kvmaccess/userspace/daemon"
)

// latencyPeriod is that of the watch whose findings are timed.
const latencyPeriod = 10 * time.Millisecond

// periods of the curve.
var periods = []time.Duration{time.Second, 100 * time.Millisecond, 10 * time.Millisecond, 2 * time.Millisecond, time.Millisecond, 500 * time.Microsecond}

// mode is how thoroughly to measure.
type mode struct {
	plan                                    sample.Plan
	ticks, latency, transient, bulk, passes int // how often
	pairs                                   int // of the guest's work
}

var (
	full = mode{
		plan:  sample.Plan{Mode: daemon.ModeWatch, Clock: sample.Icount, Periods: periods, Repetitions: 6, MinTicks: 10, MaxTicks: 1000, Window: 5 * time.Second},
		ticks: 8, latency: 1000, transient: 400, bulk: 8, passes: 6, pairs: 120,
	}
	fast = mode{
		plan:  sample.Plan{Mode: daemon.ModeWatch, Clock: sample.Icount, Periods: periods, Repetitions: 3, MinTicks: 10, MaxTicks: 500, Window: 2 * time.Second},
		ticks: 3, latency: 1000, transient: 150, bulk: 3, passes: 2, pairs: 8,
	}
)

type options struct {
	out, peers, scale, keep string
	quick                   bool
	seed                    uint64
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var o options
	flag.StringVar(&o.out, "out", "results/watch", "`directory` for the results")
	flag.StringVar(&o.peers, "peers", "results/peers", "`directory` with the results of benchpeers")
	flag.StringVar(&o.scale, "scale", "results/scale", "`directory` with the results of benchscale")
	flag.StringVar(&o.keep, "keep", "", "`directory` for what has been measured, which another run of the same revision goes on from")
	flag.BoolVar(&o.quick, "quick", false, "fewer and shorter measurements: some minutes")
	flag.Uint64Var(&o.seed, "seed", 0, "of random times and orders (default: a random one)")
	part := flag.String("part", "", "on a host: what to measure")
	n := flag.Int("n", 0, "on a host: how often")
	pairs := flag.Int("pairs", 0, "on a host: pairs of the guest's work")
	flag.Parse()
	for o.seed == 0 {
		o.seed = rand.Uint64()
	}
	var err error
	if inside.OnHost() {
		err = take(ctx, *part, *n, *pairs, o.seed)
	} else {
		err = measure(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchwatch:", err)
		os.Exit(1)
	}
}

// Parts of the measurement, each on a host of its own.
const (
	curve     = "curve"
	ticks     = "ticks"
	latency   = "latency"
	transient = "transient"
	bulk      = "bulk"
	linux     = "linux"
	findings  = "findings"
)

func take(ctx context.Context, part string, n, pairs int, seed uint64) error {
	switch part {
	case ticks:
		return inside.Serve(func(alive func(string)) ([]watch.Tick, error) { return watch.Ticks(ctx, n, alive) })
	case latency:
		return inside.Serve(func(alive func(string)) ([]watch.Changes, error) {
			return watch.Latency(ctx, latencyPeriod, n, seed, alive)
		})
	case transient:
		return inside.Serve(func(alive func(string)) ([]watch.Transient, error) { return watch.Transients(ctx, n, seed, alive) })
	case bulk:
		return inside.Serve(func(alive func(string)) ([]watch.Bulk, error) { return watch.Reads(ctx, n, alive) })
	case findings:
		return inside.Serve(func(alive func(string)) (*watch.Changes, error) {
			return watch.DaemonLatency(ctx, latencyPeriod, n, seed, alive)
		})
	case linux:
		return inside.Serve(func(alive func(string)) (*watch.Linux, error) { return watch.MeasureLinux(ctx, n, pairs, alive) })
	}
	return fmt.Errorf("no part is called %q", part)
}

func measure(ctx context.Context, o options) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	m := full
	if o.quick {
		m = fast
	}
	m.plan.Seed = o.seed
	origin, err := report.ThisRun(ctx, log, "benchwatch", os.Args[1:])
	if err != nil {
		return err
	}
	h, err := outside.NewHost(ctx, log, 2*time.Hour, "--icount")
	if err != nil {
		return err
	}
	defer h.Close()
	k := &keeper{dir: o.keep, of: fmt.Sprintf("%s quick=%t", origin.Machine.Revision, o.quick), log: log}
	r := new(watch.Results)
	on := func(part string, more ...string) []string {
		return append([]string{"-part", part, "-seed", strconv.FormatUint(o.seed, 10)}, more...)
	}
	count := func(n int) []string { return []string{"-n", strconv.Itoa(n)} }
	for _, part := range []func() error{
		func() error {
			return run(k, ticks, &r.Ticks, func() (*[]watch.Tick, error) {
				return outside.Measure[[]watch.Tick](ctx, h, "benchwatch", on(ticks, count(m.ticks)...)...)
			})
		},
		func() error {
			return run(k, bulk, &r.Bulk, func() (*[]watch.Bulk, error) {
				return outside.Measure[[]watch.Bulk](ctx, h, "benchwatch", on(bulk, count(m.bulk)...)...)
			})
		},
		func() error {
			return run(k, latency, &r.Latency, func() (*[]watch.Changes, error) {
				return outside.Measure[[]watch.Changes](ctx, h, "benchwatch", on(latency, count(m.latency)...)...)
			})
		},
		func() error {
			return run(k, transient, &r.Transient, func() (*[]watch.Transient, error) {
				return outside.Measure[[]watch.Transient](ctx, h, "benchwatch", on(transient, count(m.transient)...)...)
			})
		},
		func() error {
			return run(k, linux, &r.Linux, func() (**watch.Linux, error) {
				return outside.Measure[*watch.Linux](ctx, h, "benchwatch", on(linux, append(count(m.passes), "-pairs", strconv.Itoa(m.pairs))...)...)
			})
		},
	} {
		if err := part(); err != nil {
			return err
		}
	}
	var byDaemon watch.Changes
	if err := run(k, findings, &byDaemon, func() (*watch.Changes, error) {
		return outside.Measure[watch.Changes](ctx, h, "benchwatch", on(findings, count(m.latency)...)...)
	}); err != nil {
		return err
	}
	r.Latency = append(r.Latency, byDaemon)
	var samples outside.Result
	if err := run(k, curve, &samples, func() (*outside.Result, error) {
		of := outside.Run{Host: *h, Plan: m.plan}
		return of.Take(ctx)
	}); err != nil {
		return err
	}
	r.Samples, r.Restarts = samples.Samples, samples.Restarts
	if err := errors.Join(other(o.peers, &r.Peers), other(o.scale, &r.Scale)); err != nil {
		return err
	}
	s, err := watch.Summarize(r, origin, o.quick)
	if err != nil {
		return err
	}
	if err := s.Write(o.out, r); err != nil {
		return err
	}
	log.Info("results are written", "directory", o.out, "took", time.Since(start).Round(time.Second))
	for _, r := range s.Reaches {
		met := "met"
		if !r.Met {
			met = "MISSED: " + r.Why
		}
		fmt.Printf("%-45s %-24s %-34s %s\n", r.Metric, r.Value, r.Reach, met)
	}
	return nil
}

// other reads the summary of another bench, if there is one.
func other[T any](dir string, to **T) error {
	text, err := os.ReadFile(filepath.Join(dir, report.SummaryFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	*to = new(T)
	if err := json.Unmarshal(text, *to); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, report.SummaryFile), err)
	}
	return nil
}

// keeper keeps what has been measured.
type keeper struct {
	dir string // empty: it does not
	of  string // the revision and how thoroughly
	log *slog.Logger
}

type kept[T any] struct {
	Of     string
	Result T
}

// run measures a part, or takes what is kept of it.
func run[T any](k *keeper, part string, to *T, measure func() (*T, error)) error {
	name := filepath.Join(k.dir, part+".json")
	if k.dir != "" {
		var is kept[json.RawMessage]
		text, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(text, &is)
		}
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		case is.Of == k.of:
			k.log.Info("measured before", "part", part)
			return json.Unmarshal(is.Result, to)
		}
	}
	k.log.Info("measuring", "part", part)
	result, err := measure()
	if err != nil {
		return fmt.Errorf("%s: %w", part, err)
	}
	*to = *result
	if k.dir == "" {
		return nil
	}
	text, err := json.Marshal(kept[T]{k.of, *result})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(k.dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, text, 0o644)
}
