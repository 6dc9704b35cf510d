// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// kernelSource is what the Monitor knows of the guest as guest.Attach reads it.
type kernelSource struct {
	guest.Memory
	cpus []kvmaccess.VCPU
}

// VCPUs implements guest.Source.
func (s kernelSource) VCPUs(context.Context) ([]kvmaccess.VCPU, error) { return s.cpus, nil }

// The guest's modules are read anew at most every modulesEvery, and so seldom
// that it takes no more than one part in modulesShare of the time, however many
// modules the guest pretends to have.
const (
	modulesEvery = time.Second
	modulesShare = 100
)

// findKernel finds the guest's kernel in its memory, the one that was found
// before if that still, or again, runs. It returns false if the Monitor is to
// wait; an error is one of reading.
func (m *Monitor) findKernel(ctx context.Context) (bool, error) {
	src := kernelSource{Memory: m.mem}
	for _, c := range m.cpus {
		src.cpus = append(src.cpus, c.state)
	}
	if m.kernel != nil && m.kernel.Runs(ctx, src.cpus) != nil {
		m.kernel = nil
	}
	var err error
	if m.kernel == nil {
		m.kernel, err = guest.Attach(ctx, src, guest.AttachOptions{Early: true, Cache: m.opts.Cache})
		m.fresh, m.refreshed = true, m.now()
		if err == nil && m.tablesMoved(ctx) {
			m.wait("the guest set up other tables while its kernel was looked for: it still boots")
			return false, nil
		}
	}
	if !errors.Is(err, guest.ErrNoTables) {
		m.gone = time.Time{}
	}
	switch {
	case err == nil:
		m.g.Kernel, m.g.Image = m.kernel, m.kernel.Image
	case errors.Is(err, guest.ErrNotBooted):
		m.wait(err.Error())
		return false, nil
	case errors.Is(err, kvmaccess.ErrNotResident), errors.Is(err, kvmaccess.ErrUnsettled):
		return false, m.unreadable(ctx, "the kernel", err)
	case errors.Is(err, guest.ErrNoTables) && m.again():
		m.wait(err.Error())
		return false, nil
	case errors.Is(err, guest.ErrNoTables):
		m.g.Doubts = []guest.Doubt{{Object: guest.DoubtSymbols, Reason: err.Error()}}
		m.withoutSymbols(err)
	case isAny(err, guest.ErrNotLinux, guest.Err32Bit, guest.ErrNoMemory), guestError(err):
		m.withoutSymbols(err)
	default:
		return false, m.unreadable(ctx, "the kernel", err)
	}
	return true, nil
}

// tablesMoved says whether a vCPU has other tables, or ways into the kernel, than
// a moment ago: to find a kernel takes a while, in which one that boots goes on.
func (m *Monitor) tablesMoved(ctx context.Context) bool {
	states, err := m.src.VCPUs(ctx, m.vm.ID)
	if err != nil {
		return false // the next reading tells
	}
	for i := range states {
		w := watch(&states[i])
		for _, c := range m.cpus {
			if c.ready && c.state.ID == states[i].ID && w != c.watch && states[i].Flags&(kvmaccess.VCPUNested|kvmaccess.VCPUSMM) == 0 {
				return true
			}
		}
	}
	return false
}

// settleTables is how long a kernel must be without its symbol table: while a
// guest restarts, its memory is that of a kernel in part.
const settleTables = 2 * time.Second

// again says whether to look for the symbol table another time.
func (m *Monitor) again() bool {
	now := m.now()
	if m.gone.IsZero() || now.Before(m.gone) {
		m.gone = now
	}
	return m.opts.Settle >= 0 && now.Sub(m.gone) < settleTables
}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
}

func (m *Monitor) withoutSymbols(err error) {
	m.problem("no symbols: %v; handlers are compared with the kernel's text, not with names, and system call tables are not checked", err)
}

// takeRoot takes over the page tables that the kernel was found by: its own,
// or, if these are in doubt, the kernel's half of a process' ones.
func (m *Monitor) takeRoot() {
	k := m.g.Kernel
	m.root = k.Space.Root
	m.rootFixed = !slices.ContainsFunc(k.Doubts, func(d guest.Doubt) bool { return d.Object == guest.DoubtTables })
	if !m.rootFixed {
		m.isolated = m.isolated || m.root != m.g.Mode.RootOf(m.leader.state.CR3)
	}
}

// takeKernel reads of the kernel what boot has brought.
func (m *Monitor) takeKernel(ctx context.Context) {
	k := m.g.Kernel
	if k == nil {
		return
	}
	if !m.fresh {
		k.Refresh(ctx)
		m.takeRoot()
		m.refreshed = m.now()
	}
	m.fresh = false
	m.g.Image = k.Image
	m.g.Doubts = append(slices.Clone(k.Doubts), k.Seal.Broken()...)
	for _, d := range k.Doubts {
		if d.Object == guest.DoubtModules {
			m.problem("not all modules can be named: %s", d.Reason)
		}
	}
	if errors.Is(k.TypesErr, guest.ErrNoTypes) {
		m.problem("modules cannot be named: %v", k.TypesErr)
	}
}

// mostPieces bounds how much one tick looks at of what never changes.
const mostPieces = 128

// verify looks at what the kernel's symbols and types were made of, so much of
// it that all was looked at once in Options.Verify. It returns true if there is
// something to say.
func (m *Monitor) verify(ctx context.Context, now time.Time) bool {
	if m.g == nil || m.g.Kernel == nil || m.opts.Verify < 0 || !m.rootFixed {
		return false
	}
	k := m.g.Kernel
	if k.Seal.Pieces() == 0 {
		return false
	}
	every := max(m.opts.Verify/time.Duration(k.Seal.Pieces()), time.Microsecond)
	since := now.Sub(m.verified)
	if since >= 0 && since < every {
		return false
	}
	changed := false
	for range min(mostPieces, max(1, int(since/every))) {
		x := k.Seal.Next()
		out, err := m.src.ReadVirtual(ctx, m.vm.ID, m.leader.state.ID, m.root, kvmaccess.Range{Address: x.Start, Length: uint32(x.Size())})
		if err == nil && len(out) != 1 {
			err = errors.New("the answer does not fit the request")
		}
		if err == nil {
			err = out[0].Err
		}
		switch {
		case err == nil:
			changed = !k.Seal.See(out[0].Data, nil) || changed
		case guestError(err):
			changed = !k.Seal.See(nil, err) || changed
		case errors.Is(err, kvmaccess.ErrNotResident):
			// Nobody has used it for long. Memory brings it back, if it may.
			same, err := k.Seal.Look(ctx, k.Space)
			changed = err == nil && !same || changed
		}
	}
	m.verified = now
	if !changed {
		return false
	}
	m.g.Doubts = append(slices.Clone(k.Doubts), k.Seal.Broken()...)
	for i := range m.objects {
		if m.objects[i].check == checkKernel {
			m.objects[i].dirty = true
		}
	}
	return true
}

// moduleNamer is Guest.modules for one evaluation: which modules there are by now
// is looked at once, and all of them are read where that is called for.
func (m *Monitor) moduleNamer(ctx context.Context) func(addr uint64) {
	g, k := m.g, m.g.Kernel
	if k == nil || k.Types == nil {
		return nil
	}
	same := false // modules as before, so that names hold
	return func(addr uint64) {
		if same && k.Image.Name(addr) != "" {
			return
		}
		// Not through the VMM, which may take long.
		memory := k.Space.Memory
		k.Space.Memory = sourceMemory{m.src, m.vm.ID}
		defer func() { k.Space.Memory = memory }()
		d := m.now().Sub(m.refreshed)
		seldom := d >= 0 && d < max(modulesEvery, modulesShare*m.modulesTook)
		g.Image = k.Image
		switch same = same || k.SameModules(ctx); {
		case same && !seldom && k.Image.Name(addr) != "":
			return
		case same && seldom:
		case seldom:
			// Another one may be where one was: no name is better than a wrong one.
			g.Image = k.Image.WithoutModules()
		default:
			m.refreshed = m.now()
			start := time.Now()
			// What cannot be read is not named; the next look may find it in order.
			if err := k.ReadModules(ctx); err != nil && !guestError(err) {
				m.status.Unread++
			}
			m.modulesTook = time.Since(start)
			g.Image = k.Image
		}
		g.modules = nil
	}
}
