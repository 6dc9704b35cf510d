// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"fmt"
)

// Kprobe is a struct kprobe: a place in code that is stopped at
// (include/linux/kprobes.h).
type Kprobe struct {
	Object      uint64 `json:"object"`  // address of the struct
	Address     uint64 `json:"address"` // of the instruction that is probed
	Symbol      string `json:"symbol,omitempty"`
	Offset      uint64 `json:"offset,omitempty"` // bytes behind the symbol
	PreHandler  uint64 `json:"pre_handler"`
	PostHandler uint64 `json:"post_handler,omitempty"`
	Opcode      byte   `json:"opcode"` // first byte of the instruction that was there
	Flags       uint64 `json:"flags"`  // KPROBE_FLAG_*
	Copy        uint64 `json:"copy,omitempty"`

	// Return says that it is the first half of a kretprobe; the handlers are
	// the kretprobe's own.
	Return       bool   `json:"return,omitempty"`
	Handler      uint64 `json:"handler,omitempty"`
	EntryHandler uint64 `json:"entry_handler,omitempty"`

	// Aggregate says that the kernel made it, of those that probe the same
	// place, or to optimize one.
	Aggregate bool     `json:"aggregate,omitempty"`
	Probes    []Kprobe `json:"probes,omitempty"`

	// Optimized says that instead of a breakpoint there is a jump, to Detour;
	// Pending, that the kernel is about to write it or to take it back.
	Optimized  bool    `json:"optimized,omitempty"`
	Pending    bool    `json:"pending,omitempty"`
	Detour     uint64  `json:"detour,omitempty"`
	DetourSize uint64  `json:"detour_size,omitempty"` // bytes of the instructions that the jump overwrote
	Overwrote  [4]byte `json:"overwrote,omitzero"`    // behind Opcode
}

// Flags of a Kprobe (include/linux/kprobes.h; the values have not changed
// since 3.5).
const (
	KprobeGone      = 1 // the code has gone
	KprobeDisabled  = 2
	KprobeOptimized = 4 // it is, or will be
	KprobeFtrace    = 8 // by ftrace, at its site, instead of a breakpoint
)

// Armed says whether the kernel has changed code for the probe itself.
func (p *Kprobe) Armed() bool { return p.Flags&(KprobeGone|KprobeDisabled|KprobeFtrace) == 0 }

// Bounds of what a kernel has of kprobes.
const (
	kprobeTableSize = 64 // 1 << KPROBE_HASH_BITS
	maxKprobes      = 1 << 18
	maxSymbolName   = 512 // KSYM_NAME_LEN
)

type kprobeWalk struct {
	*Kernel
	aggregate, trampoline uint64 // aggr_pre_handler, pre_handler_kretprobe
	kp, link              *layout
	listOffset            uint64
	opt                   *Struct // nil: probes are not optimized
	walk                  *walk
}

// Kprobes reads the table of kprobes: one for each place, in the table's
// order. What could be read is returned beside an error; each error names its
// object.
func (k *Kernel) Kprobes(ctx context.Context) ([]Kprobe, error) {
	table, err := k.symbol("kprobe_table")
	if err != nil {
		return nil, err
	}
	w := kprobeWalk{Kernel: k.View(), walk: k.walk("kprobes", maxKprobes)}
	w.aggregate, _ = k.Image.Lookup("aggr_pre_handler")
	w.trampoline, _ = k.Image.Lookup("pre_handler_kretprobe")
	w.kp, err = k.layout("kprobe", "hlist.next", "list.next", "addr", "symbol_name", "offset", "pre_handler", "post_handler", "opcode", "flags", "ainsn.insn")
	if err != nil {
		return nil, err
	}
	s, err := k.Types.Struct("kprobe")
	if err != nil {
		return nil, err
	}
	list, err := s.Field("list")
	if err != nil {
		return nil, err
	}
	w.listOffset = uint64(list.Offset)
	w.opt, _ = k.Types.Struct("optimized_kprobe")

	raw := make([]byte, kprobeTableSize*8)
	if err := w.fill(ctx, "kprobe_table", table, raw); err != nil {
		return nil, err
	}
	var probes []Kprobe
	var errs problems
	for ; len(raw) > 0; raw = raw[8:] {
		for at := binary.LittleEndian.Uint64(raw); at != 0; {
			p, next, _, err := w.probe(ctx, at)
			if err != nil {
				errs.add(err)
				break
			}
			if p.Aggregate {
				errs.add(w.children(ctx, &p))
			}
			probes = append(probes, p)
			at = next
		}
	}
	return probes, errs.err()
}

// probe reads one, and what follows it in its chain and in its list.
func (w *kprobeWalk) probe(ctx context.Context, at uint64) (p Kprobe, next, list uint64, err error) {
	if err := w.walk.enter(at, 8); err != nil {
		return p, 0, 0, w.walk.fail(at, err)
	}
	data := make([]byte, w.kp.size)
	if err := w.fill(ctx, "kprobe", at, data); err != nil {
		return p, 0, 0, err
	}
	var name uint64
	p.Object = at
	for i, to := range []*uint64{&next, &list, &p.Address, &name, &p.Offset, &p.PreHandler, &p.PostHandler} {
		*to = w.kp.uint(data, i)
	}
	p.Opcode = byte(w.kp.uint(data, 7))
	p.Flags = w.kp.uint(data, 8)
	p.Copy = w.kp.uint(data, 9)
	if name != 0 {
		if p.Symbol, err = w.Space.String(ctx, name, maxSymbolName); err != nil {
			return p, 0, 0, &ObjectError{"kprobe", at, fmt.Errorf("its symbol: %w", err)}
		}
	}
	p.Aggregate = w.aggregate != 0 && p.PreHandler == w.aggregate
	if p.Return = w.trampoline != 0 && p.PreHandler == w.trampoline; p.Return {
		o, err := w.Object(ctx, "kretprobe", at)
		if err != nil {
			return p, 0, 0, err
		}
		r := reader{o: o}
		r.uint("handler", &p.Handler)
		r.uint("entry_handler", &p.EntryHandler)
		if r.err != nil {
			return p, 0, 0, r.err
		}
	}
	if p.Aggregate && w.opt != nil {
		if err := w.optimized(ctx, &p); err != nil {
			return p, 0, 0, err
		}
	}
	return p, next, list, nil
}

// optimized reads what the kernel has of an aggregate to jump instead of to
// stop. Between being marked and getting its jump, a probe is in a list
// (kprobe_optimized() and optimized_kprobe.list in kernel/kprobes.c).
func (w *kprobeWalk) optimized(ctx context.Context, p *Kprobe) error {
	o, err := w.Object(ctx, "optimized_kprobe", p.Object)
	if err != nil {
		return err
	}
	var next uint64
	r := reader{o: o}
	r.uint("optinsn.insn", &p.Detour)
	r.uint("optinsn.size", &p.DetourSize)
	r.uint("list.next", &next)
	if r.err != nil {
		return r.err
	}
	list, err := o.Addr("list")
	if err != nil {
		return err
	}
	f, err := w.opt.Field("optinsn.copied_insn")
	if err != nil {
		return err
	}
	if f.Size != uint32(len(p.Overwrote)) {
		return &ObjectError{"optimized_kprobe", p.Object, fmt.Errorf("it keeps %d bytes, not %d", f.Size, len(p.Overwrote))}
	}
	if err := w.fill(ctx, "optimized_kprobe", p.Object+uint64(f.Offset), p.Overwrote[:]); err != nil {
		return err
	}
	possible := p.Flags&KprobeOptimized != 0 && p.Detour != 0
	p.Optimized, p.Pending = possible && next == list, possible && next != list
	return nil
}

// children reads the probes of an aggregate.
func (w *kprobeWalk) children(ctx context.Context, p *Kprobe) error {
	head := p.Object + w.listOffset
	at, err := w.Space.Pointer(ctx, head)
	if err != nil {
		return &ObjectError{"kprobe", p.Object, err}
	}
	for at != head {
		child, _, next, err := w.probe(ctx, at-w.listOffset)
		if err != nil {
			return fmt.Errorf("kprobe at %#x: %w", p.Object, err)
		}
		if child.Address != p.Address {
			return &ObjectError{"kprobe", child.Object, fmt.Errorf("it is at %#x in the list of one at %#x", child.Address, p.Address)}
		}
		p.Probes = append(p.Probes, child)
		at = next
	}
	return nil
}

// KprobePatches says what must be at each probe's place. The kernel may have
// disarmed all probes at once; then nothing must be.
func (k *Kernel) KprobePatches(ctx context.Context, probes []Kprobe) ([]Patch, error) {
	if at, ok := k.Image.Lookup("kprobes_all_disarmed"); ok {
		off, err := k.Space.Uint(ctx, at, 1)
		if err != nil {
			return nil, &ObjectError{"kprobes_all_disarmed", at, err}
		}
		if off != 0 {
			return nil, nil
		}
	}
	var patches []Patch
	for i := range probes {
		p := &probes[i]
		if !p.Armed() {
			continue
		}
		patch := Patch{Address: p.Address, Table: TableKprobe, Object: p.Object, Detail: "breakpoint", Want: [][]byte{{opcodeInt3}}}
		if p.Optimized || p.Pending {
			patch.Detail = fmt.Sprintf("optimized: jump to %#x", p.Detour)
			if p.Optimized {
				patch.Want = nil
			}
			if code := branch(opcodeJmp32, p.Address, p.Detour); code != nil {
				patch.Want = append(patch.Want, code)
			}
		}
		patches = append(patches, patch)
	}
	return patches, nil
}
