// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
)

// maxModuleBTF bounds a module's BTF, in bytes.
const maxModuleBTF = 8 << 20

// ModuleTypes reads the types of a module, which build on the kernel's: the
// BTF that the kernel keeps of it (struct btf_module in kernel/bpf/btf.c). The
// error wraps ErrNoTypes where the module or the kernel has none
// (CONFIG_DEBUG_INFO_BTF_MODULES), or is an *ObjectError.
func (k *Kernel) ModuleTypes(ctx context.Context, m *Module) (*Types, error) {
	none := &ObjectError{"BTF of module " + m.Name, m.Address, errors.New("the kernel keeps no BTF of it")}
	if !k.Types.Has("btf_module", "list", "module", "btf") || !k.Types.Has("btf", "data", "data_size") {
		return nil, errors.Join(none, ErrNoTypes)
	}
	head, err := k.symbol("btf_modules")
	if err != nil {
		return nil, errors.Join(none, ErrNoTypes, err)
	}
	offset, err := k.offset("btf_module", "list")
	if err != nil {
		return nil, err
	}
	var found *Types
	view := k.View()
	err = view.List(ctx, "BTF of modules", head, maxModules, func(node uint64) error {
		o, err := view.Object(ctx, "btf_module", node-offset)
		if err != nil {
			return err
		}
		owner, err := o.Pointer("module")
		if err != nil || owner != m.Address {
			return err
		}
		at, err := o.Pointer("btf")
		if err != nil {
			return err
		}
		if found, err = view.btfObject(ctx, at); err != nil {
			return err
		}
		return ErrStop
	})
	if found != nil {
		return found, nil
	}
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", m.Name, err)
	}
	return nil, errors.Join(none, ErrNoTypes)
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
