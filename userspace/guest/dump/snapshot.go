// SPDX-License-Identifier: MIT

package dump

import (
	"bytes"
	"fmt"
	"io"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

func isGzip(head []byte) bool { return bytes.HasPrefix(head, []byte{0x1f, 0x8b}) }

// readSnapshot reads what guest.Snapshot wrote; other files that gzip
// compressed it refuses.
func (d *Dump) readSnapshot(size int64) error {
	d.format = FormatSnapshot
	s, err := guest.ReadSnapshot(io.NewSectionReader(d.file, 0, size))
	if err != nil {
		return fmt.Errorf("compressed by gzip, and no snapshot of kvmaccess: if it is a memory dump, unpack it first (gunzip): %w", err)
	}
	d.whole, d.cpus = s, s.CPUs
	return nil
}
