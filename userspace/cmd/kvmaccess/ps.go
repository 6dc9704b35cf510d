// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

func (a *app) ps() *cobra.Command {
	var threads bool
	cmd := a.ofKernel(&cobra.Command{
		Use:   "ps",
		Short: "Show the processes of a guest",
		Long: `Show the processes of a guest by its kernel's list of tasks, as ps in the guest
does. STATE is as /proc there has it; names in brackets are those of kernel
threads; START is UTC, or since the guest's boot where that is not known.`,
	}, guest.AttachOptions{}, func(ctx context.Context, t *target, k *guest.Kernel, _ []string) error {
		tasks, failed := k.Tasks(ctx)
		if failed != nil && len(tasks) == 0 {
			return &kernelError{t.String(), "", failed}
		}
		if !threads {
			tasks = slices.DeleteFunc(tasks, func(task guest.Task) bool { return !task.Leader() })
		}
		slices.SortStableFunc(tasks, func(x, y guest.Task) int { return x.PID - y.PID })
		a.doubts(k)
		if err := a.printTasks(tasks, threads, k.Fingerprint.BootTime); err != nil {
			return err
		}
		if failed != nil {
			return &kernelError{t.String(), "the list of tasks goes on, but", failed}
		}
		return nil
	})
	cmd.Flags().BoolVarP(&threads, "threads", "t", false, "all threads of each process")
	return cmd
}

func (a *app) printTasks(tasks []guest.Task, threads bool, boot time.Time) error {
	if a.output == "json" {
		return a.json(hexed{tasks})
	}
	head := []any{"PID", "PPID", "UID", "STATE", "START", "NAME"}
	if threads {
		head = append([]any{"TGID"}, head...)
	}
	w := a.table(head...)
	for _, task := range tasks {
		name := task.Name
		if task.Kernel {
			name = "[" + name + "]"
		}
		start := task.Start.Round(10 * time.Millisecond).String()
		if !boot.IsZero() {
			start = boot.Add(task.Start).UTC().Format("2006-01-02 15:04:05")
		}
		row := []any{task.PID, task.PPID, task.UID, task.State, start, name}
		if threads {
			row = append([]any{task.TGID}, row...)
		}
		w.row(row...)
	}
	return w.flush()
}
