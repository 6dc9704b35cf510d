// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// Formats of vmfixture dump.
const (
	formatELF    = "elf"
	formatPaging = "paging"
	formatRaw    = "raw"
)

func dumpCommand() *cobra.Command {
	var (
		c       = guest.Config{Name: "dumped"}
		format  string
		spin    bool
		timeout time.Duration
	)
	cmd := &cobra.Command{
		Use:   "dump [flags] DIR",
		Short: "Boot a guest here under an emulator, and leave a dump of its memory",
		Long: `Boot a guest here under an emulator, without a host and without KVM, and leave in
DIR a dump of its memory, "mem", beside what the guest says of itself, as root:
kallsyms, modules, version, release, btf, and its threads before and after the
dump, ps and ps-after (columns tgid, tid, ppid, comm, state, uid, euid, gid,
starttime, flags of /proc).`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return dumpGuest(ctx, c, format, spin, args[0])
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Kernel, "guest", "6.1", "its kernel ("+strings.Join(cache.GuestKernelNames(), ", ")+")")
	f.StringVar(&c.CPU, "cpu", "max,la57=off", "QEMU's CPU model and features")
	f.IntVar(&c.CPUs, "smp", 1, "CPUs")
	f.IntVar(&c.Memory, "memory", 256, "memory in MiB")
	f.StringVar(&c.Append, "append", "", "more for its kernel's command line")
	f.BoolVar(&spin, "user", false, "while all of its CPUs run a program")
	f.StringVar(&format, "format", formatELF, "of the dump: "+formatELF+" (dump-guest-memory), "+formatPaging+" (that with -p), "+formatRaw+" (pmemsave)")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "limit on all of it")
	return cmd
}

func dumpGuest(ctx context.Context, c guest.Config, format string, spin bool, dir string) (err error) {
	mem, err := filepath.Abs(filepath.Join(dir, "mem"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// QEMU takes commas for the beginning of another option.
	if strings.Contains(mem, ",") {
		return fmt.Errorf("%s: QEMU does not take a comma in a name", mem)
	}
	var command string
	arguments := map[string]any{}
	switch format {
	case formatELF, formatPaging:
		command = "dump-guest-memory"
		arguments["paging"], arguments["protocol"] = format == formatPaging, "file:"+mem
	case formatRaw:
		command = "pmemsave"
		arguments["val"], arguments["size"], arguments["filename"] = 0, c.Memory<<20, mem
	default:
		return fmt.Errorf("no format %q: there are %s, %s and %s", format, formatELF, formatPaging, formatRaw)
	}

	payload, err := os.MkdirTemp("", "dump-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(payload)) }()
	if err := host.StageKernel(ctx, payload, c.Kernel, logger()); err != nil {
		return err
	}
	q, err := host.OpenQEMU(ctx, logger())
	if err != nil {
		return err
	}
	defer q.Close()
	c.Payload, c.Emulator = payload, q
	g, err := guest.Start(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Kill()) }()
	if spin {
		if err := g.Spin(ctx, c.CPUs); err != nil {
			return err
		}
	}
	for name, path := range map[string]string{
		"kallsyms": "/proc/kallsyms", "modules": "/proc/modules", "version": "/proc/version",
		"release": "/proc/sys/kernel/osrelease", "btf": "/sys/kernel/btf/vmlinux",
	} {
		text, err := g.Read(ctx, path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			return err
		}
	}
	if err := writeThreads(ctx, g, filepath.Join(dir, "ps")); err != nil {
		return err
	}
	if err := pause(ctx, g, c.CPUs, spin); err != nil {
		return err
	}
	if _, err := g.QMP(ctx, command, arguments); err != nil {
		return err
	}
	if err := g.Resume(ctx); err != nil {
		return err
	}
	return writeThreads(ctx, g, filepath.Join(dir, "ps-after"))
}

// pause stops the guest, with user while all CPUs run a program.
func pause(ctx context.Context, g *guest.Guest, cpus int, user bool) error {
	for {
		if err := g.Pause(ctx); err != nil || !user {
			return err
		}
		text, err := g.Monitor(ctx, "info registers -a")
		if err != nil {
			return err
		}
		if strings.Count(text, "CPL=3") == cpus {
			return nil
		}
		if err := g.Resume(ctx); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the CPUs never all ran a program: %w", ctx.Err())
		case <-time.After(13 * time.Millisecond):
		}
	}
}

func writeThreads(ctx context.Context, g *guest.Guest, name string) error {
	all, err := g.Tasks(ctx)
	if err != nil {
		return err
	}
	var sb strings.Builder
	sb.WriteString(strings.Join([]string{"tgid", "tid", "ppid", "comm", "state", "uid", "euid", "gid", "starttime", "flags"}, "\t") + "\n")
	for _, t := range all {
		sb.WriteString(strings.Join(threadRow(t), "\t") + "\n")
	}
	return os.WriteFile(name, []byte(sb.String()), 0o644)
}

func threadRow(t agent.Task) []string {
	id := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	return []string{
		strconv.Itoa(t.TGID), strconv.Itoa(t.TID), strconv.Itoa(t.PPID), t.Name, t.State,
		id(t.UID), id(t.EUID), id(t.GID), strconv.FormatUint(t.Start, 10), id(t.Flags),
	}
}
