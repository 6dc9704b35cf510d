// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// verifyEvery is how often a VM is looked at though the module says nothing, at
// least: for what it does not compare, a part of what Config.Verify is about.
const (
	verifyEvery = time.Minute
	verifyParts = 5
)

// A guest that changes what is watched as fast as it can has this many rounds at
// once, and one each roundEvery from then on.
const (
	roundBurst = 64
	roundEvery = 20 * time.Millisecond
)

// pacer bounds how often something is done, not when the first time is.
type pacer struct {
	burst int
	every time.Duration
	full  time.Time // when all of burst may be done again
}

// wait is how long to wait before the next one.
func (p *pacer) wait(now time.Time) time.Duration {
	if p.full.Before(now) {
		return 0
	}
	return max(0, p.full.Sub(now)-time.Duration(p.burst-1)*p.every)
}

func (p *pacer) done(now time.Time) {
	if p.full.Before(now) {
		p.full = now
	}
	p.full = p.full.Add(p.every)
}

// stand has the module watch the VM and sees to what it says, until something
// happens to the VM. Nothing is done, and nobody woken, while it says nothing.
func (k *keeper) stand(ctx context.Context) outcome {
	stop := ctx
	ctx, leave := context.WithCancel(stop)
	defer leave()
	k.mu.Lock()
	k.leave = leave
	k.mu.Unlock()
	defer k.guard.close()
	defer k.code.close()
	result := k.standUntil(ctx)
	if result == outcomeStopped && ctx.Err() != nil && stop.Err() == nil {
		return outcomeChanged // by look
	}
	return result
}

func (k *keeper) standUntil(ctx context.Context) outcome {
	g := k.guard
	k.list = nil
	rounds := pacer{burst: roundBurst, every: roundEvery}
	every := min(verifyEvery, max(time.Second, k.verify/verifyParts))
	verify := time.Now().Add(every)
	failures := time.Duration(0)
	for {
		again, err := k.program(ctx)
		if err != nil {
			result := k.judge(ctx, err)
			if result != outcomeFailed {
				return result
			}
			// Until the module takes them, there are rounds.
			k.account.failed.Add(1)
			k.set(StateFailing, "its watches cannot be set up: "+err.Error())
			failures = min(max(firstRetry, 2*failures), lastRetry)
			again = time.Now().Add(failures)
		} else if failures > 0 {
			failures = 0
			k.settle()
		}
		if result := k.lookAtCode(ctx); result != outcomeNone {
			return result
		}
		k.tidy()
		next := verify
		for _, at := range []time.Time{again, g.restlessUntil(time.Now()), k.code.next()} {
			if !at.IsZero() && at.Before(next) {
				next = at
			}
		}
		timer := time.NewTimer(time.Until(next))
		select {
		case <-g.box.wake:
		case <-k.code.guard.box.wake:
			timer.Stop()
			k.code.told(k.log)
			continue
		case err := <-k.code.done:
			timer.Stop()
			if result := k.looked(ctx, err); result != outcomeNone {
				return result
			}
			continue
		case <-k.replan:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		if wait := rounds.wait(time.Now()); wait > 0 {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return outcomeStopped
		}
		now := time.Now()
		rounds.done(now)
		if !now.Before(verify) {
			verify = now.Add(every)
			g.sayStretched(ctx)
			k.code.due = k.code.due || k.code.unwatched
		}
		if result := k.round(ctx); result != outcomeNone {
			return result
		}
	}
}

// round looks at the VM because of events, or for want of them.
func (k *keeper) round(ctx context.Context) outcome {
	k.list = nil
	events, lost := k.guard.box.take()
	begin := monotonic()
	late := time.Duration(0)
	for _, e := range events {
		k.log.Debug("event", "of", k.guard.what(e), "state", e.State, "tick", e.Tick, "coalesced", e.Coalesced, "lost", e.Lost)
		lost = lost || e.Lost > 0
		late = max(late, begin-e.Time)
		if e.State == kvmaccess.StateEnded {
			k.log.Info("a watch of it ended", "rule", "ended watch")
			k.guard.stale = true
		}
	}
	if lost {
		k.log.Info("events of its watches were lost: all of it is looked at", "rule", "lost events")
	}
	// First what the events are of, which is told by the time that the rest of
	// the VM is looked at.
	soon, told, err := k.monitor.Reread(ctx, events)
	took := monotonic() - begin
	if result := k.take(ctx, soon, err); result != outcomeNone {
		k.account.look(max(0, late), took)
		return result
	}
	begin = monotonic()
	findings, err := k.monitor.Tick(ctx)
	k.account.look(max(0, late), took+monotonic()-begin)
	result := k.take(ctx, findings, err)
	if result != outcomeNone || len(events) == 0 {
		return result
	}
	list, err := k.monitor.WatchItems(ctx)
	if err != nil {
		return k.judge(ctx, err)
	}
	saw, err := k.doubt(ctx, events, told, len(soon)+len(findings) > 0, list.Items)
	if err != nil {
		return k.judge(ctx, err)
	}
	if !saw {
		k.list = &list
		return outcomeNone
	}
	// The VM as it is.
	begin = monotonic()
	findings, err = k.monitor.Tick(ctx)
	k.account.look(0, monotonic()-begin)
	return k.take(ctx, findings, err)
}

// doubt sees to events that the round they led to does not explain; told are
// those that were explained before it. saw: there were such.
func (k *keeper) doubt(ctx context.Context, events []kvmaccess.WatchEvent, told []bool, found bool, items []integrity.WatchItem) (saw bool, err error) {
	expected := make(map[integrity.WatchKey]bool, len(items))
	for i := range items {
		expected[items[i].Key()] = true
	}
	for i, e := range events {
		_, key, ok := k.guard.find(e)
		if !ok || e.State != kvmaccess.StateDifferent {
			continue
		}
		vain := !found
		if expected[key] && !(i < len(told) && told[i]) {
			// It was so for a moment only, and is no less a change.
			findings, err := k.monitor.See(ctx, e)
			k.findings = append(k.findings, findings...)
			if err != nil {
				return saw, err
			}
			saw, vain = true, vain && len(findings) == 0
		}
		if vain && k.guard.vain(key.WatchPlace, time.Now()) {
			k.log.Info("left to rounds for a while: it changes all the time and nothing is wrong with it", "rule", "restless", "what", k.guard.what(e))
		}
		if !expected[key] {
			continue // the round saw the change
		}
		if err := k.guard.rearm(ctx, e, items); err != nil {
			k.log.Info("watches are programmed anew", "rule", "a change of them failed", "error", err)
			k.guard.stale = true
		}
	}
	return saw, nil
}

// take takes what a round gave.
func (k *keeper) take(ctx context.Context, findings []integrity.Finding, err error) outcome {
	k.findings = append(k.findings, findings...)
	k.accepted()
	result := k.judge(ctx, err)
	switch {
	case result == outcomeFailed:
		k.account.failed.Add(1)
		if errors.Is(err, kvmaccess.ErrUnsettled) {
			return outcomeNone // WatchItems has it looked at again
		}
	case result != outcomeNone:
	case k.monitor.State() != k.attached:
		result = outcomeChanged
	default:
		k.report(ctx)
	}
	return result
}

// program has the module compare what the monitor saw last. It returns when
// there is to be another round even without an event; zero: not before long.
func (k *keeper) program(ctx context.Context) (again time.Time, err error) {
	if k.list == nil {
		list, err := k.monitor.WatchItems(ctx)
		if err != nil {
			return again, err
		}
		k.list = &list
	}
	now := time.Now()
	first := len(k.guard.parts) == 0
	if err := k.guard.program(ctx, kvmaccess.WatchConfig{Period: k.period()}, k.list.Items, now); err != nil {
		return again, err
	}
	if first && k.budget != nil {
		k.budget.changed()
	}
	if k.list.Again > 0 {
		again = now.Add(k.list.Again)
	}
	return again, nil
}
