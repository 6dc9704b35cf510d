// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"math/big"
	"math/rand/v2"
	"testing"
)

// A value of the table that the authors of SipHash published, of the key
// 00 01 ... 0f and the message 00 01 ... 07.
func TestSipHash(t *testing.T) {
	key := [2]uint64{0x0706050403020100, 0x0f0e0d0c0b0a0908}
	if got := siphash(key, 0x0706050403020100); got != 0x93f5f5799a932462 {
		t.Errorf("%#x", got)
	}
}

// The digest is what uapi/kvmaccess.h says, computed by other means here.
func TestDigest(t *testing.T) {
	r := rand.New(rand.NewPCG(20261123, 1))
	var key WatchKey
	page := make([]byte, PageSize)
	for i := range key {
		key[i] = byte(r.Uint32())
	}
	for i := range page {
		page[i] = byte(r.Uint32())
	}
	d := NewDigester(key)
	word := func(i int) *big.Int {
		b := make([]byte, 8)
		for j := range b {
			b[7-j] = page[8*i+j]
		}
		sum := new(big.Int).Add(new(big.Int).SetBytes(b), new(big.Int).SetUint64(d.words[i]))
		return sum.Mod(sum, new(big.Int).Lsh(big.NewInt(1), 64))
	}
	sum := new(big.Int)
	for i := 0; i < PageSize/8; i += 2 {
		sum.Add(sum, new(big.Int).Mul(word(i), word(i+1)))
	}
	sum.Mod(sum, new(big.Int).Lsh(big.NewInt(1), 128))
	low := new(big.Int).And(sum, new(big.Int).SetUint64(^uint64(0)))
	want := siphash(d.key, low.Uint64(), new(big.Int).Rsh(sum, 64).Uint64())
	if got, err := d.Page(page); err != nil || got != want {
		t.Errorf("%#x, %v, want %#x", got, err, want)
	}
	seen := map[uint64]bool{want: true}
	for range 1000 {
		i, bit := r.IntN(len(page)), byte(1)<<r.IntN(8)
		page[i] ^= bit
		got, err := d.Page(page)
		if err != nil || got == want {
			t.Fatalf("bit %#x of byte %d changes nothing: %v", bit, i, err)
		}
		seen[got] = true
		page[i] ^= bit
	}
	if len(seen) < 980 {
		t.Errorf("%d digests of about 985 pages", len(seen))
	}
	if _, err := d.Page(page[1:]); err == nil {
		t.Error("a digest of less than a page")
	}
}
