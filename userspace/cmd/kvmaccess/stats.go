// SPDX-License-Identifier: MIT

package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

type vmStats struct {
	Name string `json:"name"`
	kvmaccess.Stats
}

type watchStats struct {
	Name string `json:"name"`
	kvmaccess.WatchStats
}

type statsJSON struct {
	Module      kvmaccess.Stats `json:"module"` // VMs that are gone included; ns
	VMs         []vmStats       `json:"vms"`
	Watches     []watchStats    `json:"watches"`                // that there are now, whoever owns them
	Daemon      *daemon.Stats   `json:"daemon"`                 // null: none runs
	DaemonError string          `json:"daemon_error,omitempty"` // why not
}

func (a *app) stats() *cobra.Command {
	return &cobra.Command{
		Use:   "stats",
		Short: "Show what monitoring did and cost",
		Long: `Show what the module and, while it runs, the daemon did and what it cost since
they were started, and of each watch, which the module compares by itself each
period, how it fares. The CPU time that monitoring takes is the daemon's own, the
module's worker's and that of the module's interrupts, together. Of what the
daemon read to attach to guests it says which way: by netlink, from the VMM by
process_vm_readv, or so that it had to be made resident (faulted in).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			return a.withModule(func(src source) error {
				var out statsJSON
				var err error
				if out.Module, err = src.Stats(ctx); err != nil {
					return err
				}
				vms, err := a.listVMs(ctx, src)
				if err != nil {
					return err
				}
				names := map[kvmaccess.VMID]string{}
				for _, v := range vms {
					names[v.ID] = v.Name
				}
				per, err := src.StatsPerVM(ctx)
				if err != nil {
					return err
				}
				out.VMs = make([]vmStats, len(per))
				for i, s := range per {
					out.VMs[i] = vmStats{names[s.VM], s}
				}
				watches, err := src.Watches(ctx)
				if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
					return err
				}
				out.Watches = make([]watchStats, len(watches))
				for i, w := range watches {
					out.Watches[i] = watchStats{names[w.VM], w}
				}
				if d, err := daemon.Dial(a.socket); err != nil {
					out.DaemonError = err.Error()
				} else {
					s, err := d.Stats(ctx)
					_ = d.Close()
					if err != nil {
						return err
					}
					out.Daemon = &s
				}
				if a.output == "json" {
					return a.json(out)
				}
				return a.printStats(out)
			})
		},
	}
}

// nameOf is a VM's name, or its number.
func nameOf(name string, vm kvmaccess.VMID) string {
	if name == "" {
		return fmt.Sprintf("#%d", vm)
	}
	return name
}

func (a *app) printStats(s statsJSON) error {
	t := a.table("", "WORKER CPU", "INTERRUPT CPU", "CAPTURES", "RETRIES", "INTERRUPTS", "EVENTS")
	row := func(who string, s kvmaccess.Stats) {
		t.row(who, s.Worker, s.Interrupt, s.Captures, s.Retries, s.Interrupts, s.Events)
	}
	row("module", s.Module)
	for _, v := range s.VMs {
		row(nameOf(v.Name, v.VM), v.Stats)
	}
	t.row()
	t.row("COMMAND", "COUNT", "ERRORS", "TIME EACH", "GUEST MEMORY")
	for _, op := range s.Module.Ops {
		each := "-"
		if op.Count > 0 {
			each = (op.Time / time.Duration(op.Count)).String()
		}
		t.row(op.Command, op.Count, op.Errors, each, bytesText(op.Bytes))
	}
	if len(s.Watches) > 0 {
		t.row()
		t.row("WATCH", "VM", "PERIOD", "EFFECTIVE", "ITEMS", "EACH TICK", "DIGESTS", "PASSES", "TICKS", "MISSED", "LATE", "TIME EACH", "EVENTS", "COALESCED", "LOST", "DIFFERENT", "NOT RESIDENT")
		for _, w := range s.Watches {
			each := "-"
			if w.Ticks > 0 {
				each = (w.Time / time.Duration(w.Ticks)).String()
			}
			t.row(w.ID, nameOf(w.Name, w.VM), w.Period, w.Effective, w.Items, bytesText(w.Bytes), bytesText(w.Digested), w.Passes, w.Ticks, w.Missed, w.Late, each,
				w.Events, w.Coalesced, w.Lost, w.Different, w.NotResident+w.NoMemslot)
		}
	}
	if err := t.flush(); err != nil {
		return err
	}
	if s.Daemon == nil {
		_, err := fmt.Fprintf(a.out, "\n%s\n", s.DaemonError)
		return err
	}
	d := s.Daemon
	_, err := fmt.Fprintf(a.out, "\ndaemon: up %v, CPU %v (user %v, system %v), %s, %d missed, %d failed, %s\nread to attach: %s\n",
		d.Uptime.Round(time.Second), d.CPU, d.User, d.System, plural(d.Ticks, "tick"), d.Missed, d.Failed, plural(d.Findings, "finding"),
		pathsText(d.Reads))
	if b := d.Budget; b != nil && err == nil {
		_, err = fmt.Fprintf(a.out, "budget: %s\n", budgetText(b))
	}
	return err
}

// budgetText says what was chosen by a CPU budget.
func budgetText(b *daemon.BudgetStatus) string {
	text := fmt.Sprintf("%v of a CPU: %s every %v", b.Share, plural(uint64(b.VMs), "VM"), b.Period)
	if b.Text > 0 {
		text += fmt.Sprintf(", their code every %v", b.Text)
	}
	text += fmt.Sprintf("; takes %v", b.Cost)
	if b.Reason != "" {
		text += "; " + b.Reason
	}
	return text
}
