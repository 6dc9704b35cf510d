// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// keeper watches one VM, from when it is seen to when it is gone. What takes
// long is done in the keeper's own goroutine; the lane that all VMs share has
// only the ticks of guests that are up.
type keeper struct {
	vm       kvmaccess.VM
	id       identity
	config   VMConfig
	src      source
	host     *host
	lane     *lane
	journal  *journal
	symbols  *symbolFiles
	problems *problems
	log      *slog.Logger
	// moduleGone is told when the module does not answer any more.
	moduleGone func(error)
	// settled is called when all that the VM needs is in memory.
	settled func()

	stop context.CancelFunc
	done chan struct{} // closed when run has ended

	account account
	job     *job

	// For one goroutine at a time: the keeper's, or that of the lane that has
	// the job.
	monitor monitor
	memory  *coldMemory
	quick   int // ticks in succession that had no slow read
	outcome outcome
	failure error // why the outcome is outcomeFailed

	mu       sync.Mutex
	state    State
	reason   string
	file     string     // symbol file in use
	lacks    string     // why there is none, though there should be
	taken    *time.Time // of the baseline
	restart  context.CancelFunc
	anew     bool // the baseline is to be taken anew
	released bool // of all watching
	vcpus    int
	ram      uint64 // bytes
}

// outcome says what a tick makes of a VM.
type outcome int

const (
	outcomeNone    outcome = iota // it goes on
	outcomeStopped                // it was told to stop
	outcomeGone                   // the VM is no more
	outcomeModule                 // the module does not answer
	outcomeFailed                 // the VM cannot be read
	outcomeChanged                // another kernel runs, or none any more
	outcomeSlow                   // its memory is not all resident
	outcomeQuick                  // its memory is resident again
)

// How long a keeper waits before it looks again at a guest that is not up or
// that cannot be read: the first time, and at most.
const (
	firstRetry = 20 * time.Millisecond
	lastRetry  = time.Second
)

// quickTicks without a slow read bring a VM back to the shared lane.
const quickTicks = 64

// run watches the VM until it is gone or ctx ends.
func (k *keeper) run(ctx context.Context) {
	defer k.problems.clear(k.subject())
	k.job = newJob(k.config.Period, &k.account, k.tick)
	for {
		watch, cancel := context.WithCancel(ctx)
		k.mu.Lock()
		k.restart = cancel
		k.mu.Unlock()
		k.watch(watch)
		cancel()

		k.mu.Lock()
		anew := k.anew
		k.anew = false
		if anew {
			k.journal.rebase(k.id)
			k.taken = nil
		} else {
			k.released = true
		}
		k.mu.Unlock()
		if !anew {
			return
		}
	}
}

// rebase makes the VM's present state its baseline. It returns false if the VM
// is not watched any more.
func (k *keeper) rebase() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.released || k.restart == nil {
		return false
	}
	k.anew = true
	k.restart()
	return true
}

// watch watches the VM with one monitor.
func (k *keeper) watch(ctx context.Context) {
	if k.vm.Flags&kvmaccess.VMProtected != 0 {
		k.set(StateProtected, "the guest's state is encrypted: nothing of it can be checked")
		<-ctx.Done()
		return
	}
	if err := k.prepare(); err != nil {
		k.set(StateFailing, err.Error())
		<-ctx.Done()
		return
	}
	for first := true; k.attach(ctx); first = false {
		k.settle(first)
		if first {
			k.settled()
		}
		switch k.stay(ctx) {
		case outcomeStopped, outcomeGone, outcomeModule:
			return
		}
	}
}

func (k *keeper) subject() string { return "symbols of " + k.name() }

func (k *keeper) name() string { return integrity.VM{ID: k.vm.ID, Name: k.id.Name}.String() }

// prepare makes the monitor.
func (k *keeper) prepare() error {
	options := integrity.Options{Ranges: k.config.Ranges, Baseline: k.journal.guest(k.id).Baseline}
	k.memory = nil
	if memory := k.host.memory(k.src, k.vm); memory != nil {
		k.memory = &coldMemory{memory: memory}
		options.Memory = k.memory
	}
	var file, lacks string
	if k.config.Symbols != "" {
		symbols, err := k.symbols.load(k.config.Symbols)
		if err != nil {
			lacks = "checks that need symbols are off: " + err.Error()
			k.problems.set(k.subject(), lacks)
		} else {
			options.Symbols, file = symbols, k.config.Symbols
			k.problems.clear(k.subject())
		}
	}
	k.mu.Lock()
	k.file, k.lacks = file, lacks
	k.mu.Unlock()
	var err error
	k.monitor, err = k.host.newMonitor(k.src, integrity.VM{ID: k.vm.ID, Name: k.id.Name, UUID: k.id.UUID, PID: k.vm.PID}, options)
	return err
}

// attach looks at the guest until it is up. It returns false when there is
// nothing to watch any more.
func (k *keeper) attach(ctx context.Context) bool {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		findings, err := k.monitor.Tick(ctx)
		switch k.judge(ctx, findings, err) {
		case outcomeStopped, outcomeGone, outcomeModule:
			return false
		case outcomeFailed:
			state := StateFailing
			if errors.Is(k.failure, kvmaccess.ErrProtected) {
				state = StateProtected
			}
			k.set(state, k.failure.Error())
		default:
			status := k.monitor.Status()
			if status.State == integrity.StateWatching {
				return true
			}
			k.set(StateWaiting, status.Reason)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return false
		}
	}
}

// settle takes down how the monitor fares, now that there is a baseline.
func (k *keeper) settle(first bool) {
	baseline := k.monitor.Baseline()
	status := k.monitor.Status()
	known := k.journal.guest(k.id)
	if known.Baseline == nil || !known.Baseline.Taken.Equal(baseline.Taken) {
		k.journal.setBaseline(k.id, &baseline)
	}
	if first {
		k.journal.raise(k.id, k.ended(known.Open, status)...)
	}
	k.mu.Lock()
	k.taken = &baseline.Taken
	reasons := status.Problems
	if k.lacks != "" {
		reasons = append([]string{k.lacks}, reasons...)
	}
	k.mu.Unlock()
	k.set(StateWatching, strings.Join(reasons, "; "))
}

// ended clears the findings that were open when the daemon stopped and that do
// not hold any more.
func (k *keeper) ended(open map[string]integrity.Finding, status integrity.Status) []integrity.Finding {
	for _, f := range k.monitor.Findings() {
		delete(open, f.Key())
	}
	var cleared []integrity.Finding
	for _, f := range open {
		named := f.Old != nil && f.Old.Symbol != "" || f.New != nil && f.New.Symbol != ""
		if named && status.Symbols == 0 {
			continue // it was seen with symbols, and there are none now
		}
		f.Time = time.Now()
		f.VM.ID = k.vm.ID
		f.Old, f.New = f.New, f.Old
		f.Kind, f.Reason, f.More = integrity.KindCleared, "", 0
		f.Message = "no longer so, since a time when it was not watched: " + f.Message
		cleared = append(cleared, f)
	}
	slices.SortFunc(cleared, func(a, b integrity.Finding) int { return strings.Compare(a.Key(), b.Key()) })
	return cleared
}

// stay keeps the VM on a lane until something happens to it.
func (k *keeper) stay(ctx context.Context) outcome {
	k.outcome = outcomeStopped
	if k.memory != nil {
		k.memory.shared, k.memory.asked = true, false
		defer func() { k.memory.shared = false }()
	}
	k.lane.hold(ctx, k.job)
	if k.outcome != outcomeSlow {
		return k.outcome
	}
	k.memory.shared, k.quick = false, 0
	return k.stayApart(ctx)
}

// stayApart keeps the VM on a lane of its own, where slow reads delay no other.
func (k *keeper) stayApart(ctx context.Context) outcome {
	k.log.Debug("not all of its memory is resident: checked apart from other VMs")
	own := &lane{newClock: k.host.newClock, epoch: k.lane.epoch}
	if err := own.Init(ctx); err != nil {
		k.failure = err
		return outcomeFailed
	}
	defer own.Shutdown()
	running, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- own.Run(running) }()
	k.outcome = outcomeStopped
	own.hold(ctx, k.job)
	stop()
	if err := <-done; err != nil {
		k.failure = err
		return outcomeFailed
	}
	return k.outcome
}

// tick is one check on a lane. It returns false to leave the lane.
func (k *keeper) tick(ctx context.Context) bool {
	findings, err := k.monitor.Tick(ctx)
	if len(findings) == 0 && err == nil && (k.memory == nil || k.memory.shared && !k.memory.asked) {
		return true
	}
	result := k.judge(ctx, findings, err)
	if result == outcomeFailed {
		k.account.failed.Add(1)
		if errors.Is(err, kvmaccess.ErrUnsettled) {
			return true // the next tick asks again
		}
	}
	if result == outcomeNone && k.memory != nil {
		switch {
		case k.memory.asked && k.memory.shared:
			result = outcomeSlow
		case k.memory.asked:
			k.quick = 0
		case !k.memory.shared:
			if k.quick++; k.quick == quickTicks {
				result = outcomeQuick
			}
		}
		k.memory.asked = false
	}
	if result == outcomeNone {
		return true
	}
	k.outcome = result
	return false
}

// judge takes up what a tick found.
func (k *keeper) judge(ctx context.Context, findings []integrity.Finding, err error) outcome {
	switch {
	case err == nil:
	case isGone(err):
		// What was found of a VM in its last moments is no finding.
		k.log.Debug("gone", "error", err)
		return outcomeGone
	case ctx.Err() != nil:
		return outcomeStopped
	case isModuleGone(err):
		k.moduleGone(err)
		return outcomeModule
	}
	if n := k.journal.raise(k.id, findings...); n > 0 {
		k.account.findings.Add(uint64(n))
		k.log.Warn("findings", "count", n, "first", findings[0].Message)
	}
	if err != nil {
		k.failure = err
		return outcomeFailed
	}
	for _, f := range findings {
		if f.Kind == integrity.KindRestarted {
			return outcomeChanged
		}
	}
	return outcomeNone
}

// set says how far the watch is.
func (k *keeper) set(state State, reason string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.state != state || k.reason != reason {
		level := slog.LevelInfo
		if state == StateFailing {
			level = slog.LevelWarn
		}
		k.log.Log(context.Background(), level, string(state), "reason", reason)
	}
	k.state, k.reason = state, reason
}

// status is how the VM is watched.
func (k *keeper) status() VMStatus {
	findings := k.journal.guest(k.id).Findings
	k.mu.Lock()
	defer k.mu.Unlock()
	return VMStatus{
		ID: k.vm.ID, Name: k.id.Name, UUID: k.id.UUID, PID: k.vm.PID, VCPUs: k.vcpus, Memory: k.ram,
		State: k.state, Reason: k.reason, Period: k.config.Period, Symbols: k.file, Baseline: k.taken,
		Findings: findings, Account: k.account.snapshot(),
	}
}
