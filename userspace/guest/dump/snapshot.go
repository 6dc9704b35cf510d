// SPDX-License-Identifier: MIT

package dump

import (
	"bytes"
	"fmt"
	"io"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// isSnapshot says whether the file is a snapshot, or gzip or xz compressed it.
func isSnapshot(head []byte) bool {
	for _, magic := range []string{"KvmAccess snapshot ", "\x1f\x8b", "\xfd7zXZ\x00"} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	return false
}

// readSnapshot reads what guest.Snapshot wrote; other files that gzip or xz
// compressed it refuses.
func (d *Dump) readSnapshot(head []byte, size int64) error {
	d.format = FormatSnapshot
	s, err := guest.ReadSnapshot(io.NewSectionReader(d.file, 0, size))
	if err != nil {
		if bytes.HasPrefix(head, []byte("KvmAccess")) {
			return err
		}
		return fmt.Errorf("a compressed file, and no snapshot of kvmaccess: if it is a memory dump, unpack it first (gunzip, unxz): %w", err)
	}
	d.whole, d.cpus = s, s.CPUs
	return nil
}
