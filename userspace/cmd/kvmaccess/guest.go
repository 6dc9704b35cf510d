// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

type guestJSON struct {
	VM          kvmaccess.VMID    `json:"vm,omitempty"`
	Name        string            `json:"name,omitempty"`
	UUID        string            `json:"uuid,omitempty"`
	Dump        string            `json:"dump,omitempty"` // file
	Fingerprint guest.Fingerprint `json:"fingerprint"`
	Paging      string            `json:"paging"`
	Text        hexed             `json:"text"`
	Rodata      hexed             `json:"rodata"`
	Bases       hexed             `json:"bases"`
	VCPUs       int               `json:"vcpus"`
	Symbols     int               `json:"symbols"`
	Types       int               `json:"types"`
	TypesError  string            `json:"types_error,omitempty"` // why there are none
	Doubts      []guest.Doubt     `json:"doubts"`
	Read        readJSON          `json:"read"`
}

// readJSON is what it took.
type readJSON struct {
	Reads   uint64                 `json:"reads"`
	Bytes   uint64                 `json:"bytes"`
	Elapsed time.Duration          `json:"elapsed"`         // ns
	Paths   *kvmaccess.MemoryStats `json:"paths,omitempty"` // of a VM
}

func (a *app) guest() *cobra.Command {
	began := time.Now()
	return a.ofKernel(&cobra.Command{
		Use:   "guest",
		Short: "Show which kernel a guest runs, and where",
		Long: `Show the Linux kernel of a guest as its memory tells: release, version, build
id, command line, boot time; where it lies, and how many symbols and types it
has of itself. Nothing has to be known of the guest before.`,
	}, guest.AttachOptions{}, func(_ context.Context, t *target, k *guest.Kernel, _ []string) error {
		out := guestJSON{
			VM: t.vm.ID, Name: t.vm.Name, UUID: t.vm.UUID, Dump: t.dump,
			Fingerprint: k.Fingerprint, Paging: k.Space.Mode.Format.String(),
			Text: hexed{k.Text}, Rodata: hexed{k.Rodata}, Bases: hexed{k.Bases},
			VCPUs: len(k.CPUs), Symbols: k.Image.Len(), Doubts: k.Doubts,
			Read: readJSON{Reads: t.reads, Bytes: t.bytes, Elapsed: time.Since(began), Paths: t.paths()},
		}
		if k.Types != nil {
			out.Types = k.Types.Len()
		} else if k.TypesErr != nil {
			out.TypesError = k.TypesErr.Error()
		}
		if out.Doubts == nil {
			out.Doubts = []guest.Doubt{}
		}
		if a.output == "json" {
			return a.json(out)
		}
		w := a.table()
		f := k.Fingerprint
		w.row("release", dash(f.Release))
		w.row("version", dash(f.Version))
		w.row("distribution", dash(f.Distribution))
		w.row("build id", dash(f.BuildID))
		w.row("command line", dash(f.CommandLine))
		boot := "-"
		if !f.BootTime.IsZero() {
			boot = f.BootTime.UTC().Format(time.RFC3339)
		}
		w.row("booted", boot)
		w.row("paging", out.Paging)
		w.row("text", extentText(k.Text))
		w.row("read-only data", extentText(k.Rodata))
		w.row("slide", fmt.Sprintf("%#x", k.Bases.Text))
		w.row("direct map", baseText(k.Bases.DirectMap))
		w.row("vmalloc", baseText(k.Bases.Vmalloc))
		w.row("vmemmap", baseText(k.Bases.Vmemmap))
		w.row("symbols", out.Symbols)
		types := fmt.Sprint(out.Types)
		if k.Types == nil {
			types = "none: " + out.TypesError
		}
		w.row("types", types)
		for _, d := range k.Doubts {
			w.row("doubt", d.Object+": "+d.Reason)
		}
		w.row("read", fmt.Sprintf("%s in %s, %v", bytesText(t.bytes), plural(t.reads, "read"), out.Read.Elapsed.Round(time.Millisecond)))
		if p := out.Read.Paths; p != nil {
			w.row("", pathsText(*p))
		}
		return w.flush()
	})
}

func extentText(x guest.Extent) string {
	if x.End == 0 {
		return "-"
	}
	return fmt.Sprintf("%016x-%016x (%s)", x.Start, x.End, bytesText(x.Size()))
}

func baseText(base uint64) string {
	if base == 0 {
		return "-"
	}
	return fmt.Sprintf("%016x", base)
}

// pathsText says which way memory was read.
func pathsText(s kvmaccess.MemoryStats) string {
	text := fmt.Sprintf("netlink %s, process_vm_readv %s, faulted in %s", bytesText(s.Netlink.Bytes), bytesText(s.Bulk.Bytes), bytesText(s.Cold.Bytes))
	if s.Barred != "" {
		text += " (no process_vm_readv: " + s.Barred + ")"
	}
	return text
}
