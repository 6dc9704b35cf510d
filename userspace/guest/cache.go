// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"sync"
)

// Cache keeps what was decoded of guests' kernels, for those that attach again
// and for others of the same kernel.
//
// It is by content: what is kept is found by the SHA-256 of all the bytes that
// it was made of, and these are read out of the guest's memory each time. So
// what one guest had is given to another only if that one has the very same
// bytes, of which the same would be decoded anew; a guest that lies in its
// tables misleads about itself, whether or not there is a Cache. Nothing is
// looked up by what a guest merely says that it is: by its release, its banner
// or its build id.
type Cache struct {
	mu      sync.Mutex
	decoded map[string]*Symbols
}

func (c *Cache) symbols(k *kallsyms, text uint64) (*Symbols, string, error) {
	digest := k.digest(text)
	if c != nil {
		c.mu.Lock()
		s := c.decoded[digest]
		c.mu.Unlock()
		if s != nil {
			return s, digest, nil
		}
	}
	s, err := k.decode(text - linkedText)
	if err == nil && c != nil {
		c.mu.Lock()
		if c.decoded == nil {
			c.decoded = map[string]*Symbols{}
		}
		c.decoded[digest] = s
		c.mu.Unlock()
	}
	return s, digest, err
}

func (c *Cache) types(ctx context.Context, k *Kernel) (*Types, error) {
	return ReadTypes(ctx, k)
}
