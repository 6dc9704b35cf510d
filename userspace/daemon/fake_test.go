// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// *kvmaccess.Client and *integrity.Monitor are what the daemon runs on.
var (
	_ source       = (*kvmaccess.Client)(nil)
	_ subscription = (*kvmaccess.Subscription)(nil)
	_ monitor      = (*integrity.Monitor)(nil)
	_ watchSource  = moduleWatcher{}
)

// bubbleClock is a clock on package time, for synctest's.
type bubbleClock struct {
	wake chan struct{}
}

func newBubbleClock() (clock, error) {
	return &bubbleClock{wake: make(chan struct{}, 1)}, nil
}

func (c *bubbleClock) Now() time.Duration { return time.Since(time.Unix(0, 0)) }

func (c *bubbleClock) Wait(deadline, _ time.Duration) error {
	if deadline == noDeadline {
		<-c.wake
		return nil
	}
	timer := time.NewTimer(deadline - c.Now())
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.wake:
	}
	return nil
}

func (c *bubbleClock) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *bubbleClock) Close() error { return nil }

// fakeHost is a host whose VMs the test makes and ends.
type fakeHost struct {
	mu       sync.Mutex
	module   bool
	openErr  error
	vms      map[kvmaccess.VMID]kvmaccess.VM
	vmms     map[int]kvmaccess.VMM
	guests   map[int]*fakeGuest // by pid
	subs     []*fakeSubscription
	lists    int
	subErr   error
	monitors []*fakeMonitor // all that were made
	watchers []*fakeWatcher
	clock    func() (clock, error)
	canWatch bool
}

// fakeGuest is what monitors see of a VM.
type fakeGuest struct {
	mu    sync.Mutex
	up    bool
	blind bool // its memory cannot be read
	value uint64
	err   error                               // of each tick
	work  func(context.Context, guest.Memory) // of each tick
	burst int                                 // findings that one tick holds back
	again time.Duration                       // of WatchItems
	tick  time.Duration                       // that the module's take

	reread func(*fakeGuest) // after each Reread
}

func newFakeHost() *fakeHost {
	return &fakeHost{
		module: true, canWatch: true, vms: map[kvmaccess.VMID]kvmaccess.VM{}, vmms: map[int]kvmaccess.VMM{}, guests: map[int]*fakeGuest{},
		clock: newBubbleClock,
	}
}

func (h *fakeHost) host() host {
	return host{
		open: func() (source, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.openErr != nil {
				return nil, h.openErr
			}
			if !h.module {
				return nil, kvmaccess.ErrNoModule
			}
			return &fakeSource{h: h}, nil
		},
		subscribe: func(ctx context.Context) (subscription, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.subErr != nil {
				return nil, h.subErr
			}
			if !h.module {
				return nil, kvmaccess.ErrNoModule
			}
			s := &fakeSubscription{events: make(chan any, 16)}
			h.subs = append(h.subs, s)
			return s, nil
		},
		watch: func() (watchSource, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			if !h.module {
				return nil, kvmaccess.ErrNoModule
			}
			w := newFakeWatcher(h)
			h.watchers = append(h.watchers, w)
			return w, nil
		},
		identify: func(pid int) (kvmaccess.VMM, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			vmm, ok := h.vmms[pid]
			if !ok {
				return vmm, fmt.Errorf("process %d: %w", pid, os.ErrNotExist)
			}
			return vmm, nil
		},
		memory: func(s source, vm kvmaccess.VM) guest.Memory { return fakeMemory{} },
		newMonitor: func(s source, vm integrity.VM, o integrity.Options) (monitor, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			m := &fakeMonitor{src: s.(*fakeSource), guest: h.guests[vm.PID], vm: vm, options: o, state: integrity.StateWaiting}
			if o.Baseline != nil {
				m.resume(*o.Baseline)
			}
			h.monitors = append(h.monitors, m)
			return m, nil
		},
		bootID:   func() (string, error) { return "boot", nil },
		newClock: h.clock,
	}
}

// start makes a VM whose guest is up, and tells of it.
func (h *fakeHost) start(id kvmaccess.VMID, pid int, name string, change ...func(*fakeGuest)) *fakeGuest {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := &fakeGuest{up: true, value: 1}
	for _, c := range change {
		c(g)
	}
	vm := kvmaccess.VM{ID: id, PID: pid, VCPUs: 1, Memory: 1 << 30}
	h.vms[id] = vm
	h.vmms[pid] = kvmaccess.VMM{Name: name, UUID: fmt.Sprintf("00000000-0000-0000-0000-%012d", pid), Start: uint64(1000 + pid)}
	h.guests[pid] = g
	h.tell(kvmaccess.Event{Kind: kvmaccess.VMCreated, VM: vm})
	return g
}

// end ends a VM and its VMM; told: with an event.
func (h *fakeHost) end(id kvmaccess.VMID, told bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	vm := h.vms[id]
	delete(h.vms, id)
	delete(h.vmms, vm.PID)
	if told {
		h.tell(kvmaccess.Event{Kind: kvmaccess.VMDestroyed, VM: vm})
	}
}

func (h *fakeHost) tell(what any) {
	for _, s := range h.subs {
		s.events <- what
	}
}

// setModule loads or removes the module. Ids start anew after a removal.
func (h *fakeHost) setModule(loaded bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.module = loaded
	if !loaded {
		h.subs = nil
		for id, vm := range h.vms {
			delete(h.vms, id)
			vm.ID += 100
			h.vms[vm.ID] = vm
		}
	}
}

type fakeSource struct {
	integrity.Source
	h *fakeHost
	// gone: the module was removed since this was opened.
	mu   sync.Mutex
	gone bool
}

func (s *fakeSource) check() error {
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.h.module {
		s.gone = true
		return kvmaccess.ErrNoModule
	}
	if s.gone {
		return kvmaccess.ErrReloaded
	}
	return nil
}

func (s *fakeSource) Info(context.Context) (kvmaccess.Info, error) {
	caps := kvmaccess.CapMemory | kvmaccess.CapVCPU | kvmaccess.CapEvents
	if s.h.canWatch {
		caps |= kvmaccess.CapWatch
	}
	return kvmaccess.Info{Version: "1.0", Caps: caps}, s.check()
}

func (s *fakeSource) VMs(context.Context) ([]kvmaccess.VM, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	s.h.lists++
	var vms []kvmaccess.VM
	for _, vm := range s.h.vms {
		vms = append(vms, vm)
	}
	return vms, nil
}

func (s *fakeSource) Stats(context.Context) (kvmaccess.Stats, error) {
	return kvmaccess.Stats{Worker: 5, Interrupt: 7}, s.check()
}

func (s *fakeSource) Watches(context.Context) ([]kvmaccess.WatchStats, error) {
	s.h.mu.Lock()
	watchers := slices.Clone(s.h.watchers)
	s.h.mu.Unlock()
	var all []kvmaccess.WatchStats
	for _, w := range watchers {
		all = append(all, w.stats()...)
	}
	return all, s.check()
}

func (s *fakeSource) Close() error { return nil }

type fakeSubscription struct {
	events chan any
}

func (s *fakeSubscription) Receive(ctx context.Context) (kvmaccess.Event, error) {
	select {
	case e := <-s.events:
		if err, ok := e.(error); ok {
			return kvmaccess.Event{}, err
		}
		return e.(kvmaccess.Event), nil
	case <-ctx.Done():
		return kvmaccess.Event{}, ctx.Err()
	}
}

func (s *fakeSubscription) Close() error { return nil }

type fakeMemory struct{}

func (fakeMemory) ReadPhysical(context.Context, uint64, []byte) error { return nil }

// fakeMonitor watches the value of a fakeGuest: 1 is the baseline's unless
// another one was seen first.
type fakeMonitor struct {
	src     *fakeSource
	guest   *fakeGuest
	vm      integrity.VM
	options integrity.Options

	state integrity.State
	taken time.Time
	base  uint64
	last  uint64
	queue []integrity.Finding
}

func (m *fakeMonitor) resume(b integrity.Baseline) {
	m.taken = b.Taken
	m.base = uint64(b.Items[0].Value.Value)
	m.last = m.base
	if len(b.Open) > 0 {
		m.last = uint64(b.Open[0].Item.Value.Value)
	}
}

func (m *fakeMonitor) Tick(ctx context.Context) ([]integrity.Finding, error) {
	if err := m.src.check(); err != nil {
		return nil, err
	}
	m.src.h.mu.Lock()
	_, there := m.src.h.vms[m.vm.ID]
	m.src.h.mu.Unlock()
	if !there {
		return nil, &kvmaccess.Error{Op: "vcpu_get", VM: m.vm.ID, Errno: 2, Message: "no VM"}
	}
	m.guest.mu.Lock()
	work := m.guest.work
	m.guest.mu.Unlock()
	if work != nil {
		work(ctx, m.options.Memory) // which may take a while
	}
	m.guest.mu.Lock()
	defer m.guest.mu.Unlock()
	if m.guest.err != nil {
		return nil, m.guest.err
	}
	if !m.guest.up {
		m.state = integrity.StateWaiting
		return nil, nil
	}
	switch {
	case m.guest.blind:
		m.state = integrity.StateRegisters
	case m.state == integrity.StateRegisters: // the next one attaches
		m.state = integrity.StateWaiting
		return nil, nil
	default:
		m.state = integrity.StateWatching
	}
	if m.taken.IsZero() {
		m.taken, m.base, m.last = time.Now().Round(0), m.guest.value, m.guest.value
	}
	if m.last != m.guest.value {
		kind := integrity.KindChanged
		if m.guest.value == m.base {
			kind = integrity.KindCleared
		}
		for i := range m.guest.burst + 1 {
			m.queue = append(m.queue, finding(m.vm, kind, i, m.last, m.guest.value))
		}
		m.last = m.guest.value
	}
	if len(m.queue) == 0 {
		return nil, nil
	}
	n := min(2, len(m.queue))
	out := slices.Clone(m.queue[:n])
	m.queue = m.queue[n:]
	out[n-1].More = len(m.queue)
	return out, nil
}

func finding(vm integrity.VM, kind integrity.Kind, entry int, old, new uint64) integrity.Finding {
	return integrity.Finding{
		Time: time.Now().UTC().Round(0), VM: vm, Check: "test", Object: "value", Entry: &entry, Kind: kind,
		Old: &integrity.Value{Value: integrity.Hex(old)}, New: &integrity.Value{Value: integrity.Hex(new)},
		Message: fmt.Sprintf("value %d of guest %v is %d, was %d", entry, vm, new, old),
	}
}

// WatchItems are one register that has the value.
func (m *fakeMonitor) WatchItems(context.Context) (integrity.WatchList, error) {
	m.guest.mu.Lock()
	defer m.guest.mu.Unlock()
	if m.state == integrity.StateWaiting {
		return integrity.WatchList{}, nil
	}
	return integrity.WatchList{
		Items: []integrity.WatchItem{{Item: kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: kvmaccess.RegisterLSTAR, Value: m.last}, What: "value"}},
		Again: m.guest.again,
	}, nil
}

// Reread finds what a Tick would.
func (m *fakeMonitor) Reread(ctx context.Context, events []kvmaccess.WatchEvent) (findings []integrity.Finding, told []bool, err error) {
	if len(events) == 0 {
		return nil, nil, nil
	}
	findings, err = m.Tick(ctx)
	m.guest.mu.Lock()
	defer m.guest.mu.Unlock()
	if m.guest.reread != nil {
		m.guest.reread(m.guest)
	}
	return findings, slices.Repeat([]bool{len(findings) > 0}, len(events)), err
}

// See finds what the event says.
func (m *fakeMonitor) See(_ context.Context, e kvmaccess.WatchEvent) ([]integrity.Finding, error) {
	m.guest.mu.Lock()
	defer m.guest.mu.Unlock()
	value := binary.NativeEndian.Uint64(e.Data)
	f := finding(m.vm, integrity.KindChanged, 0, m.last, value)
	m.last = value
	return []integrity.Finding{f}, nil
}

func (m *fakeMonitor) StartText(context.Context, *kvmaccess.Digester) (*integrity.TextLook, error) {
	return nil, integrity.ErrNoText
}

func (m *fakeMonitor) FinishText(context.Context, *integrity.TextLook) ([]integrity.Finding, error) {
	return nil, nil
}

func (m *fakeMonitor) WatchText() integrity.WatchList { return integrity.WatchList{} }

func (m *fakeMonitor) Accepted() []integrity.Accepted { return nil }

func (m *fakeMonitor) State() integrity.State { return m.state }

func (m *fakeMonitor) Baseline() integrity.Baseline {
	if m.taken.IsZero() {
		return integrity.Baseline{}
	}
	item := integrity.Item{Check: "test", Object: "value", Value: integrity.Value{Value: integrity.Hex(m.base)}}
	b := integrity.Baseline{Version: integrity.BaselineVersion, Taken: m.taken, VM: m.vm, Items: []integrity.Item{item}}
	if m.last != m.base {
		item.Value.Value = integrity.Hex(m.last)
		b.Open = []integrity.Open{{Item: item}}
	}
	return b
}

func (m *fakeMonitor) Status() integrity.Status {
	s := integrity.Status{State: m.state, Pending: len(m.queue)}
	switch m.state {
	case integrity.StateWaiting:
		s.Reason = "not up"
	case integrity.StateRegisters:
		s.Reason = "no memory"
	}
	return s
}

func (g *fakeGuest) set(change func(*fakeGuest)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change(g)
}

// rig is a daemon without its API and its signals, on a fake host.
type rig struct {
	t        *testing.T
	host     *fakeHost
	config   Config
	services []service
	watcher  *watcher
	journal  *journal
	lane     *lane
	stop     func()
}

// newRig starts the daemon with what an earlier one left in dir.
func newRig(t *testing.T, h *fakeHost, dir string, change func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, host: h, config: Default()}
	r.config.StateDir = dir
	r.config.Socket = filepath.Join(dir, "sock")
	r.config.Mode = ModePoll // but for those that change it
	if change != nil {
		change(&r.config)
	}
	if err := r.config.Check(); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{config: r.config, host: h.host(), log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))}
	services, err := d.services()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range services {
		switch s := s.(type) {
		case *watcher:
			r.watcher = s
		case *journal:
			r.journal = s
		case *lane:
			r.lane = s
		case *server:
			continue
		}
		r.services = append(r.services, s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, s := range r.services {
		if err := s.Init(ctx); err != nil {
			t.Fatalf("%s: %v", s.Name(), err)
		}
	}
	for _, s := range r.services {
		running.Go(func() {
			if err := s.Run(ctx); err != nil {
				t.Errorf("%s: %v", s.Name(), err)
			}
		})
	}
	r.stop = func() {
		cancel()
		running.Wait()
		for _, s := range slices.Backward(r.services) {
			if err := s.Shutdown(); err != nil {
				t.Errorf("%s: %v", s.Name(), err)
			}
		}
	}
	return r
}

// findings are what is in the findings file, as "message" of each line.
func (r *rig) findings() []string {
	r.t.Helper()
	return messages(r.t, r.config.Findings)
}

func (r *rig) status(id kvmaccess.VMID) VMStatus {
	r.t.Helper()
	for _, k := range r.watcher.all() {
		if k.vm.ID == id {
			return k.status(r.watcher.watchAccounts(r.t.Context()))
		}
	}
	r.t.Fatalf("VM %d is not watched", id)
	return VMStatus{}
}

func (r *rig) problems() []string {
	subjects := []string{}
	for _, p := range r.watcher.problems.list() {
		subjects = append(subjects, p.Subject)
	}
	return subjects
}

var errBroken = errors.New("broken")
