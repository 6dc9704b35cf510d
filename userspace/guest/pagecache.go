// SPDX-License-Identifier: MIT

package guest

import "context"

// PageCache reads whole pages of a Memory and keeps them: for a walk over many
// neighbouring page-table entries. What it gave once it gives for ever; it is
// to be dropped with the operation that it was made for.
type PageCache struct {
	mem   Memory
	pages map[uint64]*[4096]byte
}

// NewPageCache makes a cache of mem, or returns mem if it is one.
func NewPageCache(mem Memory) *PageCache {
	if c, ok := mem.(*PageCache); ok {
		return c
	}
	return &PageCache{mem: mem, pages: map[uint64]*[4096]byte{}}
}

// maxCachedPages bounds what hostile page tables can make a cache hold: 16 MiB.
const maxCachedPages = 4096

// ReadPhysical implements Memory.
func (c *PageCache) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	for len(p) > 0 {
		frame, offset := gpa&^4095, gpa&4095
		page := c.pages[frame]
		if page == nil {
			page = new([4096]byte)
			if err := c.mem.ReadPhysical(ctx, frame, page[:]); err != nil {
				return err
			}
			if len(c.pages) >= maxCachedPages {
				clear(c.pages)
			}
			c.pages[frame] = page
		}
		n := copy(p, page[offset:])
		p = p[n:]
		gpa += uint64(n)
	}
	return nil
}
