// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
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
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "check [VM]...",
		Short: "Check the integrity of guests once",
		Long: `Check once whether guests (default all) are as an honest kernel has them: system
call table and registers, IDT, GDT, control registers. Most of it needs
--symbols. Changes over time are the daemon's to find, see kvmaccess watch.

Exit status: 0 without findings, 2 with findings, 1 when a guest could not be
checked.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			symbols, err := a.readSymbols()
			if err != nil {
				return err
			}
			return a.withModule(func(src source) error {
				vms, err := a.selectVMs(ctx, src, args)
				if err != nil {
					return err
				}
				results := make([]checked, len(vms))
				failed := 0
				for i, v := range vms {
					results[i] = checkVM(ctx, src, v, symbols, wait)
					if results[i].Error != "" {
						failed++
					}
					a.found = a.found || len(results[i].Findings) > 0
				}
				if a.output == "json" {
					err = a.json(results)
				} else {
					err = a.printChecked(results)
				}
				if err == nil && failed > 0 {
					err = fmt.Errorf("%d of %s could not be checked", failed, plural(len(vms), "guest"))
				}
				return err
			})
		},
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return a.completeVMs(cmd.Context())
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 5*time.Second, "how long to wait for a guest that boots")
	return cmd
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

func checkVM(ctx context.Context, src source, v vm, symbols *guest.Symbols, wait time.Duration) checked {
	r := checked{VM: v.integrity(), Findings: []integrity.Finding{}}
	m, err := integrity.NewMonitor(src, r.VM, integrity.Options{Symbols: symbols, Memory: src.Memory(v.VM), MaxFindings: everything})
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
		if r.Status.State == integrity.StateWatching {
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
