// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"slices"
	"sync"
)

// Cache keeps what was decoded of guests' kernels, for those that attach again
// and for others of the same kernel, which then share it. The zero value works,
// and so does nil, which keeps nothing. It is safe for concurrent use.
//
// It is by content: all the bytes that something was made of are kept with it,
// and held against those that are read out of the guest's memory each time. So
// what one guest had is given to another only if that one has the very same
// bytes, of which the same would be decoded anew; a guest that lies in its
// tables misleads about itself, whether or not there is a Cache. Nothing is
// looked up by what a guest merely says that it is: by its release, its banner
// or its build id; nor is it held against a guest that another one says the same
// of itself and has other tables, since that one may lie. What depends on the
// boot is not kept: where the kernel lies, its page tables, its modules.
type Cache struct {
	symbols kept[*decodedTable]
	types   kept[*Types]
}

// kept are the values that were used last, the newest at the end. Some ten
// megabytes is what each takes.
type kept[V any] struct {
	mu     sync.Mutex
	values []V
}

// mostKept kernels bound what guests can make a Cache hold.
const mostKept = 16

// share returns the value that is kept, or a new one, which it keeps then. Two that
// come at once may both make one; they share the first.
func (c *kept[V]) share(is func(V) bool, decode func() (V, error)) (V, error) {
	c.mu.Lock()
	v, ok := c.find(is)
	c.mu.Unlock()
	if ok {
		return v, nil
	}
	made, err := decode()
	if err != nil {
		return made, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if v, ok := c.find(is); ok {
		return v, nil
	}
	if len(c.values) == mostKept {
		c.values = slices.Delete(c.values, 0, 1)
	}
	c.values = append(c.values, made)
	return made, nil
}

func (c *kept[V]) find(is func(V) bool) (v V, ok bool) {
	i := slices.IndexFunc(c.values, is)
	if i < 0 {
		return v, false
	}
	v = c.values[i]
	c.values = append(slices.Delete(c.values, i, i+1), v)
	return v, true
}

// decodedTable is what a symbol table says, and all that it was made of.
type decodedTable struct {
	of     tableContent
	d      *decoded
	digest string
}

// decode decodes a symbol table of a kernel whose _text is at text, moved to
// where it is without KASLR, and returns its digest.
func (c *Cache) decode(k *kallsyms, text uint64) (*decoded, string, error) {
	content := k.content(text)
	decode := func() (*decodedTable, error) {
		digest := make(chan string, 1)
		go func() { digest <- content.digest() }()
		d, err := k.decode(text - linkedText)
		t := &decodedTable{d: d, digest: <-digest}
		if c != nil {
			t.of = content.clone() // all of the kernel's read-only data is behind it
		}
		return t, err
	}
	var t *decodedTable
	var err error
	if c == nil {
		t, err = decode()
	} else {
		t, err = c.symbols.share(func(t *decodedTable) bool { return t.of.equal(&content) }, decode)
	}
	return t.d, t.digest, err
}

// parseTypes is ParseTypes of a kernel's BTF.
func (c *Cache) parseTypes(raw []byte) (*Types, error) {
	parse := func() (*Types, error) { return ParseTypes(raw, nil) }
	if c == nil {
		return parse()
	}
	return c.types.share(func(t *Types) bool { return bytes.Equal(t.Raw(), raw) }, parse)
}
