// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Bounds of what is taken for modules and their symbols. The largest modules
// have some 60,000 symbols.
const (
	mostModules       = 4096
	mostModuleSymbols = 1 << 20  // of all modules together
	mostModuleStrings = 64 << 20 // bytes, of all modules together
	mostExports       = 1 << 16
	mostModuleExports = 1 << 18 // of all modules together
	mostExportStrings = 8 << 20 // bytes
	mostPrograms      = 1 << 16
	mostOther         = 1 << 14
)

// moduleExtent is memory of a module.
type moduleExtent struct {
	Extent
	module string
}

// ReadModules reads anew which modules there are, with the symbols of their
// own tables, and what else the kernel gives names to while it runs: programs,
// trampolines and dispatchers of BPF, ftrace's trampolines, kprobes' pages, in
// modules "bpf", "__builtin__ftrace" and "__builtin__kprobes". Image has them
// afterwards. It needs types. The error, *ObjectErrors joined, says what of
// them cannot be read; the rest is there.
//
// These are the names that /proc/kallsyms has, those of BPF even where
// net.core.bpf_jit_kallsyms hides them; it also has, while the function
// tracer is on, functions of modules' init that are gone, which Image lacks.
func (k *Kernel) ReadModules(ctx context.Context) error {
	if k.Types == nil {
		return &ObjectError{"modules", 0, errors.Join(ErrNoTypes, k.TypesErr)}
	}
	v := k.View() // tables lie side by side
	r := moduleReader{k: v}
	k.newest, _ = v.newestModule(ctx)
	err := errors.Join(r.modules(ctx), r.programs(ctx), r.trampolines(ctx), r.kprobes(ctx))
	slices.SortFunc(r.extents, func(a, b moduleExtent) int { return cmp.Compare(a.Start, b.Start) })
	image := *k.Image
	image.modules, image.extents = r.list.symbols(true), r.extents
	k.Image = &image
	return err
}

// newestModule says which module is the first one of their list: the one that
// was loaded last, of those that there are.
func (k *Kernel) newestModule(ctx context.Context) (string, error) {
	head, err := k.symbol("modules")
	if err != nil {
		return "", err
	}
	list, err := k.offset("module", "list")
	if err != nil {
		return "", err
	}
	first, err := k.Space.Pointer(ctx, head)
	if err != nil {
		return "", &ObjectError{"modules", head, err}
	}
	if first == head {
		return "none", nil
	}
	o, err := k.Part(ctx, "module", first-list, "name")
	if err != nil {
		return "", err
	}
	name, err := o.String("name")
	return fmt.Sprintf("%s at %#x", name, first), err
}

// SameModules says, by two small reads, whether the module that was loaded last
// is the one that it was for ReadModules: none was loaded since, and the names
// that addresses have hold.
func (k *Kernel) SameModules(ctx context.Context) bool {
	newest, err := k.newestModule(ctx)
	return err == nil && newest == k.newest
}

type moduleReader struct {
	k        *Kernel
	list     symbolList
	extents  []moduleExtent
	count    uint64 // entries of tables
	exported uint64
	strings  uint64 // bytes of names
}

// modules reads all modules' symbols.
func (r *moduleReader) modules(ctx context.Context) error {
	head, err := r.k.symbol("modules")
	if err != nil {
		return err
	}
	list, err := r.k.offset("module", "list")
	if err != nil {
		return err
	}
	var failed []error
	err = r.k.List(ctx, "modules", head, mostModules, func(node uint64) error {
		if err := r.module(ctx, node-list); err != nil {
			failed = append(failed, err)
		}
		return ctx.Err()
	})
	return errors.Join(err, errors.Join(failed...))
}

// moduleUnformed is MODULE_STATE_UNFORMED (include/linux/module.h): nothing of
// it is set up.
const moduleUnformed = 3

// module reads the symbols of the module at an address, from the table that
// kallsyms uses: while it is loaded all, afterwards those that it keeps.
func (r *moduleReader) module(ctx context.Context, at uint64) error {
	o, err := r.k.Object(ctx, "module", at)
	if err != nil {
		return err
	}
	name, err1 := o.String("name")
	state, err2 := o.Uint("state")
	table, err3 := o.Pointer("kallsyms")
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	if state == moduleUnformed {
		return nil
	}
	fail := func(err error) error { return &ObjectError{"module " + name, at, err} }
	r.extents = append(r.extents, extentsOf(o, name)...)
	if table == 0 {
		return nil
	}
	t, err := r.k.Object(ctx, "mod_kallsyms", table)
	if err != nil {
		return fail(err)
	}
	symtab, err1 := t.Pointer("symtab")
	count, err2 := t.Uint("num_symtab")
	strtab, err3 := t.Pointer("strtab")
	types, err4 := t.Pointer("typetab")
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return fail(err)
	}
	if count > mostModuleSymbols || r.count+count > mostModuleSymbols {
		return fail(fmt.Errorf("%w: %d symbols", ErrTooLong, r.count+count))
	}
	r.count += count
	exported, unknown := r.exports(ctx, o) // which makes their letters, no more
	// Elf64_Sym (elf(5)).
	const size = 24
	entries, letters := make([]byte, count*size), make([]byte, count)
	if err := r.k.Space.Read(ctx, symtab, entries); err != nil {
		return fail(fmt.Errorf("symbols: %w", err))
	}
	if err := r.k.Space.Read(ctx, types, letters); err != nil {
		return fail(fmt.Errorf("symbols' types: %w", err))
	}
	last := uint64(0)
	for i := range count {
		last = max(last, uint64(binary.LittleEndian.Uint32(entries[i*size:])))
	}
	if r.strings += last; r.strings > mostModuleStrings {
		return fail(fmt.Errorf("%w: names of %d bytes", ErrTooLong, r.strings))
	}
	names := make([]byte, last)
	if err := r.k.Space.Read(ctx, strtab, names); err != nil {
		return fail(fmt.Errorf("symbols' names: %w", err))
	}
	final, err := r.k.Space.String(ctx, strtab+last, longestName)
	if err != nil {
		return fail(fmt.Errorf("symbols' names: %w", err))
	}
	all := string(names) + final + "\x00"
	for i := range count {
		rest := all[binary.LittleEndian.Uint32(entries[i*size:]):]
		end := min(len(rest), longestName)
		if n := indexNUL(rest[:end]); n >= 0 {
			end = n
		}
		sym := Symbol{Name: rest[:end], Module: name, Address: binary.LittleEndian.Uint64(entries[i*size+8:]), Type: letters[i]}
		if sym.Name == "" {
			continue
		}
		at, known := exported[sym.Name]
		switch c := letters[i] | 0x20; {
		case c < 'a' || c > 'z':
			sym.Type = '?'
		case known && at == sym.Address:
			sym.Type = c - 'a' + 'A'
		default:
			sym.Type = c
		}
		r.list.add(sym)
	}
	if unknown != nil {
		return fail(unknown)
	}
	return nil
}

func indexNUL(s string) int {
	for i := range len(s) {
		if s[i] == 0 {
			return i
		}
	}
	return -1
}

// extentsOf are the module's regions: since 6.4 an array of them, before that
// the core's and, until it is freed, the init's.
func extentsOf(o *Object, name string) []moduleExtent {
	var out []moduleExtent
	add := func(base, size string) bool {
		start, err1 := o.Pointer(base)
		length, err2 := o.Uint(size)
		if err1 != nil || err2 != nil {
			return false
		}
		if start != 0 && length != 0 && start+length > start {
			out = append(out, moduleExtent{Extent{start, start + length}, name})
		}
		return true
	}
	if add("core_layout.base", "core_layout.size") {
		add("init_layout.base", "init_layout.size")
		return out
	}
	for i := range 16 {
		if !add(fmt.Sprintf("mem[%d].base", i), fmt.Sprintf("mem[%d].size", i)) {
			break
		}
	}
	return out
}

// exports are the addresses of what a module exports, by name; of a kernel that
// keeps apart what is exported to modules under the GPL only, without these, as
// kallsyms takes it.
func (r *moduleReader) exports(ctx context.Context, o *Object) (map[string]uint64, error) {
	at, err1 := o.Pointer("syms")
	count, err2 := o.Uint("num_syms")
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	out := map[string]uint64{}
	if count == 0 {
		return out, nil
	}
	if count > mostExports || r.exported+count > mostModuleExports {
		return nil, fmt.Errorf("%w: %d exported symbols", ErrTooLong, r.exported+count)
	}
	r.exported += count
	err := r.k.exports(ctx, at, int(count), func(name []byte, at uint64) { out[string(name)] = at })
	if err != nil {
		return nil, fmt.Errorf("exported symbols: %w", err)
	}
	return out, nil
}

// exports calls f with the name and the address of each of an array of count
// struct kernel_symbol (include/linux/export.h), which has offsets from their
// own place (CONFIG_HAVE_ARCH_PREL32_RELOCATIONS) or pointers.
func (k *Kernel) exports(ctx context.Context, at uint64, count int, f func(name []byte, at uint64)) error {
	s, err := k.Types.Struct("kernel_symbol")
	if err != nil {
		return err
	}
	relative := s.Has("value_offset", "name_offset")
	fields := [2]string{"value", "name"}
	width := 8
	if relative {
		fields, width = [2]string{"value_offset", "name_offset"}, 4
	}
	value, err1 := s.Field(fields[0])
	name, err2 := s.Field(fields[1])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	size := uint64(s.Size)
	if size > 256 || uint64(value.Offset)+uint64(width) > size || uint64(name.Offset)+uint64(width) > size {
		return fmt.Errorf("%w: kernel_symbol has %d bytes", ErrBadTypes, size)
	}
	data := make([]byte, uint64(count)*size)
	if err := k.Space.Read(ctx, at, data); err != nil {
		return err
	}
	pointer := func(i int, offset uint64) uint64 {
		p := uint64(i)*size + offset
		if relative {
			return at + p + uint64(int64(int32(binary.LittleEndian.Uint32(data[p:]))))
		}
		return binary.LittleEndian.Uint64(data[p:])
	}
	// The names lie together.
	low, high := ^uint64(0), uint64(0)
	for i := range count {
		p := pointer(i, uint64(name.Offset))
		low, high = min(low, p), max(high, p)
	}
	var names []byte
	if high >= low && high-low <= mostExportStrings {
		names = make([]byte, high-low)
		if err := k.Space.Read(ctx, low, names); err != nil {
			names = nil
		}
	}
	for i := range count {
		p := pointer(i, uint64(name.Offset))
		var text []byte
		end := -1
		if p-low < uint64(len(names)) {
			rest := names[p-low:]
			if end = bytes.IndexByte(rest[:min(len(rest), longestName)], 0); end >= 0 {
				text = rest[:end]
			}
		}
		if end < 0 {
			name, err := k.Space.String(ctx, p, longestName)
			if err != nil {
				return fmt.Errorf("name of export %d: %w", i, err)
			}
			text = []byte(name)
		}
		f(text, pointer(i, uint64(value.Offset)))
	}
	return nil
}

func (r *moduleReader) add(at uint64, name, module string) {
	if name == "" {
		return // kallsyms leaves these out, too
	}
	r.list.add(Symbol{Name: name, Module: module, Address: at, Type: 't'})
}

// programs names what BPF's compiler made (struct bpf_ksym, kernel/bpf/core.c).
func (r *moduleReader) programs(ctx context.Context) error {
	head, ok := r.k.Image.Lookup("bpf_kallsyms")
	if !ok {
		return nil // a kernel without BPF
	}
	node, err := r.k.offset("bpf_ksym", "lnode")
	if err != nil {
		return err
	}
	return r.k.List(ctx, "bpf_kallsyms", head, mostPrograms, func(at uint64) error {
		o, err := r.k.Object(ctx, "bpf_ksym", at-node)
		if err != nil {
			return err
		}
		start, err1 := o.Pointer("start")
		end, err2 := o.Pointer("end")
		name, err3 := o.String("name")
		if err := errors.Join(err1, err2, err3); err != nil {
			return err
		}
		r.add(start, name, "bpf")
		if end > start {
			r.extents = append(r.extents, moduleExtent{Extent{start, end}, "bpf"})
		}
		return nil
	})
}

// trampolines names ftrace's (kernel/trace/ftrace.c).
func (r *moduleReader) trampolines(ctx context.Context) error {
	const module = "__builtin__ftrace"
	head, ok := r.k.Image.Lookup("ftrace_ops_trampoline_list")
	if !ok {
		return nil
	}
	node, err := r.k.offset("ftrace_ops", "list")
	if err != nil {
		return nil // a kernel without dynamic ones
	}
	return r.k.List(ctx, "ftrace_ops_trampoline_list", head, mostOther, func(at uint64) error {
		o, err := r.k.Object(ctx, "ftrace_ops", at-node)
		if err != nil {
			return err
		}
		start, err1 := o.Pointer("trampoline")
		size, err2 := o.Uint("trampoline_size")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		r.add(start, "ftrace_trampoline", module)
		if start+size > start {
			r.extents = append(r.extents, moduleExtent{Extent{start, start + size}, module})
		}
		return nil
	})
}

// kprobes names the pages that hold displaced instructions (kernel/kprobes.c).
func (r *moduleReader) kprobes(ctx context.Context) error {
	const module = "__builtin__kprobes"
	for _, cache := range [][2]string{{"kprobe_insn_slots", "kprobe_insn_page"}, {"kprobe_optinsn_slots", "kprobe_optinsn_page"}} {
		at, ok := r.k.Image.Lookup(cache[0])
		if !ok {
			continue
		}
		head, err1 := r.k.offset("kprobe_insn_cache", "pages")
		node, err2 := r.k.offset("kprobe_insn_page", "list")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		err := r.k.List(ctx, cache[0], at+head, mostOther, func(at uint64) error {
			o, err := r.k.Object(ctx, "kprobe_insn_page", at-node)
			if err != nil {
				return err
			}
			page, err := o.Pointer("insns")
			if err != nil {
				return err
			}
			r.add(page, cache[1], module)
			r.extents = append(r.extents, moduleExtent{Extent{page, page + 4096}, module})
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
