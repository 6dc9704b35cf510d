// SPDX-License-Identifier: MIT

// Command benchattach measures what it takes to attach to guests of several
// kernels, and writes results/attach. On the emulated host that it boots it
// takes the measurements itself.
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
	"strings"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/attach"
	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/outside"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	out := flag.String("out", "results/attach", "`directory` for the results")
	suite := flag.String("suite", "bookworm", "Debian suite of the host")
	kernels := flag.String("guests", strings.Join(cache.GuestKernelNames(), ","), "kernels of the guests")
	n := flag.Int("n", 5, "attachments of each kind to each guest")
	every := flag.Int("every", 1, "compare each `N`th struct only")
	ways := flag.Int("ways", 2, "ways to boot each kernel: 1, with page-table isolation, or 2")
	flag.Parse()
	if flag.NArg() > 0 || *n < 1 || *every < 1 || *ways < 1 || *kernels == "" {
		fmt.Fprintln(os.Stderr, "benchattach: no arguments, and numbers from 1 on: see -help")
		os.Exit(2)
	}
	var err error
	if inside.OnHost() {
		err = inside.Serve(func(alive func(string)) (*attach.Run, error) {
			return attach.Measure(ctx, strings.Split(*kernels, ","), *n, *every, *ways, func(guest string) {
				fmt.Fprintln(os.Stderr, "attaching:", guest)
				alive(guest)
			})
		})
	} else {
		err = measure(ctx, *out, *suite, *kernels, *n, *every, *ways)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchattach:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, out, suite, kernels string, n, every, ways int) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	rep := new(attach.Report)
	var err error
	if rep.Origin, err = report.ThisRun(ctx, log, "benchattach", os.Args[1:]); err != nil {
		return err
	}
	h, err := outside.NewHost(ctx, log, 2*time.Hour, "--suite", suite, "--cpu", "max", "--guest", kernels)
	if err != nil {
		return err
	}
	defer h.Close()
	h.Stall = h.Timeout // by the wall's clock, hosts do not stand still
	before, err := load()
	if err != nil {
		return err
	}
	log.Info("measuring", "kernels", kernels, "attachments", n)
	r, err := outside.Measure[attach.Run](ctx, h, "benchattach",
		"-guests", kernels, "-n", strconv.Itoa(n), "-every", strconv.Itoa(every), "-ways", strconv.Itoa(ways))
	if err != nil {
		return err
	}
	after, err := load()
	if err != nil {
		return err
	}
	if len(r.Rows) == 0 {
		return errors.New("nothing was measured")
	}
	if err := r.Summarize(); err != nil {
		return err
	}
	rep.Host, rep.Rows, rep.Load = r.Host, r.Rows, before+" before and "+after+" after it"
	if err := rep.Write(out, r.Samples); err != nil {
		return err
	}
	log.Info("results are written", "directory", out, "took", time.Since(start).Round(time.Second))
	for _, row := range rep.Rows {
		fmt.Printf("%-40s %6d of %6d symbols, %6d of %6d offsets, cold %.2f s, cached %.2f s, %d bytes\n",
			row.Guest, row.SymbolsEqual, row.Symbols, row.OffsetsEqual, row.Offsets, row.AttachCold, row.AttachCached, row.BytesRead)
	}
	return nil
}

// load is the machine's load averages.
func load() (string, error) {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	return strings.Join(strings.Fields(string(text))[:3], " "), nil
}
