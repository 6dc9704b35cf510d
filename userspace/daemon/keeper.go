// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
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
	cache    *guest.Cache
	verify   time.Duration // Config.Verify
	stateDir string        // Config.StateDir
	problems *problems
	log      *slog.Logger
	// moduleGone is told when the module does not answer any more.
	moduleGone func(error)
	// settled is called when all that the VM needs is in memory.
	settled func()
	// tidy is called when what was to be done is done, until the next event.
	tidy func()

	stop context.CancelFunc
	done chan struct{} // closed when run has ended

	account account
	job     *job          // in poll mode
	guard   *guard        // in watch mode; nil: this is poll mode
	code    *codeWatch    // likewise
	text    time.Duration // Config.Text
	scratch *os.File      // for a copy of the kernel's code; nil: there is none
	budget  *budget       // that chooses the period; nil: it is given
	replan  chan struct{} // receives when the period may be another one

	// For one goroutine at a time: the keeper's, or that of the lane that has
	// the job.
	monitor  monitor
	attached integrity.State // the monitor's, when that attached
	memory   *coldMemory
	list     *integrity.WatchList // what the module is to compare; nil: to be asked for
	quick    int                  // ticks in succession that had no slow read
	outcome  outcome
	findings []integrity.Finding // not in the journal yet
	failure  error               // that is the outcome, if that is outcomeFailed

	mu       sync.Mutex
	state    State
	reason   string
	file     string             // symbol file in use
	lacks    string             // why there is none, though there should be
	kernel   *guest.Fingerprint // as found in the guest's memory; nil: it was not
	taken    *time.Time         // of the baseline
	restart  context.CancelFunc // ends the watch
	leave    context.CancelFunc // ends the stay on a lane
	anew     chan struct{}      // closed when the baseline was dropped on request; nil: it is not to be
	released bool               // of all watching
	vcpus    int
	ram      uint64 // bytes
}

// outcome says what a tick makes of a VM.
type outcome int

const (
	outcomeNone     outcome = iota // it goes on as it was
	outcomeStopped                 // it was told to stop
	outcomeGone                    // the VM is no more
	outcomeModule                  // the module does not answer
	outcomeFailed                  // the VM cannot be read
	outcomeFindings                // there are findings
	outcomeChanged                 // the guest restarts, or something else is to be looked at anew
	outcomeSlow                    // its memory is not all resident
	outcomeQuick                   // its memory is resident again
)

// How long a keeper waits before it looks again at a guest that is not up or
// that cannot be read: the first time, and at most.
const (
	firstRetry = 20 * time.Millisecond
	lastRetry  = time.Second
)

// encrypted is what there is to say of a guest in StateProtected.
const encrypted = "its registers and its memory are encrypted (SEV-ES, SEV-SNP, TDX): there is nothing to look at"

// quickTicks without a slow read bring a VM back to the shared lane.
const quickTicks = 64

// run watches the VM until it is gone or ctx ends.
func (k *keeper) run(ctx context.Context) {
	defer k.problems.clear(k.subject())
	defer k.account.count(nil)
	if k.guard != nil && k.stateDir != "" {
		var err error
		if k.scratch, err = openCode(k.stateDir, k.id); err != nil {
			k.log.Warn("the kernel's code is not compared", "error", err)
		} else {
			defer k.scratch.Close()
		}
	}
	k.job = newJob(k.config.Period, &k.account, k.tick)
	for {
		watch, cancel := context.WithCancel(ctx)
		k.mu.Lock()
		k.restart = cancel
		k.mu.Unlock()
		k.watch(watch)
		cancel()

		if !k.next() {
			return
		}
	}
}

// ended says whether run has.
func (k *keeper) ended() bool {
	select {
	case <-k.done:
		return true
	default:
		return false
	}
}

// next says whether there is another watch to begin.
func (k *keeper) next() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.anew == nil {
		k.released = true
		return false
	}
	k.journal.rebase(k.id)
	if k.scratch != nil {
		if err := k.scratch.Truncate(0); err != nil {
			k.log.Warn("the copy of its code stays what it was", "error", err)
		}
	}
	k.taken, k.findings = nil, nil
	close(k.anew)
	k.anew = nil
	return true
}

// rebase drops the VM's baseline, so that its present state becomes the new
// one. It returns false if the VM is not watched any more.
func (k *keeper) rebase(ctx context.Context) bool {
	k.mu.Lock()
	if k.released || k.restart == nil {
		k.mu.Unlock()
		return false
	}
	if k.anew == nil {
		k.anew = make(chan struct{})
	}
	dropped := k.anew
	k.restart()
	k.mu.Unlock()
	select {
	case <-dropped:
	case <-ctx.Done():
	}
	return true
}

// look has the keeper look at the whole VM anew.
func (k *keeper) look() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.leave != nil {
		k.leave()
	}
}

// watch watches the VM with one monitor.
func (k *keeper) watch(ctx context.Context) {
	if k.vm.Flags&kvmaccess.VMProtected != 0 {
		k.set(StateProtected, encrypted)
		<-ctx.Done()
		return
	}
	if err := k.prepare(); err != nil {
		k.set(StateFailing, err.Error())
		<-ctx.Done()
		return
	}
	defer k.finish()
	result := outcomeChanged
	for first := true; k.attach(ctx); first = false {
		if result == outcomeChanged || !k.said() {
			k.settle()
		}
		if first {
			k.settled()
		}
		if k.guard != nil {
			result = k.stand(ctx)
		} else {
			result = k.stay(ctx)
		}
		k.report(ctx)
		switch result {
		case outcomeStopped, outcomeGone, outcomeModule:
			return
		}
	}
}

// said says whether the state of the watch is that of the monitor.
func (k *keeper) said() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state == State(k.attached)
}

func (k *keeper) subject() string { return "symbols of " + k.name() }

func (k *keeper) name() string { return integrity.VM{ID: k.vm.ID, Name: k.id.Name}.String() }

// prepare makes the monitor.
func (k *keeper) prepare() error {
	options := integrity.Options{Cache: k.cache, Verify: k.verify, Ranges: k.config.Ranges, Baseline: k.journal.guest(k.id).Baseline}
	if k.guard != nil && k.scratch != nil {
		options.Scratch = k.scratch
	}
	k.memory = nil
	if memory := k.host.memory(k.src, k.vm); memory != nil {
		k.memory = &coldMemory{memory: memory}
		k.account.count(memory)
		options.Memory = k.memory
	}
	var file, lacks string
	if k.config.Symbols != "" {
		symbols, err := k.symbols.load(k.config.Symbols)
		if err != nil {
			lacks = "the guest's own symbols are used instead of a file's: " + err.Error()
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
		begin := monotonic()
		findings, err := k.monitor.Tick(ctx)
		if k.guard != nil {
			k.account.tick(0, monotonic()-begin, 0)
		}
		k.findings = append(k.findings, findings...)
		k.accepted()
		result := k.judge(ctx, err)
		k.report(ctx)
		switch result {
		case outcomeStopped, outcomeGone, outcomeModule:
			return false
		case outcomeFailed:
			if errors.Is(k.failure, kvmaccess.ErrProtected) {
				k.set(StateProtected, encrypted)
			} else {
				k.set(StateFailing, k.failure.Error())
			}
		default:
			if k.attached = k.monitor.State(); k.attached != integrity.StateWaiting {
				return true
			}
			k.set(StateWaiting, k.monitor.Status().Reason)
			k.job.next = 0 // no tick is missed of a guest that is not up
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return false
		}
	}
}

// settle takes down how the monitor fares, now that there is a baseline.
func (k *keeper) settle() {
	k.save()
	status := k.monitor.Status()
	var reasons []string
	k.mu.Lock()
	k.kernel = status.Kernel
	for _, reason := range []string{status.Reason, k.lacks} {
		if reason != "" {
			reasons = append(reasons, reason)
		}
	}
	k.mu.Unlock()
	k.set(State(status.State), strings.Join(append(reasons, status.Problems...), "; "))
}

// save keeps the baseline, with findings if there are any.
func (k *keeper) save(findings ...integrity.Finding) {
	baseline := k.monitor.Baseline()
	n := k.journal.raise(k.id, &baseline, findings...)
	k.account.findings.Add(uint64(n))
	if baseline.Version != 0 {
		k.mu.Lock()
		k.taken = &baseline.Taken
		k.mu.Unlock()
	}
}

// report hands findings to the journal. The monitor holds some back when there
// are many; its baseline says of these, too, that they are open, so all must
// come before the baseline is kept.
func (k *keeper) report(ctx context.Context) {
	for len(k.findings) > 0 {
		if k.findings[len(k.findings)-1].More == 0 {
			k.save(k.findings...)
			letFollowersGo()
			k.log.Warn("findings", "count", len(k.findings), "first", k.findings[0].Message)
			k.findings = nil
			return
		}
		more, err := k.monitor.Tick(ctx)
		if isGone(err) {
			k.findings = nil // of a VM in its last moments
		}
		k.findings = append(k.findings, more...)
		if err != nil || len(more) == 0 {
			return // the next tick brings the rest
		}
	}
}

// finish keeps the last state of a VM that may go on to run.
func (k *keeper) finish() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.anew == nil && len(k.findings) == 0 && k.monitor.State() != integrity.StateWaiting && k.monitor.Status().Pending == 0 {
		baseline := k.monitor.Baseline()
		k.journal.raise(k.id, &baseline)
	}
}

// stay keeps the VM on a lane until something happens to it.
func (k *keeper) stay(ctx context.Context) outcome {
	k.outcome = outcomeStopped
	stop := ctx
	ctx, leave := context.WithCancel(stop)
	defer leave()
	k.mu.Lock()
	k.leave = leave
	k.mu.Unlock()
	if k.memory != nil {
		k.memory.shared = true
		k.memory.asked.Store(false)
		defer func() { k.memory.shared = false }()
	}
	k.lane.hold(ctx, k.job)
	result := k.outcome
	if result == outcomeSlow {
		k.memory.shared, k.quick = false, 0
		result = k.stayApart(ctx)
	}
	if result == outcomeStopped && ctx.Err() != nil && stop.Err() == nil {
		result = outcomeChanged // by look
	}
	return result
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
	k.accepted()
	if len(findings) == 0 && err == nil && k.monitor.State() == k.attached &&
		(k.memory == nil || k.memory.shared && !k.memory.asked.Load()) {
		return true
	}
	k.findings = append(k.findings, findings...)
	k.outcome = k.judge(ctx, err)
	switch k.outcome {
	case outcomeFailed:
		k.account.failed.Add(1)
		if errors.Is(err, kvmaccess.ErrUnsettled) && len(findings) == 0 {
			return true // the next tick asks again
		}
	case outcomeNone:
		switch {
		case k.monitor.State() != k.attached:
			k.outcome = outcomeChanged
		case len(findings) > 0:
			k.outcome = outcomeFindings
		default:
			k.outcome = k.pace()
		}
	}
	return k.outcome == outcomeNone
}

// accepted takes down what the guest may do and did.
func (k *keeper) accepted() {
	for _, a := range k.monitor.Accepted() {
		k.log.Info("accepted: "+a.What, "rule", a.Rule)
		k.account.accepted.Add(1)
	}
}

// pace says whether the VM is on the right lane.
func (k *keeper) pace() outcome {
	if k.memory == nil {
		return outcomeNone
	}
	asked := k.memory.asked.Swap(false)
	switch {
	case k.memory.shared && asked:
		return outcomeSlow
	case k.memory.shared:
		return outcomeNone
	case asked:
		k.quick = 0
	default:
		k.quick++
	}
	if k.quick == quickTicks {
		return outcomeQuick
	}
	return outcomeNone
}

// judge says what a tick's error makes of the VM.
func (k *keeper) judge(ctx context.Context, err error) outcome {
	switch {
	case err == nil:
		return outcomeNone
	case isGone(err):
		k.log.Debug("gone", "error", err)
		k.findings = nil // of a VM in its last moments
		return outcomeGone
	case ctx.Err() != nil:
		return outcomeStopped
	case isModuleGone(err):
		k.moduleGone(err)
		return outcomeModule
	}
	k.failure = err
	return outcomeFailed
}

// set says how far the watch is.
func (k *keeper) set(state State, reason string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.state != state || k.reason != reason {
		level := slog.LevelInfo
		if state == StateFailing || state == StateRegisters || state == StateProtected {
			level = slog.LevelWarn
		}
		k.log.Log(context.Background(), level, string(state), "reason", reason)
	}
	k.state, k.reason = state, reason
}

// mode is how the VM is watched.
func (k *keeper) mode() Mode {
	if k.guard != nil {
		return ModeWatch
	}
	return ModePoll
}

// period is that of ticks, the daemon's own or the module's.
func (k *keeper) period() time.Duration {
	if k.budget != nil && k.guard != nil {
		return k.budget.chosen().Period
	}
	return k.config.Period
}

// review has the keeper see whether its period is another one.
func (k *keeper) review() {
	select {
	case k.replan <- struct{}{}:
	default:
	}
}

// watchAccount is that of the module's watches of the VM, out of those of all;
// nil: there are none in this mode.
func (k *keeper) watchAccount(all []kvmaccess.WatchStats) *WatchAccount {
	if k.guard == nil {
		return nil
	}
	a := k.guard.account(all)
	a.Code = k.code.account(all)
	return &a
}

// status is how the VM is watched. all are the accounts of the module's watches.
func (k *keeper) status(all []kvmaccess.WatchStats) VMStatus {
	findings := k.journal.guest(k.id).Findings
	k.mu.Lock()
	defer k.mu.Unlock()
	return VMStatus{
		Mode: k.mode(), Watch: k.watchAccount(all),
		ID: k.vm.ID, Name: k.id.Name, UUID: k.id.UUID, PID: k.vm.PID, VCPUs: k.vcpus, Memory: k.ram,
		State: k.state, Reason: k.reason, Period: k.period(), Symbols: k.file, Kernel: k.kernel, Baseline: k.taken,
		Findings: findings, Account: k.account.snapshot(),
	}
}
