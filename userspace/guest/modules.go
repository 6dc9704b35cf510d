// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Module is a loaded module of the guest's kernel.
type Module struct {
	Address  uint64         `json:"address"` // of its struct module
	Name     string         `json:"name"`
	State    string         `json:"state"`              // as /proc/modules has it: Live, Loading, Unloading; Unformed
	Refcount int            `json:"refcount"`           // as /proc/modules has it; -1: it is being unloaded
	Users    []string       `json:"users,omitempty"`    // modules that need it, in the kernel's order
	Base     uint64         `json:"base"`               // of its text: the address that /proc/modules shows
	Size     uint64         `json:"size"`               // bytes, of all its memory
	Memory   []ModuleMemory `json:"memory"`             // what of it there is
	Taints   uint64         `json:"taints,omitempty"`   // TAINT_* bits
	Exitless bool           `json:"exitless,omitempty"` // it has an init function but none to leave: "[permanent]"
}

// ModuleMemory is a part of a module.
type ModuleMemory struct {
	Kind string `json:"kind"` // "text", "data", "rodata", "ro_after_init", "init_text", ...; "core", "init" before 6.4
	Extent
}

// Contains says whether an address lies in the module.
func (m *Module) Contains(addr uint64) bool {
	for _, part := range m.Memory {
		if part.Contains(addr) {
			return true
		}
	}
	return false
}

// Bounds of modules.
const (
	maxModules    = 1 << 14
	maxModuleSize = 1 << 30
	maxModuleName = 256
	maxUsers      = 1 << 16 // of all modules together
	maxCandidates = 1 << 16 // of what may be a module
)

// Module reads one struct module, without Users. The error is an *ObjectError.
func (k *Kernel) Module(ctx context.Context, addr uint64) (Module, error) {
	m := Module{Address: addr}
	o, err := k.Object(ctx, "module", addr)
	if err != nil {
		return m, err
	}
	if m.Name, err = o.String("name"); err != nil {
		return m, err
	}
	if m.Name == "" || strings.ContainsFunc(m.Name, func(r rune) bool { return r <= ' ' || r == 0x7f || r == 0xfffd }) {
		return m, o.fail(fmt.Errorf("not a module: its name is %q", m.Name[:min(len(m.Name), maxModuleName)]))
	}
	state, err := o.Uint("state")
	if err != nil {
		return m, err
	}
	if m.State, err = k.moduleState(state); err != nil {
		return m, o.fail(err)
	}
	if o.Has("refcnt.counter") { // CONFIG_MODULE_UNLOAD
		n, err := o.Uint("refcnt.counter")
		if err != nil {
			return m, err
		}
		m.Refcount = int(int32(n)) - 1 // MODULE_REF_BASE
	}
	if m.Taints, err = o.Uint("taints"); err != nil {
		return m, err
	}
	if o.Has("init", "exit") {
		begin, err1 := o.Uint("init")
		end, err2 := o.Uint("exit")
		if err := errors.Join(err1, err2); err != nil {
			return m, err
		}
		m.Exitless = begin != 0 && end == 0
	}
	return m, k.moduleMemory(o, &m)
}

func (k *Kernel) moduleState(state uint64) (string, error) {
	for name, text := range map[string]string{
		"MODULE_STATE_LIVE": "Live", "MODULE_STATE_COMING": "Loading",
		"MODULE_STATE_GOING": "Unloading", "MODULE_STATE_UNFORMED": "Unformed",
	} {
		v, err := k.Types.EnumValue("module_state", name)
		if err != nil {
			return "", err
		}
		if uint64(v) == state {
			return text, nil
		}
	}
	return "", fmt.Errorf("not a module: its state is %d", state)
}

// moduleMemory tells where a module is: in up to seven pieces since 6.4, in two
// with a layout each before.
func (k *Kernel) moduleMemory(o *Object, m *Module) error {
	type piece struct{ kind, base, size string }
	var pieces []piece
	if f, err := o.Struct.Field("mem"); err == nil {
		const most = 32
		names := map[int64]string{}
		for _, name := range []string{"TEXT", "DATA", "RODATA", "RO_AFTER_INIT", "INIT_TEXT", "INIT_DATA", "INIT_RODATA"} {
			if v, err := k.Types.EnumValue("mod_mem_type", "MOD_"+name); err == nil {
				names[v] = strings.ToLower(name)
			}
		}
		for i := range min(f.Count, most) {
			name := names[int64(i)]
			if name == "" {
				name = fmt.Sprintf("memory %d", i)
			}
			at := fmt.Sprintf("mem[%d].", i)
			pieces = append(pieces, piece{name, at + "base", at + "size"})
		}
	} else {
		pieces = []piece{{"core", "core_layout.base", "core_layout.size"}, {"init", "init_layout.base", "init_layout.size"}}
		if o.Has("data_layout") { // only where data cannot lie near code; not on x86
			pieces = append(pieces, piece{"data", "data_layout.base", "data_layout.size"})
		}
	}
	for i, p := range pieces {
		base, err1 := o.Pointer(p.base)
		size, err2 := o.Uint(p.size)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		if i == 0 {
			m.Base = base
		}
		if size == 0 {
			continue
		}
		m.Size += size
		if size > maxModuleSize || !k.Space.Mode.Kernel(base) || base+size < base {
			return o.fail(fmt.Errorf("not a module: its %s has %d bytes at %#x", p.kind, size, base))
		}
		m.Memory = append(m.Memory, ModuleMemory{p.kind, Extent{base, base + size}})
	}
	if m.Size == 0 {
		return o.fail(errors.New("not a module: it has no memory"))
	}
	return nil
}

// moduleUsers lists which modules use this one.
func (k *moduleCollector) moduleUsers(ctx context.Context, m *Module) error {
	if !k.Types.Has("module", "source_list") {
		return nil
	}
	head, err := k.offset("module", "source_list")
	if err != nil {
		return err
	}
	link, err := k.offset("module_use", "source_list")
	if err != nil {
		return err
	}
	return k.List(ctx, "users of module "+m.Name, m.Address+head, maxUsers-k.users, func(node uint64) error {
		k.users++
		use, err := k.Object(ctx, "module_use", node-link)
		if err != nil {
			return err
		}
		source, err := use.Pointer("source")
		if err != nil {
			return err
		}
		user, err := k.Part(ctx, "module", source, "name")
		if err != nil {
			return err
		}
		name, err := user.String("name")
		m.Users = append(m.Users, name)
		return err
	})
}

// Modules lists the modules by the kernel's list, which lsmod sees, the newest
// first. Errors are as for Tasks.
func (k *Kernel) Modules(ctx context.Context) ([]Module, error) {
	return settle(ctx, k, func(k *Kernel, ctx context.Context) ([]Module, error) {
		head, err := k.moduleList(ctx)
		if err != nil {
			return nil, err
		}
		offset, err := k.offset("module", "list")
		if err != nil {
			return nil, err
		}
		c := moduleCollector{Kernel: k}
		err = k.List(ctx, "module list", head, maxModules, func(node uint64) error { c.add(ctx, node-offset); return nil })
		return c.done(err)
	})
}

// moduleList finds the head of the list of modules. More than one variable may
// have its name.
func (k *Kernel) moduleList(ctx context.Context) (uint64, error) {
	const name = "modules"
	var errs []error
	for _, sym := range k.Image.Symbols.LookupAll(name) {
		at := sym.Address + k.Image.Slide
		next, err := k.Space.Pointer(ctx, at)
		if err == nil {
			err = k.pointer(next, 8)
		}
		var back uint64
		if err == nil {
			back, err = k.Space.Pointer(ctx, next+8)
		}
		if err == nil && (back == at || len(k.Image.Symbols.LookupAll(name)) == 1) {
			return at, nil
		}
		if err == nil {
			err = ErrBackLink
		}
		errs = append(errs, &ObjectError{"module list", at, err})
	}
	if len(errs) == 0 {
		return 0, &ObjectError{name, 0, ErrNoSymbol}
	}
	return 0, errors.Join(errs...)
}

// moduleCollector gathers modules of which some may be damaged.
type moduleCollector struct {
	*Kernel
	found      []Module
	seen       map[uint64]bool
	errs       []error
	users      int
	candidates int
}

func (c *moduleCollector) note(err error) { c.errs = bounded(c.errs, err) }

func (c *moduleCollector) add(ctx context.Context, at uint64) {
	if c.seen == nil {
		c.seen = map[uint64]bool{}
	}
	if c.seen[at] || len(c.seen) >= maxModules {
		return
	}
	c.seen[at] = true
	m, err := c.Module(ctx, at)
	if err != nil {
		c.note(err)
		return
	}
	c.note(c.moduleUsers(ctx, &m))
	c.found = append(c.found, m)
}

func (c *moduleCollector) done(err error) ([]Module, error) {
	return c.found, errors.Join(append(c.errs, err)...)
}

// ModuleTree lists the modules by the tree through which the kernel finds a
// module by an address in it. Kernels without perf events and tracing have
// none: ErrNoSymbol. Errors are as for Tasks.
func (k *Kernel) ModuleTree(ctx context.Context) ([]Module, error) {
	return settle(ctx, k, func(k *Kernel, ctx context.Context) ([]Module, error) {
		o, err := k.variable(ctx, "mod_tree", "mod_tree_root")
		if err != nil {
			return nil, err
		}
		// A latch: while one tree is changed readers take the other, by the
		// lowest bit of a counter.
		sequence := ""
		for _, path := range []string{"root.seq.seqcount.sequence", "root.seq.sequence"} {
			if o.Has(path) {
				sequence = path
			}
		}
		n, err := o.Uint(sequence)
		if err != nil {
			return nil, err
		}
		which := n & 1
		root, err := o.Addr(fmt.Sprintf("root.tree[%d]", which))
		if err != nil {
			return nil, err
		}
		offset, err := k.offset("mod_tree_node", fmt.Sprintf("node.node[%d]", which))
		if err != nil {
			return nil, err
		}
		c := moduleCollector{Kernel: k}
		const most = 8 * maxModules
		err = k.Tree(ctx, "module tree", root, most, func(node uint64) error {
			n, err := k.Object(ctx, "mod_tree_node", node-offset)
			if err != nil {
				c.note(err)
				return nil
			}
			at, err := n.Pointer("mod")
			if err != nil {
				c.note(err)
				return nil
			}
			c.add(ctx, at)
			return nil
		})
		return c.done(err)
	})
}

// ModuleKset lists the modules by what /sys/module shows. Modules that are
// built in are left out. Errors are as for Tasks.
func (k *Kernel) ModuleKset(ctx context.Context) ([]Module, error) {
	return settle(ctx, k, func(k *Kernel, ctx context.Context) ([]Module, error) {
		at, err := k.pointerAt(ctx, "module_kset")
		if err != nil {
			return nil, err
		}
		set, err := k.Object(ctx, "kset", at)
		if err != nil {
			return nil, err
		}
		head, err := set.Addr("list")
		if err != nil {
			return nil, err
		}
		entry, err := k.offset("kobject", "entry")
		if err != nil {
			return nil, err
		}
		kobj, err := k.offset("module_kobject", "kobj")
		if err != nil {
			return nil, err
		}
		c := moduleCollector{Kernel: k}
		err = k.List(ctx, "module kset", head, maxModules, func(node uint64) error {
			o, err := k.Part(ctx, "module_kobject", node-entry-kobj, "mod")
			if err != nil {
				c.note(err)
				return nil
			}
			mod, err := o.Pointer("mod")
			if err != nil {
				c.note(err)
			} else if mod != 0 {
				c.add(ctx, mod)
			}
			return nil
		})
		return c.done(err)
	})
}

// The end of where x86-64 Linux has modules (Documentation/arch/x86/x86_64/mm.rst).
// They begin behind the kernel image.
const moduleEnd = 0xffffffffff000000

// maxModuleArea bounds what ModuleAreas reads.
const maxModuleArea = 256 << 20

// ModuleAreas finds modules without any list: it looks through all data in the
// addresses where modules lie for what can only be a struct module, one that
// says of itself where it is. Errors are as for Tasks.
func (k *Kernel) ModuleAreas(ctx context.Context) ([]Module, error) {
	return settle(ctx, k, (*Kernel).moduleAreas)
}

func (k *Kernel) moduleAreas(ctx context.Context) ([]Module, error) {
	end, err := k.symbol("_end")
	if err != nil {
		return nil, err
	}
	self, err := k.offset("module", "mkobj.mod")
	if err != nil {
		return nil, err
	}
	// Runs of pages that code cannot be in: struct module is data.
	var runs []Extent
	total := uint64(0)
	err = k.Space.Mappings(ctx, end, moduleEnd, func(m Mapping) error {
		if m.Executable || m.User || m.GVA < end {
			return nil
		}
		if total += m.Size; total > maxModuleArea {
			return &ObjectError{"module addresses", m.GVA, ErrTooLong}
		}
		if n := len(runs); n > 0 && runs[n-1].End == m.GVA && runs[n-1].Size() < 1<<20 {
			runs[n-1].End += m.Size
		} else {
			runs = append(runs, Extent{m.GVA, m.GVA + m.Size})
		}
		return nil
	})
	c := moduleCollector{Kernel: k}
	c.note(err)
	for _, x := range runs {
		if ctx.Err() != nil {
			return c.done(ctx.Err())
		}
		p := make([]byte, x.Size())
		if err := k.Space.Read(ctx, x.Start, p); err != nil {
			c.note(&ObjectError{"module addresses", x.Start, err})
			continue
		}
		// The pointer lies so far behind the start of the struct that it points
		// to, which is aligned to a cache line.
		for at := 0; at+8 <= len(p); at += 8 {
			v := binary.LittleEndian.Uint64(p[at:])
			if v == x.Start+uint64(at)-self && v%8 == 0 && v >= end && v < moduleEnd {
				if c.candidates++; c.candidates > maxCandidates {
					return c.done(&ObjectError{"module addresses", v, ErrTooLong})
				}
				c.candidate(ctx, v)
			}
		}
	}
	return c.done(nil)
}

// candidate adds what may be a module if it is one: bytes that look alike are
// no error, and what is left of an unloaded one is none.
func (c *moduleCollector) candidate(ctx context.Context, at uint64) {
	m, err := c.Module(ctx, at)
	if err != nil || !m.Contains(at) {
		return
	}
	c.add(ctx, at)
}
