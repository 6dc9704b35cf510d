// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Exit codes.
const (
	exitOK       = 0
	exitError    = 1
	exitFindings = 2
)

// source is the module, or what stands in for it in tests.
type source interface {
	integrity.Source
	Info(context.Context) (kvmaccess.Info, error)
	VMs(context.Context) ([]kvmaccess.VM, error)
	Table(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, kind kvmaccess.TableKind) (kvmaccess.Table, error)
	Stats(context.Context) (kvmaccess.Stats, error)
	StatsPerVM(context.Context) ([]kvmaccess.Stats, error)
	Watches(context.Context) ([]kvmaccess.WatchStats, error)
	// Memory also reads what is not resident in the host.
	Memory(kvmaccess.VM) guest.Memory
	Close() error
}

type module struct{ *kvmaccess.Client }

func (m module) Memory(vm kvmaccess.VM) guest.Memory { return kvmaccess.NewMemory(m.Client, vm) }

func openModule() (source, error) {
	c, err := kvmaccess.New()
	if err != nil {
		return nil, err
	}
	return module{c}, nil
}

// app is the program with all that it takes from its surroundings.
type app struct {
	out, err io.Writer
	open     func() (source, error)
	identify func(pid int) (kvmaccess.VMM, error)

	// Flags of all commands.
	output  string // table or json
	symbols string // file
	socket  string // of the daemon

	found bool         // check had findings
	cache *guest.Cache // of what was decoded of guests' kernels
}

func newApp(out, err io.Writer) *app {
	return &app{out: out, err: err, open: openModule, identify: kvmaccess.Identify, cache: &guest.Cache{}}
}

// run executes a command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	cmd := a.command()
	cmd.SetArgs(args)
	cmd.SetOut(a.out)
	cmd.SetErr(a.err)
	err := cmd.ExecuteContext(ctx)
	switch {
	case errors.Is(err, syscall.EPIPE):
		// Whoever read the output has seen enough.
	case err != nil:
		fmt.Fprintf(a.err, "kvmaccess: %s\n", explain(err))
		return exitError
	case a.found:
		return exitFindings
	}
	return exitOK
}

// explain is an error's text and what to do about it, where it does not say so
// itself.
func explain(err error) string {
	// The program is called as the package that most errors come from.
	text := strings.ReplaceAll(err.Error(), "kvmaccess: ", "")
	var kernel *kernelError
	switch {
	case errors.As(err, &kernel): // the addresses are not the user's
	case errors.Is(err, kvmaccess.ErrNoModule):
	case errors.Is(err, kvmaccess.ErrPermission):
		return text + "\nrun it as root"
	case errors.Is(err, kvmaccess.ErrNoVM), errors.Is(err, kvmaccess.ErrDying):
		return text + "\nthe guest ended meanwhile; kvmaccess vms lists those that run"
	case errors.Is(err, kvmaccess.ErrNoVCPU):
		return text + "\nkvmaccess regs VM lists the vCPUs of a guest"
	case errors.Is(err, kvmaccess.ErrNoMemslot):
		return text + "\nno guest memory lies there; for a guest-virtual address give --virtual"
	case errors.Is(err, kvmaccess.ErrNotMapped):
		return text + "\nthe vCPU's page tables may be a process' ones; --root takes others, in the format of CR3"
	}
	return text
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "kvmaccess",
		Short: "Look into the KVM guests of this host",
		Long: `kvmaccess shows registers, descriptor tables, system call tables and memory of
the KVM guests that run on this host, without pausing them, checks their
integrity, and follows what the daemon kvmaccessd finds.

VM is a guest's id, its name or its UUID (QEMU's -name and -uuid); a UUID may be
cut short. It must run as root, with the kernel module kvmaccess loaded; neither
is needed to look into a file of a guest's memory (--dump).

Exit status: 0, 1 after an error; of "check" 2 when there are findings.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if !slices.Contains(outputs, a.output) {
				return fmt.Errorf("-o %s: the output is one of %s", a.output, strings.Join(outputs, ", "))
			}
			return nil
		},
	}
	f := root.PersistentFlags()
	f.StringVarP(&a.output, "output", "o", "table", "`format`: table for people, json for programs")
	f.StringVarP(&a.symbols, "symbols", "s", "", "symbol `file` of the guest's kernel, instead of what it has in memory: a copy of its /proc/kallsyms, taken as root, or its System.map")
	f.StringVar(&a.socket, "socket", daemon.DefaultSocket, "unix `socket` of kvmaccessd")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w\nsee: %s --help", err, cmd.CommandPath())
	})
	root.AddCommand(a.vms(), a.regs(), a.gdt(), a.idt(), a.syscalls(), a.mem(), a.check(), a.watch(), a.stats(), a.version(),
		a.guest(), a.ps(), a.modules(), a.symbolsOf(), a.types())
	return root
}

var outputs = []string{"table", "json"}

// oneVM makes a command take a VM, and arguments after it.
func (a *app) oneVM(cmd *cobra.Command, after ...string) *cobra.Command {
	names := append([]string{"VM"}, after...)
	cmd.Use += " " + strings.Join(names, " ")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		return fmt.Errorf("%s takes %s, got %d arguments\nsee: %s --help", cmd.Name(), strings.Join(names, " "), len(args), cmd.CommandPath())
	}
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.completeVMs(cmd.Context())
	}
	return cmd
}

// withModule opens the module for f.
func (a *app) withModule(f func(source) error) error {
	src, err := a.open()
	if err != nil {
		return err
	}
	err = f(src)
	return errors.Join(err, src.Close())
}

// withVM opens the module and finds the VM that arg names for f.
func (a *app) withVM(ctx context.Context, arg string, f func(source, vm) error) error {
	return a.withModule(func(src source) error {
		v, err := a.findVM(ctx, src, arg)
		if err != nil {
			return err
		}
		return f(src, v)
	})
}
