// SPDX-License-Identifier: MIT

package guest

import (
	"crypto/sha256"
	"slices"
	"sync"
)

// Cache keeps what was decoded of guests' kernels, for those that attach again
// and for others of the same kernel, which then share it. The zero value works,
// and so does nil, which keeps nothing. It is safe for concurrent use.
//
// It is by content: what is kept is found by the SHA-256 of all the bytes that
// it was made of, and these are read out of the guest's memory each time. So
// what one guest had is given to another only if that one has the very same
// bytes, of which the same would be decoded anew; a guest that lies in its
// tables misleads about itself, whether or not there is a Cache. Nothing is
// looked up by what a guest merely says that it is: by its release, its banner
// or its build id; nor is it held against a guest that another one says the same
// of itself and has other tables, since that one may lie. What depends on the
// boot is not kept: where the kernel lies, its page tables, its modules.
type Cache struct {
	mu      sync.Mutex
	symbols kept[string, *decoded]
	types   kept[[sha256.Size]byte, *Types]
}

// kept are the values that were used last, the newest at the end. A few tens of
// megabytes is what they take.
type kept[K comparable, V any] struct {
	keys   []K
	values []V
}

// mostKept kernels bound what guests can make a Cache hold.
const mostKept = 16

func (c *kept[K, V]) get(key K) (v V, ok bool) {
	i := slices.Index(c.keys, key)
	if i < 0 {
		return v, false
	}
	v = c.values[i]
	c.keys = append(slices.Delete(c.keys, i, i+1), key)
	c.values = append(slices.Delete(c.values, i, i+1), v)
	return v, true
}

func (c *kept[K, V]) put(key K, v V) {
	if _, ok := c.get(key); ok {
		return
	}
	if len(c.keys) == mostKept {
		c.keys, c.values = slices.Delete(c.keys, 0, 1), slices.Delete(c.values, 0, 1)
	}
	c.keys, c.values = append(c.keys, key), append(c.values, v)
}

// decode decodes a symbol table of a kernel whose _text is at text, moved to
// where it is without KASLR, and returns its digest.
func (c *Cache) decode(k *kallsyms, text uint64) (*decoded, string, error) {
	digest := k.digest(text)
	if c != nil {
		c.mu.Lock()
		d, ok := c.symbols.get(digest)
		c.mu.Unlock()
		if ok {
			return d, digest, nil
		}
	}
	d, err := k.decode(text - linkedText)
	if err == nil && c != nil {
		c.mu.Lock()
		c.symbols.put(digest, d)
		c.mu.Unlock()
	}
	return d, digest, err
}

// parseTypes is ParseTypes of a kernel's BTF.
func (c *Cache) parseTypes(raw []byte) (*Types, error) {
	if c == nil {
		return ParseTypes(raw, nil)
	}
	digest := sha256.Sum256(raw)
	c.mu.Lock()
	t, ok := c.types.get(digest)
	c.mu.Unlock()
	if ok {
		return t, nil
	}
	t, err := ParseTypes(raw, nil)
	if err == nil {
		c.mu.Lock()
		c.types.put(digest, t)
		c.mu.Unlock()
	}
	return t, err
}
