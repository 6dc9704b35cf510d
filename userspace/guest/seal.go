// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
)

// Seal tells whether memory that a kernel never changes is as it was: what its
// symbols and types were made of. It is looked at a piece at a time, so that
// no look takes long.
//
// The digests are of 64 bits, with a key that the guest does not know.
type Seal struct {
	seed   maphash.Seed
	pieces []piece
	next   int
}

type piece struct {
	object string
	Extent
	sum    uint64
	broken error
}

// pieceSize is how much is looked at at once, in bytes.
const pieceSize = 64 << 10

// add seals data, which lie at an address.
func (s *Seal) add(object string, at uint64, data []byte) {
	if len(s.pieces) == 0 {
		s.seed = maphash.MakeSeed()
	}
	for len(data) > 0 {
		n := min(len(data), pieceSize)
		s.pieces = append(s.pieces, piece{object: object, Extent: Extent{at, at + uint64(n)}, sum: maphash.Bytes(s.seed, data[:n])})
		at += uint64(n)
		data = data[n:]
	}
}

// Pieces is how many looks see everything once.
func (s *Seal) Pieces() int { return len(s.pieces) }

// Extents are where what is sealed of an object lies, in pieces.
func (s *Seal) Extents(object string) []Extent {
	var out []Extent
	for _, p := range s.pieces {
		if p.object == object {
			out = append(out, p.Extent)
		}
	}
	return out
}

// Look looks at the next piece. It returns false if what Broken returns
// changed by that. The error is the host's: nothing was seen.
func (s *Seal) Look(ctx context.Context, space *Space) (same bool, err error) {
	if len(s.pieces) == 0 {
		return true, nil
	}
	p := &s.pieces[s.next%len(s.pieces)]
	data := make([]byte, p.Size())
	err = space.Read(ctx, p.Start, data)
	var broken error
	switch {
	case errors.Is(err, ErrNotPresent) || errors.Is(err, ErrReserved):
		broken = err
	case err != nil:
		return true, err
	case maphash.Bytes(s.seed, data) != p.sum:
		broken = fmt.Errorf("%#x-%#x, which the kernel never changes, was overwritten", p.Start, p.End)
	}
	s.next++
	same = (broken == nil) == (p.broken == nil)
	p.broken = broken
	return same, nil
}

// Broken are the doubts that arise from what is not as it was.
func (s *Seal) Broken() []Doubt {
	var doubts []Doubt
	for _, p := range s.pieces {
		if p.broken != nil {
			doubts = append(doubts, Doubt{p.object, p.broken.Error()})
		}
	}
	return doubts
}
