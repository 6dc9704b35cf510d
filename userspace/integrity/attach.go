// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// attach finds out what there is to know of the guest, lays out what is
// watched and evaluates it; or it leaves the Monitor waiting.
func (m *Monitor) attach(ctx context.Context) error {
	m.wait("not attached yet")
	m.attaching = true // what lies elsewhere now has been seen to
	defer func() { m.attaching = false }()
	now := m.now()
	if _, err := m.scan(ctx, now); err != nil {
		return err
	}
	for _, c := range m.cpus {
		c.settled = c.ready
	}
	if len(m.cpus) == 0 || !m.cpus[0].ready {
		m.wait(m.whyWaiting())
		return nil
	}
	m.leader = m.cpus[0]
	g := &Guest{VM: m.vm, Mode: guest.ModeOf(&m.leader.state.Registers)}
	m.g = g
	m.root, m.rootFixed = g.Mode.RootOf(m.leader.state.CR3), false
	m.status.Problems = nil

	g.IDT = m.leader.state.IDTR
	idt, err := m.fetch(ctx, m.leader.state.IDTR.Base, idtLength(g, m.leader.state.IDTR))
	if err != nil {
		return m.unreadable(ctx, "the interrupt table", err)
	}
	gates := guest.ParseIDT(idt, g.Mode.Long())
	if !complete(gates) {
		m.wait("the interrupt table is not complete: the guest is in firmware or early boot")
		return nil
	}
	handler := medianHandler(gates)
	if m.opts.Symbols == nil {
		if ok, err := m.findKernel(ctx); !ok {
			return err
		}
	} else {
		m.findImage(gates)
	}
	if g.Kernel != nil {
		m.takeRoot()
	} else if g.Image != nil && !m.fixRoot(ctx, handler) {
		if table, ok := g.Image.Lookup(tableSyscalls); ok {
			if root, err := m.kernelRoot(ctx, table); err == nil {
				m.root = root
			}
		}
	}
	if g.Image != nil && g.Kernel == nil && !m.symbolsFit(ctx) {
		m.problem("%v (the gates of the IDT fit, the system call table does not)", guest.ErrSymbolsMismatch)
		g.Image, m.rootFixed = nil, false
	}
	if !m.rootFixed && g.Kernel == nil {
		probe := m.leader.state.GS.Base
		if m.leader.state.CPL == 3 {
			probe = m.leader.state.KernelGSBase
		}
		if !g.Mode.Long() || !g.Mode.Kernel(probe) {
			probe = handler
		}
		root, err := m.kernelRoot(ctx, probe)
		if err != nil && probe != handler {
			// Since 6.15 GS holds what is to be added to a per-CPU symbol, and
			// not where anything is. The handler is mapped in both halves.
			kernel := g.Mode.KernelHalf(m.leader.state.CR3, true)
			if root, err = guest.KernelRoot(ctx, m.mem, g.Mode, kernel, handler); err != nil {
				root, err = m.kernelRoot(ctx, handler)
			}
		}
		if err != nil {
			return m.unreadable(ctx, "the kernel's page tables", err)
		}
		m.isolated = m.isolated || root != g.Mode.RootOf(m.leader.state.CR3)
		m.root = root
	}
	if !m.booted(ctx, idt) {
		return nil
	}
	m.takeKernel(ctx)
	m.handler, m.textAt = handler, 0
	if t, err := guest.Translate(ctx, m.mem, g.Mode, m.root, handler); err == nil {
		m.textAt = t.GPA
	}
	m.findText(ctx, handler)
	g.Linux = g.Image != nil
	if !g.Linux {
		gdt, err := m.fetch(ctx, m.leader.state.GDTR.Base, min(uint32(m.leader.state.GDTR.Limit)+1, maxGDT))
		g.Linux = err == nil && looksLinux(gdt, g.Mode.Long())
		if !g.Linux {
			m.problem(notLinux)
		}
	}
	if slices.ContainsFunc(m.cpus, func(c *cpu) bool { return c.state.Flags&kvmaccess.VCPUPartial != 0 }) {
		m.problem("the dump has no model-specific registers: where system calls enter the kernel (LSTAR) and EFER are not checked")
	}
	m.findPinned(ctx)
	m.findRanges()
	boot := m.witness(ctx)
	m.rebase(ctx, gates, boot)
	m.boot, m.restarts = boot, false
	m.readable()

	if m.code != nil {
		if c, err := m.newCode(); err == nil && c.key == m.code.key {
			g.Code = m.code // until it is looked at again
		}
	}
	m.layout()
	m.status.State, m.status.Reason = StateWatching, ""
	if g.Image != nil {
		m.status.Symbols, m.status.Slide = g.Image.Len(), Hex(g.Image.Slide)
	} else {
		m.status.Symbols, m.status.Slide = 0, 0
	}
	m.status.Kernel = nil
	if g.Kernel != nil {
		m.status.Kernel = &g.Kernel.Fingerprint
	}
	return m.reread(ctx)
}

func (m *Monitor) whyWaiting() string {
	if len(m.cpus) == 0 {
		return "the guest has no vCPUs yet"
	}
	v := &m.cpus[0].state
	return fmt.Sprintf("vCPU %d %s", v.ID, readyReason(v))
}

func (m *Monitor) problem(format string, args ...any) {
	m.status.Problems = append(m.status.Problems, fmt.Sprintf(format, args...))
}

// fetch reads guest-virtual memory with the tables that are known by now.
func (m *Monitor) fetch(ctx context.Context, gva uint64, n uint32) ([]byte, error) {
	p := make([]byte, n)
	return p, guest.ReadVirtual(ctx, m.mem, m.g.Mode, m.root, gva, p)
}

// unreadable sees to what is left if the guest does not have what it should
// yet, or any more, or the host not at hand, and hands on an error of a VM that
// cannot be read at all.
func (m *Monitor) unreadable(ctx context.Context, what string, err error) error {
	if unreadableError(err) {
		return m.watchRegistersOnly(ctx, fmt.Sprintf("%s cannot be read: %v", what, err))
	}
	m.wait("reading failed")
	return fmt.Errorf("guest %v: %s: %w", m.vm, what, err)
}

// complete says whether all interrupts have gates, which a kernel's have once
// it has set up interrupts; firmware's and early boot's do not, or do not go
// on to have a system call entry.
func complete(gates []guest.Gate) bool {
	n := 0
	for _, g := range gates {
		if g.Vector >= 32 && g.Present {
			n++
		}
	}
	return n >= 200
}

// medianHandler is an exception's handler that lies among the others': a few
// that were moved elsewhere do not.
func medianHandler(gates []guest.Gate) uint64 {
	var handlers []uint64
	for _, g := range gates[:min(32, len(gates))] {
		if g.Present && g.Type != guest.TypeTaskGate {
			handlers = append(handlers, g.Handler)
		}
	}
	if len(handlers) == 0 {
		return 0
	}
	slices.Sort(handlers)
	return handlers[len(handlers)/2]
}

func (m *Monitor) findImage(gates []guest.Gate) {
	if m.opts.Symbols.Long() != m.g.Mode.Long() {
		m.problem("the symbols are those of a kernel of another width than the guest's")
		return
	}
	slide, err := guest.FindSlide(m.opts.Symbols, &m.leader.state.Registers, gates)
	if err != nil {
		m.problem("%v", err)
		return
	}
	m.g.Image = guest.NewImage(m.opts.Symbols, slide.Value)
}

// symbolsFit says whether the system call table is where the symbols have it.
// That the IDT fits is not enough: neighbouring versions of a kernel often have
// the entry code, which all gates point to, at the same place, and nothing
// else. Entries outside kernel text say nothing: they are an attacker's.
func (m *Monitor) symbolsFit(ctx context.Context) bool {
	m.g.Linux, m.g.Text = true, m.g.Image.Text()
	fit, of := 0, 0
	for _, it := range m.syscalls(ctx) {
		if !m.g.Text.Contains(uint64(it.Value.Value)) {
			continue
		}
		of++
		if all, offset := m.g.Image.At(uint64(it.Value.Value)); len(all) > 0 && offset == 0 {
			fit++
		}
	}
	const fewest = 16
	return of < fewest || 2*fit > of
}

// fixRoot finds the page tables of the kernel itself, which unlike a process'
// ones stay.
func (m *Monitor) fixRoot(ctx context.Context, handler uint64) bool {
	var table uint64
	for _, name := range []string{"init_top_pgt", "init_level4_pgt", "swapper_pg_dir"} {
		if at, ok := m.g.Image.Lookup(name); ok {
			table = at
			break
		}
	}
	if table == 0 {
		return false
	}
	now, err := m.kernelRoot(ctx, table)
	if err != nil {
		return false
	}
	at, err := guest.Translate(ctx, m.mem, m.g.Mode, now, table)
	if err != nil {
		return false
	}
	for _, gva := range []uint64{handler, table} {
		a, err1 := guest.Translate(ctx, m.mem, m.g.Mode, now, gva)
		b, err2 := guest.Translate(ctx, m.mem, m.g.Mode, at.GPA, gva)
		if err1 != nil || err2 != nil || a.GPA != b.GPA {
			return false
		}
	}
	m.root, m.rootFixed = at.GPA, true
	return true
}

// kernelRoot finds the kernel's page tables by the leader's CR3.
func (m *Monitor) kernelRoot(ctx context.Context, probe uint64) (uint64, error) {
	return guest.KernelRoot(ctx, m.mem, m.g.Mode, m.leader.state.CR3, probe)
}

// booted says whether the kernel is through with patching itself; if not, the
// Monitor waits.
func (m *Monitor) booted(ctx context.Context, idt []byte) bool {
	if m.g.Image != nil {
		at, ok := m.g.Image.Lookup("system_state")
		if !ok {
			return true
		}
		p, err := m.fetch(ctx, at, 4)
		if err != nil {
			m.wait(fmt.Sprintf("the kernel's system_state cannot be read: %v", err))
			return false
		}
		// SYSTEM_BOOTING, SYSTEM_SCHEDULING (include/linux/kernel.h, since
		// 4.13); what follows these changed since, and is late enough.
		if state := binary.LittleEndian.Uint32(p); state < 2 && !m.userMode() {
			m.wait("the guest's kernel still boots")
			return false
		}
		return true
	}
	if m.opts.Settle < 0 || m.protected(ctx, idt) {
		return true
	}
	h := sha256.New()
	h.Write(idt)
	if m.userMode() {
		return true
	}
	for _, c := range m.cpus {
		fmt.Fprintf(h, "%v %v", c.ready, c.watch)
	}
	if !m.stays([32]byte(h.Sum(nil)), m.opts.Settle) {
		m.wait("no symbols tell whether the guest has booted: waiting until it write-protects its kernel, runs a program, or stays the same")
		return false
	}
	return true
}

// stays says whether what sum is of has stayed the same for so long.
func (m *Monitor) stays(sum [32]byte, limit time.Duration) bool {
	now := m.now()
	if sum != m.seen || m.settling.IsZero() {
		m.seen, m.settling = sum, now
	}
	return now.Sub(m.settling) >= limit
}

// userMode says whether a vCPU runs a program, which it does not before the
// kernel is up.
func (m *Monitor) userMode() bool {
	return slices.ContainsFunc(m.cpus, func(c *cpu) bool { return c.ready && c.state.CPL == 3 })
}

// protected says whether the kernel's text is mapped read-only, which is the
// last that a kernel does before it starts init (mark_readonly in init/main.c).
func (m *Monitor) protected(ctx context.Context, idt []byte) bool {
	handler := medianHandler(guest.ParseIDT(idt, m.g.Mode.Long()))
	t, err := guest.Translate(ctx, m.mem, m.g.Mode, m.root, handler)
	return err == nil && t.Execute && !t.Write && !t.User
}

func (m *Monitor) findText(ctx context.Context, handler uint64) {
	if m.g.Image != nil {
		if m.g.Text = m.g.Image.Text(); m.g.Text.End != 0 {
			return
		}
	}
	x, err := guest.ExecutableExtent(ctx, m.mem, m.g.Mode, m.root, handler, textSearch)
	if err != nil {
		m.problem("where the kernel's text is cannot be told: %v", err)
		return
	}
	m.g.Text = x
}

func (m *Monitor) findPinned(ctx context.Context) {
	at, ok := m.g.pinnedAt()
	if !ok {
		return
	}
	p, err := m.fetch(ctx, at, uint32(pointerSize(m.g)))
	if err != nil {
		m.problem("%s cannot be read: %v", symbolPinned, err)
		return
	}
	m.g.HavePinned = true
	m.g.Pinned = pointer(p)
}

func pointer(p []byte) uint64 {
	if len(p) >= 8 {
		return binary.LittleEndian.Uint64(p)
	}
	return uint64(binary.LittleEndian.Uint32(p))
}

func (m *Monitor) findRanges() {
	m.g.Ranges = nil
	for _, r := range m.opts.Ranges {
		if r.Symbol != "" {
			switch at, ok := uint64(0), false; {
			case m.g.Image != nil:
				if at, ok = m.g.Image.Lookup(r.Symbol); !ok {
					m.problem("memory range %s: the symbols have no %s", r.name(), r.Symbol)
					continue
				}
				r.Address = Hex(at)
			case r.Symbol == symbolEntry && m.g.Mode.Long():
				r.Address = Hex(m.leader.state.LSTAR)
			default:
				m.problem("memory range %s: no symbols tell where %s is", r.name(), r.Symbol)
				continue
			}
		}
		if !m.g.Mode.Canonical(uint64(r.Address)) || !m.g.Mode.Canonical(uint64(r.Address)+uint64(r.Length)-1) {
			m.problem("memory range %s: %v is not canonical in the guest (%v)", r.name(), r.Address, m.g.Mode.Format)
			continue
		}
		m.g.Ranges = append(m.g.Ranges, r)
	}
}

// witness reads what is another in each boot: where the kernel maps all memory.
func (m *Monitor) witness(ctx context.Context) Hex {
	if m.g.Image == nil || !m.g.Mode.Long() {
		return 0
	}
	at, ok := m.g.Image.Lookup("page_offset_base")
	if !ok {
		return 0
	}
	p, err := m.fetch(ctx, at, 8)
	if err != nil {
		return 0
	}
	return Hex(pointer(p))
}

// rebase moves the baseline to where the kernel runs now, or drops it if it is
// of another kernel. How far the kernel moved is what more than half of the
// exceptions' gates agree on: interrupts' ones look the same in many kernels.
func (m *Monitor) rebase(ctx context.Context, gates []guest.Gate, boot Hex) {
	if !m.based {
		return
	}
	votes := map[uint64]int{}
	of := 0
	for _, g := range gates[:min(32, len(gates))] {
		t := m.items[itemKey{checkIDT, "idt", -1, g.Vector, ""}]
		if t == nil || t.base == nil || !g.Present {
			continue
		}
		of++
		votes[g.Handler-uint64(t.base.Value.Value)]++
	}
	delta, most := uint64(0), 0
	for d, n := range votes {
		if n > most {
			delta, most = d, n
		}
	}
	found := 2*most > of
	if !found {
		delta, found = m.entryDelta()
	}
	const fewest = 8
	again := delta != 0 || boot != 0 && m.boot != 0 && boot != m.boot
	switch {
	case of < fewest: // the baseline has no interrupt table
		m.rebaseRegisters()
	case !found, again && !m.sameSyscalls(ctx, delta):
		m.dropBaseline()
	case again:
		m.moveBaseline(delta)
	}
}

// dropBaseline begins anew with another kernel.
func (m *Monitor) dropBaseline() {
	m.items, m.open, m.listed = map[itemKey]*tracked{}, map[itemKey]*tracked{}, nil
	m.based = false
	m.emit(Finding{Kind: KindRestarted, Check: "guest", Object: "kernel",
		Message: fmt.Sprintf("guest %v runs another kernel than its baseline is of: a new baseline was taken", m.vm)})
}

// moveBaseline goes on with the same kernel, another boot of it, delta bytes
// higher.
func (m *Monitor) moveBaseline(delta uint64) {
	m.listed = nil
	for _, t := range m.items {
		if t.base == nil {
			continue
		}
		switch t.base.Scope {
		case ScopeImage:
			if t.base.Value.Value != 0 {
				t.base.Value.Value += Hex(delta)
			}
		case ScopeBoot:
			t.base = nil
		}
	}
	m.emit(Finding{Kind: KindRestarted, Check: "guest", Object: "kernel",
		Message: fmt.Sprintf("guest %v was restarted: its kernel lies %s than before", m.vm, moved(delta))})
}

// sameSyscalls says whether most of the system call table is as it was, moved
// by delta, as far as that can be told.
func (m *Monitor) sameSyscalls(ctx context.Context, delta uint64) bool {
	same, of := 0, 0
	for _, it := range m.syscalls(ctx) {
		if t := m.items[it.key()]; t != nil && t.base != nil {
			of++
			if it.same(t.base, delta) {
				same++
			}
		}
	}
	return of == 0 || 2*same > of
}

// syscalls reads the system call table; nil: it cannot be read.
func (m *Monitor) syscalls(ctx context.Context) []Item {
	if m.g.Image == nil {
		return nil
	}
	r, ok := syscallTable(m.g, tableSyscalls)
	if !ok {
		return nil
	}
	data, err := m.fetch(ctx, r.Address, r.Length)
	if err != nil {
		return nil
	}
	return syscallItems(m.g, tableSyscalls, data, nil)
}

// entryDelta is how far the kernel moved by LSTAR and CSTAR, if these agree.
func (m *Monitor) entryDelta() (uint64, bool) {
	id := int64(m.leader.state.ID)
	l := m.items[itemKey{checkMSR, "lstar", id, -1, "LSTAR"}]
	c := m.items[itemKey{checkMSR, "cstar", id, -1, "CSTAR"}]
	if l == nil || c == nil || l.base == nil || c.base == nil {
		return 0, false
	}
	delta := m.leader.state.LSTAR - uint64(l.base.Value.Value)
	return delta, m.leader.state.CSTAR-uint64(c.base.Value.Value) == delta
}

func moved(delta uint64) string {
	switch {
	case delta == 0:
		return "no elsewhere"
	case int64(delta) < 0:
		return fmt.Sprintf("%#x bytes lower", -delta)
	}
	return fmt.Sprintf("%#x bytes higher", delta)
}

// layout lists what is watched of the guest as it is now.
func (m *Monitor) layout() {
	g := m.g
	g.CPUs = g.CPUs[:0]
	m.status.Waiting = 0
	votes := map[kvmaccess.TableRegister]int{}
	m.leader = nil
	for _, c := range m.cpus {
		if !c.ready || !c.settled {
			m.status.Waiting++
			continue
		}
		if m.leader == nil {
			m.leader = c
		}
		g.CPUs = append(g.CPUs, &c.state)
		votes[c.state.IDTR]++
	}
	if m.leader == nil {
		m.wait(notRunning)
		return
	}
	m.status.VCPUs = len(g.CPUs)
	best := g.CPUs[0].IDTR
	for r, n := range votes {
		if n > votes[best] || n == votes[best] && r == g.IDT {
			best = r
		}
	}
	g.IDT = best

	m.objects, m.ranges, m.places, m.status.Bytes = nil, nil, nil, 0
	index := map[kvmaccess.Range]int{}
	for _, check := range m.checks {
		for _, o := range check.Objects(g) {
			if o.Memory.Length > 0 && m.status.State == StateRegisters {
				continue
			}
			obj := object{Object: o, check: check.Name(), index: -1, dirty: true}
			for _, c := range m.cpus {
				if c.state.ID == o.CPU {
					obj.cpu = c
				}
			}
			if o.Memory.Length > 0 {
				i, ok := index[o.Memory]
				if !ok {
					i = len(m.ranges)
					index[o.Memory] = i
					m.ranges = append(m.ranges, o.Memory)
					m.status.Bytes += int(o.Memory.Length)
				}
				obj.index = i
			}
			m.objects = append(m.objects, obj)
		}
	}
	m.data, m.errs = make([][]byte, len(m.ranges)), make([]error, len(m.ranges))
}

// reread reads and evaluates all that layout lists.
func (m *Monitor) reread(ctx context.Context) error {
	if m.g == nil {
		return nil
	}
	if _, err := m.read(ctx); err != nil {
		return err
	}
	for i := range m.objects {
		m.objects[i].dirty = true
	}
	if err := m.evaluate(ctx); err != nil {
		return err
	}
	m.forget()
	return nil
}

// forget drops what is known of tables that vCPUs had for themselves and have
// no more.
func (m *Monitor) forget() {
	if m.g == nil {
		return
	}
	var keys []itemKey
	for k := range m.items {
		if k.check == checkIDT && k.object == "idt" && k.vcpu >= 0 {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, itemKey.compare)
	for _, k := range keys {
		t := m.items[k]
		for _, cpu := range m.g.CPUs {
			if int64(cpu.ID) != k.vcpu || cpu.IDTR != m.g.IDT {
				continue
			}
			if t.open != nil {
				f := m.cleared(&t.last, t)
				f.New = nil
				f.Message = fmt.Sprintf("%s: the vCPU does not use that table any more", t.last.subject(m.vm))
				m.emit(f)
			}
			m.drop(k)
		}
	}
}
