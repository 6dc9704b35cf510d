// SPDX-License-Identifier: MIT

// Command kvmaccessd watches the integrity of every KVM guest of this host.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
)

func main() {
	if err := command().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintf(os.Stderr, "kvmaccessd: %v\n", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var (
		file     string
		periods  []string
		symbols  []string
		level    string
		mode     string
		budget   string
		settings = daemon.Default()
		flags    = daemon.Default()
	)
	cmd := &cobra.Command{
		Use:   "kvmaccessd",
		Short: "Watch the integrity of every KVM guest of this host",
		Long: `kvmaccessd checks the kernel of each guest on this host at a fixed period:
system call table and registers, IDT, GDT, control registers. What differs from
the guest's baseline, or from what an honest kernel has, is written as a line
of JSON and told over an HTTP/JSON API on a unix socket (see kvmaccess watch).

The kernel module compares each period, and the daemon looks only when something
is not as it was; with --mode poll the daemon itself reads and compares all.

It needs the kernel module kvmaccess and must run as root. SIGTERM and SIGINT
end it; baselines and findings outlast it.`,
		Args:          cobra.NoArgs,
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			set := cmd.Flags().Changed
			if err := settings.Load(file, set("config")); err != nil {
				return err
			}
			if set("socket") {
				settings.Socket = flags.Socket
			}
			if set("state-dir") {
				settings.StateDir = flags.StateDir
			}
			if set("findings") {
				settings.Findings = flags.Findings
			}
			if set("relist") {
				settings.Relist = flags.Relist
			}
			if set("verify") {
				settings.Verify = flags.Verify
			}
			if set("text") {
				settings.Text = flags.Text
			}
			if set("mode") {
				settings.Mode = daemon.Mode(mode)
			}
			if set("cpu-budget") {
				if len(periods) > 0 {
					return fmt.Errorf("--cpu-budget chooses the periods that --period gives: use one of them")
				}
				if err := settings.SetBudget(budget); err != nil {
					return fmt.Errorf("--cpu-budget: %w", err)
				}
			}
			for _, arg := range periods {
				if err := settings.SetPeriod(arg); err != nil {
					return fmt.Errorf("--period: %w", err)
				}
			}
			for _, arg := range symbols {
				if err := settings.SetSymbols(arg); err != nil {
					return fmt.Errorf("--symbols: %w", err)
				}
			}
			if level != "" {
				if err := settings.LogLevel.UnmarshalText([]byte(level)); err != nil {
					return fmt.Errorf("--log-level: %q is none of debug, info, warn, error", level)
				}
			}
			log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: settings.LogLevel}))
			d, err := daemon.New(settings, log)
			if err != nil {
				return err
			}
			return d.Run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVarP(&file, "config", "c", daemon.DefaultConfig, "configuration `file` (YAML); flags go before it")
	f.StringVar(&mode, "mode", "", fmt.Sprintf("`mode`: watch, the module compares and the daemon looks when it finds a change, or poll, the daemon reads and compares each period (default %s)", daemon.ModeWatch))
	f.StringArrayVarP(&periods, "period", "p", nil, fmt.Sprintf("`duration` from one check of a VM to the next, %v or more, %v in poll mode; VM=DURATION for one VM by name or UUID (default %v)", daemon.MinWatchPeriod, daemon.MinPeriod, daemon.DefaultPeriod))
	f.StringVar(&budget, "cpu-budget", "", fmt.Sprintf("`share` of a CPU that monitoring may take, %v to %v: the daemon chooses the shortest periods that fit, and says which; in place of --period", daemon.MinBudget, daemon.MaxBudget))
	f.StringArrayVarP(&symbols, "symbols", "s", nil, "symbol `file` of the guests' kernel, a copy of its /proc/kallsyms or System.map, to be used instead of the symbols in their memory; VM=FILE for one VM by name or UUID")
	f.StringVar(&flags.Socket, "socket", flags.Socket, "unix `socket` of the API")
	f.StringVar(&flags.StateDir, "state-dir", flags.StateDir, "`directory` for baselines and findings")
	f.StringVar(&flags.Findings, "findings", "", fmt.Sprintf("`file` that findings are appended to, - for standard output (default %s in the state directory)", daemon.DefaultFindings))
	f.DurationVar(&flags.Relist, "relist", flags.Relist, "`duration` from one listing of the VMs to the next, in case an event was lost")
	f.DurationVar(&flags.Verify, "verify", flags.Verify, "`duration` in which all that guests' symbols and types were made of is looked at once, a little with each check")
	f.DurationVar(&flags.Text, "text", flags.Text, "`duration` in which all of a guest's kernel code and read-only data is compared once, in watch mode; 0: not at all")
	f.StringVar(&level, "log-level", "", "debug, info, warn or error (default info)")
	return cmd
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
