// SPDX-License-Identifier: MIT

// Package prune makes test data small.
package prune

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf/btf"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/dump"
)

// Attach attaches to the guest in a memory dump, which stays open. Its types
// are cut down as BTF does, and written to out.btf.gz.
func Attach(ctx context.Context, name, out string, types []string, enums ...string) (*guest.Kernel, error) {
	d, err := dump.Open(name)
	if err != nil {
		return nil, err
	}
	k, err := guest.Attach(ctx, d, guest.AttachOptions{})
	if err != nil {
		return nil, err
	}
	if k.Types == nil {
		return nil, k.TypesErr
	}
	small, err := BTF(k.Types.Raw(), types, enums...)
	if err != nil {
		return nil, fmt.Errorf("cut down BTF: %w", err)
	}
	if k.Types, err = guest.ParseTypes(small, nil); err != nil {
		return nil, err
	}
	return k, Pack(out+".btf.gz", small)
}

// Look reads the tasks, modules, descriptor tables and system calls of a kernel
// in each way that there is.
func Look(ctx context.Context, k *guest.Kernel) error {
	var errs []error
	note := func(_ any, err error) { errs = append(errs, err) }
	note(k.Tasks(ctx))
	note(k.PIDTable(ctx))
	note(k.RunQueues(ctx))
	note(k.Modules(ctx))
	note(k.ModuleTree(ctx))
	note(k.ModuleKset(ctx))
	note(k.ModuleAreas(ctx))
	note(k.CPUTables(ctx))
	note(k.SyscallTables(ctx))
	note(k.Dispatchers(ctx))
	for i := -1; i < len(k.CPUs); i++ { // -1: the kernel's own
		_, _, err := k.Interrupts(ctx, i)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Write writes a snapshot to a file.
func Write(name string, s *guest.Snapshot) error {
	file, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(s.Write(file), file.Close())
}

// Pack writes a file compressed by gzip.
func Pack(name string, data []byte) error {
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := z.Write(data); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return os.WriteFile(name, out.Bytes(), 0o644)
}

// BTF cuts a kernel's BTF down to the types of the names and what they hold, and
// to enums without a name whose first value's begins with one of the prefixes.
func BTF(raw []byte, names []string, enums ...string) ([]byte, error) {
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	p := pruner{seen: map[btf.Type]bool{}, fwd: map[string]*btf.Fwd{}}
	var types []btf.Type
	for _, name := range names {
		all, err := spec.AnyTypesByName(name)
		if err != nil {
			continue
		}
		for _, typ := range all {
			switch typ.(type) {
			case *btf.Struct, *btf.Union, *btf.Enum, *btf.Typedef:
				p.cut(typ)
				types = append(types, typ)
			}
		}
	}
	for typ, err := range spec.All() {
		if err != nil {
			return nil, err
		}
		e, ok := typ.(*btf.Enum)
		if ok && e.Name == "" && slices.ContainsFunc(enums, func(prefix string) bool {
			return len(e.Values) > 0 && strings.HasPrefix(e.Values[0].Name, prefix)
		}) {
			types = append(types, e)
		}
	}
	b, err := btf.NewBuilder(types, nil)
	if err != nil {
		return nil, err
	}
	return b.Marshal(nil, nil)
}

type pruner struct {
	seen map[btf.Type]bool
	fwd  map[string]*btf.Fwd
}

// cut lets pointers lead to a name only.
func (p *pruner) cut(typ btf.Type) {
	if typ == nil || p.seen[typ] {
		return
	}
	p.seen[typ] = true
	switch v := typ.(type) {
	case *btf.Struct:
		for i := range v.Members {
			p.cut(v.Members[i].Type)
		}
	case *btf.Union:
		for i := range v.Members {
			p.cut(v.Members[i].Type)
		}
	case *btf.Array:
		p.cut(v.Type)
		p.cut(v.Index)
	case *btf.Typedef:
		p.cut(v.Type)
	case *btf.Const:
		p.cut(v.Type)
	case *btf.Volatile:
		p.cut(v.Type)
	case *btf.Restrict:
		p.cut(v.Type)
	case *btf.TypeTag:
		p.cut(v.Type)
	case *btf.Pointer:
		s, ok := btf.As[*btf.Struct](v.Target)
		if !ok || s.Name == "" {
			v.Target = (*btf.Void)(nil)
			return
		}
		if p.fwd[s.Name] == nil {
			p.fwd[s.Name] = &btf.Fwd{Name: s.Name, Kind: btf.FwdStruct}
		}
		v.Target = p.fwd[s.Name]
	}
}
