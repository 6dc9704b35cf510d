// SPDX-License-Identifier: MIT

package guest

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/ulikunitz/xz"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Snapshot is a VM at one instant: its vCPUs' states and some of its memory.
type Snapshot struct {
	VM    kvmaccess.VM
	CPUs  []kvmaccess.VCPU
	Pages Pages
	Notes map[string]string // what recorded it, of which guest
}

// Machine gives the snapshot the methods of a live VM.
func (s *Snapshot) Machine() *Machine {
	return &Machine{VM: s.VM, CPUs: s.CPUs, Memory: s.Pages}
}

// VCPUs implements Source.
func (s *Snapshot) VCPUs(context.Context) ([]kvmaccess.VCPU, error) { return slices.Clone(s.CPUs), nil }

// ReadPhysical implements Source.
func (s *Snapshot) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	return s.Pages.ReadPhysical(ctx, gpa, p)
}

// Regions implements Regions.
func (s *Snapshot) Regions(ctx context.Context) ([]Region, error) { return s.Pages.Regions(ctx) }

// A snapshot file is, compressed by gzip, by xz or not at all: the magic line,
// a little-endian u32 with the length of the header, the header in JSON, then
// the pages by ascending address, each as a little-endian u64 address and 4096
// bytes.
const (
	snapshotMagic   = "KvmAccess snapshot 1\n"
	maxHeader       = 16 << 20
	maxSnapshotPage = 1 << 20 // 4 GiB
)

type snapshotHeader struct {
	VM    kvmaccess.VM      `json:"vm"`
	CPUs  []kvmaccess.VCPU  `json:"vcpus"`
	Pages int               `json:"pages"`
	Notes map[string]string `json:"notes,omitempty"`
}

// Write writes the snapshot as a file, compressed by gzip.
func (s *Snapshot) Write(w io.Writer) error {
	z, _ := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err := s.Encode(z); err != nil {
		return err
	}
	return z.Close()
}

// Encode writes the snapshot without compressing it, which gzip(1) or xz(1)
// may do.
func (s *Snapshot) Encode(z io.Writer) error {
	head, err := json.Marshal(snapshotHeader{s.VM, s.CPUs, len(s.Pages), s.Notes})
	if err != nil {
		return fmt.Errorf("snapshot header: %w", err)
	}
	out := append([]byte(snapshotMagic), binary.LittleEndian.AppendUint32(nil, uint32(len(head)))...)
	if _, err := z.Write(append(out, head...)); err != nil {
		return err
	}
	frames := make([]uint64, 0, len(s.Pages))
	for frame := range s.Pages {
		frames = append(frames, frame)
	}
	slices.Sort(frames)
	for _, frame := range frames {
		if _, err := z.Write(append(binary.LittleEndian.AppendUint64(nil, frame), s.Pages[frame][:]...)); err != nil {
			return err
		}
	}
	return nil
}

// xzMagic begins a file that xz compressed.
const xzMagic = "\xfd7zXZ\x00"

// ReadSnapshot reads what Write or Encode wrote. The error says what is wrong with the
// file: it is none, of another version, or cut off.
func ReadSnapshot(r io.Reader) (*Snapshot, error) {
	packed := bufio.NewReader(r)
	var z io.Reader
	magic, err := packed.Peek(len(xzMagic))
	switch {
	case err == nil && string(magic) == xzMagic:
		z, err = xz.NewReader(packed)
	case err == nil && snapshotMagic[:len(xzMagic)] == string(magic):
		z = packed
	default:
		z, err = gzip.NewReader(packed)
	}
	if err != nil {
		return nil, fmt.Errorf("no snapshot: %w", err)
	}
	in := bufio.NewReader(z)
	start := make([]byte, len(snapshotMagic)+4)
	if _, err := io.ReadFull(in, start); err != nil {
		return nil, fmt.Errorf("no snapshot: %w", cut(err))
	}
	if string(start[:len(snapshotMagic)]) != snapshotMagic {
		return nil, fmt.Errorf("no snapshot of this version: it begins with %q, not %q", start[:len(snapshotMagic)], snapshotMagic)
	}
	length := binary.LittleEndian.Uint32(start[len(snapshotMagic):])
	if length > maxHeader {
		return nil, fmt.Errorf("snapshot header of %d bytes, at most %d are taken", length, maxHeader)
	}
	text, err := io.ReadAll(io.LimitReader(in, int64(length)))
	if err == nil && uint32(len(text)) < length {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("snapshot header: %w", cut(err))
	}
	var head snapshotHeader
	if err := json.Unmarshal(text, &head); err != nil {
		return nil, fmt.Errorf("snapshot header: %w", err)
	}
	if head.Pages < 0 || head.Pages > maxSnapshotPage {
		return nil, fmt.Errorf("snapshot of %d pages, at most %d are taken", head.Pages, maxSnapshotPage)
	}
	s := &Snapshot{VM: head.VM, CPUs: head.CPUs, Notes: head.Notes, Pages: Pages{}}
	for i := range head.Pages {
		var frame [8]byte
		page := new([4096]byte)
		if _, err := io.ReadFull(in, frame[:]); err != nil {
			return nil, fmt.Errorf("snapshot page %d of %d: %w", i, head.Pages, cut(err))
		}
		if _, err := io.ReadFull(in, page[:]); err != nil {
			return nil, fmt.Errorf("snapshot page %d of %d: %w", i, head.Pages, cut(err))
		}
		gpa := binary.LittleEndian.Uint64(frame[:])
		if gpa&4095 != 0 || s.Pages[gpa] != nil {
			return nil, fmt.Errorf("snapshot page %d of %d: bad address %#x", i, head.Pages, gpa)
		}
		s.Pages[gpa] = page
	}
	if n, err := io.Copy(io.Discard, io.LimitReader(in, 1)); n != 0 || err != nil {
		return nil, fmt.Errorf("snapshot: trailing data or bad checksum: %w", errors.Join(err))
	}
	return s, nil
}

func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the file is cut off: %w", io.ErrUnexpectedEOF)
	}
	return err
}
