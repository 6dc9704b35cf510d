// SPDX-License-Identifier: MIT

package dump

import (
	"errors"
	"fmt"
)

// leastRaw is less than any guest with a kernel has: the memory below 1 MiB.
const leastRaw = 1 << 20

// readRaw takes a file as physical memory from address 0 on, without holes, as
// QEMU's pmemsave, dd of /dev/mem and LiME's format=padded leave it. Nothing in
// the file says so.
func (d *Dump) readRaw(size int64) error {
	d.format = FormatRaw
	switch {
	case size < leastRaw:
		return fmt.Errorf("%w: neither an ELF core nor a LiME image, and with %d bytes too small for an image of physical memory", ErrUnsupported, size)
	case size%4096 != 0:
		return fmt.Errorf("neither an ELF core nor a LiME image; for an image of physical memory its %d bytes are no multiple of a page, 4096: it is cut off, or something else", size)
	}
	if err := d.chunks.add(chunk{size: uint64(size)}, size, "raw image"); err != nil {
		return errors.Join(ErrUnsupported, err)
	}
	return nil
}
