// SPDX-License-Identifier: MIT

// Command benchscale measures what watching up to a thousand VMs costs, and
// writes results/scale. On the emulated hosts that it boots it takes the
// measurements itself.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/outside"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/bench/scale"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	out := flag.String("out", "results/scale", "`directory` for the results")
	quick := flag.Bool("quick", false, "fewer repetitions, and 100 VMs at most: a few minutes")
	most := flag.Int("most", 1000, "VMs at most")
	n := flag.Int("n", 6, "repetitions")
	kind := flag.String("kind", "", "of the guests: halt or spin (default: both, one after the other)")
	flag.Parse()
	if *quick {
		*most, *n = min(*most, 100), min(*n, 3)
	}
	var err error
	if inside.OnHost() {
		err = inside.Serve(func(alive func(string)) ([]scale.Row, error) {
			return scale.Measure(ctx, tinyvm.Kind(*kind), scale.Numbers(*most), *n, alive)
		})
	} else {
		kinds := []tinyvm.Kind{tinyvm.Halting, tinyvm.Spinning}
		if *kind != "" {
			kinds = []tinyvm.Kind{tinyvm.Kind(*kind)}
		}
		err = measure(ctx, kinds, *out, *most, *n, *quick)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchscale:", err)
		os.Exit(1)
	}
}

// mostSpinning is how many guests that spin are started.
const mostSpinning = 100

func measure(ctx context.Context, kinds []tinyvm.Kind, out string, most, n int, quick bool) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	origin, err := report.ThisRun(ctx, log, "benchscale", os.Args[1:])
	if err != nil {
		return err
	}
	h, err := outside.NewHost(ctx, log, time.Hour, "--icount")
	if err != nil {
		return err
	}
	defer h.Close()
	var rows []scale.Row
	for _, kind := range kinds {
		most := most
		if kind == tinyvm.Spinning {
			// On one CPU a thousand that count take hours to have their turns.
			most = min(most, mostSpinning)
		}
		log.Info("measuring", "guests", kind, "VMs", most)
		more, err := outside.Measure[[]scale.Row](ctx, h, "benchscale", "-kind", string(kind), "-most", strconv.Itoa(most), "-n", strconv.Itoa(n))
		if err != nil {
			return err
		}
		rows = append(rows, *more...)
	}
	s, err := scale.Summarize(rows)
	if err != nil {
		return err
	}
	s.Origin, s.Quick = origin, quick
	if err := s.Write(out, rows); err != nil {
		return err
	}
	log.Info("results are written", "directory", out, "took", time.Since(start).Round(time.Second))
	for _, c := range s.Costs {
		fmt.Printf("%5d VMs that %s: %.0f instructions a tick, %.3f of one alone, %.4f%% of a CPU in all\n", c.VMs, c.Kind, c.Instructions.Median, c.Ratio, c.CPUPercent.Median)
	}
	return nil
}
