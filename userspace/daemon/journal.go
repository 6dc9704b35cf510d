// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

// maxUnstored bounds the findings that are in memory alone because the store
// cannot be written.
const maxUnstored = 1 << 14

// journal numbers findings, keeps them and the state of each guest in the
// store, and writes findings out. Raising a finding never waits for a disk.
type journal struct {
	config           *Config
	log              *slog.Logger
	problems         *problems
	retry, lastRetry time.Duration // after a failure: first and longest wait
	flush            time.Duration // that Shutdown waits at most for either

	lock  *lock
	store *store
	sink  *sink

	put func(write) error // of store

	stopWriting, stopStoring context.CancelFunc
	writing, storing         chan struct{} // closed when that has stopped

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change
	last     uint64        // Seq of the last finding
	stored   uint64        // up to which they are in the store
	written  uint64        // up to which they are written out
	unstored []Record      // those after stored
	guests   map[string]*guestState
	dirty    map[string]bool // keys of guests that changed since they were stored; false: in Findings and open ones alone
	position bool            // written changed since it was stored
	failing  bool            // what is raised cannot be stored
	ending   bool            // Shutdown has begun
	pruned   uint64
	raised   uint64 // since the start
	dropped  uint64
}

func newJournal(config *Config, log *slog.Logger, p *problems) *journal {
	return &journal{
		config: config, log: log, problems: p, retry: time.Second, lastRetry: 8 * time.Second, flush: 5 * time.Second,
		changed: make(chan struct{}), dirty: map[string]bool{},
	}
}

func (j *journal) Name() string { return "journal" }

// Init opens the state directory, for this daemon alone, and the findings file.
func (j *journal) Init(context.Context) error {
	dir := j.config.StateDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	var err error
	if j.lock, err = takeLock(dir); err != nil {
		return err
	}
	store, aside, err := openStore(dir)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	j.store, j.put = store, store.put
	if aside != "" {
		j.problems.set("state", aside)
	}
	if j.sink, err = newSink(j.config.Findings); err != nil {
		return err
	}
	out, err := recoverSink(j.config.Findings)
	if err != nil {
		return err
	}
	last, written, err := store.last()
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	guests, broken, err := store.guests()
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	j.guests = guests
	for _, key := range broken {
		j.log.Warn("the stored state of a VM does not decode: its baseline starts anew", "vm", key)
		j.dirty[key] = true
	}
	j.last, j.written = max(last, out), max(written, out)
	j.stored = j.last

	var ctx context.Context
	ctx, j.stopWriting = context.WithCancel(context.Background())
	j.writing = make(chan struct{})
	go j.keep(ctx, "findings", j.writeBatch, j.writing)
	ctx, j.stopStoring = context.WithCancel(context.Background())
	j.storing = make(chan struct{})
	go j.keep(ctx, "store", j.storeBatch, j.storing)
	return nil
}

// Run waits for the end: the work goes on in the background until Shutdown,
// after the last finding of all others.
func (j *journal) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Shutdown writes and stores what is left.
func (j *journal) Shutdown() error {
	if j.storing != nil {
		j.mu.Lock()
		j.ending = true
		j.mu.Unlock()
		if !j.finish(j.stopWriting, j.writing) || !j.finish(j.stopStoring, j.storing) {
			// The store is in use by what does not end; it is sound without
			// being closed.
			return fmt.Errorf("%s or %s took longer than %v: what is left is lost, or is written at the next start", j.sink.name, j.store.db.Path(), j.flush)
		}
		if _, unwritten := j.counts(); unwritten > 0 {
			j.log.Error("findings are left that could not be written out", "count", unwritten, "in the store", j.stored == j.last)
		}
	}
	var errs []error
	if j.store != nil {
		errs = append(errs, j.store.Close())
	}
	if j.lock != nil {
		errs = append(errs, j.lock.Close())
	}
	return errors.Join(errs...)
}

func (j *journal) finish(stop func(), done <-chan struct{}) bool {
	stop()
	select {
	case <-done:
		return true
	case <-time.After(j.flush):
		return false
	}
}

// guest returns a copy of what is known of the guest with an identity, which
// may be nothing yet.
func (j *journal) guest(id identity) guestState {
	j.mu.Lock()
	defer j.mu.Unlock()
	return *j.entry(id)
}

// entry finds or makes a guest's state. j.mu is held.
func (j *journal) entry(id identity) *guestState {
	key := id.key()
	g := j.guests[key]
	if g == nil {
		g = &guestState{Identity: id}
		j.guests[key] = g
	}
	return g
}

// raise takes up findings of a guest, and with them the baseline that says that
// they are open: both are stored, or neither is. b must not change after. It
// returns how many findings there was room for.
func (j *journal) raise(id identity, b *integrity.Baseline, findings ...integrity.Finding) int {
	j.mu.Lock()
	defer j.mu.Unlock()
	g := j.entry(id)
	n := 0
	for _, f := range findings {
		if !j.room() {
			continue
		}
		g.Findings++
		j.last++
		j.raised++
		n++
		j.unstored = append(j.unstored, Record{Seq: j.last, Finding: f})
	}
	old := g.Baseline
	if b.Version != 0 {
		g.Baseline = b
	}
	same := old != nil && g.Baseline.SameItems(old) && g.Baseline.Taken.Equal(old.Taken) && g.Baseline.Boot == old.Boot
	j.dirty[id.key()] = j.dirty[id.key()] || !same
	j.notify()
	return n
}

// room makes room for another finding in memory. j.mu is held.
func (j *journal) room() bool {
	if len(j.unstored) < maxUnstored {
		return true
	}
	// Those that are written out are not lost if the store never comes back.
	if out := j.unstored[0].Seq; out <= j.written {
		j.stored = out
		j.unstored = slices.Delete(j.unstored, 0, 1)
		return true
	}
	j.dropped++
	j.problems.set("lost findings", fmt.Sprintf("%d findings are lost: neither the store nor %s can be written, and %d findings are waiting in memory: make room on the disk", j.dropped, j.sink.name, maxUnstored))
	return false
}

// rebase forgets the baseline of a guest, and which findings are open.
func (j *journal) rebase(id identity) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entry(id).Baseline = nil
	j.dirty[id.key()] = true
	j.notify()
}

// forget drops a guest that is gone.
func (j *journal) forget(id identity) {
	j.forgetWhere(func(other identity) bool { return other == id })
}

// forgetWhere drops guests that are gone.
func (j *journal) forgetWhere(gone func(identity) bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for key, g := range j.guests {
		if gone(g.Identity) {
			delete(j.guests, key)
			j.dirty[key] = true
		}
	}
	if len(j.dirty) > 0 {
		j.notify()
	}
}

// notify wakes all that wait for a change. j.mu is held.
func (j *journal) notify() {
	close(j.changed)
	j.changed = make(chan struct{})
}

// letFollowersGo has who follows findings hear of one that was just raised before
// the caller goes on, which may take milliseconds of a CPU, of the only one maybe.
// The runtime, which now and then takes one that has yielded before those that
// were woken, does not do so twice in succession.
func letFollowersGo() {
	runtime.Gosched()
	runtime.Gosched()
}

// change returns a channel that is closed at the next change.
func (j *journal) change() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.changed
}

// after returns up to limit findings after a sequence number, oldest first.
func (j *journal) after(seq uint64, limit int) ([]Record, error) {
	for {
		j.mu.Lock()
		stored := j.stored
		if seq >= stored {
			var records []Record
			if skip := seq - stored; skip < uint64(len(j.unstored)) {
				records = slices.Clone(j.unstored[skip:][:min(limit, len(j.unstored)-int(skip))])
			}
			j.mu.Unlock()
			return records, nil
		}
		j.mu.Unlock()
		records, err := j.store.records(seq, limit)
		if err != nil || len(records) > 0 {
			return records, err
		}
		// All up to stored were pruned, or never came into the store.
		seq = stored
	}
}

// counts of findings: raised since the start, and not written out yet.
func (j *journal) counts() (raised, unwritten uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.raised, j.last - min(j.written, j.last)
}

// keep runs step at each change, for as long as there is more to do, until ctx
// ends and once more then. What fails is tried again.
func (j *journal) keep(ctx context.Context, subject string, step func() (more bool, err error), done chan<- struct{}) {
	defer close(done)
	wait := j.retry
	for {
		last := ctx.Err() != nil
		changed := j.change()
		more, err := step()
		switch {
		case err != nil:
			j.problems.set(subject, err.Error())
		case more:
			continue
		default:
			j.problems.clear(subject)
			wait = j.retry
		}
		if last {
			return
		}
		if err != nil {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
			wait = min(2*wait, j.lastRetry)
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// batch bounds what one transaction or one write takes.
const batch = 512

func (j *journal) storeBatch() (more bool, err error) {
	j.mu.Lock()
	w := write{guests: map[string]*guestState{}, open: map[string]*guestState{}}
	w.records = slices.Clone(j.unstored[:min(batch, len(j.unstored))])
	for key, whole := range j.dirty {
		g := j.guests[key]
		if g != nil {
			copied := *g
			g = &copied
		}
		if whole || g == nil {
			w.guests[key] = g
		} else {
			w.open[key] = g
		}
	}
	dirty, position := j.dirty, j.position
	j.dirty, j.position = map[string]bool{}, false
	if position {
		w.written = j.written
	}
	if old := min(j.written, j.stored); old > j.config.Keep && old-j.config.Keep >= j.pruned+batch {
		w.prune = old - j.config.Keep
	}
	j.mu.Unlock()
	if w.empty() {
		return false, nil
	}

	letFollowersGo()
	err = j.put(w)

	j.mu.Lock()
	defer j.mu.Unlock()
	if j.failing = err != nil; j.failing {
		for key, whole := range dirty {
			j.dirty[key] = j.dirty[key] || whole
		}
		j.position = j.position || position
		j.notify() // writeBatch does not wait for the store any more
		return false, fmt.Errorf("%s cannot be written, so findings and baselines do not survive a restart: %w", j.store.db.Path(), unwrapPath(err))
	}
	if n := len(w.records); n > 0 {
		// room may have taken some away meanwhile.
		j.stored = max(j.stored, w.records[n-1].Seq)
		for len(j.unstored) > 0 && j.unstored[0].Seq <= j.stored {
			j.unstored = j.unstored[1:]
		}
		if len(j.unstored) == 0 {
			j.unstored = nil
		}
		j.notify() // writeBatch waits for it
	}
	j.pruned = max(j.pruned, w.prune)
	return true, nil
}

// writeBatch writes out what is stored: a daemon that is killed in between
// would not know, the next time, what it had told, and would tell it again
// under another number. Only where the store fails, the file goes first.
func (j *journal) writeBatch() (more bool, err error) {
	j.mu.Lock()
	from, upTo := j.written, j.stored
	if j.failing || j.ending {
		upTo = math.MaxUint64
	}
	j.mu.Unlock()
	records, err := j.after(from, batch)
	if err != nil {
		return false, fmt.Errorf("findings to be written to %s cannot be read: %w", j.sink.name, err)
	}
	for len(records) > 0 && records[len(records)-1].Seq > upTo {
		records = records[:len(records)-1]
	}
	if len(records) == 0 {
		return false, nil
	}
	n, err := j.sink.write(records)
	j.mu.Lock()
	defer j.mu.Unlock()
	if n > 0 {
		j.written = records[n-1].Seq
		j.position = true
		j.notify()
	}
	if err != nil {
		return false, fmt.Errorf("findings cannot be written and wait: %w", err)
	}
	return true, nil
}
