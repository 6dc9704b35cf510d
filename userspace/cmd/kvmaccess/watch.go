// SPDX-License-Identifier: MIT

package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
)

func (a *app) watch() *cobra.Command {
	var (
		all   bool
		count int
	)
	cmd := &cobra.Command{
		Use:   "watch [VM]",
		Short: "Follow what the daemon finds",
		Long: `Follow the findings of kvmaccessd, of all guests or of one, until interrupted.
With -o json each is a line. Whether the module compares the guests (kvmaccessd
--mode watch) or the daemon does (--mode poll), they are the same.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := daemon.Dial(a.socket)
			if err != nil {
				return err
			}
			defer d.Close()
			q := daemon.Query{}
			if len(args) > 0 {
				q.VM = args[0]
			}
			if !all {
				q.Since = time.Now()
			}
			n := 0
			for r, err := range d.Follow(cmd.Context(), q) {
				if err != nil {
					return err
				}
				if err := a.printRecord(r); err != nil {
					return err
				}
				if n++; n == count {
					break
				}
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.completeVMs(cmd.Context())
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "earlier findings first")
	cmd.Flags().IntVarP(&count, "count", "n", 0, "end after this `number` of findings (default never)")
	return cmd
}

func (a *app) printRecord(r daemon.Record) error {
	if a.output == "json" {
		return json.NewEncoder(a.out).Encode(r)
	}
	_, err := fmt.Fprintf(a.out, "%s  %-9s  %s\n", r.Time.Local().Format("2006-01-02 15:04:05.000"), r.Kind, printable(r.Message))
	return err
}
