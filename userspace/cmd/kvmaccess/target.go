// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/dump"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// target is a guest whose kernel a command looks into: a VM of this host, or a
// file.
type target struct {
	guest.Source
	vm   vm     // zero: of a file
	dump string // file; empty: of a VM
	mem  guest.Memory

	reads, bytes uint64
}

func (t *target) String() string {
	if t.dump != "" {
		return "dump " + filepath.Base(t.dump)
	}
	return t.vm.String()
}

// ReadPhysical implements guest.Memory. It is for one goroutine at a time.
func (t *target) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	t.reads++
	t.bytes += uint64(len(p))
	return t.mem.ReadPhysical(ctx, gpa, p)
}

// regional is a target of which the regions of memory are known.
type regional struct {
	*target
	known guest.Regions
}

// Regions implements guest.Regions.
func (r regional) Regions(ctx context.Context) ([]guest.Region, error) { return r.known.Regions(ctx) }

// source is the target with all that its Source can do.
func (t *target) source() guest.Source {
	if r, ok := t.Source.(guest.Regions); ok {
		return regional{t, r}
	}
	return t
}

// paths says which way the memory of a VM was read; nil: it is a file.
func (t *target) paths() *kvmaccess.MemoryStats {
	m, ok := t.mem.(interface{ Stats() kvmaccess.MemoryStats })
	if !ok {
		return nil
	}
	s := m.Stats()
	return &s
}

// live is a VM as guest.Source.
type live struct {
	guest.Memory
	src source
	id  kvmaccess.VMID
}

// VCPUs implements guest.Source.
func (l live) VCPUs(ctx context.Context) ([]kvmaccess.VCPU, error) { return l.src.VCPUs(ctx, l.id) }

// withTarget opens the dump, or finds the VM that arg names, for f.
func (a *app) withTarget(ctx context.Context, file, arg string, f func(*target) error) error {
	if file != "" {
		d, err := dump.Open(file)
		if err != nil {
			return fmt.Errorf("--dump: %w", err)
		}
		return errors.Join(f(&target{Source: d, mem: d, dump: file}), d.Close())
	}
	return a.withVM(ctx, arg, func(src source, v vm) error {
		l := live{src.Memory(v.VM), src, v.ID}
		return f(&target{Source: l, mem: l.Memory, vm: v})
	})
}

// ofKernel makes a command that looks into a guest's kernel. After the VM,
// or --dump, come arguments; those in brackets may be left out.
func (a *app) ofKernel(cmd *cobra.Command, opts guest.AttachOptions, f func(ctx context.Context, t *target, k *guest.Kernel, args []string) error, after ...string) *cobra.Command {
	var (
		file string
		wait time.Duration
	)
	most, least := len(after), 0
	for _, name := range after {
		if !strings.HasPrefix(name, "[") {
			least++
		}
	}
	cmd.Use += " " + strings.Join(append([]string{"{VM | --dump FILE}"}, after...), " ")
	name := cmd.Name()
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		n := len(args)
		takes := after
		if file == "" {
			n--
			takes = append([]string{"VM"}, after...)
		}
		if n < least || n > most {
			what := strings.Join(takes, " ")
			if what == "" {
				what = "no arguments with --dump"
			}
			return fmt.Errorf("%s takes %s, got %d arguments\nsee: %s --help", name, what, len(args), cmd.CommandPath())
		}
		if a.symbols != "" {
			return fmt.Errorf("--symbols: %s takes what the guest has in memory: leave it away", name)
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		vm := ""
		if file == "" {
			vm, args = args[0], args[1:]
		}
		ctx := cmd.Context()
		opts.Cache = a.cache
		return a.withTarget(ctx, file, vm, func(t *target) error {
			k, err := attach(ctx, t, opts, wait)
			switch {
			case gone(err):
				return err
			case err != nil:
				return &kernelError{t.String(), "", err}
			}
			return f(ctx, t, k, args)
		})
	}
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 || file != "" {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.completeVMs(cmd.Context())
	}
	dumpFlag(cmd, &file)
	cmd.Flags().DurationVar(&wait, "wait", 5*time.Second, "how long to wait for a guest that boots")
	return cmd
}

func dumpFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVar(file, "dump", "", "instead of a VM, a `file` of its memory: QEMU's dump-guest-memory, virsh dump --memory-only, LiME, a raw image, or a snapshot")
	_ = cmd.MarkFlagFilename("dump")
}

// attach finds the kernel, and waits for one that still boots. In a file
// nothing changes.
func attach(ctx context.Context, t *target, opts guest.AttachOptions, wait time.Duration) (*guest.Kernel, error) {
	for deadline := time.Now().Add(wait); ; {
		k, err := guest.Attach(ctx, t.source(), opts)
		if !errors.Is(err, guest.ErrNotBooted) || t.dump != "" || time.Now().After(deadline) {
			return k, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// doubts tells, beside what a command shows, what the guest contradicts itself
// in.
func (a *app) doubts(k *guest.Kernel) {
	for _, d := range k.Doubts {
		fmt.Fprintf(a.err, "note: %s\n", printable(d.Object+": "+d.Reason))
	}
}
