// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
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

// pieceSize is how much is looked at at once, in bytes: what one request to the
// kernel module reads.
const pieceSize = kvmaccess.MaxBytes

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

// Next is the piece to be looked at next; it is empty if nothing is sealed.
func (s *Seal) Next() Extent {
	if len(s.pieces) == 0 {
		return Extent{}
	}
	return s.pieces[s.next].Extent
}

// See takes what the piece is that Next returned, or why the guest's page
// tables do not map it any more, and goes on to the following one. It returns
// false if what Broken returns changed by that.
func (s *Seal) See(data []byte, gone error) (same bool) {
	if len(s.pieces) == 0 {
		return true
	}
	p := &s.pieces[s.next]
	var broken error
	switch {
	case gone != nil:
		broken = gone
	case uint64(len(data)) != p.Size() || maphash.Bytes(s.seed, data) != p.sum:
		broken = fmt.Errorf("%#x-%#x, which the kernel never changes, was overwritten", p.Start, p.End)
	}
	same = (broken == nil) == (p.broken == nil)
	p.broken = broken
	s.next = (s.next + 1) % len(s.pieces)
	return same
}

// Look reads the next piece and sees it. The error is the host's: nothing was
// seen.
func (s *Seal) Look(ctx context.Context, space *Space) (same bool, err error) {
	x := s.Next()
	data := make([]byte, x.Size())
	err = space.Read(ctx, x.Start, data)
	if errors.Is(err, ErrNotPresent) || errors.Is(err, ErrReserved) {
		return s.See(nil, err), nil
	}
	if err != nil {
		return true, err
	}
	return s.See(data, nil), nil
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
