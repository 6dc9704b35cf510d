// SPDX-License-Identifier: MIT

package dump

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// chunk is a run of guest-physical memory and where the file has it.
type chunk struct {
	gpa, size uint64 // bytes
	offset    uint64 // in the file
}

func (c chunk) end() uint64 { return c.gpa + c.size }

// chunks are sorted by address and do not overlap.
type chunks []chunk

const (
	// physicalBits is the most that x86-64 has (Intel SDM vol. 3, 4.1.4).
	physicalBits = 52
	// maxChunks bounds what headers can make a Dump hold: 96 MiB.
	maxChunks = 1 << 22
)

// add appends a chunk that what calls for. Empty ones are left out.
func (cs *chunks) add(c chunk, fileSize int64, what string) error {
	if c.size == 0 {
		return nil
	}
	switch {
	case c.gpa >= 1<<physicalBits || c.size > 1<<physicalBits-c.gpa:
		return fmt.Errorf("%s: %d bytes at guest-physical %#x: that passes %d bits", what, c.size, c.gpa, physicalBits)
	case c.offset > uint64(fileSize) || c.size > uint64(fileSize)-c.offset:
		return fmt.Errorf("%s: guest-physical %#x to %#x needs %d bytes at offset %d, the file has %d: it is cut off, or still being written",
			what, c.gpa, c.end()-1, c.size, c.offset, fileSize)
	case len(*cs) >= maxChunks:
		return fmt.Errorf("%s: more than %d ranges", what, maxChunks)
	}
	if n := len(*cs); n > 0 {
		if last := &(*cs)[n-1]; last.end() == c.gpa && last.offset+last.size == c.offset {
			last.size += c.size
			return nil
		}
	}
	*cs = append(*cs, c)
	return nil
}

// merge sorts the chunks and joins those that touch. Two that overlap must
// have the same bytes there, which those of a paging dump do, where one page
// is mapped at several addresses.
func (cs *chunks) merge() error {
	all := *cs
	slices.SortFunc(all, func(a, b chunk) int {
		return cmp.Or(cmp.Compare(a.gpa, b.gpa), cmp.Compare(b.size, a.size))
	})
	var out chunks
	for _, c := range all {
		if len(out) == 0 {
			out = append(out, c)
			continue
		}
		last := &out[len(out)-1]
		same := c.offset-last.offset == c.gpa-last.gpa
		switch {
		case c.gpa < last.end() && !same:
			return fmt.Errorf("guest-physical %#x to %#x is in the file twice, at offset %d and at %d: the headers are damaged",
				c.gpa, min(c.end(), last.end())-1, last.offset+(c.gpa-last.gpa), c.offset)
		case c.gpa <= last.end() && same:
			last.size = max(last.end(), c.end()) - last.gpa
		default:
			out = append(out, c)
		}
	}
	*cs = out
	return nil
}

// find returns the chunk that holds gpa.
func (cs chunks) find(gpa uint64) (chunk, bool) {
	i := sort.Search(len(cs), func(i int) bool { return cs[i].end() > gpa })
	if i == len(cs) || cs[i].gpa > gpa {
		return chunk{}, false
	}
	return cs[i], true
}

func (cs chunks) read(file io.ReaderAt, gpa uint64, p []byte) error {
	for len(p) > 0 {
		c, ok := cs.find(gpa)
		if !ok {
			return fmt.Errorf("guest-physical %#x is not in the dump: %w", gpa, kvmaccess.ErrNoMemslot)
		}
		n := int(min(uint64(len(p)), c.end()-gpa))
		got, err := file.ReadAt(p[:n], int64(c.offset+(gpa-c.gpa)))
		if got < n {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the file was cut off after it was opened: %w", io.ErrUnexpectedEOF)
			}
			return fmt.Errorf("guest-physical %#x: %w", gpa, err)
		}
		p = p[n:]
		gpa += uint64(n)
	}
	return nil
}
