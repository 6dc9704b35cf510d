// SPDX-License-Identifier: MIT

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// watcher knows the VMs of the host and has a keeper for each.
type watcher struct {
	config   *Config
	host     *host
	boot     string
	lane     *lane
	journal  *journal
	problems *problems
	symbols  symbolFiles
	cache    guest.Cache // of what was decoded of guests' kernels
	memory   memoryLimit
	log      *slog.Logger

	mu      sync.Mutex
	src     source   // nil while the module does not answer
	watches *watches // nil: poll mode
	budget  *budget  // nil: periods are given
	module  *kvmaccess.Info
	keepers map[kvmaccess.VMID]*keeper
	retired Account // of VMs that are gone
}

// moduleRetry is how often a module that does not answer is looked for.
const moduleRetry = time.Second

// idleRelist is how often VMs are listed while there are none, and so no ticks
// that would tell when the module is gone.
const idleRelist = 5 * time.Second

func (w *watcher) Name() string { return "watcher" }

// Init connects to the module.
func (w *watcher) Init(ctx context.Context) error {
	_, err := w.connect(ctx)
	return err
}

// Shutdown closes the connection to the module.
func (w *watcher) Shutdown() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.src == nil {
		return nil
	}
	err := w.src.Close()
	w.src = nil
	return err
}

// connect opens the module, and says what to do if that fails.
func (w *watcher) connect(ctx context.Context) (source, error) {
	src, err := w.host.open()
	if err != nil {
		return nil, explainOpen(err)
	}
	info, err := src.Info(ctx)
	if err != nil {
		src.Close()
		return nil, explainOpen(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.src, w.module = src, &info
	return src, nil
}

func explainOpen(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("kvmaccessd must run as root (CAP_SYS_ADMIN in the initial user namespace): %w", err)
	}
	return err
}

// Run watches all VMs until ctx ends, over as many lives of the module as
// there are.
func (w *watcher) Run(ctx context.Context) error {
	for {
		w.mu.Lock()
		src := w.src
		w.mu.Unlock()
		var err error
		if src == nil {
			src, err = w.connect(ctx)
		}
		if err == nil {
			w.problems.clear("module")
			err = w.session(ctx, src)
			w.mu.Lock()
			w.src, w.module = nil, nil
			w.mu.Unlock()
			src.Close()
		}
		if ctx.Err() != nil {
			return nil
		}
		w.problems.set("module", "no VM is watched: "+err.Error())
		select {
		case <-time.After(moduleRetry):
		case <-ctx.Done():
			return nil
		}
	}
}

// session watches the VMs for as long as the module answers. It returns why it
// does not any more.
func (w *watcher) session(ctx context.Context, src source) error {
	ctx, cancel := context.WithCancelCause(ctx)
	if err := w.openWatches(); err != nil {
		cancel(nil)
		return err
	}
	defer w.closeWatches()
	defer w.release()
	defer cancel(nil)

	events := make(chan kvmaccess.Event)
	relist := make(chan struct{}, 1)
	var receiving sync.WaitGroup
	receiving.Go(func() { w.receive(ctx, events, relist, cancel) })
	defer receiving.Wait()
	defer cancel(nil)
	if watches := w.watches; watches != nil {
		receiving.Go(func() {
			if err := watches.receive(ctx); ctx.Err() == nil {
				cancel(err)
			}
		})
		if w.budget != nil {
			receiving.Go(func() { w.budget.run(ctx, w.all, w.looks, w.watchAccounts) })
		}
	}

	if err := w.list(ctx, src, cancel); err != nil {
		return err
	}
	w.journal.forgetWhere(func(id identity) bool { return !id.alive(w.boot, w.host.identify) })
	var present []identity
	for _, k := range w.all() {
		present = append(present, k.id)
	}
	dropCode(w.config.StateDir, present, w.log)
	for {
		w.memory.adjust()
		timer := time.NewTimer(w.relistPeriod())
		select {
		case e := <-events:
			timer.Stop()
			w.event(ctx, src, e, cancel)
			continue
		case <-relist:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := w.list(ctx, src, cancel); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if isModuleGone(err) {
				return err
			}
			w.problems.set("list", "the VMs cannot be listed: "+err.Error())
			continue
		}
		w.problems.clear("list")
	}
}

// openWatches prepares for the watch mode, if that is the mode and the module
// can.
func (w *watcher) openWatches() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watches = nil
	if w.config.Mode != ModeWatch {
		return nil
	}
	if w.module.Caps&kvmaccess.CapWatch == 0 {
		w.problems.set("watches", "the module cannot watch on this host, so all VMs are checked in poll mode: make check-config says what the kernel lacks")
		return nil
	}
	src, err := w.host.watch()
	if err != nil {
		return err
	}
	w.problems.clear("watches")
	w.watches = newWatches(src)
	return nil
}

// closeWatches ends those that are left.
func (w *watcher) closeWatches() {
	if w.watches != nil {
		w.watches.src.Close()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watches = nil
}

func (w *watcher) relistPeriod() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	period := w.config.Relist
	if len(w.keepers) == 0 {
		period = min(period, idleRelist)
	}
	if w.module != nil && w.module.Caps&kvmaccess.CapEvents == 0 {
		period = min(period, time.Second)
	}
	return period
}

// receive passes on events, and asks for a new list whenever some may have
// been missed.
func (w *watcher) receive(ctx context.Context, events chan<- kvmaccess.Event, relist chan<- struct{}, fail context.CancelCauseFunc) {
	ask := func() {
		select {
		case relist <- struct{}{}:
		default:
		}
	}
	for ctx.Err() == nil {
		err := func() error {
			sub, err := w.host.subscribe(ctx)
			if err != nil {
				return err
			}
			defer sub.Close()
			w.problems.clear("events")
			ask() // for what came before the subscription
			for {
				e, err := sub.Receive(ctx)
				switch {
				case errors.Is(err, kvmaccess.ErrEventsLost):
					w.log.Info("events were lost: listing the VMs again")
					ask()
					continue
				case err != nil:
					return err
				}
				select {
				case events <- e:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}()
		if ctx.Err() != nil {
			return
		}
		if isModuleGone(err) {
			fail(err)
			return
		}
		w.problems.set("events", "VMs that come and go are noticed late: "+err.Error())
		select {
		case <-time.After(moduleRetry):
		case <-ctx.Done():
		}
	}
}

// list compares the host's VMs with those that are watched.
func (w *watcher) list(ctx context.Context, src source, fail context.CancelCauseFunc) error {
	vms, err := src.VMs(ctx)
	if err != nil {
		return err
	}
	slices.SortFunc(vms, func(a, b kvmaccess.VM) int { return cmp.Compare(a.ID, b.ID) })
	present := map[kvmaccess.VMID]bool{}
	for _, vm := range vms {
		present[vm.ID] = true
		w.add(ctx, src, vm, fail)
	}
	for _, id := range w.ids() {
		if !present[id] {
			w.remove(id)
		}
	}
	return nil
}

func (w *watcher) event(ctx context.Context, src source, e kvmaccess.Event, fail context.CancelCauseFunc) {
	switch e.Kind {
	case kvmaccess.VMCreated:
		w.add(ctx, src, e.VM, fail)
	case kvmaccess.VMDestroyed:
		w.remove(e.VM.ID)
	}
}

// add begins to watch a VM, or takes up what has changed of one.
func (w *watcher) add(ctx context.Context, src source, vm kvmaccess.VM, fail context.CancelCauseFunc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if k := w.keepers[vm.ID]; k != nil && k.ended() {
		w.drop(k) // and yet the VM is there
	}
	if k := w.keepers[vm.ID]; k != nil {
		k.mu.Lock()
		changed := k.vcpus != vm.VCPUs
		k.vcpus, k.ram = vm.VCPUs, vm.Memory
		k.mu.Unlock()
		if changed {
			k.look()
		}
		return
	}
	vmm, err := w.host.identify(vm.PID)
	if err != nil {
		// It is on its way out, or the next list tells more.
		w.log.Debug("a VM without a VMM is not watched", "vm", vm.ID, "pid", vm.PID, "error", err)
		return
	}
	config := w.config.vm(vmm.Name, vmm.UUID)
	if config.Period == 0 {
		config.Period = DefaultPeriod // as long as no budget chooses
	}
	id := identity{Boot: w.boot, PID: vm.PID, Start: vmm.Start, Name: vmm.Name, UUID: vmm.UUID}
	for w.taken(id) {
		id.Index++
	}
	k := &keeper{
		vm: vm, id: id, config: config,
		src: src, host: w.host, lane: w.lane, journal: w.journal, symbols: &w.symbols, cache: &w.cache, verify: w.config.Verify, stateDir: w.config.StateDir, text: w.config.Text, problems: w.problems,
		moduleGone: fail, settled: w.memory.adjust, tidy: w.memory.tidy, state: StateWaiting, vcpus: vm.VCPUs, ram: vm.Memory,
		done: make(chan struct{}), replan: make(chan struct{}, 1), budget: w.budget,
	}
	k.log = w.log.With("vm", k.name(), "pid", vm.PID)
	if w.watches != nil {
		k.guard = newGuard(w.watches, vm.ID, k.log)
		k.code = newCodeWatch(w.watches, vm.ID, k.log)
	}
	ctx, k.stop = context.WithCancel(ctx)
	w.keepers[vm.ID] = k
	k.log.Info("watching", "id", vm.ID, "uuid", id.UUID, "mode", k.mode(), "period", k.period())
	go func() {
		defer close(k.done)
		k.run(ctx)
	}()
}

// taken says whether a VM that is watched has the identity. w.mu is held.
func (w *watcher) taken(id identity) bool {
	for _, k := range w.keepers {
		if k.id == id {
			return true
		}
	}
	return false
}

func (w *watcher) ids() []kvmaccess.VMID {
	w.mu.Lock()
	defer w.mu.Unlock()
	ids := make([]kvmaccess.VMID, 0, len(w.keepers))
	for id := range w.keepers {
		ids = append(ids, id)
	}
	return ids
}

// remove ends the watch of a VM that is gone, and drops what was kept of it.
func (w *watcher) remove(id kvmaccess.VMID) {
	if k := w.end(id); k != nil {
		w.journal.forget(k.id)
		if err := os.Remove(codeFile(w.config.StateDir, k.id)); err != nil && !errors.Is(err, os.ErrNotExist) {
			k.log.Warn("the copy of its code is left", "error", err)
		}
		k.log.Info("gone")
	}
}

// end ends the watch of a VM.
func (w *watcher) end(id kvmaccess.VMID) *keeper {
	w.mu.Lock()
	k := w.keepers[id]
	w.mu.Unlock()
	if k == nil {
		return nil
	}
	k.stop()
	<-k.done
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drop(k)
	return k
}

// drop drops a keeper that has ended. w.mu is held.
func (w *watcher) drop(k *keeper) {
	delete(w.keepers, k.vm.ID)
	if w.budget != nil {
		w.budget.changed()
	}
	w.retired = w.retired.add(k.account.snapshot())
}

// release ends the watch of all VMs, which may go on to run.
func (w *watcher) release() {
	for _, id := range w.ids() {
		w.end(id)
	}
}

// all returns the keepers by id.
func (w *watcher) all() []*keeper {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sorted()
}

// sorted is all. w.mu is held.
func (w *watcher) sorted() []*keeper {
	all := make([]*keeper, 0, len(w.keepers))
	for _, k := range w.keepers {
		all = append(all, k)
	}
	slices.SortFunc(all, func(a, b *keeper) int { return cmp.Compare(a.vm.ID, b.vm.ID) })
	return all
}

// What find can fail with.
var (
	errUnknownVM   = errors.New("no VM with this id, name or UUID is watched")
	errAmbiguousVM = errors.New("several VMs have this name: give the id or the UUID")
)

// find finds a VM by id, name or UUID.
func (w *watcher) find(selector string) (*keeper, error) {
	var named []*keeper
	for _, k := range w.all() {
		switch selector {
		case strconv.FormatUint(uint64(k.vm.ID), 10), k.id.UUID, strings.ToUpper(k.id.UUID):
			return k, nil
		case k.id.Name:
			named = append(named, k)
		}
	}
	switch len(named) {
	case 0:
		return nil, fmt.Errorf("%q: %w", selector, errUnknownVM)
	case 1:
		return named[0], nil
	}
	return nil, fmt.Errorf("%q: %w", selector, errAmbiguousVM)
}

// watchAccounts are those of the module's watches; nil: they are not to be had,
// or there are none in this mode.
func (w *watcher) watchAccounts(ctx context.Context) []kvmaccess.WatchStats {
	w.mu.Lock()
	src, watching := w.src, w.watches != nil
	w.mu.Unlock()
	if src == nil || !watching {
		return nil
	}
	all, err := src.Watches(ctx)
	if err != nil {
		w.log.Debug("the accounts of watches are not to be had", "error", err)
	}
	return all
}

// looks is the time that looks at VMs have taken, but for those to attach. It is
// less than before when a VM is gone.
func (w *watcher) looks() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	var sum time.Duration
	for _, k := range w.keepers {
		sum += time.Duration(k.account.lookSum.Load())
	}
	return sum
}

// budgetStatus is what the CPU budget has chosen; nil: there is none.
func (w *watcher) budgetStatus() *BudgetStatus {
	if w.budget == nil {
		return nil
	}
	b := w.budget.chosen()
	return &b
}

// stats is the account of everything.
func (w *watcher) stats(ctx context.Context) (Stats, error) {
	s := Stats{VMs: []VMAccount{}}
	accounts := w.watchAccounts(ctx)
	w.mu.Lock()
	src := w.src
	s.Account = w.retired
	for _, k := range w.sorted() {
		a := VMAccount{ID: k.vm.ID, Name: k.id.Name, Mode: k.mode(), Period: k.period(), Findings: k.account.findings.Load(),
			Watch: k.watchAccount(accounts), Account: k.account.snapshot()}
		s.VMs = append(s.VMs, a)
		s.Account = s.Account.add(a.Account)
	}
	w.mu.Unlock()
	s.Budget = w.budgetStatus()
	s.Wakeups = w.lane.wakeups.Load()
	s.Findings, _ = w.journal.counts()
	if src == nil {
		s.ModuleError = "the module does not answer"
	} else if m, err := src.Stats(ctx); err != nil {
		s.ModuleError = err.Error()
	} else {
		s.Module = &m
	}
	var err error
	s.Time, s.CPU, s.User, s.System, err = usage()
	return s, err
}
