// SPDX-License-Identifier: MIT

// Command stress puts the kvmaccess module under loads that no sane program
// causes. It runs on a KVM host, as root, and leaves the module unloaded.
package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/stress"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

func main() {
	tinyvm.Main()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "stress:", err)
		os.Exit(1)
	}
}

type config struct {
	module   string
	seed     uint64
	messages int64
	rounds   int
	kills    int
	reloads  int
	faults   time.Duration
	hostile  time.Duration
}

// parts in the order in which they run; each is given the loaded module.
var parts = []struct {
	name string
	run  func(context.Context, config) (*stress.Report, error)
}{
	{"fuzz", func(ctx context.Context, c config) (*stress.Report, error) {
		return stress.Fuzz(ctx, stress.FuzzConfig{Messages: c.messages, Seed: c.seed})
	}},
	{"lifecycle", func(ctx context.Context, c config) (*stress.Report, error) {
		return stress.Lifecycle(ctx, stress.LifecycleConfig{Rounds: c.rounds, Kills: c.kills, Seed: c.seed})
	}},
	{"reload", func(ctx context.Context, c config) (*stress.Report, error) {
		return stress.Reload(ctx, stress.ReloadConfig{Rounds: c.reloads, Module: c.module})
	}},
	{"faults", func(ctx context.Context, c config) (*stress.Report, error) {
		return stress.Faults(ctx, stress.FaultsConfig{Duration: c.faults, Seed: c.seed, Module: c.module})
	}},
	{"hostile", func(ctx context.Context, c config) (*stress.Report, error) {
		return stress.Hostile(ctx, stress.HostileConfig{Duration: c.hostile, Seed: c.seed})
	}},
}

func command() *cobra.Command {
	var c config
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	cmd := &cobra.Command{
		Use:   "stress [flags] [PART]...",
		Short: "Put the kvmaccess module under loads that no sane program causes",
		Long: `Put the kvmaccess module under loads that no sane program causes.

PARTs are ` + strings.Join(names, ", ") + `; none means all. It runs on
a KVM host, as root, with the module not loaded. "faults" needs a kernel with
CONFIG_FAILSLAB, which that of the suite "sanitizers" has. Each part prints a
line of numbers; the same seed makes the same messages.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, a := range args {
				if !slices.Contains(names, a) {
					return fmt.Errorf("no part %q: there are %s", a, strings.Join(names, ", "))
				}
			}
			return run(cmd.Context(), c, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.module, "module", filepath.Join(os.Getenv(host.Env), host.ModuleFile), "kvmaccess.ko")
	f.Uint64Var(&c.seed, "seed", rand.Uint64()>>32, "of all random numbers (default random)")
	f.Int64Var(&c.messages, "messages", 1_000_000, "fuzz: messages to send")
	f.IntVar(&c.rounds, "rounds", 10_000, "lifecycle: VMs to create and destroy")
	f.IntVar(&c.kills, "kills", 200, "lifecycle: VMMs to kill")
	f.IntVar(&c.reloads, "reloads", 200, "reload: times to load and unload the module")
	f.DurationVar(&c.faults, "faults", 30*time.Second, "faults: how long allocations fail at random")
	f.DurationVar(&c.hostile, "hostile", 10*time.Minute, "hostile: how long the guest is read")
	return cmd
}

func run(ctx context.Context, c config, only []string) error {
	fmt.Printf("seed %d\n", c.seed)
	if err := boot.LoadModule(c.module, ""); err != nil {
		return err
	}
	for _, p := range parts {
		if len(only) > 0 && !slices.Contains(only, p.name) {
			continue
		}
		fmt.Println(p.name)
		r, err := p.run(ctx, c)
		fmt.Println(r)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return stress.Unload(10 * time.Second)
}
