// SPDX-License-Identifier: MIT

// Command benchattach measures what it takes to attach to guests of several
// kernels, and writes results/attach. On the emulated host that it boots it
// takes the measurements itself.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
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
	all := strings.Join(cache.GuestKernelNames(), ",")
	kernels := flag.String("guests", all, "kernels of the guests, of "+all)
	peers := flag.String("peers", "6.12", "those that drgn attaches to as well: 300 MB of debug info each; empty: none")
	var o attach.Options
	flag.IntVar(&o.N, "n", 5, "attachments of each kind to each guest")
	flag.IntVar(&o.Every, "every", 1, "compare each `N`th struct only")
	flag.IntVar(&o.Ways, "ways", 2, "ways to boot each kernel: 1, with page-table isolation, or 2")
	flag.Parse()
	o.Kernels = list(*kernels)
	if flag.NArg() > 0 || o.N < 1 || o.Every < 1 || o.Ways < 1 || len(o.Kernels) == 0 {
		fmt.Fprintln(os.Stderr, "benchattach: no arguments, and numbers from 1 on: see -help")
		os.Exit(2)
	}
	var err error
	if inside.OnHost() {
		err = inside.Serve(func(alive func(string)) (*attach.Run, error) {
			return attach.Measure(ctx, o, func(guest string) {
				fmt.Fprintln(os.Stderr, "attaching:", guest)
				alive(guest)
			})
		})
	} else {
		err = measure(ctx, *out, *suite, list(*peers), o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchattach:", err)
		os.Exit(1)
	}
}

func list(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == ',' })
}

func measure(ctx context.Context, out, suite string, peers []string, o attach.Options) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	rep := new(attach.Report)
	var err error
	if rep.Origin, err = report.ThisRun(ctx, log, "benchattach", os.Args[1:]); err != nil {
		return err
	}
	kernels := strings.Join(o.Kernels, ",")
	h, err := outside.NewHost(ctx, log, 2*time.Hour, "--suite", suite, "--cpu", "max", "--guest", kernels)
	if err != nil {
		return err
	}
	defer h.Close()
	h.Stall = h.Timeout // by the wall's clock, hosts do not stand still
	h.Flags = append(h.Flags, "--file", filepath.Join(h.Dir, "kvmaccess"))
	if len(peers) > 0 {
		p, err := cache.OpenPeer(ctx, peers, log)
		if err != nil {
			return fmt.Errorf("what drgn needs (-peers '' leaves it out): %w", err)
		}
		h.Flags = append(h.Flags, "--file", p.Root+":"+attach.PeerFile)
		for kernel, file := range p.Debug {
			h.Flags = append(h.Flags, "--file", file+":"+attach.PeerDebug(kernel))
		}
	}
	before, err := load()
	if err != nil {
		return err
	}
	log.Info("measuring", "kernels", kernels, "attachments", o.N, "drgn", peers)
	r, err := outside.Measure[attach.Run](ctx, h, "benchattach",
		"-guests", kernels, "-n", strconv.Itoa(o.N), "-every", strconv.Itoa(o.Every), "-ways", strconv.Itoa(o.Ways))
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
		fmt.Printf("%-40s %6d of %6d symbols, %6d of %6d offsets, cold %.2f s, cached %.2f s, %d bytes; %s %.2f s\n",
			row.Guest, row.SymbolsEqual, row.Symbols, row.OffsetsEqual, row.Offsets, row.AttachCold, row.AttachCached, row.BytesRead,
			cmp.Or(row.Peer, "no peer"), row.PeerSeconds)
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
