// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// What is wrong with a structure that is walked; errors wrap one of these, or
// ErrNull, ErrNotKernel, ErrUnaligned or the Space's.
var (
	ErrCycle    = errors.New("it leads back into itself")
	ErrTooLong  = errors.New("it has more members than there can be")
	ErrBackLink = errors.New("its links forth and back do not agree")
)

// ErrStop ends a walk without an error, when its function returns it.
var ErrStop = errors.New("stop")

// walk counts and remembers the members of a structure.
type walk struct {
	k      *Kernel
	object string
	most   int
	seen   map[uint64]struct{}
}

func (k *Kernel) walk(object string, most int) *walk {
	return &walk{k, object, most, map[uint64]struct{}{}}
}

// enter checks the address of the next member.
func (w *walk) enter(at, align uint64) error {
	if err := w.k.pointer(at, align); err != nil {
		return err
	}
	if _, ok := w.seen[at]; ok {
		return fmt.Errorf("%#x: %w", at, ErrCycle)
	}
	if len(w.seen) >= w.most {
		return fmt.Errorf("%w, %d", ErrTooLong, w.most)
	}
	w.seen[at] = struct{}{}
	return nil
}

func (w *walk) fail(at uint64, err error) error {
	if errors.Is(err, ErrStop) {
		return nil
	}
	return &ObjectError{w.object, at, err}
}

// words reads n pointers.
func (w *walk) words(ctx context.Context, at uint64, n int) ([]uint64, error) {
	p := make([]byte, 8*n)
	if err := w.k.Space.Read(ctx, at, p); err != nil {
		return nil, err
	}
	out := make([]uint64, n)
	for i := range out {
		out[i] = binary.LittleEndian.Uint64(p[8*i:])
	}
	return out, nil
}

// List calls f with the address of each list_head of the circular list at head,
// head itself left out; at most most of them. object names the list in errors.
// f's error ends the walk; ErrStop without an error. A link back that does not
// match is an error, but what lies behind it is visited all the same.
func (k *Kernel) List(ctx context.Context, object string, head uint64, most int, f func(node uint64) error) error {
	w := k.walk(object, most)
	if err := k.pointer(head, 8); err != nil {
		return w.fail(head, err)
	}
	links, err := w.words(ctx, head, 2)
	if err != nil {
		return w.fail(head, err)
	}
	var broken error
	last := links[1]
	at, from := links[0], head
	for at != head {
		if err := w.enter(at, 8); err != nil {
			return errors.Join(broken, w.fail(from, err))
		}
		links, err := w.words(ctx, at, 2)
		if err != nil {
			return errors.Join(broken, w.fail(at, err))
		}
		if links[1] != from && broken == nil {
			broken = w.fail(at, fmt.Errorf("%w: %#x is before it, not %#x", ErrBackLink, links[1], from))
		}
		if err := f(at); err != nil {
			return errors.Join(broken, w.fail(at, err))
		}
		at, from = links[0], at
	}
	if last != from && broken == nil {
		broken = w.fail(head, fmt.Errorf("%w: %#x is the last one, not %#x", ErrBackLink, last, from))
	}
	return broken
}

// HList calls f with the address of each hlist_node of the list whose
// hlist_head is at head. The rest is as for List.
func (k *Kernel) HList(ctx context.Context, object string, head uint64, most int, f func(node uint64) error) error {
	w := k.walk(object, most)
	if err := k.pointer(head, 8); err != nil {
		return w.fail(head, err)
	}
	first, err := w.words(ctx, head, 1)
	if err != nil {
		return w.fail(head, err)
	}
	var broken error
	at, link := first[0], head // where the pointer to at is
	for at != 0 {
		if err := w.enter(at, 8); err != nil {
			return errors.Join(broken, w.fail(link, err))
		}
		node, err := w.words(ctx, at, 2)
		if err != nil {
			return errors.Join(broken, w.fail(at, err))
		}
		if node[1] != link && broken == nil {
			broken = w.fail(at, fmt.Errorf("%w: %#x leads to it, not %#x", ErrBackLink, node[1], link))
		}
		if err := f(at); err != nil {
			return errors.Join(broken, w.fail(at, err))
		}
		at, link = node[0], at
	}
	return broken
}

// Tree calls f with the address of each rb_node of the tree whose rb_root is at
// root, in order. The rest is as for List.
func (k *Kernel) Tree(ctx context.Context, object string, root uint64, most int, f func(node uint64) error) error {
	w := k.walk(object, most)
	if err := k.pointer(root, 8); err != nil {
		return w.fail(root, err)
	}
	first, err := w.words(ctx, root, 1)
	if err != nil {
		return w.fail(root, err)
	}
	type visit struct {
		at    uint64
		right uint64
	}
	var broken error
	var path []visit
	at, parent := first[0], uint64(0)
	for {
		for at != 0 {
			if err := w.enter(at, 8); err != nil {
				return errors.Join(broken, w.fail(max(parent, root), err))
			}
			// __rb_parent_color, rb_right, rb_left (include/linux/rbtree_types.h)
			node, err := w.words(ctx, at, 3)
			if err != nil {
				return errors.Join(broken, w.fail(at, err))
			}
			if up := node[0] &^ 3; up != parent && broken == nil {
				broken = w.fail(at, fmt.Errorf("%w: %#x is above it, not %#x", ErrBackLink, up, parent))
			}
			path = append(path, visit{at, node[1]})
			at, parent = node[2], at
		}
		if len(path) == 0 {
			return broken
		}
		top := path[len(path)-1]
		path = path[:len(path)-1]
		if err := f(top.at); err != nil {
			return errors.Join(broken, w.fail(top.at, err))
		}
		at, parent = top.right, top.at
	}
}
