// SPDX-License-Identifier: MIT

// Package dump opens files of a guest's memory: QEMU's dump-guest-memory and
// with it "virsh dump --memory-only", LiME images, flat images of physical
// memory, and this project's own snapshots. What it opens satisfies
// guest.Source, so that all that works on a live guest works on a file.
//
// Only a snapshot, which is small, is loaded. All others are read where and
// when something is asked for.
package dump

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// ErrUnsupported: the file is something else than a dump that can be read. The
// error that wraps it says what, and what to do.
var ErrUnsupported = errors.New("unsupported file")

// Format is how a dump is laid out.
type Format string

// Formats.
const (
	FormatELF      Format = "ELF"      // QEMU's dump-guest-memory, libvirt, others' ELF cores of physical memory
	FormatLiME     Format = "LiME"     // ranges, each after a header
	FormatRaw      Format = "raw"      // physical memory from address 0 on
	FormatSnapshot Format = "snapshot" // guest.Snapshot
)

// Dump is a guest's memory in a file, with its vCPUs' states where the format
// has them. It implements guest.Source and guest.Regions, and is safe for
// concurrent use.
type Dump struct {
	format Format
	file   io.ReaderAt
	close  io.Closer
	chunks chunks
	cpus   []kvmaccess.VCPU
	whole  *guest.Snapshot // instead, where the file is one
}

// Open opens a file. The error says what is wrong with it: ErrUnsupported, or
// where its headers contradict themselves or the file.
func Open(name string) (*Dump, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() && info.Mode()&os.ModeDevice == 0 {
		err = fmt.Errorf("%w: %v, not a file", ErrUnsupported, info.Mode().Type())
	}
	var size int64
	if err == nil {
		// Of a block device Stat does not tell the size.
		size, err = f.Seek(0, io.SeekEnd)
	}
	var d *Dump
	if err == nil {
		d, err = New(f, size)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	d.close = f
	return d, nil
}

// New reads a dump of size bytes through r, which it uses until it is closed.
func New(r io.ReaderAt, size int64) (*Dump, error) {
	// As long as the longest magic.
	head := make([]byte, min(size, 64))
	if _, err := r.ReadAt(head, 0); err != nil && (len(head) > 0 || !errors.Is(err, io.EOF)) {
		return nil, err
	}
	d := &Dump{file: r}
	var err error
	switch {
	case size == 0:
		return nil, errors.New("the file is empty")
	case isELF(head):
		err = d.readELF(size)
	case isLiME(head):
		err = d.readLiME(size)
	case isSnapshot(head):
		err = d.readSnapshot(head, size)
	default:
		if err = unsupported(head); err == nil {
			err = d.readRaw(size)
		}
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Close closes the file.
func (d *Dump) Close() error {
	if d.close == nil {
		return nil
	}
	return d.close.Close()
}

// Format says how the file is laid out.
func (d *Dump) Format() Format { return d.format }

// VCPUs implements guest.Source: none where the file does not have their page
// tables and descriptor tables. Those out of an ELF file carry
// kvmaccess.VCPUPartial: it has no model-specific registers but, since QEMU
// 6.2, KERNEL_GS_BASE, and EFER is what the other registers imply.
func (d *Dump) VCPUs(context.Context) ([]kvmaccess.VCPU, error) { return slices.Clone(d.cpus), nil }

// Regions implements guest.Regions.
func (d *Dump) Regions(ctx context.Context) ([]guest.Region, error) {
	if d.whole != nil {
		return d.whole.Regions(ctx)
	}
	out := make([]guest.Region, len(d.chunks))
	for i, c := range d.chunks {
		out[i] = guest.Region{GPA: c.gpa, Size: c.size}
	}
	return out, nil
}

// ReadPhysical implements guest.Memory. What is not in the file is
// kvmaccess.ErrNoMemslot.
func (d *Dump) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.whole != nil {
		return d.whole.ReadPhysical(ctx, gpa, p)
	}
	return d.chunks.read(d.file, gpa, p)
}
