// SPDX-License-Identifier: MIT

// Command benchattach measures what it takes to attach to guests of several
// kernels, and writes results/attach. On the emulated host that it boots it
// takes the measurements itself.
package main

import (
	"bytes"
	"cmp"
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
	"time"

	"github.com/kvmaccess/kvmaccess/bench/attach"
	"github.com/kvmaccess/kvmaccess/bench/outside"
	"github.com/kvmaccess/kvmaccess/bench/report"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
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
	if os.Getenv(host.Env) != "" {
		err = inside(ctx, o)
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

// inside measures on this very host and writes what it finds as JSON.
func inside(ctx context.Context, o attach.Options) error {
	r, err := attach.Measure(ctx, o, func(guest string) { fmt.Fprintln(os.Stderr, "attaching:", guest) })
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

func measure(ctx context.Context, out, suite string, peers []string, o attach.Options) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	start := time.Now()
	dir, err := os.MkdirTemp("", "kvmaccess-attach-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := outside.Build(ctx, dir); err != nil {
		return err
	}
	rep := &attach.Report{Command: command(), Date: start.UTC().Format(time.DateOnly), Machine: report.ThisMachine()}
	if rep.Machine.Emulator, err = host.QEMUVersion(ctx, log); err != nil {
		return err
	}
	kernels := strings.Join(o.Kernels, ",")
	args := []string{"run", "--suite", suite, "--cpu", "max", "--guest", kernels, "--timeout", "120m", "--file", filepath.Join(dir, "kvmaccess")}
	if len(peers) > 0 {
		p, err := cache.OpenPeer(ctx, peers, log)
		if err != nil {
			return fmt.Errorf("what drgn needs (-peers '' leaves it out): %w", err)
		}
		args = append(args, "--file", p.Root+":"+attach.PeerFile)
		for kernel, file := range p.Debug {
			args = append(args, "--file", file+":"+attach.PeerDebug(kernel))
		}
	}
	args = append(args, "--", filepath.Join(dir, "benchattach"),
		"-guests", kernels, "-n", strconv.Itoa(o.N), "-every", strconv.Itoa(o.Every), "-ways", strconv.Itoa(o.Ways))
	before, err := load()
	if err != nil {
		return err
	}
	log.Info("measuring", "kernels", kernels, "attachments", o.N, "drgn", peers)
	var stdout bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "vmfixture"), args...)
	cmd.Stdout, cmd.Stderr = &stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	if err := cmd.Run(); err != nil {
		return err
	}
	after, err := load()
	if err != nil {
		return err
	}
	var r attach.Run
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
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

// command is how this was called, but for where the results go.
func command() string {
	text := "go run ./bench/cmd/benchattach"
	flag.Visit(func(f *flag.Flag) {
		if f.Name != "out" {
			text += fmt.Sprintf(" -%s %s", f.Name, cmp.Or(f.Value.String(), "''"))
		}
	})
	return text
}

// load is the machine's load averages.
func load() (string, error) {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	return strings.Join(strings.Fields(string(text))[:3], " "), nil
}
