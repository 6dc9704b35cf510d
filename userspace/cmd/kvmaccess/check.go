// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/dump"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

// checked is the outcome for one VM.
type checked struct {
	VM       integrity.VM        `json:"vm"`
	Status   integrity.Status    `json:"status"`
	Findings []integrity.Finding `json:"findings"`
	Error    string              `json:"error,omitempty"` // it could not be checked
}

func (a *app) check() *cobra.Command {
	var (
		wait           time.Duration
		file, baseline string
	)
	cmd := &cobra.Command{
		Use:   "check {[VM]... | --dump FILE}",
		Short: "Check the integrity of guests once",
		Long: `Check once whether guests (default all), or a file of a guest's memory, are as an
honest kernel has them: system call table and registers, IDT, GDT, control
registers. Changes over time are the daemon's to find, see kvmaccess watch, or
those since a --baseline.

Of a guest whose memory cannot be read, encrypted or gone, the registers alone
are checked, if they stay the same for a while: see --wait.

Exit status: 0 without findings, 2 with findings, 1 when a guest could not be
checked, or its registers only.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			opts := integrity.Options{MaxFindings: everything, Cache: a.cache}
			var err error
			if opts.Symbols, err = a.readSymbols(); err != nil {
				return err
			}
			if baseline != "" {
				if file == "" && len(args) != 1 {
					return errors.New("--baseline: a baseline is of one guest: name that")
				}
				if opts.Baseline, err = readBaseline(baseline); err != nil {
					return fmt.Errorf("--baseline %s: %w", baseline, err)
				}
			}
			if file != "" {
				if len(args) > 0 {
					return fmt.Errorf("check --dump takes no VM, got %q", args[0])
				}
				r, err := checkDump(ctx, file, opts)
				if err != nil {
					return fmt.Errorf("--dump: %w", err)
				}
				return a.report([]checked{r})
			}
			return a.withModule(func(src source) error {
				vms, err := a.selectVMs(ctx, src, args)
				if err != nil {
					return err
				}
				results := make([]checked, len(vms))
				for i, v := range vms {
					results[i] = checkVM(ctx, src, v, opts, wait)
				}
				return a.report(results)
			})
		},
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return a.completeVMs(cmd.Context())
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 5*time.Second, "how long to wait for a guest that boots")
	dumpFlag(cmd, &file)
	cmd.Flags().StringVar(&baseline, "baseline", "", "compare with this `file` as well: what the daemon answers to GET /v1/baselines/VM")
	return cmd
}

// report prints the outcome and makes the exit code.
func (a *app) report(results []checked) error {
	failed := 0
	for _, r := range results {
		if r.Error != "" {
			failed++
		}
		a.found = a.found || len(r.Findings) > 0
	}
	var err error
	if a.output == "json" {
		err = a.json(results)
	} else {
		err = a.printChecked(results)
	}
	if err == nil && failed > 0 {
		err = fmt.Errorf("%d of %s could not be checked", failed, plural(len(results), "guest"))
	}
	return err
}

// maxBaseline is more than a baseline of thousands of vCPUs takes, in bytes.
const maxBaseline = 256 << 20

func readBaseline(file string) (*integrity.Baseline, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b integrity.Baseline
	d := json.NewDecoder(io.LimitReader(f, maxBaseline))
	d.DisallowUnknownFields()
	if err := d.Decode(&b); err != nil {
		return nil, fmt.Errorf("no baseline: %w", err)
	}
	if b.Version == 0 {
		return nil, errors.New("no baseline: it has no version")
	}
	return &b, nil
}

// checkDump checks a guest that lies in a file. Nothing of it changes, so what
// is not ready is never.
func checkDump(ctx context.Context, file string, opts integrity.Options) (checked, error) {
	r := checked{VM: integrity.VM{Name: filepath.Base(file)}, Findings: []integrity.Finding{}}
	d, err := dump.Open(file)
	if err != nil {
		return r, err
	}
	defer d.Close()
	cpus, err := d.VCPUs(ctx)
	if err != nil {
		return r, err
	}
	for i := range cpus {
		cpus[i].VM = 0
	}
	opts.Memory, opts.Settle = d, -1
	note := ""
	if len(cpus) == 0 {
		k, err := guest.Attach(ctx, d, guest.AttachOptions{Cache: opts.Cache})
		if err == nil {
			cpus, err = k.ImpliedVCPUs(ctx)
		}
		if err != nil {
			r.Error = err.Error()
			return r, nil
		}
		note = "the file has no registers: the tables are checked that the kernel keeps for its CPUs; whether CPUs use these, and how their control registers are, it does not tell"
		opts.Checks = slices.DeleteFunc(integrity.Checks(), func(c integrity.Check) bool { return c.Name() == integrity.ControlCheck{}.Name() })
	}
	m, err := integrity.NewMonitor(&guest.Machine{CPUs: cpus, Memory: d}, r.VM, opts)
	if err != nil {
		return r, err
	}
	findings, err := m.Attach(ctx)
	r.Findings = append(r.Findings, findings...)
	r.Status = m.Status()
	if note != "" {
		r.Status.Problems = append(r.Status.Problems, note)
	}
	switch {
	case err != nil:
		r.Error = err.Error()
	case r.Status.State != integrity.StateWatching:
		r.Error = r.Status.Reason
	}
	return r, nil
}

func (a *app) selectVMs(ctx context.Context, src source, args []string) ([]vm, error) {
	if len(args) == 0 {
		return a.listVMs(ctx, src)
	}
	var vms []vm
	for _, arg := range args {
		v, err := a.findVM(ctx, src, arg)
		if err != nil {
			return nil, err
		}
		vms = append(vms, v)
	}
	return vms, nil
}

// everything is more findings than a guest can have.
const everything = 1 << 20

func checkVM(ctx context.Context, src source, v vm, opts integrity.Options, wait time.Duration) checked {
	r := checked{VM: v.integrity(), Findings: []integrity.Finding{}}
	opts.Memory = src.Memory(v.VM)
	m, err := integrity.NewMonitor(src, r.VM, opts)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	deadline := time.Now().Add(wait)
	for {
		findings, err := m.Attach(ctx)
		r.Status = m.Status()
		if err != nil {
			r.Error = explain(err)
			return r
		}
		r.Findings = append(r.Findings, findings...)
		switch r.Status.State {
		case integrity.StateWatching:
			return r
		case integrity.StateRegisters:
			r.Error = r.Status.Reason
			return r
		}
		if time.Now().After(deadline) {
			r.Error = r.Status.Reason
			return r
		}
		select {
		case <-ctx.Done():
			r.Error = ctx.Err().Error()
			return r
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (a *app) printChecked(results []checked) error {
	if len(results) == 0 {
		fmt.Fprintln(a.err, "no KVM guest runs on this host")
	}
	for _, r := range results {
		var err error
		who := printable(r.VM.String())
		switch {
		case r.Status.State == integrity.StateRegisters:
			found := "no findings"
			if n := len(r.Findings); n > 0 {
				found = plural(n, "finding")
			}
			_, err = fmt.Fprintf(a.out, "%s: %s in the registers of %s; %s\n", who, found, plural(r.Status.VCPUs, "vCPU"), r.Error)
		case r.Error != "":
			_, err = fmt.Fprintf(a.out, "%s: not checked: %s\n", who, r.Error)
		case len(r.Findings) == 0:
			_, err = fmt.Fprintf(a.out, "%s: no findings (%s, %s of guest memory, %s)\n", who, plural(r.Status.VCPUs, "vCPU"), bytesText(uint64(r.Status.Bytes)), symbolText(r.Status))
		default:
			_, err = fmt.Fprintf(a.out, "%s: %s\n", who, plural(len(r.Findings), "finding"))
		}
		if err != nil {
			return err
		}
		for _, f := range r.Findings {
			if _, err := fmt.Fprintf(a.out, "  %s\n", printable(f.Message)); err != nil {
				return err
			}
		}
		for _, p := range r.Status.Problems {
			if _, err := fmt.Fprintf(a.out, "  note: %s\n", printable(p)); err != nil {
				return err
			}
		}
	}
	return nil
}

func symbolText(s integrity.Status) string {
	if s.Symbols == 0 {
		return "without symbols"
	}
	return fmt.Sprintf("%d symbols at a slide of %v", s.Symbols, s.Slide)
}
