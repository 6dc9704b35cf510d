// SPDX-License-Identifier: MIT

// Whole makes NAME.snapshot.xz out of a memory dump of a guest: all pages that
// are read to attach to its kernel, to list what guest lists, and to check it
// once; with what the guest itself said, in the notes:
//
//	guest     which it is
//	kallsyms  SHA-256 of the lines of its /proc/kallsyms, read as root, sorted
//	modules   its /proc/modules
//	btf       SHA-256 of its /sys/kernel/btf/vmlinux
//	release   as uname -r
//
// It needs xz(1), which packs tighter than what Go has.
//
//	go run ./userspace/guest/testdata/whole -dump mem.elf -truth DIR -note "Debian 12, ..." -o debian12
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/dump"
	"github.com/kvmaccess/kvmaccess/userspace/guest/testdata/prune"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

func main() {
	name := flag.String("dump", "", "memory dump of the guest")
	truth := flag.String("truth", "", "directory with the guest's kallsyms, modules, btf and release")
	note := flag.String("note", "", "which guest it is")
	out := flag.String("o", "", "name of the file to write, without ending")
	flag.Parse()
	if *name == "" || *truth == "" || *note == "" || *out == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(context.Background(), *name, *truth, *note, *out); err != nil {
		log.Fatal(err)
	}
}

// recorder keeps what is read of a dump.
type recorder struct {
	*guest.Recorder
	*dump.Dump
}

func (r recorder) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	return r.Recorder.ReadPhysical(ctx, gpa, p)
}

func run(ctx context.Context, name, truth, note, out string) error {
	d, err := dump.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	s := &guest.Snapshot{Notes: map[string]string{"guest": note}}
	for _, key := range []string{"kallsyms", "modules", "btf", "release"} {
		text, err := os.ReadFile(filepath.Join(truth, key))
		if err != nil {
			return err
		}
		switch key {
		case "kallsyms":
			lines := slices.Sorted(strings.Lines(string(text)))
			s.Notes[key] = fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(lines, ""))))
		case "btf":
			s.Notes[key] = fmt.Sprintf("%x", sha256.Sum256(text))
		default:
			s.Notes[key] = strings.TrimSpace(string(text))
		}
	}
	r := recorder{guest.NewRecorder(d), d}
	if s.CPUs, err = d.VCPUs(ctx); err != nil {
		return err
	}
	if err := look(ctx, r); err != nil {
		return err
	}
	m, err := integrity.NewMonitor(&guest.Machine{CPUs: s.CPUs, Memory: r}, integrity.VM{}, integrity.Options{Memory: r, Settle: -1})
	if err != nil {
		return err
	}
	if _, err := m.Attach(ctx); err != nil {
		return err
	}
	if status := m.Status(); status.State != integrity.StateWatching {
		return fmt.Errorf("the guest cannot be checked: %s", status.Reason)
	}
	s.Pages = r.Pages

	file, err := os.Create(out + ".snapshot.xz")
	if err != nil {
		return err
	}
	defer file.Close()
	pack := exec.CommandContext(ctx, "xz", "-9e", "--threads=1")
	pack.Stdout, pack.Stderr = file, os.Stderr
	in, err := pack.StdinPipe()
	if err != nil {
		return err
	}
	if err := pack.Start(); err != nil {
		return err
	}
	return errors.Join(s.Encode(in), in.Close(), pack.Wait(), file.Close())
}

// look reads all that there is to list.
func look(ctx context.Context, src guest.Source) error {
	k, err := guest.Attach(ctx, src, guest.AttachOptions{})
	if err != nil {
		return err
	}
	errs := []error{prune.Look(ctx, k)}
	note := func(_ any, err error) { errs = append(errs, err) }
	note(k.ImpliedVCPUs(ctx))
	note(k.Ftrace(ctx))
	note(k.Kprobes(ctx))
	note(k.JumpSites(ctx))
	note(k.StaticCalls(ctx))
	return errors.Join(errs...)
}
