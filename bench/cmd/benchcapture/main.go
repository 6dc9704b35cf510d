// SPDX-License-Identifier: MIT

// Command benchcapture measures what it costs to take the state of a vCPU once,
// in each condition, on AMD and Intel, and writes results/capture. On the
// emulated hosts that it boots it takes the measurements itself.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/capture"
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
	if os.Getenv(host.Env) != "" {
		err = inside(ctx, *n, *cpus)
	} else {
		err = measure(ctx, *out, *suite, *n)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchcapture:", err)
		os.Exit(1)
	}
}

// inside measures on this very host and writes what it finds as JSON.
func inside(ctx context.Context, n, cpus int) error {
	r, err := capture.Measure(ctx, n, cpus)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func measure(ctx context.Context, out, suite string, n int) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	dir, err := os.MkdirTemp("", "kvmaccess-capture-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := outside.Build(ctx, dir); err != nil {
		return err
	}
	rep := &capture.Report{
		Command: strings.Join(append([]string{"go run ./bench/cmd/benchcapture"}, os.Args[1:]...), " "),
		Date:    start.UTC().Format(time.DateOnly),
		Machine: report.ThisMachine(),
	}
	var clocks []capture.Clock
	var runs []*capture.Run
	for _, h := range []struct {
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
		log.Info("measuring", "clock", h.clock, "captures in each condition", h.n)
		r, err := take(ctx, dir, append([]string{"--suite", suite}, h.flags...), h.n, h.cpus)
		if err != nil {
			return fmt.Errorf("%s: %w", h.clock, err)
		}
		rows, err := capture.Summarize(h.clock, r)
		if err != nil {
			return fmt.Errorf("%s: %w", h.clock, err)
		}
		rep.Rows = append(rep.Rows, rows...)
		clocks, runs = append(clocks, h.clock), append(runs, r)
	}
	if err := rep.Write(out, clocks, runs); err != nil {
		return err
	}
	log.Info("results are written", "directory", out, "took", time.Since(start).Round(time.Second))
	return show(rep.Rows)
}

// take has captures taken on a host that is booted for it.
func take(ctx context.Context, dir string, flags []string, n, cpus int) (*capture.Run, error) {
	args := append([]string{"run", "--timeout", "15m"}, flags...)
	args = append(args, "--", filepath.Join(dir, "benchcapture"), "-n", strconv.Itoa(n), "-cpus", strconv.Itoa(cpus))
	var stdout bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "vmfixture"), args...)
	cmd.Stdout, cmd.Stderr = &stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Run(); err != nil {
		return nil, err
	}
	var r capture.Run
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		return nil, err
	}
	if len(r.Samples) == 0 {
		return nil, errors.New("no capture was taken")
	}
	return &r, nil
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
