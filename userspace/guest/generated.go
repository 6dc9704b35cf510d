// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"fmt"
)

// GeneratedCode is code that a kernel made while it runs, outside of its own
// text and its modules'.
type GeneratedCode struct {
	Extent        // of kprobes: whole pages
	Kind   Table  // what made it: TableFtrace, TableKprobe, TableBPF
	Name   string // as in /proc/kallsyms: "ftrace_trampoline", "bpf_prog_..."
	Object uint64 // address of the struct that says so
}

// Bounds of generated code.
const (
	maxTrampolineOps = 1 << 14
	maxInsnPages     = 1 << 14
)

// GeneratedCode lists the code that ftrace, kprobes and eBPF made: trampolines,
// copies of instructions, programs. What could be read is returned beside an
// error; each error names its object.
func (k *Kernel) GeneratedCode(ctx context.Context) ([]GeneratedCode, error) {
	k = k.View()
	var errs problems
	var all []GeneratedCode
	add := func(found []GeneratedCode, err error) {
		all = append(all, found...)
		errs.add(err)
	}
	add(k.ftraceTrampolines(ctx))
	for _, name := range []string{"kprobe_insn", "kprobe_optinsn"} {
		add(k.kprobePages(ctx, name))
	}
	b := &BPF{}
	errs.add(k.bpfSymbols(ctx, b))
	for _, s := range b.Symbols {
		all = append(all, GeneratedCode{s.Code, TableBPF, s.Name, s.Object})
	}
	return all, errs.err()
}

// ftraceTrampolines lists the trampolines of ftrace_ops that have one, those
// that do not trace any more included.
func (k *Kernel) ftraceTrampolines(ctx context.Context) ([]GeneratedCode, error) {
	head, err := k.symbol("ftrace_ops_trampoline_list")
	if err != nil {
		return nil, err
	}
	link, err := k.offset("ftrace_ops", "list")
	if err != nil {
		return nil, err
	}
	var found []GeneratedCode
	err = k.List(ctx, "list of ftrace trampolines", head, maxTrampolineOps, func(node uint64) error {
		o, err := k.Part(ctx, "ftrace_ops", node-link, "trampoline", "trampoline_size")
		if err != nil {
			return err
		}
		var start, size uint64
		r := reader{o: o}
		r.uint("trampoline", &start)
		r.uint("trampoline_size", &size)
		if r.err != nil {
			return r.err
		}
		const most = 64 << 10
		if err := k.pointer(start, 1); err != nil {
			return o.fail(fmt.Errorf("its trampoline: %w", err))
		}
		if size > most {
			return o.fail(fmt.Errorf("its trampoline has %d bytes, at most %d are taken", size, most))
		}
		found = append(found, GeneratedCode{Extent{start, start + size}, TableFtrace, "ftrace_trampoline", o.Address})
		return nil
	})
	return found, err
}

// kprobePages lists the pages of a struct kprobe_insn_cache.
func (k *Kernel) kprobePages(ctx context.Context, name string) ([]GeneratedCode, error) {
	cache, err := k.symbol(name + "_slots")
	if err != nil {
		return nil, err
	}
	pages, err := k.offset("kprobe_insn_cache", "pages")
	if err != nil {
		return nil, err
	}
	link, err := k.offset("kprobe_insn_page", "list")
	if err != nil {
		return nil, err
	}
	var found []GeneratedCode
	err = k.List(ctx, "list of "+name+" pages", cache+pages, maxInsnPages, func(node uint64) error {
		o, err := k.Part(ctx, "kprobe_insn_page", node-link, "insns")
		if err != nil {
			return err
		}
		start, err := o.Pointer("insns")
		if err != nil {
			return err
		}
		if err := k.pointer(start, 1); err != nil {
			return o.fail(fmt.Errorf("its page: %w", err))
		}
		found = append(found, GeneratedCode{Extent{start, start + 4096}, TableKprobe, name + "_page", o.Address})
		return nil
	})
	return found, err
}
