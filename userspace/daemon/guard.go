// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// guard has the module compare a VM with what was seen of it last.
type guard struct {
	watches *watches
	vm      kvmaccess.VMID
	log     *slog.Logger
	box     *mailbox

	// For one goroutine at a time, the keeper's.
	config    kvmaccess.WatchConfig
	parts     []*part // the watches; one, unless there is more than it may have
	next      uint64  // cookie
	stale     bool    // what the watches are is not known
	stretched bool    // was said to be
	noise     map[integrity.WatchPlace]*noise

	mu       sync.Mutex
	ids      []kvmaccess.WatchID
	past     WatchAccount // of watches that are closed
	rearmed  uint64       // times that all was programmed anew
	restless int          // places that are left to rounds
}

// part is one watch, and what it compares.
type part struct {
	watch
	items map[integrity.WatchKey]item
	keys  map[uint64]integrity.WatchKey // by cookie
}

type item struct {
	cookie uint64
	place  integrity.WatchPlace
	what   string
}

// noise is how often a place changed without anything being wrong.
type noise struct {
	count int
	since time.Time
	until time.Time     // left to rounds until then; zero: it is not
	pause time.Duration // the last one
}

// What a place may do without anything being wrong, before it is left to rounds
// for a while, which grows as it goes on.
const (
	noiseCount = 32
	noiseTime  = 10 * time.Second
	firstPause = 10 * time.Second
	lastPause  = 5 * time.Minute
)

// partRegisters and partItems are what one watch has at most: of registers the
// module takes no more, of the others this many leave room for changes.
const (
	partRegisters = 240
	partItems     = kvmaccess.WatchMaxItems / 2
)

func newGuard(w *watches, vm kvmaccess.VMID, log *slog.Logger) *guard {
	return &guard{watches: w, vm: vm, log: log, box: newMailbox(), noise: map[integrity.WatchPlace]*noise{}}
}

// program has the module compare what is in the list, and nothing else. What it
// compares already goes on as it is.
func (g *guard) program(ctx context.Context, config kvmaccess.WatchConfig, list []integrity.WatchItem, now time.Time) error {
	list = g.quiet(list, now)
	if len(g.parts) == 1 && !g.stale && g.config == config && len(list) <= partItems {
		err := g.change(ctx, g.parts[0], list)
		if err == nil {
			return nil
		}
		if isGone(err) || isModuleGone(err) || ctx.Err() != nil {
			return err
		}
		// Whether it was done is not known, or the watch is no more.
		g.log.Info("watches are programmed anew", "rule", "a change of them failed", "error", err)
	}
	return g.anew(ctx, config, list)
}

// change changes one watch.
func (g *guard) change(ctx context.Context, p *part, list []integrity.WatchItem) error {
	wanted := make(map[integrity.WatchKey]bool, len(list))
	var add []kvmaccess.Item
	var keys []integrity.WatchKey
	for i := range list {
		k := list[i].Key()
		wanted[k] = true
		if _, ok := p.items[k]; !ok {
			add, keys = append(add, list[i].Item), append(keys, k)
		}
	}
	registers := 0
	for k, it := range p.items {
		if wanted[k] {
			if it.place.Register() {
				registers++
			}
			continue
		}
		if _, err := p.Remove(ctx, it.cookie); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		delete(p.items, k)
		delete(p.keys, it.cookie)
	}
	for i := range add {
		if add[i].Kind == kvmaccess.KindRegister {
			registers++
		}
	}
	if registers > partRegisters {
		return errors.New("more registers than one watch may have")
	}
	return g.add(ctx, p, list, add, keys)
}

func (g *guard) add(ctx context.Context, p *part, list []integrity.WatchItem, add []kvmaccess.Item, keys []integrity.WatchKey) error {
	if len(add) == 0 {
		return nil
	}
	for i := range add {
		g.next++
		add[i].Cookie = g.next
	}
	if _, err := p.Add(ctx, add...); err != nil {
		return err
	}
	by := make(map[integrity.WatchKey]*integrity.WatchItem, len(list))
	for i := range list {
		by[list[i].Key()] = &list[i]
	}
	for i, k := range keys {
		p.items[k] = item{add[i].Cookie, k.WatchPlace, by[k].What}
		p.keys[add[i].Cookie] = k
	}
	return nil
}

// anew makes new watches before it ends those that there are.
func (g *guard) anew(ctx context.Context, config kvmaccess.WatchConfig, list []integrity.WatchItem) error {
	var parts []*part
	fail := func(err error) error {
		for _, p := range parts {
			g.end(ctx, p)
		}
		return err
	}
	for len(list) > 0 || len(parts) == 0 {
		n, registers := 0, 0
		for n < len(list) && n < partItems {
			if list[n].Kind == kvmaccess.KindRegister {
				if registers++; registers > partRegisters {
					break
				}
			}
			n++
		}
		x, err := g.watches.open(ctx, g.vm, config, g.box)
		if err != nil {
			return fail(fmt.Errorf("watch: %w", err))
		}
		p := &part{watch: x, items: map[integrity.WatchKey]item{}, keys: map[uint64]integrity.WatchKey{}}
		parts = append(parts, p)
		var add []kvmaccess.Item
		var keys []integrity.WatchKey
		for i := range list[:n] {
			add, keys = append(add, list[i].Item), append(keys, list[i].Key())
		}
		if err := g.add(ctx, p, list[:n], add, keys); err != nil {
			return fail(fmt.Errorf("watch: %w", err))
		}
		list = list[n:]
	}
	old := g.parts
	g.parts, g.config, g.stale = parts, config, false
	g.mu.Lock()
	g.ids = nil
	for _, p := range append(parts, old...) {
		g.ids = append(g.ids, p.Ident())
	}
	if len(old) > 0 {
		g.rearmed++
	}
	g.mu.Unlock()
	for _, p := range old {
		g.end(ctx, p)
	}
	return nil
}

// end ends a watch and keeps its account.
func (g *guard) end(ctx context.Context, p *part) {
	stats, err := g.watches.close(ctx, p.watch)
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, id := range g.ids {
		if id == p.Ident() {
			g.ids = append(g.ids[:i:i], g.ids[i+1:]...)
			if err == nil {
				g.past = g.past.add(watchAccount(stats).past())
			}
			break
		}
	}
}

// endLimit is how long watches may take to end with those of a daemon that
// stops; with its socket they end anyway.
const endLimit = 2 * time.Second

// close ends all watches.
func (g *guard) close() {
	ctx, cancel := context.WithTimeout(context.Background(), endLimit)
	defer cancel()
	for _, p := range g.parts {
		g.end(ctx, p)
	}
	g.parts = nil
}

// quiet leaves out places that change all the time.
func (g *guard) quiet(list []integrity.WatchItem, now time.Time) []integrity.WatchItem {
	if len(g.noise) == 0 {
		return list
	}
	out := make([]integrity.WatchItem, 0, len(list))
	for i := range list {
		if n := g.noise[list[i].Place()]; n == nil || !now.Before(n.until) {
			out = append(out, list[i])
		}
	}
	return out
}

// vain takes down that an event of a place led to nothing. It returns true if
// the place is left to rounds from now on.
func (g *guard) vain(p integrity.WatchPlace, now time.Time) bool {
	n := g.noise[p]
	if n == nil {
		n = &noise{since: now}
		g.noise[p] = n
	}
	if now.Sub(n.since) > noiseTime {
		n.count, n.since = 0, now
	}
	if n.count++; n.count < noiseCount || now.Before(n.until) {
		return false
	}
	n.pause = min(max(firstPause, 2*n.pause), lastPause)
	n.count, n.until = 0, now.Add(n.pause)
	return true
}

// restlessUntil is until when the first of the places that are left to rounds is;
// zero: there is none.
func (g *guard) restlessUntil(now time.Time) time.Time {
	var first time.Time
	count := 0
	for p, n := range g.noise {
		switch {
		case now.Before(n.until):
			count++
			if first.IsZero() || n.until.Before(first) {
				first = n.until
			}
		case now.Sub(n.until) > 2*lastPause && now.Sub(n.since) > 2*lastPause:
			delete(g.noise, p)
		}
	}
	g.mu.Lock()
	g.restless = count
	g.mu.Unlock()
	return first
}

// find finds the item of an event, if it still is one.
func (g *guard) find(e kvmaccess.WatchEvent) (*part, integrity.WatchKey, bool) {
	for _, p := range g.parts {
		if p.Ident() == e.Watch {
			k, ok := p.keys[e.Cookie]
			return p, k, ok
		}
	}
	return nil, integrity.WatchKey{}, false
}

// what says what an event is of.
func (g *guard) what(e kvmaccess.WatchEvent) string {
	if p, k, ok := g.find(e); ok {
		return p.items[k].what
	}
	return e.Kind.String()
}

// rearm has the module look at an item as if it never had: a change of it that
// goes on is told again.
func (g *guard) rearm(ctx context.Context, e kvmaccess.WatchEvent, list []integrity.WatchItem) error {
	p, k, ok := g.find(e)
	if !ok {
		return nil
	}
	if _, err := p.Remove(ctx, p.items[k].cookie); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	delete(p.keys, p.items[k].cookie)
	delete(p.items, k)
	for i := range list {
		if list[i].Key() == k {
			return g.add(ctx, p, list, []kvmaccess.Item{list[i].Item}, []integrity.WatchKey{k})
		}
	}
	return nil
}

// sayStretched says if ticks take too long for the period.
func (g *guard) sayStretched(ctx context.Context) {
	for _, p := range g.parts {
		s, err := p.Stats(ctx)
		// Beyond what comes of a tick that was kept waiting.
		if stretched := err == nil && s.Effective > s.Period+s.Period/16; stretched != g.stretched && err == nil {
			g.stretched = stretched
			if stretched {
				g.log.Warn("the module stretches the period: its ticks, or those of all VMs together, take too long for it", "period", s.Period, "effective", s.Effective, "longest", s.Longest)
			} else {
				g.log.Info("the period is kept again", "period", s.Period)
			}
		}
	}
}

// account is the module's account of the VM's watches, out of those of all.
func (g *guard) account(all []kvmaccess.WatchStats) WatchAccount {
	g.mu.Lock()
	defer g.mu.Unlock()
	a := g.past
	a.Restless, a.Rearmed = g.restless, g.rearmed
	for _, id := range g.ids {
		if s, ok := sameWatch(all, id); ok {
			a = a.add(watchAccount(s))
		}
	}
	return a
}
