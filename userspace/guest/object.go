// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
)

// ObjectError says which object of the guest's kernel is not as it should be,
// or cannot be read.
type ObjectError struct {
	Object  string // "task_struct", "module list", ...
	Address uint64 // guest-virtual
	Err     error
}

func (e *ObjectError) Error() string { return fmt.Sprintf("%s at %#x: %v", e.Object, e.Address, e.Err) }

// Unwrap returns Err.
func (e *ObjectError) Unwrap() error { return e.Err }

// maxObject bounds the size of a struct, in bytes.
const maxObject = 1 << 20

// Object is one struct of the guest's kernel, read once.
type Object struct {
	Struct  *Struct
	Address uint64
	data    []byte
	have    []Extent // what was read of it, from its start; nil: all
}

// Object reads the struct of that type at a guest-virtual address, once. The
// error is an *ObjectError.
func (k *Kernel) Object(ctx context.Context, typeName string, addr uint64) (*Object, error) {
	return k.Part(ctx, typeName, addr)
}

// Part reads only some fields of a struct, or all of it without any: a task has
// ten kilobytes. The error is an *ObjectError.
func (k *Kernel) Part(ctx context.Context, typeName string, addr uint64, paths ...string) (*Object, error) {
	if k.Types == nil {
		return nil, &ObjectError{typeName, addr, errors.Join(ErrNoTypes, k.TypesErr)}
	}
	s, err := k.Types.Struct(typeName)
	if err != nil {
		return nil, &ObjectError{typeName, addr, err}
	}
	return k.read(ctx, s, addr, paths...)
}

func (k *Kernel) read(ctx context.Context, s *Struct, addr uint64, paths ...string) (*Object, error) {
	fail := func(err error) (*Object, error) { return nil, &ObjectError{s.Name, addr, err} }
	if s.Size == 0 || s.Size > maxObject {
		return fail(fmt.Errorf("%w: it has %d bytes", ErrBadTypes, s.Size))
	}
	if err := k.pointer(addr, 1); err != nil {
		return fail(err)
	}
	o := &Object{Struct: s, Address: addr}
	if len(paths) == 0 {
		o.data = make([]byte, s.Size)
		if err := k.Space.Read(ctx, addr, o.data); err != nil {
			return fail(err)
		}
		return o, nil
	}
	for _, path := range paths {
		f, err := s.Field(path)
		if err != nil {
			return fail(err)
		}
		end := uint64(f.Offset) + uint64(f.Size)
		if end > uint64(s.Size) {
			return fail(fmt.Errorf("%w: %s ends behind the struct", ErrBadTypes, path))
		}
		o.have = append(o.have, Extent{uint64(f.Offset), end})
	}
	slices.SortFunc(o.have, func(a, b Extent) int { return int(a.Start) - int(b.Start) })
	const near = 256 // one read of so much more costs less than two
	merged := o.have[:1]
	for _, x := range o.have[1:] {
		if last := &merged[len(merged)-1]; x.Start <= last.End+near {
			last.End = max(last.End, x.End)
			continue
		}
		merged = append(merged, x)
	}
	o.have = merged
	o.data = make([]byte, merged[len(merged)-1].End)
	for _, x := range merged {
		if err := k.Space.Read(ctx, addr+x.Start, o.data[x.Start:x.End]); err != nil {
			return fail(err)
		}
	}
	return o, nil
}

// What pointers can have wrong.
var (
	ErrNull      = errors.New("a null pointer")
	ErrNotKernel = errors.New("not an address of the kernel")
	ErrUnaligned = errors.New("not an address of such a thing: it is not aligned")
)

// pointer says why an address cannot be that of a kernel object with the
// alignment.
func (k *Kernel) pointer(addr uint64, align uint64) error {
	switch {
	case addr == 0:
		return ErrNull
	case !k.Space.Mode.Kernel(addr):
		return fmt.Errorf("%#x: %w", addr, ErrNotKernel)
	case addr%align != 0:
		return fmt.Errorf("%#x: %w", addr, ErrUnaligned)
	}
	return nil
}

func (o *Object) field(path string) (Field, error) {
	f, err := o.Struct.Field(path)
	if err != nil {
		return f, o.fail(err)
	}
	start, end := uint64(f.Offset), uint64(f.Offset)+uint64(f.Size)
	if o.have != nil {
		if !slices.ContainsFunc(o.have, func(x Extent) bool { return x.Start <= start && end <= x.End }) {
			return f, o.fail(fmt.Errorf("%s was not read", path))
		}
	} else if end > uint64(len(o.data)) {
		return f, o.fail(fmt.Errorf("%w: %s ends behind the struct", ErrBadTypes, path))
	}
	return f, nil
}

func (o *Object) fail(err error) error { return &ObjectError{o.Struct.Name, o.Address, err} }

// Uint is the value of a number, enum, pointer or bit-field. Errors of all
// accessors are *ObjectErrors.
func (o *Object) Uint(path string) (uint64, error) {
	f, err := o.field(path)
	if err != nil {
		return 0, err
	}
	v, err := f.number(o.data)
	if err != nil {
		return 0, o.fail(err)
	}
	return v, nil
}

// Int is the value of a signed number.
func (o *Object) Int(path string) (int64, error) {
	v, err := o.Uint(path)
	return int64(v), err
}

// Pointer is the value of a pointer or unsigned long.
func (o *Object) Pointer(path string) (uint64, error) {
	f, err := o.field(path)
	if err != nil {
		return 0, err
	}
	if f.Size != 8 {
		return 0, o.fail(fmt.Errorf("%s is no pointer: it has %d bytes", path, f.Size))
	}
	return o.Uint(path)
}

// String is the text of an array of characters, up to a NUL or its end.
func (o *Object) String(path string) (string, error) {
	p, err := o.Bytes(path)
	if err != nil {
		return "", err
	}
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return string(p), nil
}

// Bytes are a field as it stands in memory.
func (o *Object) Bytes(path string) ([]byte, error) {
	f, err := o.field(path)
	if err != nil {
		return nil, err
	}
	return slices.Clone(o.data[f.Offset : f.Offset+f.Size]), nil
}

// Addr is the guest-virtual address of a member.
func (o *Object) Addr(path string) (uint64, error) {
	f, err := o.Struct.Field(path)
	if err != nil {
		return 0, o.fail(err)
	}
	return o.Address + uint64(f.Offset), nil
}

// Has says whether the struct has the fields.
func (o *Object) Has(paths ...string) bool { return o.Struct.Has(paths...) }

// symbol is the address of one of the kernel's variables. The error is an
// *ObjectError.
func (k *Kernel) symbol(name string) (uint64, error) {
	at, ok := k.Image.Lookup(name)
	if !ok {
		return 0, &ObjectError{name, 0, ErrNoSymbol}
	}
	if err := k.pointer(at, 1); err != nil {
		return 0, &ObjectError{name, at, err}
	}
	return at, nil
}

// ErrNoSymbol: the kernel has no symbol of the name.
var ErrNoSymbol = errors.New("the kernel has no such symbol")

// pointerAt reads the pointer that a variable of the kernel holds.
func (k *Kernel) pointerAt(ctx context.Context, name string) (uint64, error) {
	at, err := k.symbol(name)
	if err != nil {
		return 0, err
	}
	p, err := k.Space.Pointer(ctx, at)
	if err != nil {
		return 0, &ObjectError{name, at, err}
	}
	return p, nil
}

// offset is where a field of a type lies; for walks from a member to what it is
// in.
func (k *Kernel) offset(typeName, path string) (uint64, error) {
	if k.Types == nil {
		return 0, &ObjectError{typeName, 0, errors.Join(ErrNoTypes, k.TypesErr)}
	}
	s, err := k.Types.Struct(typeName)
	if err != nil {
		return 0, &ObjectError{typeName, 0, err}
	}
	f, err := s.Field(path)
	if err != nil {
		return 0, &ObjectError{typeName, 0, err}
	}
	return uint64(f.Offset), nil
}
