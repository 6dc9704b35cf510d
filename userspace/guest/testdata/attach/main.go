// SPDX-License-Identifier: MIT

// Command attach makes the snapshots in its directory: of a memory dump what
// guest.Attach needs to find the kernel and its symbols, with what the guest
// itself said of them, its /proc/kallsyms as root and its /proc/version, for
// tests to compare with.
//
//	go run ./userspace/guest/testdata/attach -out NAME.snapshot DUMP KALLSYMS VERSION
//
// Read-only data in which the symbol table was looked for and not found are
// zeroed, so that the file is small.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/dump"
)

func main() {
	out := flag.String("out", "", "snapshot `file` to write")
	flag.Parse()
	if *out == "" || flag.NArg() != 3 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*out, flag.Arg(0), flag.Arg(1), flag.Arg(2)); err != nil {
		fmt.Fprintln(os.Stderr, "attach:", err)
		os.Exit(1)
	}
}

// reads tells what is read at once from what is read bit by bit.
type reads struct {
	*dump.Dump
	few, many guest.Pages
}

func (r *reads) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	if err := r.Dump.ReadPhysical(ctx, gpa, p); err != nil {
		return err
	}
	if len(p) >= 128<<10 {
		r.many.WritePhysical(gpa, p)
		return nil
	}
	whole := make([]byte, (gpa+uint64(len(p))+4095)&^4095-gpa&^4095)
	if err := r.Dump.ReadPhysical(ctx, gpa&^4095, whole); err != nil {
		return err
	}
	r.few.WritePhysical(gpa&^4095, whole)
	return nil
}

func run(out, file, kallsyms, version string) error {
	ctx := context.Background()
	d, err := dump.Open(file)
	if err != nil {
		return err
	}
	defer d.Close()
	src := &reads{Dump: d, few: guest.Pages{}, many: guest.Pages{}}
	k, err := guest.Attach(ctx, src, guest.AttachOptions{NoTypes: true})
	if err != nil {
		return err
	}
	s := &guest.Snapshot{CPUs: k.CPUs, Pages: src.few, Notes: map[string]string{"recorder": "userspace/guest/testdata/attach"}}
	tables := k.Seal.Extents(guest.DoubtSymbols)
	offset := k.Bases.Physical - (k.Text.Start &^ (2<<20 - 1)) // from the image's virtual to physical addresses
	for frame, page := range src.many {
		if s.Pages[frame] != nil {
			continue
		}
		if !slices.ContainsFunc(tables, func(x guest.Extent) bool {
			return frame+4096 > x.Start+offset && frame < x.End+offset
		}) {
			page = new([4096]byte)
		}
		s.Pages[frame] = page
	}
	text, err := os.ReadFile(kallsyms)
	if err != nil {
		return err
	}
	if err := note(s.Notes, string(text)); err != nil {
		return err
	}
	banner, err := os.ReadFile(version)
	if err != nil {
		return err
	}
	s.Notes["version"] = strings.TrimSpace(string(banner))
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	if err := s.Write(f); err != nil {
		return err
	}
	return f.Close()
}

// note takes down how many symbols the guest's kernel has, a digest of all of
// them, by name and address, and some of them.
func note(notes map[string]string, text string) error {
	var lines []string
	for line := range strings.Lines(text) {
		if strings.Contains(line, "[") {
			continue // a module's
		}
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return fmt.Errorf("%q is no line of kallsyms", line)
		}
		lines = append(lines, strings.Join(fields, " "))
		switch fields[2] {
		case "_text", "_etext", "entry_SYSCALL_64", "sys_call_table", "init_top_pgt", "_end":
			notes[fields[2]] = fields[0]
		}
	}
	slices.Sort(lines)
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	notes["symbols"], notes["digest"] = strconv.Itoa(len(lines)), hex.EncodeToString(sum[:])
	return nil
}
