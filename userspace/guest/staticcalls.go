// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"fmt"
	"strings"
)

// StaticCall is a struct static_call_site: a call, or a jump at a function's
// end, to a function that the kernel chose (include/linux/static_call_types.h).
type StaticCall struct {
	Entry   uint64 `json:"entry"`   // address of the struct
	Address uint64 `json:"address"` // of the instruction
	Key     uint64 `json:"key"`     // address of the struct static_call_key
	Func    uint64 `json:"func"`    // what is called; 0: nothing
	Tail    bool   `json:"tail"`    // a jump
	Init    bool   `json:"init"`    // it was in code that is freed after boot
	Module  string `json:"module,omitempty"`
}

// StaticTrampoline is a jump of its own to what a static call calls, for code
// that is no site.
type StaticTrampoline struct {
	Address uint64 `json:"address"`
	Key     uint64 `json:"key"`
	Func    uint64 `json:"func"`
	Name    string `json:"name"`
}

// maxStaticCalls bounds the static-call sites of the kernel, or a module.
const maxStaticCalls = 1 << 18

// The bits of static_call_site.key that are no address.
const (
	staticCallTail = 1
	staticCallInit = 2
)

// StaticCalls reads the static-call sites of the kernel, then those of its
// modules, each in its table's order. What could be read is returned beside an
// error; each error names its object. A kernel without inline static calls has
// none.
func (k *Kernel) StaticCalls(ctx context.Context) ([]StaticCall, error) {
	if _, ok := k.Image.Lookup("__start_static_call_sites"); !ok {
		return nil, nil
	}
	k = k.View()
	site, err := k.layout("static_call_site", "addr", "key")
	if err != nil {
		return nil, err
	}
	if f := site.fields; !f[0].Signed || f[0].Size != 4 || !f[1].Signed || f[1].Size != 4 {
		return nil, fmt.Errorf("struct static_call_site: its fields are no relative addresses: %w", ErrBadTypes)
	}
	start, n, err := k.between("__start_static_call_sites", "__stop_static_call_sites", site.size, maxStaticCalls)
	if err != nil {
		return nil, err
	}
	w := staticCallWalk{Kernel: k, site: site, funcs: map[uint64]uint64{}}
	var errs problems
	errs.add(w.sites(ctx, "", start, n))
	modules, err := k.moduleTables(ctx, "static_call_sites", "num_static_call_sites")
	errs.add(err)
	for _, m := range modules {
		if m.n > maxStaticCalls {
			errs.add(&ObjectError{"module " + m.name, m.at, fmt.Errorf("%d static-call sites", m.n)})
			continue
		}
		if err := w.sites(ctx, m.name, m.start, m.n); err != nil {
			errs.add(fmt.Errorf("module %s: %w", m.name, err))
		}
	}
	return w.found, errs.err()
}

type staticCallWalk struct {
	*Kernel
	site  *layout
	funcs map[uint64]uint64 // by key
	found []StaticCall
}

func (w *staticCallWalk) sites(ctx context.Context, module string, start, n uint64) error {
	return w.array(ctx, "static_call_site", start, w.site.size, n, func(at uint64, p []byte) error {
		place := func(i int) uint64 { return at + uint64(w.site.fields[i].Offset) }
		key := place(1) + w.site.uint(p, 1)
		s := StaticCall{
			Entry:   at,
			Module:  module,
			Address: place(0) + w.site.uint(p, 0),
			Key:     key &^ (staticCallTail | staticCallInit),
			Tail:    key&staticCallTail != 0,
			Init:    key&staticCallInit != 0,
		}
		if !s.Init {
			f, ok := w.funcs[s.Key]
			if !ok {
				var err error
				if f, err = w.staticCallFunc(ctx, s.Key); err != nil {
					return fmt.Errorf("static_call_site at %#x: %w", at, err)
				}
				w.funcs[s.Key] = f
			}
			s.Func = f
		}
		w.found = append(w.found, s)
		return nil
	})
}

func (k *Kernel) staticCallFunc(ctx context.Context, key uint64) (uint64, error) {
	l, err := k.layout("static_call_key", "func")
	if err != nil {
		return 0, err
	}
	p := make([]byte, l.size)
	if err := k.fill(ctx, "static_call_key", key, p); err != nil {
		return 0, err
	}
	return l.uint(p, 0), nil
}

// Prefixes of the symbols of a static call's key and trampoline.
const (
	prefixStaticKey        = "__SCK__"
	prefixStaticTrampoline = "__SCT__"
)

// StaticTrampolines finds the trampolines of the kernel's static calls by the
// names of their symbols. What could be read is returned beside an error.
func (k *Kernel) StaticTrampolines(ctx context.Context) ([]StaticTrampoline, error) {
	k = k.View()
	var found []StaticTrampoline
	var errs problems
	for sym := range k.Image.Symbols.All() {
		name, ok := strings.CutPrefix(sym.Name, prefixStaticTrampoline)
		if !ok || sym.Module != "" {
			continue
		}
		at, ok1 := k.Image.Lookup(sym.Name)
		key, ok2 := k.Image.Lookup(prefixStaticKey + name)
		if !ok1 || !ok2 {
			continue
		}
		f, err := k.staticCallFunc(ctx, key)
		if err != nil {
			errs.add(err)
			continue
		}
		found = append(found, StaticTrampoline{Address: at, Key: key, Func: f, Name: name})
	}
	return found, errs.err()
}

// Instructions of arch/x86/kernel/static_call.c beside calls and jumps.
var (
	staticReturn = []byte{opcodeRet, opcodeInt3, opcodeInt3, opcodeInt3, opcodeInt3}
	// A call of a function that returns 0: 5.13 to 5.15 have the first.
	staticZero = [][]byte{{0x66, 0x66, 0x48, 0x31, 0xc0}, {0x2e, 0x2e, 0x2e, 0x31, 0xc0}}
	staticWarn = []byte{0x67, 0x48, 0x0f, 0xb9, 0x3a}
)

type staticCallCode struct {
	nop        []byte
	thunks     []uint64 // what a function returns through
	ret        uint64   // __static_call_return
	zero, warn uint64   // functions that are not called, but done in place
}

func (k *Kernel) staticCallCode(ctx context.Context) (staticCallCode, error) {
	var c staticCallCode
	var errs problems
	var err error
	c.nop, err = k.idealNop(ctx)
	errs.add(err)
	c.thunks, err = k.returnThunks(ctx)
	errs.add(err)
	c.ret, _ = k.Image.Lookup("__static_call_return")
	c.zero, _ = k.Image.Lookup("__static_call_return0")
	c.warn, _ = k.Image.Lookup("__WARN_trap")
	return c, errs.err()
}

// returnThunks are where functions may return through: what x86_return_thunk
// holds since 6.5, or __x86_return_thunk.
func (k *Kernel) returnThunks(ctx context.Context) ([]uint64, error) {
	var thunks []uint64
	if at, ok := k.Image.Lookup("__x86_return_thunk"); ok {
		thunks = append(thunks, at)
	}
	variable, ok := k.Image.Lookup("x86_return_thunk")
	if !ok {
		return thunks, nil
	}
	thunk, err := k.Space.Pointer(ctx, variable)
	if err != nil {
		return thunks, &ObjectError{"x86_return_thunk", variable, err}
	}
	if !k.Image.Text().Contains(thunk) {
		return thunks, &ObjectError{"x86_return_thunk", variable, fmt.Errorf("%#x is not in the kernel's text", thunk)}
	}
	if len(thunks) == 0 || thunks[0] != thunk {
		thunks = append(thunks, thunk)
	}
	return thunks, nil
}

// returns are the ways to return, of five bytes at at.
func (c *staticCallCode) returns(at uint64) [][]byte {
	want := [][]byte{staticReturn}
	for _, thunk := range c.thunks {
		if code := branch(opcodeJmp32, at, thunk); code != nil {
			want = append(want, code)
		}
	}
	return want
}

// want is what __static_call_transform() writes to a site or trampoline. Where
// a jump is to be there may be a conditional one, which stays so.
func (c *staticCallCode) want(p *Patch, function uint64, tail bool) {
	add := func(code []byte) {
		if code != nil {
			p.Want = append(p.Want, code)
		}
	}
	switch {
	case !tail && function == 0:
		add(c.nop)
	case !tail && function == c.zero:
		p.Want = staticZero
	case !tail:
		add(branch(opcodeCall, p.Address, function))
		if function == c.warn {
			add(staticWarn)
		}
	case function == 0:
		p.Want = c.returns(p.Address)
		p.Cond = append([]uint64{c.ret}, c.thunks...)
	default:
		add(branch(opcodeJmp32, p.Address, function))
		p.Cond = []uint64{function}
	}
}

// StaticCallPatches says what must be at each static-call site and trampoline.
// Sites in code that was freed after boot are left out. What could be told is
// returned beside an error.
func (k *Kernel) StaticCallPatches(ctx context.Context, sites []StaticCall, trampolines []StaticTrampoline) ([]Patch, error) {
	c, err := k.staticCallCode(ctx)
	var errs problems
	errs.add(err)
	patches := make([]Patch, 0, len(sites)+len(trampolines))
	for i := range sites {
		s := &sites[i]
		if s.Init {
			continue
		}
		p := Patch{Address: s.Address, Table: TableStaticCall, Object: s.Entry, Detail: fmt.Sprintf("call %#x", s.Func)}
		if s.Func == 0 {
			p.Detail = "call nothing"
		}
		c.want(&p, s.Func, s.Tail)
		patches = append(patches, p)
	}
	for _, t := range trampolines {
		p := Patch{Address: t.Address, Table: TableStaticCall, Object: t.Key, Detail: fmt.Sprintf("trampoline of %s to %#x", t.Name, t.Func)}
		c.want(&p, t.Func, true)
		patches = append(patches, p)
	}
	return patches, errs.err()
}
