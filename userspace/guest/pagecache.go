// SPDX-License-Identifier: MIT

package guest

import "context"

// PageCache reads whole pages of a Memory and keeps them: for a walk over many
// neighbouring page-table entries or objects. What it gave once it gives for
// ever; it is to be dropped, or renewed, with the operation that it was made for.
type PageCache struct {
	mem   Memory
	pages map[uint64]*[4096]byte
	free  []*[4096]byte
}

// NewPageCache makes a cache of mem, or returns mem if it is one.
func NewPageCache(mem Memory) *PageCache {
	if c, ok := mem.(*PageCache); ok {
		return c
	}
	return &PageCache{mem: mem, pages: map[uint64]*[4096]byte{}}
}

// Renew forgets what was read, so that what it gives is again as it is then, and
// uses the memory again.
func (c *PageCache) Renew() {
	for _, page := range c.pages {
		if len(c.free) < maxFreePages {
			c.free = append(c.free, page)
		}
	}
	clear(c.pages)
}

const (
	// maxFreePages is for the page tables on the way to what is watched.
	maxFreePages = 32
	// maxCachedPages bounds what hostile page tables can make a cache hold:
	// 16 MiB.
	maxCachedPages = 4096
	// bulk is from how many bytes on a read is not worth keeping.
	bulk = 128 << 10
)

// ReadPhysical implements Memory. What is large is read at once and not kept.
func (c *PageCache) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	if len(p) >= bulk {
		return c.mem.ReadPhysical(ctx, gpa, p)
	}
	for len(p) > 0 {
		frame, offset := gpa&^4095, gpa&4095
		page := c.pages[frame]
		if page == nil {
			if err := c.fill(ctx, frame, offset+uint64(len(p))); err != nil {
				return err
			}
			page = c.pages[frame]
		}
		n := copy(p, page[offset:])
		p = p[n:]
		gpa += uint64(n)
	}
	return nil
}

// fill reads the page at frame and, at once, those behind it that size bytes
// reach into and that are not there yet.
func (c *PageCache) fill(ctx context.Context, frame, size uint64) error {
	count := uint64(1)
	for count*4096 < size && c.pages[frame+count*4096] == nil {
		count++
	}
	if uint64(len(c.pages))+count > maxCachedPages {
		clear(c.pages)
	}
	if count == 1 {
		var page *[4096]byte
		if n := len(c.free); n > 0 {
			page, c.free = c.free[n-1], c.free[:n-1]
		} else {
			page = new([4096]byte)
		}
		if err := c.mem.ReadPhysical(ctx, frame, page[:]); err != nil {
			return err
		}
		c.pages[frame] = page
		return nil
	}
	data := make([]byte, count*4096)
	if err := c.mem.ReadPhysical(ctx, frame, data); err != nil {
		return err
	}
	for i := range count {
		c.pages[frame+i*4096] = (*[4096]byte)(data[i*4096:])
	}
	return nil
}
