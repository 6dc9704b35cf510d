// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// BudgetStatus is what was chosen by Config.CPUBudget. Durations are in ns.
type BudgetStatus struct {
	Share  Share         `json:"share"`          // that monitoring may take
	VMs    int           `json:"vms"`            // that it was chosen for
	Period time.Duration `json:"period"`         // of all of them
	Text   time.Duration `json:"text,omitempty"` // in which all code is compared once; 0: it is not
	Cost   Share         `json:"cost"`           // that this is expected to take
	Daemon Share         `json:"daemon"`         // of that, the daemon's looks; requests to its API are beside it
	Fits   bool          `json:"fits"`
	Reason string        `json:"reason,omitempty"` // why it does not, or not in full
}

// slowestPeriod is what a budget is never stretched beyond.
const slowestPeriod = 10 * time.Second

// textPasses are in which time all code may be compared once, where less than
// what was asked for fits.
var textPasses = []time.Duration{10 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute}

// need is what watching one VM takes.
type need struct {
	tick time.Duration // each
	text time.Duration // each pass over its code; 0: there is none to compare
}

// What a tick, and a pass over a kernel's code, is taken to need that none is
// known of.
const (
	unmeasured     = 50 * time.Microsecond
	unmeasuredText = 50 * time.Millisecond
)

// choose finds the shortest period that fits, and how often all code can be
// compared. own is what the daemon's looks take, text what was asked for.
func choose(share, own Share, needs []need, text time.Duration) BudgetStatus {
	b := BudgetStatus{Share: share, VMs: len(needs), Period: slowestPeriod, Daemon: own, Fits: true}
	var tick, longest, pass time.Duration
	for _, n := range needs {
		tick += n.tick
		longest = max(longest, n.tick)
		pass += n.text
	}
	// A little is left over, so that not each change in what is measured makes
	// for another period. The daemon may be told to take less than it does.
	left := float64(share-min(own, share/2)) * 0.9
	if pass == 0 {
		b.Text = text // of nothing
	}
	if text > 0 && pass > 0 {
		for _, t := range append([]time.Duration{text}, textPasses...) {
			if t >= text && float64(pass)/float64(t) <= left/2 {
				b.Text = t
				break
			}
		}
		switch {
		case b.Text == 0:
			b.Reason = "kernels' code is not compared: there is not enough for that"
		case b.Text > text:
			b.Reason = "kernels' code is compared less often than asked for: there is not enough for that"
		}
		if b.Text > 0 {
			left -= float64(pass) / float64(b.Text)
		}
	}
	if len(needs) == 0 {
		b.Period = MinWatchPeriod
		return b
	}
	// The module stretches what is shorter than twice a tick.
	period := max(time.Duration(math.Ceil(float64(tick)/left)), 2*longest, MinWatchPeriod)
	if period > slowestPeriod {
		b.Fits = false
		b.Reason = "it is not enough for one look each " + slowestPeriod.String()
		b.Text = 0
		period = slowestPeriod
	}
	if own > share/2 {
		b.Fits = false
		b.Reason = "the daemon's own looks take more than half of it: something that is watched changes all the time"
	}
	b.Period = roundUp(period)
	b.Cost = own + cost(b, needs)
	return b
}

// cost is what the module takes.
func cost(b BudgetStatus, needs []need) Share {
	sum := 0.0
	for _, n := range needs {
		sum += float64(n.tick) / float64(b.Period)
		if b.Text > 0 {
			sum += float64(n.text) / float64(b.Text)
		}
	}
	return Share(sum)
}

// roundUp gives a duration two digits.
func roundUp(d time.Duration) time.Duration {
	unit := time.Duration(1)
	for d/unit >= 100 {
		unit *= 10
	}
	return (d + unit - 1) / unit * unit
}

// keeps says whether it is better to go on as now than to change to next.
func keeps(now, next BudgetStatus, needs []need) bool {
	if now.VMs == 0 || now.Fits != next.Fits || now.Text != next.Text {
		return false
	}
	fits := next.Daemon+cost(now, needs) <= now.Share || !next.Fits
	return fits && next.Period*4 > now.Period*3
}

// When costs are measured after something changed, and from then on.
var budgetAfter = []time.Duration{time.Second, 5 * time.Second, 30 * time.Second, time.Minute}

// budget chooses periods by what they cost.
type budget struct {
	share Share
	text  time.Duration
	log   *slog.Logger
	wake  chan struct{} // receives when VMs have come or gone

	mu     sync.Mutex
	status BudgetStatus
	before map[kvmaccess.VMID]WatchAccount // when it was last measured
	needs  map[kvmaccess.VMID]need
	at     time.Duration // CLOCK_MONOTONIC, of looks
	looks  time.Duration // that the daemon has taken so far
	own    Share
}

func newBudget(share Share, text time.Duration, log *slog.Logger) *budget {
	b := &budget{share: share, text: text, log: log, wake: make(chan struct{}, 1), before: map[kvmaccess.VMID]WatchAccount{}, needs: map[kvmaccess.VMID]need{}}
	b.status = choose(share, 0, []need{{unmeasured, unmeasuredText}}, text)
	b.status.VMs = 0
	return b
}

// chosen is what holds now.
func (b *budget) chosen() BudgetStatus {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status
}

// changed says that VMs have come or gone.
func (b *budget) changed() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// run measures and chooses until ctx ends. Each keeper is told of a change.
func (b *budget) run(ctx context.Context, keepers func() []*keeper, looks func() time.Duration, accounts func(context.Context) []kvmaccess.WatchStats) {
	for step := 0; ; {
		timer := time.NewTimer(budgetAfter[min(step, len(budgetAfter)-1)])
		select {
		case <-b.wake:
			timer.Stop()
			step = 0
		case <-timer.C:
			step++
		case <-ctx.Done():
			timer.Stop()
			return
		}
		all := keepers()
		if b.adapt(all, accounts(ctx), looks(), step > 1) {
			for _, k := range all {
				k.review()
			}
		}
	}
}

// adapt chooses anew. quiet says that no VM has come or gone for a while, which
// takes looks of its own. It returns true if something changed.
func (b *budget) adapt(keepers []*keeper, accounts []kvmaccess.WatchStats, looks time.Duration, quiet bool) bool {
	at := monotonic()
	b.mu.Lock()
	defer b.mu.Unlock()
	// Looks without an event come once in that time.
	if long := at-b.at >= verifyEvery; long && quiet && looks >= b.looks {
		b.own = Share(float64(looks-b.looks) / float64(at-b.at))
	} else if quiet && !long {
		at, looks = b.at, b.looks
	}
	b.at, b.looks = at, looks
	var needs []need
	present := map[kvmaccess.VMID]bool{}
	for _, k := range keepers {
		a := k.watchAccount(accounts)
		if a == nil || a.Period == 0 {
			continue // not watched, or not yet
		}
		id := k.vm.ID
		present[id] = true
		needs = append(needs, b.measure(id, *a))
	}
	for id := range b.before {
		if !present[id] {
			delete(b.before, id)
			delete(b.needs, id)
		}
	}
	if len(needs) == 0 {
		b.status.VMs = 0
		return false
	}
	next := choose(b.share, b.own, needs, b.text)
	if keeps(b.status, next, needs) {
		b.status.VMs, b.status.Daemon, b.status.Cost = len(needs), b.own, b.own+cost(b.status, needs)
		return false
	}
	b.status = next
	level := slog.LevelInfo
	if !next.Fits {
		level = slog.LevelWarn
	}
	b.log.Log(context.Background(), level, "chosen by the CPU budget", "budget", next.Share, "period", next.Period, "vms", next.VMs,
		"takes", next.Cost, "daemon", next.Daemon, "text", next.Text, "reason", next.Reason)
	return true
}

// fewestTicks are needed to tell what one takes.
const fewestTicks = 8

// measure is what the VM needed since it was measured before. b.mu is held.
func (b *budget) measure(id kvmaccess.VMID, a WatchAccount) need {
	n, known := b.needs[id]
	if !known {
		n.tick = unmeasured
	}
	switch c := a.Code; {
	case c == nil || c.Reason != "":
		n.text = 0
	case c.Compared > 0 && c.Bytes > 0:
		n.text = time.Duration(float64(c.Time) / float64(c.Compared) * float64(c.Bytes))
	case !known:
		n.text = unmeasuredText
	}
	before := b.before[id]
	if a.Ticks < before.Ticks || a.Time < before.Time {
		before = WatchAccount{}
	}
	if ticks := a.Ticks - before.Ticks; ticks >= fewestTicks || known && ticks > 0 {
		n.tick = (a.Time - before.Time) / time.Duration(ticks)
		b.needs[id], b.before[id] = n, a
	}
	return n
}
