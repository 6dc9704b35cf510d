// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
)

// layout is where some fields of a struct lie, for reading many of them out of
// bytes at hand.
type layout struct {
	size   uint64
	fields []Field
}

// maxLayout bounds the size of a struct that is read as a whole.
const maxLayout = 64 << 10

// layout finds fields, each of which is a number or pointer. The error names
// the struct or field that is missing.
func (k *Kernel) layout(name string, paths ...string) (*layout, error) {
	if k.Types == nil {
		return nil, errors.Join(ErrNoTypes, k.TypesErr)
	}
	s, err := k.Types.Struct(name)
	if err != nil {
		return nil, err
	}
	l := &layout{size: uint64(s.Size)}
	if l.size == 0 || l.size > maxLayout {
		return nil, fmt.Errorf("struct %s has %d bytes, 1 to %d are taken: %w", name, l.size, maxLayout, ErrBadTypes)
	}
	data := make([]byte, l.size)
	for _, path := range paths {
		f, err := s.Field(path)
		if err != nil {
			return nil, err
		}
		if _, err := f.number(data); err != nil {
			return nil, fmt.Errorf("struct %s: %w", name, err)
		}
		l.fields = append(l.fields, f)
	}
	return l, nil
}

// uint is the value of the i-th field in a struct's bytes.
func (l *layout) uint(p []byte, i int) uint64 {
	v, _ := l.fields[i].number(p) // it fits: layout tried
	return v
}

// enumerator is the value of a name of an anonymous enum.
func (k *Kernel) enumerator(name string) (uint64, error) {
	if k.Types == nil {
		return 0, errors.Join(ErrNoTypes, k.TypesErr)
	}
	v, err := k.Types.EnumValue("", name)
	return uint64(v), err
}

// fill reads a kernel object's bytes. The error is an *ObjectError.
func (k *Kernel) fill(ctx context.Context, object string, at uint64, p []byte) error {
	if err := k.pointer(at, 1); err != nil {
		return &ObjectError{object, at, err}
	}
	if err := k.Space.Read(ctx, at, p); err != nil {
		return &ObjectError{object, at, err}
	}
	return nil
}

// array calls f for each of n elements of size bytes. The caller bounds n.
func (k *Kernel) array(ctx context.Context, object string, at, size, n uint64, f func(at uint64, p []byte) error) error {
	const chunk = 256 << 10
	buf := make([]byte, min(n, max(1, chunk/size))*size)
	for n > 0 {
		p := buf[:min(uint64(len(buf)), n*size)]
		if err := k.fill(ctx, object, at, p); err != nil {
			return err
		}
		for ; len(p) > 0; p = p[size:] {
			if err := f(at, p[:size]); err != nil {
				return err
			}
			at += size
			n--
		}
	}
	return nil
}

// between where a table between two symbols begins, and how many entries of
// size bytes it has, at most most.
func (k *Kernel) between(first, end string, size, most uint64) (start, n uint64, err error) {
	start, err1 := k.symbol(first)
	stop, err2 := k.symbol(end)
	if err := errors.Join(err1, err2); err != nil {
		return 0, 0, err
	}
	if stop < start || (stop-start)/size > most {
		return 0, 0, &ObjectError{first, start, fmt.Errorf("its end is at %#x: more than %d entries, or fewer than none", stop, most)}
	}
	return start, (stop - start) / size, nil
}

// reader reads numbers out of an object until one cannot be.
type reader struct {
	o   *Object
	err error
}

func (r *reader) uint(path string, to *uint64) {
	if r.err == nil {
		*to, r.err = r.o.Uint(path)
	}
}

// moduleTable is a table of a module: n entries.
type moduleTable struct {
	name  string
	at    uint64 // of the struct module
	start uint64
	n     uint64
}

// moduleTables lists a table of each module by the fields that say where it is
// and how many entries it has. Modules that are not there yet have none.
func (k *Kernel) moduleTables(ctx context.Context, start, count string) ([]moduleTable, error) {
	head, err := k.symbol("modules")
	if err != nil {
		return nil, err
	}
	list, err := k.offset("module", "list")
	if err != nil {
		return nil, err
	}
	var tables []moduleTable
	err = k.List(ctx, "module list", head, maxModules, func(node uint64) error {
		o, err := k.Part(ctx, "module", node-list, "name", "state", start, count)
		if err != nil {
			return err
		}
		const unformed = 3 // MODULE_STATE_UNFORMED (include/linux/module.h)
		t := moduleTable{at: node - list}
		var state uint64
		r := reader{o: o}
		r.uint("state", &state)
		r.uint(start, &t.start)
		r.uint(count, &t.n)
		if r.err != nil {
			return r.err
		}
		if t.name, err = o.String("name"); err != nil {
			return err
		}
		if state != unformed && t.n != 0 {
			tables = append(tables, t)
		}
		return nil
	})
	return tables, err
}

// problems collects errors of a walk that goes on after one. Of many, as a
// damaged guest gives, the first ones are kept.
type problems struct {
	errs []error
	more int
}

// maxProblems is how many errors of a walk are kept.
const maxProblems = 16

func (p *problems) add(err error) {
	switch {
	case err == nil:
	case len(p.errs) < maxProblems:
		p.errs = append(p.errs, err)
	default:
		p.more++
	}
}

// err joins what was collected; nil: nothing.
func (p *problems) err() error {
	if p.more > 0 {
		return errors.Join(append(p.errs, fmt.Errorf("and %d more errors", p.more))...)
	}
	return errors.Join(p.errs...)
}
