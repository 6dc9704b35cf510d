// SPDX-License-Identifier: MIT

package guest

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
)

// Ftrace is what a kernel has of its function tracer: who traces, and the
// places at functions' entries that are patched for it.
type Ftrace struct {
	Ops    []FtraceOps
	Sites  []FtraceSite // by ascending address
	Direct FtraceHash   // entries' places with what is called there itself

	flags      ftraceFlags
	nop        []byte
	caller     uint64
	regsCaller uint64
}

// FtraceOps is a struct ftrace_ops: one that traces functions
// (include/linux/ftrace.h).
type FtraceOps struct {
	Address        uint64     `json:"address"`
	Func           uint64     `json:"func"` // is called at each function that is traced
	SavedFunc      uint64     `json:"saved_func"`
	Flags          uint64     `json:"flags"` // FTRACE_OPS_FL_*
	Private        uint64     `json:"private"`
	Trampoline     uint64     `json:"trampoline,omitempty"`      // code of its own; 0: none
	TrampolineSize uint64     `json:"trampoline_size,omitempty"` // bytes
	DirectCall     uint64     `json:"direct_call,omitempty"`     // of direct ones, since 6.0
	Filter         FtraceHash `json:"filter"`                    // empty: all functions
	Notrace        FtraceHash `json:"notrace"`                   // but not these
	old            *FtraceOps // the hashes that are being replaced
}

// FtraceHash is a struct ftrace_hash: a set of sites. The zero value is an
// empty one.
type FtraceHash struct {
	Address uint64
	// Direct is, for each site's address, what is called there; 0 in the hash
	// of an FtraceOps.
	Direct map[uint64]uint64
	flags  uint64
}

// Empty says whether the hash stands for no choice at all.
func (h *FtraceHash) Empty() bool { return len(h.Direct) == 0 && h.flags&ftraceHashModule == 0 }

// ftraceHashModule: the hash waits for a module (FTRACE_HASH_FL_MOD).
const ftraceHashModule = 1

// Traces says whether the ops are called at the site.
func (o *FtraceOps) Traces(ip uint64) bool {
	if _, ok := o.Filter.Direct[ip]; !ok && !o.Filter.Empty() {
		return false
	}
	_, ok := o.Notrace.Direct[ip]
	return !ok
}

// FtraceSite is a struct dyn_ftrace: the place of a call at a function's entry.
type FtraceSite struct {
	Record uint64 `json:"record"` // address of the struct
	IP     uint64 `json:"ip"`     // of the instruction of 5 bytes
	Flags  uint64 `json:"flags"`  // FTRACE_FL_*, and how many trace it
}

// ftraceFlags are bits of a site's flags, out of the kernel's own types.
type ftraceFlags struct {
	enabled, regs, tramp, direct uint64
	count                        uint64 // mask of the number of ops
	adding, modifying            uint64 // of ops
}

// Bounds of what a kernel has of ftrace.
const (
	maxFtraceOps      = 1 << 14
	maxFtracePages    = 1 << 16
	maxFtraceSites    = 1 << 21
	maxFtraceOrder    = 20
	maxFtraceHashBits = 16
	maxFtraceEntries  = 1 << 20
)

// Ftrace reads who traces functions and where. What could be read is returned
// beside an error; each error names its object.
func (k *Kernel) Ftrace(ctx context.Context) (*Ftrace, error) {
	k = k.View()
	f := &Ftrace{}
	var errs problems
	var err error
	if f.flags, err = k.ftraceFlags(); err != nil {
		return nil, err
	}
	f.nop, err = k.idealNop(ctx)
	errs.add(err)
	if f.caller, err = k.symbol("ftrace_caller"); err != nil {
		return nil, err
	}
	f.regsCaller, _ = k.Image.Lookup("ftrace_regs_caller")
	f.Sites, err = k.ftraceSites(ctx)
	errs.add(err)
	f.Ops, err = k.ftraceOps(ctx)
	errs.add(err)
	if at, ok := k.Image.Lookup("direct_functions"); ok {
		hash, err := k.Space.Pointer(ctx, at)
		if err == nil {
			f.Direct, err = k.ftraceHash(ctx, hash)
		}
		errs.add(err)
	}
	return f, errs.err()
}

func (k *Kernel) ftraceFlags() (ftraceFlags, error) {
	var f ftraceFlags
	for _, e := range []struct {
		name string
		to   *uint64
	}{
		{"FTRACE_FL_ENABLED", &f.enabled}, {"FTRACE_FL_REGS_EN", &f.regs},
		{"FTRACE_FL_TRAMP_EN", &f.tramp}, {"FTRACE_FL_DIRECT_EN", &f.direct},
		{"FTRACE_OPS_FL_ADDING", &f.adding}, {"FTRACE_OPS_FL_MODIFYING", &f.modifying},
	} {
		value, err := k.enumerator(e.name)
		if err != nil {
			return f, err
		}
		*e.to = value
	}
	// The lower bits, as many as no flag takes, count.
	lowest := f.direct
	for _, name := range []string{"FTRACE_FL_CALL_OPS_EN", "FTRACE_FL_TOUCHED", "FTRACE_FL_MODIFIED"} {
		if value, err := k.enumerator(name); err == nil && value != 0 {
			lowest = min(lowest, value)
		}
	}
	f.count = lowest - 1
	return f, nil
}

// ftraceOps walks ftrace_ops_list, which ends with ftrace_list_end.
func (k *Kernel) ftraceOps(ctx context.Context) ([]FtraceOps, error) {
	head, err := k.symbol("ftrace_ops_list")
	if err != nil {
		return nil, err
	}
	end, err := k.symbol("ftrace_list_end")
	if err != nil {
		return nil, err
	}
	at, err := k.Space.Pointer(ctx, head)
	if err != nil {
		return nil, &ObjectError{"ftrace_ops_list", head, err}
	}
	var ops []FtraceOps
	var errs problems
	w := k.walk("ftrace_ops list", maxFtraceOps)
	for from := head; at != end && at != 0; {
		if err := w.enter(at, 8); err != nil {
			errs.add(w.fail(from, err))
			break
		}
		op, next, err := k.ftraceOp(ctx, at)
		errs.add(err)
		if op == nil {
			break
		}
		ops = append(ops, *op)
		at, from = next, at
	}
	return ops, errs.err()
}

// ftraceOp reads one; without it if its struct cannot be read.
func (k *Kernel) ftraceOp(ctx context.Context, at uint64) (*FtraceOps, uint64, error) {
	o, err := k.Object(ctx, "ftrace_ops", at)
	if err != nil {
		return nil, 0, err
	}
	op := &FtraceOps{Address: at}
	var next, hash uint64
	r := reader{o: o}
	r.uint("func", &op.Func)
	r.uint("next", &next)
	r.uint("flags", &op.Flags)
	r.uint("private", &op.Private)
	r.uint("saved_func", &op.SavedFunc)
	r.uint("func_hash", &hash)
	r.uint("trampoline", &op.Trampoline)
	r.uint("trampoline_size", &op.TrampolineSize)
	if r.err != nil {
		return nil, 0, r.err
	}
	if o.Has("direct_call") {
		r.uint("direct_call", &op.DirectCall)
	}
	op.Filter, op.Notrace, err = k.ftraceOpsHash(ctx, hash)
	if err != nil {
		return op, next, fmt.Errorf("ftrace_ops at %#x: %w", at, err)
	}
	if old, err := o.Addr("old_hash"); err == nil {
		var was FtraceOps
		if was.Filter, was.Notrace, err = k.ftraceOpsHash(ctx, old); err != nil {
			return op, next, fmt.Errorf("ftrace_ops at %#x: old hash: %w", at, err)
		}
		op.old = &was
	}
	return op, next, r.err
}

func (k *Kernel) ftraceOpsHash(ctx context.Context, at uint64) (filter, notrace FtraceHash, err error) {
	o, err := k.Object(ctx, "ftrace_ops_hash", at)
	if err != nil {
		return filter, notrace, err
	}
	var a, b uint64
	r := reader{o: o}
	r.uint("filter_hash", &a)
	r.uint("notrace_hash", &b)
	if r.err != nil {
		return filter, notrace, r.err
	}
	if filter, err = k.ftraceHash(ctx, a); err != nil {
		return filter, notrace, err
	}
	notrace, err = k.ftraceHash(ctx, b)
	return filter, notrace, err
}

// ftraceHash reads a hash table of sites; none at address 0.
func (k *Kernel) ftraceHash(ctx context.Context, at uint64) (FtraceHash, error) {
	h := FtraceHash{Address: at}
	if at == 0 {
		return h, nil
	}
	o, err := k.Object(ctx, "ftrace_hash", at)
	if err != nil {
		return h, err
	}
	var bits, buckets, count uint64
	r := reader{o: o}
	r.uint("size_bits", &bits)
	r.uint("buckets", &buckets)
	r.uint("count", &count)
	if r.err == nil && o.Has("flags") {
		r.uint("flags", &h.flags)
	}
	if r.err != nil {
		return h, r.err
	}
	if count == 0 { // no entries: the empty hash, which all share, has no buckets
		return h, nil
	}
	if bits > maxFtraceHashBits || count > maxFtraceEntries {
		return h, &ObjectError{"ftrace_hash", at, fmt.Errorf("%d entries in 2^%d buckets are too many", count, bits)}
	}
	entry, err := k.layout("ftrace_func_entry", "hlist.next", "ip", "direct")
	if err != nil {
		return h, err
	}
	raw := make([]byte, 8<<bits)
	if err := k.Space.Read(ctx, buckets, raw); err != nil {
		return h, &ObjectError{"ftrace_hash buckets", buckets, err}
	}
	h.Direct = make(map[uint64]uint64, min(count, 4096))
	p := make([]byte, entry.size)
	seen := uint64(0)
	for ; len(raw) > 0; raw = raw[8:] {
		for node := binary.LittleEndian.Uint64(raw); node != 0; {
			if seen++; seen > count {
				return h, &ObjectError{"ftrace_hash", at, fmt.Errorf("it has more entries than the %d that it says: %w", count, ErrCycle)}
			}
			if err := k.fill(ctx, "ftrace_func_entry", node, p); err != nil {
				return h, err
			}
			h.Direct[entry.uint(p, 1)] = entry.uint(p, 2)
			node = entry.uint(p, 0)
		}
	}
	if seen < count {
		return h, &ObjectError{"ftrace_hash", at, fmt.Errorf("%d of %d entries are in it", seen, count)}
	}
	return h, nil
}

// ftraceSites reads the records of all sites, those of modules too.
func (k *Kernel) ftraceSites(ctx context.Context) ([]FtraceSite, error) {
	head, err := k.symbol("ftrace_pages_start")
	if err != nil {
		return nil, err
	}
	page, err := k.layout("ftrace_page", "next", "records", "index", "order")
	if err != nil {
		if page, err = k.layout("ftrace_page", "next", "records", "index"); err != nil {
			return nil, err
		}
	}
	rec, err := k.layout("dyn_ftrace", "ip", "flags")
	if err != nil {
		return nil, err
	}
	at, err := k.Space.Pointer(ctx, head)
	if err != nil {
		return nil, &ObjectError{"ftrace_pages_start", head, err}
	}
	var sites []FtraceSite
	w := k.walk("ftrace_page list", maxFtracePages)
	p := make([]byte, page.size)
	for from := head; at != 0; {
		if err := w.enter(at, 8); err != nil {
			return sites, w.fail(from, err)
		}
		if err := k.fill(ctx, "ftrace_page", at, p); err != nil {
			return sites, err
		}
		records, n := page.uint(p, 1), page.uint(p, 2)
		most := uint64(maxFtraceSites - len(sites))
		if len(page.fields) > 3 {
			if order := page.uint(p, 3); order <= maxFtraceOrder {
				most = min(most, 4096<<order/rec.size)
			}
		}
		if n > most {
			return sites, &ObjectError{"ftrace_page", at, fmt.Errorf("%d records, at most %d have room", n, most)}
		}
		err := k.array(ctx, "dyn_ftrace", records, rec.size, n, func(at uint64, p []byte) error {
			site := FtraceSite{Record: at, IP: rec.uint(p, 0), Flags: rec.uint(p, 1)}
			if site.IP != 0 {
				sites = append(sites, site)
			}
			return nil
		})
		if err != nil {
			return sites, err
		}
		at, from = page.uint(p, 0), at
	}
	slices.SortFunc(sites, func(a, b FtraceSite) int { return cmp.Compare(a.IP, b.IP) })
	return sites, nil
}

// Enabled says whether a site is patched into a call.
func (f *Ftrace) Enabled(s FtraceSite) bool { return s.Flags&f.flags.enabled != 0 }

// Users is how many ops trace the site.
func (f *Ftrace) Users(s FtraceSite) int { return int(s.Flags & f.flags.count) }

// OpsOf are the ops that trace the site.
func (f *Ftrace) OpsOf(s FtraceSite) []*FtraceOps {
	var ops []*FtraceOps
	for i := range f.Ops {
		if f.Ops[i].Traces(s.IP) {
			ops = append(ops, &f.Ops[i])
		}
	}
	return ops
}

// Site finds a site by the address of its instruction.
func (f *Ftrace) Site(ip uint64) (FtraceSite, bool) {
	i, ok := slices.BinarySearchFunc(f.Sites, ip, func(s FtraceSite, ip uint64) int { return cmp.Compare(s.IP, ip) })
	if !ok {
		return FtraceSite{}, false
	}
	return f.Sites[i], true
}

// Target is what the instruction at the site must go to, and whether by a
// call, or by a jump, which direct ones do since 6.19. It follows
// ftrace_get_addr_curr() (kernel/trace/ftrace.c): a direct call before the
// trampoline of an ops before ftrace_regs_caller before ftrace_caller. ok is
// false if the site must not be patched.
func (f *Ftrace) Target(s FtraceSite) (target uint64, jump, ok bool) {
	if !f.Enabled(s) {
		return 0, false, false
	}
	if s.Flags&f.flags.direct != 0 {
		if to := f.Direct.Direct[s.IP]; to != 0 {
			return to &^ 1, to&1 != 0, true
		}
	}
	if s.Flags&f.flags.tramp != 0 {
		for i := range f.Ops {
			op := &f.Ops[i]
			if op.Trampoline == 0 || op.Flags&f.flags.adding != 0 {
				continue
			}
			hashes := op
			if op.Flags&f.flags.modifying != 0 && op.old != nil {
				hashes = op.old
			}
			if hashes.Traces(s.IP) {
				return op.Trampoline, false, true
			}
		}
		return f.caller, false, true
	}
	if s.Flags&f.flags.regs != 0 && f.regsCaller != 0 {
		return f.regsCaller, false, true
	}
	return f.caller, false, true
}

// Patches says what must be at each site.
func (f *Ftrace) Patches() []Patch {
	patches := make([]Patch, 0, len(f.Sites))
	idle := [][]byte{f.nop}
	for _, s := range f.Sites {
		p := Patch{Address: s.IP, Table: TableFtrace, Object: s.Record, Want: idle, Detail: "not traced"}
		if target, jump, ok := f.Target(s); ok {
			opcode := byte(opcodeCall)
			p.Detail = fmt.Sprintf("call %#x", target)
			if jump {
				opcode = opcodeJmp32
				p.Detail = fmt.Sprintf("jump to %#x", target)
			}
			p.Want = nil
			if code := branch(opcode, s.IP, target); code != nil {
				p.Want = [][]byte{code}
			}
		}
		patches = append(patches, p)
	}
	return patches
}

// ftraceCalls are the places inside of ftrace_caller and ftrace_regs_caller
// where what is to be called is written (ftrace_update_ftrace_func() and, to
// 5.10, ftrace_enable_ftrace_graph_caller() in arch/x86/kernel/ftrace.c).
func (k *Kernel) ftraceCalls(ctx context.Context) ([]Patch, error) {
	var patches []Patch
	variable, err := k.symbol("ftrace_trace_function")
	if err != nil {
		return nil, err
	}
	function, err := k.Space.Pointer(ctx, variable)
	if err != nil {
		return nil, &ObjectError{"ftrace_trace_function", variable, err}
	}
	add := func(name string, opcode byte, targets ...uint64) {
		at, ok := k.Image.Lookup(name)
		if !ok {
			return
		}
		p := Patch{Address: at, Table: TableFtraceCall, Object: variable, Detail: name}
		for _, target := range targets {
			if code := branch(opcode, at, target); code != nil {
				p.Want = append(p.Want, code)
			}
		}
		patches = append(patches, p)
	}
	add("ftrace_call", opcodeCall, function)
	add("ftrace_regs_call", opcodeCall, function)
	var graph []uint64
	for _, name := range []string{"ftrace_stub", "ftrace_graph_caller"} {
		if at, ok := k.Image.Lookup(name); ok {
			graph = append(graph, at)
		}
	}
	if len(graph) > 0 {
		add("ftrace_graph_call", opcodeJmp32, graph...)
	}
	return patches, nil
}
