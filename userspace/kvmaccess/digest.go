// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// WatchKey is the secret that the digests of a watch are made with. It is to
// be random: crypto/rand.
type WatchKey [watchKeyBytes]byte

// PageSize is what a digest covers, in bytes.
const PageSize = 4096

// Digester makes the digests that the module compares pages with.
type Digester struct {
	key   [2]uint64
	words [PageSize / 8]uint64
}

// NewDigester prepares the digests of one key.
func NewDigester(key WatchKey) *Digester {
	d := &Digester{key: [2]uint64{binary.LittleEndian.Uint64(key[:]), binary.LittleEndian.Uint64(key[8:])}}
	for i := range d.words {
		d.words[i] = siphash(d.key, uint64(i))
	}
	return d
}

// Page returns the digest of PageSize bytes: NH, as VMAC has it (Krovetz and
// Dai, "VHASH Security", 2007), under SipHash-2-4. Pages of another size have
// none.
func (d *Digester) Page(page []byte) (uint64, error) {
	if len(page) != PageSize {
		return 0, fmt.Errorf("kvmaccess: digest of %d bytes, want %d", len(page), PageSize)
	}
	var high, low uint64
	for i := 0; i < len(d.words); i += 2 {
		a := binary.LittleEndian.Uint64(page[8*i:]) + d.words[i]
		b := binary.LittleEndian.Uint64(page[8*i+8:]) + d.words[i+1]
		h, l := bits.Mul64(a, b)
		var carry uint64
		low, carry = bits.Add64(low, l, 0)
		high, _ = bits.Add64(high, h, carry)
	}
	return siphash(d.key, low, high), nil
}

// siphash is SipHash-2-4 of whole words (Aumasson and Bernstein, 2012).
func siphash(key [2]uint64, words ...uint64) uint64 {
	v0 := key[0] ^ 0x736f6d6570736575
	v1 := key[1] ^ 0x646f72616e646f6d
	v2 := key[0] ^ 0x6c7967656e657261
	v3 := key[1] ^ 0x7465646279746573
	rounds := func(n int) {
		for range n {
			v0 += v1
			v1 = bits.RotateLeft64(v1, 13) ^ v0
			v0 = bits.RotateLeft64(v0, 32)
			v2 += v3
			v3 = bits.RotateLeft64(v3, 16) ^ v2
			v0 += v3
			v3 = bits.RotateLeft64(v3, 21) ^ v0
			v2 += v1
			v1 = bits.RotateLeft64(v1, 17) ^ v2
			v2 = bits.RotateLeft64(v2, 32)
		}
	}
	for _, w := range append(words, uint64(8*len(words))<<56) {
		v3 ^= w
		rounds(2)
		v0 ^= w
	}
	v2 ^= 0xff
	rounds(4)
	return v0 ^ v1 ^ v2 ^ v3
}
