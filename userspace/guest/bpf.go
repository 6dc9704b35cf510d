// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"
)

// BPF is what a kernel has loaded of eBPF.
type BPF struct {
	Programs    []BPFProgram
	Symbols     []BPFSymbol // in the kernel's list, as in /proc/kallsyms
	Trampolines []BPFTrampoline
	Dispatchers []BPFDispatcher
}

// BPFProgram is a struct bpf_prog: a program that was loaded (include/linux/bpf.h).
type BPFProgram struct {
	Object uint64  `json:"object"` // address of the struct
	ID     uint64  `json:"id"`
	Name   string  `json:"name,omitempty"` // as its loader chose it, at most 15 characters
	Type   BPFType `json:"type"`
	Tag    string  `json:"tag"`    // of its instructions, 16 hexadecimal digits
	Length uint64  `json:"length"` // instructions of 8 bytes

	// Func is what runs: the start of the machine code, or a function of the
	// kernel that interprets the program.
	Func     uint64    `json:"func"`
	Jited    bool      `json:"jited"`
	Code     Extent    `json:"code,omitzero"` // the machine code
	Symbol   string    `json:"symbol,omitempty"`
	LoadTime uint64    `json:"load_time,omitempty"` // ns of the boot clock
	AttachTo string    `json:"attach_to,omitempty"` // the function that a tracing program is for
	Parts    []BPFCode `json:"parts,omitempty"`     // its functions, of a program with several
}

// BPFCode is machine code of one of a program's functions.
type BPFCode struct {
	Object uint64 `json:"object"`
	Code   Extent `json:"code"`
	Symbol string `json:"symbol,omitempty"`
}

// BPFSymbol is a struct bpf_ksym: code that came from eBPF.
type BPFSymbol struct {
	Object  uint64 `json:"object"`
	Code    Extent `json:"code"` // empty: none yet
	Name    string `json:"name"`
	Program bool   `json:"program"` // not a trampoline or dispatcher
}

// BPFTrampoline is a struct bpf_trampoline: code that calls programs where a
// function begins and ends.
type BPFTrampoline struct {
	Object   uint64   `json:"object"`
	Key      uint64   `json:"key"`     // of the function's type, and what it is in
	Function uint64   `json:"address"` // where it is attached
	Ftrace   bool     `json:"ftrace"`  // by ftrace, at its site
	Code     Extent   `json:"code,omitzero"`
	Symbol   string   `json:"symbol,omitempty"`
	Programs []uint64 `json:"programs,omitempty"` // addresses of struct bpf_prog
}

// BPFDispatcher is a struct bpf_dispatcher: code that calls one of some
// programs without an indirect branch.
type BPFDispatcher struct {
	Object   uint64 `json:"object"`
	Name     string `json:"name"`
	Func     uint64 `json:"func"`            // where it is entered
	Image    uint64 `json:"image,omitempty"` // a page of its code
	Code     uint64 `json:"code,omitempty"`  // where its code begins now; 0: no programs
	Programs uint64 `json:"programs"`
	// Static says that Func calls the code by a static call, and not by a jump
	// that is patched into it, as kernels before 6.1 do.
	Static bool `json:"static"`
}

// Bounds of what a kernel has of eBPF.
const (
	maxBPFPrograms    = 1 << 17
	maxBPFParts       = 1 << 10
	maxBPFSymbols     = 1 << 18
	maxBPFCode        = 32 << 20 // of a program
	trampolineTable   = 1 << 10  // TRAMPOLINE_HASH_BITS
	maxTrampolines    = 1 << 16
	maxTrampolineProg = 1 << 10
)

// bpfTypes are the names of BPF_PROG_TYPE_* (include/uapi/linux/bpf.h), which
// do not change.
var bpfTypes = strings.Fields(`unspec socket_filter kprobe sched_cls sched_act tracepoint xdp perf_event
	cgroup_skb cgroup_sock lwt_in lwt_out lwt_xmit sock_ops sk_skb cgroup_device sk_msg raw_tracepoint
	cgroup_sock_addr lwt_seg6local lirc_mode2 sk_reuseport flow_dissector cgroup_sysctl
	raw_tracepoint_writable cgroup_sockopt tracing struct_ops ext lsm sk_lookup syscall netfilter`)

// BPFType is a BPF_PROG_TYPE_*.
type BPFType uint64

// String names it as bpftool(8) does, or gives the number of one that has no
// name here.
func (t BPFType) String() string {
	if t < BPFType(len(bpfTypes)) {
		return bpfTypes[t]
	}
	return fmt.Sprintf("type %d", uint64(t))
}

// MarshalText implements encoding.TextMarshaler with String's words.
func (t BPFType) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// BPF reads what is loaded of eBPF. What could be read is returned beside an
// error; each error names its object.
func (k *Kernel) BPF(ctx context.Context) (*BPF, error) {
	k = k.View()
	b := &BPF{}
	var errs problems
	for _, read := range []func(context.Context, *BPF) error{k.bpfPrograms, k.bpfSymbols, k.bpfTrampolines, k.bpfDispatchers} {
		errs.add(read(ctx, b))
	}
	return b, errs.err()
}

func (k *Kernel) bpfPrograms(ctx context.Context, b *BPF) error {
	idr, err := k.symbol("prog_idr")
	if err != nil {
		return err
	}
	var errs problems
	err = k.IDR(ctx, "bpf program table", idr, maxBPFPrograms, func(id, at uint64) error {
		p, err := k.bpfProgram(ctx, id, at)
		if err != nil {
			errs.add(err)
		}
		if p != nil {
			b.Programs = append(b.Programs, *p)
		}
		return nil
	})
	errs.add(err)
	return errs.err()
}

// bpfProgram reads one; what there is beside an error.
func (k *Kernel) bpfProgram(ctx context.Context, id, at uint64) (*BPFProgram, error) {
	o, err := k.Object(ctx, "bpf_prog", at)
	if err != nil {
		return nil, err
	}
	p := &BPFProgram{Object: at, ID: id}
	var aux, jited, size uint64
	r := reader{o: o}
	r.uint("aux", &aux)
	r.uint("type", (*uint64)(&p.Type))
	r.uint("len", &p.Length)
	r.uint("bpf_func", &p.Func)
	r.uint("jited", &jited)
	r.uint("jited_len", &size)
	if r.err != nil {
		return p, r.err
	}
	tag, err := o.Bytes("tag")
	if err != nil {
		return p, err
	}
	p.Tag = hex.EncodeToString(tag)
	if p.Jited = jited != 0; p.Jited {
		if p.Code, err = k.bpfCode(o, p.Func, size); err != nil {
			return p, err
		}
	}

	a, err := k.Object(ctx, "bpf_prog_aux", aux)
	if err != nil {
		return p, fmt.Errorf("bpf_prog at %#x: %w", at, err)
	}
	var owner, own, attach, parts, count uint64
	r = reader{o: a}
	r.uint("prog", &owner)
	r.uint("id", &own)
	r.uint("load_time", &p.LoadTime)
	r.uint("attach_func_name", &attach)
	r.uint("func", &parts)
	r.uint("func_cnt", &count)
	if a.Has("real_func_cnt") {
		r.uint("real_func_cnt", &count)
	}
	if r.err != nil {
		return p, r.err
	}
	if owner != at || own != id {
		return p, a.fail(fmt.Errorf("it is of program %d at %#x, not of %d at %#x", own, owner, id, at))
	}
	if p.Name, err = a.String("name"); err != nil {
		return p, err
	}
	if p.Symbol, err = a.String("ksym.name"); err != nil {
		return p, err
	}
	if attach != 0 {
		if p.AttachTo, err = k.Space.String(ctx, attach, maxSymbolName); err != nil {
			return p, a.fail(fmt.Errorf("attach_func_name: %w", err))
		}
	}
	if parts == 0 || count == 0 {
		return p, nil
	}
	if count > maxBPFParts {
		return p, a.fail(fmt.Errorf("%d functions, at most %d are taken", count, maxBPFParts))
	}
	for i := range count {
		sub, err := k.Space.Pointer(ctx, parts+8*i)
		if err != nil {
			return p, a.fail(fmt.Errorf("function %d: %w", i, err))
		}
		code, err := k.bpfPart(ctx, sub)
		if err != nil {
			return p, fmt.Errorf("bpf_prog at %#x: function %d: %w", at, i, err)
		}
		p.Parts = append(p.Parts, code)
	}
	return p, nil
}

func (k *Kernel) bpfPart(ctx context.Context, at uint64) (BPFCode, error) {
	c := BPFCode{Object: at}
	o, err := k.Object(ctx, "bpf_prog", at)
	if err != nil {
		return c, err
	}
	var aux, start, size uint64
	r := reader{o: o}
	r.uint("aux", &aux)
	r.uint("bpf_func", &start)
	r.uint("jited_len", &size)
	if r.err != nil {
		return c, r.err
	}
	if c.Code, err = k.bpfCode(o, start, size); err != nil {
		return c, err
	}
	a, err := k.Object(ctx, "bpf_prog_aux", aux)
	if err != nil {
		return c, err
	}
	c.Symbol, err = a.String("ksym.name")
	return c, err
}

func (k *Kernel) bpfCode(o *Object, start, size uint64) (Extent, error) {
	if err := k.pointer(start, 1); err != nil {
		return Extent{}, o.fail(fmt.Errorf("its code: %w", err))
	}
	if size > maxBPFCode {
		return Extent{}, o.fail(fmt.Errorf("its code has %d bytes, at most %d are taken", size, maxBPFCode))
	}
	return Extent{start, start + size}, nil
}

// bpfSymbols walks bpf_kallsyms.
func (k *Kernel) bpfSymbols(ctx context.Context, b *BPF) error {
	head, err := k.symbol("bpf_kallsyms")
	if err != nil {
		return err
	}
	link, err := k.offset("bpf_ksym", "lnode")
	if err != nil {
		return err
	}
	return k.List(ctx, "list of bpf symbols", head, maxBPFSymbols, func(node uint64) error {
		o, err := k.Object(ctx, "bpf_ksym", node-link)
		if err != nil {
			return err
		}
		s := BPFSymbol{Object: o.Address}
		var program uint64
		r := reader{o: o}
		r.uint("start", &s.Code.Start)
		r.uint("end", &s.Code.End)
		r.uint("prog", &program)
		if r.err != nil {
			return r.err
		}
		s.Program = program != 0
		if s.Name, err = o.String("name"); err != nil {
			return err
		}
		if s.Code.End < s.Code.Start || s.Code.Size() > maxBPFCode {
			return o.fail(fmt.Errorf("its code is %#x to %#x", s.Code.Start, s.Code.End))
		}
		b.Symbols = append(b.Symbols, s)
		return nil
	})
}

// bpfTrampolines walks the table of trampolines, which has another name since
// 6.19, when it got a second one by address.
func (k *Kernel) bpfTrampolines(ctx context.Context, b *BPF) error {
	table, node := "trampoline_table", "hlist"
	if _, ok := k.Image.Lookup(table); !ok {
		table, node = "trampoline_key_table", "hlist_key"
	}
	head, err := k.symbol(table)
	if err != nil {
		return err
	}
	link, err := k.offset("bpf_trampoline", node)
	if err != nil {
		return err
	}
	var errs problems
	for i := range uint64(trampolineTable) {
		if len(b.Trampolines) > maxTrampolines {
			errs.add(&ObjectError{table, head, ErrTooLong})
			break
		}
		errs.add(k.HList(ctx, "bpf trampolines", head+8*i, maxTrampolines, func(node uint64) error {
			t, err := k.bpfTrampoline(ctx, node-link)
			b.Trampolines = append(b.Trampolines, t)
			return err
		}))
	}
	return errs.err()
}

func (k *Kernel) bpfTrampoline(ctx context.Context, at uint64) (BPFTrampoline, error) {
	t := BPFTrampoline{Object: at}
	o, err := k.Object(ctx, "bpf_trampoline", at)
	if err != nil {
		return t, err
	}
	var managed, image uint64
	r := reader{o: o}
	r.uint("key", &t.Key)
	r.uint("func.addr", &t.Function)
	r.uint("func.ftrace_managed", &managed)
	r.uint("cur_image", &image)
	if r.err != nil {
		return t, r.err
	}
	t.Ftrace = managed != 0
	if image != 0 {
		im, err := k.Object(ctx, "bpf_tramp_image", image)
		if err != nil {
			return t, fmt.Errorf("bpf_trampoline at %#x: %w", at, err)
		}
		r := reader{o: im}
		r.uint("ksym.start", &t.Code.Start)
		r.uint("ksym.end", &t.Code.End)
		if r.err != nil {
			return t, r.err
		}
		if t.Symbol, err = im.String("ksym.name"); err != nil {
			return t, err
		}
	}
	t.Programs, err = k.trampolinePrograms(ctx, o)
	return t, err
}

// trampolinePrograms lists what a trampoline calls. What its lists link
// changed: a program's bpf_prog_aux, since 6.0 a bpf_tramp_link, since 7.1 a
// bpf_tramp_node.
func (k *Kernel) trampolinePrograms(ctx context.Context, o *Object) ([]uint64, error) {
	lists, err := o.Struct.Field("progs_hlist")
	if err != nil {
		return nil, o.fail(err)
	}
	var member string
	for _, m := range []string{"bpf_tramp_node", "bpf_tramp_link", "bpf_prog_aux"} {
		if k.Types.Has(m, "tramp_hlist") {
			member = m
			break
		}
	}
	if member == "" {
		return nil, o.fail(fmt.Errorf("what it calls: %w", ErrNoType))
	}
	link, err := k.offset(member, "tramp_hlist")
	if err != nil {
		return nil, err
	}
	const most = 16 // BPF_TRAMP_MAX is 3 to 5
	if lists.ElemSize != 8 || lists.Count > most {
		return nil, o.fail(fmt.Errorf("progs_hlist: %w", ErrBadTypes))
	}
	var programs []uint64
	var errs problems
	for i := range uint64(lists.Count) {
		head := o.Address + uint64(lists.Offset) + 8*i
		errs.add(k.HList(ctx, "programs of a bpf trampoline", head, maxTrampolineProg, func(node uint64) error {
			m, err := k.Object(ctx, member, node-link)
			if err != nil {
				return err
			}
			var program uint64
			switch member {
			case "bpf_prog_aux":
				program, err = m.Pointer("prog")
			case "bpf_tramp_link":
				program, err = m.Pointer("link.prog")
			default:
				var at uint64
				if at, err = m.Pointer("link"); err == nil {
					var l *Object
					if l, err = k.Object(ctx, "bpf_link", at); err == nil {
						program, err = l.Pointer("prog")
					}
				}
			}
			if err != nil {
				return err
			}
			programs = append(programs, program)
			return nil
		}))
	}
	return programs, errs.err()
}

// bpfDispatchers finds the dispatchers by the names of their symbols.
func (k *Kernel) bpfDispatchers(ctx context.Context, b *BPF) error {
	const prefix, suffix = "bpf_dispatcher_", "_func"
	var errs problems
	for sym := range k.Image.Symbols.All() {
		name, ok := strings.CutSuffix(sym.Name, suffix)
		if !ok || sym.Module != "" || !strings.HasPrefix(name, prefix) {
			continue
		}
		at, ok := k.Image.Lookup(name)
		if !ok {
			continue
		}
		d, err := k.bpfDispatcher(ctx, name, at)
		if err != nil {
			errs.add(err)
			continue
		}
		b.Dispatchers = append(b.Dispatchers, d)
	}
	return errs.err()
}

func (k *Kernel) bpfDispatcher(ctx context.Context, name string, at uint64) (BPFDispatcher, error) {
	d := BPFDispatcher{Object: at, Name: name}
	o, err := k.Object(ctx, "bpf_dispatcher", at)
	if err != nil {
		return d, err
	}
	var offset uint64
	r := reader{o: o}
	r.uint("func", &d.Func)
	r.uint("num_progs", &d.Programs)
	r.uint("image", &d.Image)
	r.uint("image_off", &offset)
	if r.err != nil {
		return d, r.err
	}
	d.Static = o.Has("sc_key")
	if d.Programs != 0 && d.Image != 0 {
		if offset >= 4096 {
			return d, o.fail(fmt.Errorf("its code begins %d bytes behind the start of a page", offset))
		}
		d.Code = d.Image + offset
	}
	return d, nil
}

// DispatcherPatches says what must be where those dispatchers are entered that
// have a jump patched in.
func (k *Kernel) DispatcherPatches(ctx context.Context, dispatchers []BPFDispatcher) ([]Patch, error) {
	nop, err := k.idealNop(ctx)
	var patches []Patch
	for _, d := range dispatchers {
		if d.Static {
			continue
		}
		p := Patch{Address: d.Func, Table: TableDispatcher, Object: d.Object, Want: [][]byte{nop}, Detail: "no programs"}
		if d.Code != 0 {
			p.Detail = fmt.Sprintf("jump to %#x", d.Code)
			p.Want = nil
			if code := branch(opcodeJmp32, d.Func, d.Code); code != nil {
				p.Want = [][]byte{code}
			}
		}
		patches = append(patches, p)
	}
	return patches, err
}
