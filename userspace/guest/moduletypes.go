// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/btf"
)

// maxModuleBTF bounds a module's BTF, in bytes.
const maxModuleBTF = 8 << 20

// ModuleTypes reads the types of a module, which build on the kernel's: the
// BTF that the kernel keeps of it (struct btf_module in kernel/bpf/btf.c). The
// error wraps ErrNoTypes where the module or the kernel has none
// (CONFIG_DEBUG_INFO_BTF_MODULES), or is an *ObjectError.
func (k *Kernel) ModuleTypes(ctx context.Context, m *Module) (*Types, error) {
	var found *Types
	err := k.View().eachModuleBTF(ctx, func(module, btf uint64, k *Kernel) (err error) {
		if module != m.Address {
			return nil
		}
		if found, err = k.btfObject(ctx, btf); err != nil {
			return err
		}
		return ErrStop
	})
	switch {
	case found != nil:
		return found, nil
	case err != nil:
		return nil, fmt.Errorf("module %s: %w", m.Name, err)
	}
	return nil, &ObjectError{"BTF of module " + m.Name, m.Address, fmt.Errorf("the kernel keeps none of it: %w", ErrNoTypes)}
}

// FindTypes finds the types that declare a name: the kernel's, or else those of
// a module, whose name it returns then. The error is as for Types.Struct, or an
// *ObjectError.
func (k *Kernel) FindTypes(ctx context.Context, name string) (types *Types, module string, err error) {
	tag, _ := cutKind(name)
	if _, err = k.Types.named(tag, func(btf.Type) bool { return true }); !errors.Is(err, ErrNoType) {
		return k.Types, "", err
	}
	walk := k.View().eachModuleBTF(ctx, func(owner, at uint64, k *Kernel) error {
		t, err := k.btfObject(ctx, at)
		if err != nil {
			return err
		}
		if _, err := t.named(tag, func(btf.Type) bool { return true }); err != nil {
			return nil
		}
		m, err := k.Module(ctx, owner)
		if err != nil {
			return err
		}
		types, module = t, m.Name
		return ErrStop
	})
	switch {
	case types != nil:
		return types, module, nil
	case walk != nil && !errors.Is(walk, ErrNoTypes):
		return nil, "", fmt.Errorf("%w in the kernel, and its modules' cannot all be read: %w", err, walk)
	}
	return nil, "", err
}

// eachModuleBTF calls f with each struct module that has BTF, and its struct
// btf.
func (k *Kernel) eachModuleBTF(ctx context.Context, f func(module, btf uint64, k *Kernel) error) error {
	const object = "BTF of modules"
	if !k.Types.Has("btf_module", "list", "module", "btf") || !k.Types.Has("btf", "data", "data_size") {
		return &ObjectError{object, 0, fmt.Errorf("the kernel keeps none: %w", ErrNoTypes)}
	}
	head, err := k.symbol("btf_modules")
	if err != nil {
		return err
	}
	offset, err := k.offset("btf_module", "list")
	if err != nil {
		return err
	}
	return k.List(ctx, object, head, maxModules, func(node uint64) error {
		o, err := k.Object(ctx, "btf_module", node-offset)
		if err != nil {
			return err
		}
		module, err1 := o.Pointer("module")
		at, err2 := o.Pointer("btf")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		return f(module, at, k)
	})
}

// btfObject decodes what a struct btf holds, on top of the kernel's types.
func (k *Kernel) btfObject(ctx context.Context, addr uint64) (*Types, error) {
	o, err := k.Part(ctx, "btf", addr, "data", "data_size")
	if err != nil {
		return nil, err
	}
	data, err1 := o.Pointer("data")
	size, err2 := o.Uint("data_size")
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if err := k.pointer(data, 1); err != nil {
		return nil, o.fail(err)
	}
	if size < minBTF || size > maxModuleBTF {
		return nil, o.fail(fmt.Errorf("%w: it has %d bytes", ErrBadTypes, size))
	}
	raw := make([]byte, size)
	if err := k.Space.Read(ctx, data, raw); err != nil {
		return nil, o.fail(err)
	}
	t, err := ParseTypes(raw, k.Types)
	if err != nil {
		return nil, o.fail(err)
	}
	return t, nil
}
