// SPDX-License-Identifier: MIT

// Command vmfixture runs commands on KVM hosts that it boots under an
// emulator. It is also the first process of those hosts and of their guests.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// exitError carries the exit code of a command that was run.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

func main() {
	if os.Getpid() == 1 {
		if os.Args[0] == agent.Init {
			agent.Main()
		}
		host.Main()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := root().ExecuteContext(ctx)
	var code exitError
	switch {
	case errors.As(err, &code):
		os.Exit(int(code))
	case err != nil:
		fmt.Fprintln(os.Stderr, "vmfixture:", err)
		os.Exit(125) // as env(1) and its kin say that they failed themselves
	}
}

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "vmfixture",
		Short:         "Run commands on emulated KVM hosts",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.AddCommand(runCommand(), hereCommand(), rootCommand(), moduleCommand(), checkCommand(), dumpCommand())
	return cmd
}

func logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.String(a.Key, a.Value.Time().Format(time.TimeOnly))
			}
			return a
		},
	}))
}

// withRoot is a command that does something with the cached root of a suite.
func withRoot(cmd *cobra.Command, do func(context.Context, *cache.Root) error) *cobra.Command {
	var suite string
	cmd.Args = cobra.NoArgs
	cmd.Flags().StringVar(&suite, "suite", defaultSuite, "Debian suite of the host")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := cache.SuiteNamed(suite)
		if err != nil {
			return err
		}
		r, err := cache.Open(cmd.Context(), s, logger())
		if err != nil {
			return err
		}
		defer r.Close()
		return do(cmd.Context(), r)
	}
	return cmd
}

const defaultSuite = "bookworm"

func rootCommand() *cobra.Command {
	return withRoot(&cobra.Command{
		Use:   "root",
		Short: "Make or verify the cached root of a suite, and print its kernel's release",
	}, func(_ context.Context, r *cache.Root) error {
		fmt.Println(r.Kernel)
		return nil
	})
}

func moduleCommand() *cobra.Command {
	var out string
	cmd := withRoot(&cobra.Command{
		Use:   "module",
		Short: "Build kvmaccess.ko for the kernel of a suite",
	}, func(ctx context.Context, r *cache.Root) error {
		module, err := host.BuildModule(ctx, r, logger())
		if err != nil {
			return err
		}
		to := filepath.Join(out, r.Kernel, host.ModuleFile)
		fmt.Println(to)
		return host.CopyFile(to, module)
	})
	cmd.Flags().StringVar(&out, "out", "bin", "directory that gets KERNEL/kvmaccess.ko")
	return cmd
}

func checkCommand() *cobra.Command {
	return withRoot(&cobra.Command{
		Use:   "check",
		Short: "Run sparse over the sources of kvmaccess.ko",
	}, host.CheckModule)
}

// runFlags are what run and here have in common.
func runFlags(cmd *cobra.Command, run func(context.Context, host.Config) (int, error)) (*cobra.Command, *host.Config) {
	c := &host.Config{Stdout: os.Stdout, Stderr: os.Stderr, Log: logger()}
	var files []string
	cmd.Args = cobra.MinimumNArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c.Args = args
		takeAlong(c, files)
		code, err := run(cmd.Context(), *c)
		if err != nil {
			return err
		}
		if code != 0 {
			return exitError(code)
		}
		return nil
	}
	f := cmd.Flags()
	f.StringVar(&c.Suite, "suite", defaultSuite, "Debian suite of host and guests")
	f.StringSliceVar(&c.GuestKernels, "guest", nil, "kernel that guests can have beside the suite's own ("+
		strings.Join(cache.GuestKernelNames(), ", ")+")")
	f.StringVar(&c.Module, "module", "", "kvmaccess.ko to take along (default: built from this checkout)")
	f.StringArrayVar(&files, "file", nil, "file to take along, `FROM[:TO]`; TO is relative to the payload (default bin/BASENAME)")
	f.StringArrayVar(&c.Env, "env", nil, "environment of the command, `NAME=VALUE`")
	f.StringVar(&c.Out, "out", "", "directory for the files that the command leaves")
	f.DurationVar(&c.Timeout, "timeout", 10*time.Minute, "limit on all of it")
	return cmd, c
}

func runCommand() *cobra.Command {
	cmd, c := runFlags(&cobra.Command{
		Use:   "run [flags] -- COMMAND [ARGUMENT]...",
		Short: "Boot a host, run a command in it, and exit as it did",
		Long: `Boot a host, run a command in it, and exit as it did.

A command that is a file here is taken along. So are kvmaccess.ko, and the
kernel, initramfs and attacks of guests; $` + host.Env + ` names their directory to
the command, $` + host.OutEnv + ` the one whose files come back.

The command's files, exit code and output come out of the host; an alarming
word on the host's console, or no closing record, is an error (exit code 125).`,
	}, host.Run)
	f := cmd.Flags()
	f.BoolVar(&c.Icount, "icount", false, "clock of the host counts instructions, 1 ns each; one CPU")
	f.StringVar(&c.Vendor, "vendor", host.SVM, "processor of the host: svm (AMD, under QEMU) or vmx (Intel, under Bochs)")
	f.IntVar(&c.CPUs, "smp", 2, "CPUs of the host")
	f.IntVar(&c.Memory, "memory", 0, "memory of the host in MiB (default: enough for tests)")
	f.StringVar(&c.CPU, "cpu", "", "the emulator's CPU model (and QEMU's features; default "+host.DefaultCPU+")")
	f.StringVar(&c.Append, "append", "", "more for the kernel's command line")
	return cmd
}

func hereCommand() *cobra.Command {
	cmd, _ := runFlags(&cobra.Command{
		Use:   "here [flags] -- COMMAND [ARGUMENT]...",
		Short: "Run a command as 'run' does, but on this machine itself",
	}, host.Here)
	return cmd
}

// takeAlong adds the files named on the command line, and the command itself
// where it is one here.
func takeAlong(c *host.Config, files []string) {
	for _, f := range files {
		from, to, ok := strings.Cut(f, ":")
		if !ok {
			to = "bin/" + filepath.Base(from)
		}
		c.Files = append(c.Files, host.File{From: from, To: to})
	}
	if name := c.Args[0]; strings.Contains(name, "/") {
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			c.Files = append(c.Files, host.File{From: name, To: "bin/" + filepath.Base(name)})
			c.Args = append([]string{filepath.Base(name)}, c.Args[1:]...)
		}
	}
}
