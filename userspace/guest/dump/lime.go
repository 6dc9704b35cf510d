// SPDX-License-Identifier: MIT

package dump

import (
	"encoding/binary"
	"fmt"
)

// limeHeader goes before each range of a LiME image (doc/README.md of LiME,
// "LiME Memory Range Header Version 1 Specification"). AVML writes the same,
// unless it compresses.
type limeHeader struct {
	Magic, Version uint32
	Start, Last    uint64 // guest-physical, both included
	Reserved       [8]byte
}

const (
	limeMagic   = 0x4c694d45
	limeVersion = 1
)

func isLiME(head []byte) bool {
	return len(head) >= 4 && binary.LittleEndian.Uint32(head) == limeMagic
}

func (d *Dump) readLiME(size int64) error {
	d.format = FormatLiME
	length := int64(binary.Size(limeHeader{}))
	for at := int64(0); at < size; {
		var h limeHeader
		if err := decode(d.file, at, &h); err != nil {
			return fmt.Errorf("LiME header at offset %d: the file is cut off or damaged: %w", at, err)
		}
		switch {
		case h.Magic != limeMagic:
			return fmt.Errorf("LiME header at offset %d: it begins with %#x, not %#x: the file is damaged", at, h.Magic, uint32(limeMagic))
		case h.Version != limeVersion:
			return fmt.Errorf("%w: LiME header at offset %d: version %d, only %d is known", ErrUnsupported, at, h.Version, limeVersion)
		case h.Last < h.Start:
			return fmt.Errorf("LiME header at offset %d: the range ends at %#x and begins at %#x", at, h.Last, h.Start)
		case h.Last>>physicalBits != 0:
			return fmt.Errorf("LiME header at offset %d: the range %#x to %#x passes %d bits", at, h.Start, h.Last, physicalBits)
		}
		c := chunk{gpa: h.Start, size: h.Last - h.Start + 1, offset: uint64(at + length)}
		if err := d.chunks.add(c, size, fmt.Sprintf("LiME header at offset %d", at)); err != nil {
			return err
		}
		at += length + int64(c.size)
	}
	return d.chunks.merge()
}
