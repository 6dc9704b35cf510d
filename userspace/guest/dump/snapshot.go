// SPDX-License-Identifier: MIT

package dump

import (
	"bytes"
	"fmt"
	"io"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// isPacked says whether gzip or xz compressed the file.
func isPacked(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0x1f, 0x8b}) || bytes.HasPrefix(head, []byte("\xfd7zXZ\x00"))
}

// readSnapshot reads what guest.Snapshot wrote; other files that gzip or xz
// compressed it refuses.
func (d *Dump) readSnapshot(size int64) error {
	d.format = FormatSnapshot
	s, err := guest.ReadSnapshot(io.NewSectionReader(d.file, 0, size))
	if err != nil {
		return fmt.Errorf("a compressed file, and no snapshot of kvmaccess: if it is a memory dump, unpack it first (gunzip, unxz): %w", err)
	}
	d.whole, d.cpus = s, s.CPUs
	return nil
}
