// SPDX-License-Identifier: MIT

package integrity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Source is what a Monitor reads a VM through; *kvmaccess.Client and
// *guest.Machine are ones.
type Source interface {
	VCPUs(ctx context.Context, vm kvmaccess.VMID) ([]kvmaccess.VCPU, error)
	VCPU(ctx context.Context, vm kvmaccess.VMID, id uint32) (kvmaccess.VCPU, error)
	ReadPhysical(ctx context.Context, vm kvmaccess.VMID, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error)
	// ReadVirtual reads through the page tables of a vCPU, at root or, with
	// root 0, at its CR3. It returns one RangeData for each range.
	ReadVirtual(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, root uint64, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error)
}

// Options of a Monitor; the zero value works.
type Options struct {
	Symbols     *guest.Symbols // of the guest's kernel, to be used instead of those in its memory; nil: the guest's own
	Cache       *guest.Cache   // shared with Monitors of other guests; nil: none
	Baseline    *Baseline      // of an earlier Monitor of this VM; nil: the first sight becomes it
	Checks      []Check        // default: Checks()
	Ranges      []MemoryRange  // guest memory that MemoryCheck watches
	Scratch     Scratch        // for a copy of the kernel's code, which StartText needs; it may be that of an earlier Monitor of this VM
	Memory      guest.Memory   // physical memory; default: the Source's ReadPhysical, which does not get at pages that the host swapped out
	MaxFindings int            // that one Attach or Tick returns at most; default 256, the rest follows in the next ones

	// Settle is how long a guest of which there are no symbols, and that does
	// not write-protect its kernel, must stay the same before it counts as
	// booted, unless a program is seen running; default 30 s, negative: not at
	// all. With symbols the kernel itself tells.
	Settle time.Duration
	// Verify is in how long all that the guest's symbols and types were made
	// of is looked at once, a little with each tick, for whether it was
	// overwritten; default 5 min, negative: not at all.
	Verify time.Duration
	Now    func() time.Time // default: time.Now
}

// State says how far a Monitor is.
type State string

const (
	// StateWaiting: the guest has not come to run a kernel with its tables set
	// up (it is in firmware, in a boot loader or in early boot), or cannot be
	// read; Status.Reason tells. There are no findings then.
	StateWaiting State = "waiting"
	// StateRegisters: there is a baseline of registers, and every Tick compares
	// these. Memory cannot be read, encrypted or gone; Status.Reason tells. As
	// soon as it can, all is attached to.
	StateRegisters State = "registers"
	// StateWatching: there is a baseline and every Tick compares with it.
	StateWatching State = "watching"
)

// Status is how a Monitor fares.
type Status struct {
	State   State  `json:"state"`
	Reason  string `json:"reason,omitempty"` // why it waits, or has registers only
	Symbols int    `json:"symbols"`          // in use; 0: there are none
	Slide   Hex    `json:"slide"`            // of the running kernel against the symbols
	// Kernel is the guest's, as it says itself; nil: it was not found in the
	// guest's memory, or the symbols come out of a file.
	Kernel   *guest.Fingerprint `json:"kernel,omitempty"`
	Problems []string           `json:"problems,omitempty"` // what cannot be checked, and why
	VCPUs    int                `json:"vcpus"`              // watched
	Waiting  int                `json:"waiting"`            // vCPUs that are not in the kernel, or not yet
	Bytes    int                `json:"bytes"`              // of guest memory compared each tick
	Open     int                `json:"open"`               // findings that hold now
	Pending  int                `json:"pending"`            // findings that the next ticks return
	Ticks    uint64             `json:"ticks"`
	Slow     uint64             `json:"slow"`   // ticks that saw a difference and had to decode
	Unread   uint64             `json:"unread"` // times that something could not be read for a reason of the host
}

// Monitor watches one VM. Its methods are for one goroutine at a time.
type Monitor struct {
	src    Source
	vm     VM
	opts   Options
	checks []Check
	mem    guest.Memory
	now    func() time.Time

	// What there is to know of the guest; nil until it is up.
	g         *Guest
	cpus      []*cpu
	leader    *cpu   // whose page tables are used
	handler   uint64 // of an exception: kernel text that must be mapped
	textAt    uint64 // guest-physical address of it
	root      uint64 // of the kernel's page tables
	rootFixed bool   // no process' tables: they stay
	isolated  bool   // page-table isolation was seen
	scanned   time.Time

	objects []object
	ranges  []kvmaccess.Range     // that the objects need, each once
	data    [][]byte              // what was read of ranges last; nil: nothing could be
	errs    []error               // why
	dst     []kvmaccess.RangeData // for the next read
	places  []place               // where they lie, as WatchItems found
	watched watchedMemory         // what WatchItems listed of them
	tables  *guest.PageCache      // page tables on the way to them
	unseen  bool                  // the last Tick could not read all, for a reason of the host

	kernel      *guest.Kernel // as found last; nil: it was not
	fresh       bool          // all of it was just read
	gone        time.Time     // since when its symbol table is not there; zero: it is
	refreshed   time.Time     // when what changes of it was
	modulesTook time.Duration // to read its modules
	verified    time.Time     // when a piece of what it never changes was looked at

	code     *Code // as it was looked at last, of whichever boot; nil: it was not
	accepted []Accepted

	attaching bool
	unread    unread
	restarts  bool // the kernel was seen not to run, since it was attached to

	// Settling of a guest without symbols.
	settling time.Time
	seen     [32]byte

	based  bool
	taken  time.Time
	boot   Hex
	items  map[itemKey]*tracked
	open   map[itemKey]*tracked // those of items of which a finding holds
	listed []Item               // for Baseline; nil: to be made
	queue  []Finding

	status Status
}

// cpu is what the Monitor knows of one vCPU.
type cpu struct {
	state kvmaccess.VCPU // the last one
	watch watched
	ready bool // runs the kernel
	// settled: it has done so for a while. A vCPU that comes up has its
	// registers loaded one by one.
	settled bool
	since   time.Time
	dirty   bool // watch differs from what the items were made of
}

// object is an Object in its place in the Monitor.
type object struct {
	Object
	check string
	cpu   *cpu
	index int // of its Memory in ranges; -1: it has none
	dirty bool
	made  []byte // what its items were made of last, if it has Changed; empty: nothing
}

// tracked is the state of one item.
type tracked struct {
	base *Item // nil: the next sight becomes it
	last Item
	open *Finding // holds now
}

// notRunning is why a Monitor waits that has watched.
const notRunning = "the kernel does not run any more: the guest restarts or is being shut down"

const (
	rescanEvery    = 10 * time.Second
	retryEvery     = 20 * time.Millisecond
	settleVCPU     = 50 * time.Millisecond
	defaultMost    = 256
	maxQueue       = 16384
	maxVCPUs       = 4096
	textSearch     = 128 << 20
	defaultSettles = 30 * time.Second
	defaultVerify  = 5 * time.Minute
)

// NewMonitor makes a Monitor of vm. It reads nothing yet. The error says what
// is wrong with the options.
func NewMonitor(src Source, vm VM, opts Options) (*Monitor, error) {
	if err := checkRanges(opts.Ranges); err != nil {
		return nil, err
	}
	m := &Monitor{src: src, vm: vm, opts: opts, checks: opts.Checks, mem: opts.Memory, now: opts.Now, items: map[itemKey]*tracked{}, open: map[itemKey]*tracked{}}
	if m.checks == nil {
		m.checks = Checks()
	}
	if m.mem == nil {
		m.mem = sourceMemory{src, vm.ID}
	}
	if m.now == nil {
		m.now = time.Now
	}
	if m.opts.MaxFindings <= 0 {
		m.opts.MaxFindings = defaultMost
	}
	if m.opts.Verify == 0 {
		m.opts.Verify = defaultVerify
	}
	if m.opts.Settle == 0 {
		m.opts.Settle = defaultSettles
	}
	m.status.State = StateWaiting
	m.status.Reason = "not attached yet"
	if opts.Baseline != nil && opts.Baseline.Version != 0 {
		if err := opts.Baseline.check(); err != nil {
			return nil, err
		}
		m.resume(opts.Baseline)
	}
	return m, nil
}

// sourceMemory is the physical memory that a Source reads.
type sourceMemory struct {
	src Source
	vm  kvmaccess.VMID
}

func (s sourceMemory) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), kvmaccess.MaxBytes)
		out, err := s.src.ReadPhysical(ctx, s.vm, kvmaccess.Range{Address: gpa, Length: uint32(n)})
		if err != nil {
			return err
		}
		if len(out) != 1 || out[0].Err == nil && len(out[0].Data) != n {
			return errors.New("the answer does not fit the request")
		}
		if out[0].Err != nil {
			return out[0].Err
		}
		copy(p, out[0].Data)
		p, gpa = p[n:], gpa+uint64(n)
	}
	return nil
}

// Attach looks at the whole VM, takes the baseline unless there is one
// already, and returns what differs from it or is not as an honest kernel has
// it. Findings that hold and were returned before, by this Monitor or by the
// one that Options.Baseline is of, are not returned again. An error is one of
// reading (a dying VM: kvmaccess.ErrNoVM or ErrDying); a guest that is not up
// yet is none, see Status.
func (m *Monitor) Attach(ctx context.Context) ([]Finding, error) {
	m.g = nil
	if err := m.attach(ctx); err != nil {
		return nil, err
	}
	return m.flush(), nil
}

// Tick compares with what was seen last and returns what changed. It attaches
// if that has not succeeded yet.
func (m *Monitor) Tick(ctx context.Context) ([]Finding, error) {
	m.status.Ticks++
	m.unseen = false
	now := m.now()
	if m.g == nil {
		if d := now.Sub(m.scanned); d < 0 || d >= retryEvery {
			if err := m.attach(ctx); err != nil {
				return nil, err
			}
		}
		return m.flush(), nil
	}
	layout, dirty, err := m.capture(ctx, now)
	if err != nil {
		return nil, err
	}
	if m.g != nil {
		if err := m.probe(ctx, now); err != nil {
			return nil, err
		}
	}
	if m.g == nil { // the guest restarts, or is to be attached to anew
		return m.flush(), nil
	}
	if layout {
		m.status.Slow++
		m.layout()
		if err := m.reread(ctx); err != nil {
			return nil, err
		}
		return m.flush(), nil
	}
	changed, err := m.read(ctx)
	if err != nil {
		return nil, err
	}
	if changed || dirty {
		m.status.Slow++
		if err := m.evaluate(ctx); err != nil {
			return nil, err
		}
	}
	if len(m.queue) == 0 {
		return nil, nil
	}
	return m.flush(), nil
}

// capture takes each vCPU's registers. layout: what there is to watch may lie
// elsewhere now; dirty: some item may have another value.
func (m *Monitor) capture(ctx context.Context, now time.Time) (layout, dirty bool, err error) {
	if now.Sub(m.scanned) >= rescanEvery || now.Before(m.scanned) {
		layout, err = m.scan(ctx, now)
		if err != nil {
			return false, false, err
		}
	}
	dirty = m.verify(ctx, now)
	ready := 0
	for i := 0; i < len(m.cpus); i++ {
		c := m.cpus[i]
		state, err := m.src.VCPU(ctx, m.vm.ID, c.state.ID)
		switch {
		case err == nil:
		case errors.Is(err, kvmaccess.ErrUnsettled):
			m.status.Unread++
			m.unseen = true
			if c.ready {
				ready++
			}
			continue
		case errors.Is(err, kvmaccess.ErrNoVCPU):
			m.cpus = slices.Delete(m.cpus, i, i+1)
			i--
			layout = true
			continue
		default:
			return false, false, fmt.Errorf("vCPU %d of guest %v: %w", c.state.ID, m.vm, err)
		}
		settled := c.settled
		l, d := c.update(state, now)
		if c.settled && !settled {
			m.accept("vCPU up", fmt.Sprintf("vCPU %d runs the kernel: what it has for itself is compared with what it had before, or becomes its baseline", c.state.ID))
		}
		layout, dirty = layout || l, dirty || d
		if c.ready {
			ready++
		}
	}
	// The first vCPU runs the kernel from boot to shutdown; it is reset before
	// or after the others.
	if ready == 0 || !m.cpus[0].ready {
		m.wait(notRunning)
		m.restarts = true
	}
	return layout, dirty, nil
}

// update takes over a new state.
func (c *cpu) update(state kvmaccess.VCPU, now time.Time) (layout, dirty bool) {
	if state.Flags&(kvmaccess.VCPUNested|kvmaccess.VCPUSMM) != 0 {
		return false, false // not the kernel's state; the last one stands
	}
	restoreLimits(&state.Registers, &c.state.Registers)
	w := watch(&state)
	same := w == c.watch
	moved := state.GDTR != c.state.GDTR || state.IDTR != c.state.IDTR
	c.state, c.watch = state, w
	ready := readyReason(&state) == ""
	if ready != c.ready {
		c.ready, c.settled, c.since = ready, false, now
		return true, false
	}
	if !ready {
		return false, false
	}
	if !c.settled {
		if !same {
			c.since = now
		} else if now.Sub(c.since) >= settleVCPU {
			c.settled = true
			return true, false
		}
		return false, false
	}
	if !same {
		c.dirty = true
	}
	return moved, !same
}

// readyReason says why a vCPU does not run a kernel with its tables set up;
// empty: it does.
func readyReason(v *kvmaccess.VCPU) string {
	mode := guest.ModeOf(&v.Registers)
	switch {
	case v.Condition == kvmaccess.ConditionNew:
		return "has never run"
	case v.Flags&kvmaccess.VCPUNested != 0:
		return "runs a nested guest"
	case v.Flags&kvmaccess.VCPUSMM != 0:
		return "is in system management mode"
	case v.CR0&guest.CR0PE == 0:
		return "is in real mode: in reset or in firmware"
	case mode.Format == guest.FormatNone:
		return "has paging off: in firmware or a boot loader"
	case mode.Long() && v.LSTAR == 0 && v.Flags&kvmaccess.VCPUPartial == 0:
		return "has no system call entry yet: in firmware or early boot"
	case !mode.Long() && !mode.Kernel(v.IDTR.Base):
		return "has no kernel's interrupt table yet: in firmware or early boot"
	case v.CPL == 0 && !mode.Kernel(v.RIP) && !mode.Kernel(v.IDTR.Base) && !mode.Kernel(v.GDTR.Base):
		return "runs firmware or a boot loader" // LSTAR survives a reset
	case v.TR.Selector == 0 || v.GDTR.Limit == 0 || v.IDTR.Limit == 0:
		return "has no descriptor tables yet: in early boot"
	}
	return ""
}

// scan looks for vCPUs that were added.
func (m *Monitor) scan(ctx context.Context, now time.Time) (added bool, err error) {
	states, err := m.src.VCPUs(ctx, m.vm.ID)
	if err != nil {
		return false, fmt.Errorf("vCPUs of guest %v: %w", m.vm, err)
	}
	m.scanned = now
	for _, state := range states {
		known := slices.ContainsFunc(m.cpus, func(c *cpu) bool { return c.state.ID == state.ID })
		if known || len(m.cpus) >= maxVCPUs {
			continue
		}
		c := &cpu{since: now}
		c.state.ID = state.ID
		c.update(state, now)
		m.cpus = append(m.cpus, c)
		added = true
	}
	slices.SortFunc(m.cpus, func(a, b *cpu) int { return int(a.state.ID) - int(b.state.ID) })
	return added, nil
}

// read reads all ranges and compares them with what was read last.
func (m *Monitor) read(ctx context.Context) (changed bool, err error) {
	if len(m.ranges) == 0 {
		return false, nil
	}
	root := m.root
	if !m.rootFixed {
		root = m.currentRoot()
	}
	out, err := m.readRanges(ctx, root)
	if err != nil && !rangeError(err) {
		return false, fmt.Errorf("read memory of guest %v: %w", m.vm, err)
	}
	if err == nil && len(out) != len(m.ranges) {
		return false, fmt.Errorf("read memory of guest %v: %d answers to %d ranges", m.vm, len(out), len(m.ranges))
	}
	for i := range m.ranges {
		var data []byte
		failed := err
		if err == nil {
			data, failed = out[i].Data, out[i].Err
			if failed == nil && len(data) == int(m.ranges[i].Length) && m.errs[i] == nil && bytes.Equal(data, m.data[i]) {
				continue
			}
		}
		if m.store(ctx, root, i, data, failed) {
			changed = true
		}
	}
	return changed, nil
}

// intoSource is a Source that reads into memory that is used again: a tick
// leaves nothing behind then.
type intoSource interface {
	ReadVirtualInto(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, root uint64, dst []kvmaccess.RangeData) error
}

// readRanges reads all ranges. What it returns is good until the next call.
func (m *Monitor) readRanges(ctx context.Context, root uint64) ([]kvmaccess.RangeData, error) {
	into, ok := m.src.(intoSource)
	if !ok {
		return m.src.ReadVirtual(ctx, m.vm.ID, m.leader.state.ID, root, m.ranges...)
	}
	if len(m.dst) != len(m.ranges) {
		m.dst = make([]kvmaccess.RangeData, len(m.ranges))
	}
	for i, r := range m.ranges {
		m.dst[i].Range = r
	}
	return m.dst, into.ReadVirtualInto(ctx, m.vm.ID, m.leader.state.ID, root, m.dst)
}

// currentRoot is the leader's page tables, the kernel's half of them.
func (m *Monitor) currentRoot() uint64 {
	return m.g.Mode.KernelHalf(m.leader.state.CR3, m.isolated)
}

// store takes over what was read of a range, or tries other ways to read it.
func (m *Monitor) store(ctx context.Context, root uint64, i int, data []byte, err error) (changed bool) {
	r := m.ranges[i]
	if err == nil && len(data) != int(r.Length) {
		err = fmt.Errorf("%d bytes came of %d", len(data), r.Length)
		data = nil
	}
	if err != nil && !(m.rootFixed && guestError(err)) {
		// The module reads only what is resident, and on a process' tables
		// only what these map when it gets there.
		p := make([]byte, r.Length)
		again := guest.ReadVirtual(ctx, m.mem, m.g.Mode, root, r.Address, p)
		if again != nil && !m.rootFixed {
			if kernel, err := m.kernelRoot(ctx, r.Address); err == nil && kernel != root {
				m.isolated = true
				again = guest.ReadVirtual(ctx, m.mem, m.g.Mode, kernel, r.Address, p)
			}
		}
		if again == nil {
			data, err = p, nil
		} else {
			data = nil
			if !guestError(again) {
				m.status.Unread++
				m.unseen = true
				m.errs[i] = again
				return false // the host's matter: the last sight stands
			}
			err = again
		}
	}
	changed = !bytes.Equal(data, m.data[i]) || (data == nil) != (m.data[i] == nil)
	m.errs[i] = err
	if data == nil {
		m.data[i] = nil
	} else {
		m.data[i] = append(m.data[i][:0], data...) // a Source may use its memory again
	}
	if changed {
		for j := range m.objects {
			if m.objects[j].index == i {
				m.objects[j].dirty = true
			}
		}
	}
	return changed
}

// guestError says whether memory cannot be read for a reason of the guest's:
// its page tables do not map it.
func guestError(err error) bool {
	return errors.Is(err, kvmaccess.ErrNotMapped) || errors.Is(err, kvmaccess.ErrNoMemslot) || errors.Is(err, kvmaccess.ErrInvalid) ||
		errors.Is(err, guest.ErrNotPresent) || errors.Is(err, guest.ErrReserved) || errors.Is(err, guest.ErrNotCanonical)
}

// rangeError says whether a request's error is of its ranges: none could be
// read.
func rangeError(err error) bool {
	return guestError(err) || errors.Is(err, kvmaccess.ErrNotResident) || errors.Is(err, kvmaccess.ErrUnsettled)
}

// unreadableError says whether memory cannot be read for a reason that its
// registers do not share.
func unreadableError(err error) bool {
	return rangeError(err) || errors.Is(err, kvmaccess.ErrProtected)
}

// wait gives up what is known of the guest until it is up again.
func (m *Monitor) wait(reason string) {
	m.g = nil
	m.cpus, m.leader = nil, nil
	m.objects, m.ranges, m.data, m.errs, m.places = nil, nil, nil, nil, nil
	m.watched, m.tables = watchedMemory{}, nil
	m.status.State, m.status.Reason = StateWaiting, reason
	m.status.VCPUs, m.status.Waiting, m.status.Bytes = 0, 0, 0
}

// flush hands out findings, as many as may be at once.
func (m *Monitor) flush() []Finding {
	n := min(len(m.queue), m.opts.MaxFindings)
	if n == 0 {
		return nil
	}
	out := slices.Clone(m.queue[:n])
	m.queue = slices.Delete(m.queue, 0, n)
	if len(m.queue) > 0 {
		out[n-1].More = len(m.queue)
	}
	return out
}

// Status says how the Monitor fares.
func (m *Monitor) Status() Status {
	s := m.status
	s.Pending = len(m.queue)
	s.Open = len(m.open)
	s.Problems = slices.Clone(s.Problems)
	return s
}
