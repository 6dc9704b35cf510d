// SPDX-License-Identifier: MIT

// Command benchpeers measures what other ways to look at a guest cost beside
// KvmAccess, and writes results/peers. On the emulated host that it boots it
// takes the measurements itself.
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
	"github.com/kvmaccess/kvmaccess/bench/peers"
	"github.com/kvmaccess/kvmaccess/bench/report"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	out := flag.String("out", "results/peers", "`directory` for the results")
	quick := flag.Bool("quick", false, "fewer repetitions: a few minutes")
	n := flag.Int("n", 6, "repetitions")
	flag.Parse()
	if *quick {
		*n = min(*n, 3)
	}
	var err error
	if inside.OnHost() {
		err = inside.Serve(func(alive func(string)) (*peers.Run, error) { return peers.Measure(ctx, *n, alive) })
	} else {
		err = measure(ctx, *out, *n, *quick)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchpeers:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, out string, n int, quick bool) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	origin, err := report.ThisRun(ctx, log, "benchpeers", os.Args[1:])
	if err != nil {
		return err
	}
	h, err := outside.NewHost(ctx, log, time.Hour, "--icount")
	if err != nil {
		return err
	}
	defer h.Close()
	log.Info("measuring")
	run, err := outside.Measure[peers.Run](ctx, h, "benchpeers", "-n", strconv.Itoa(n))
	if err != nil {
		return err
	}
	s, err := peers.Summarize(run)
	if err != nil {
		return err
	}
	s.Origin, s.Quick = origin, quick
	s.Machine.Kernel = run.Kernel
	if err := s.Write(out, run); err != nil {
		return err
	}
	log.Info("results are written", "directory", out, "took", time.Since(start).Round(time.Second))
	for _, c := range s.Costs {
		fmt.Printf("%-40s %9.0f instructions a look, %.4f of QMP's; guest slower by %.2f%%\n", c.Peer, c.Instructions.Median, c.OfQMP, c.Slowdown.Median)
	}
	return nil
}
