// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// fakeWatcher is the module's part of the watch mode: each watch compares its
// items with the value of a fakeGuest, each period.
type fakeWatcher struct {
	h      *fakeHost
	events chan any
	closed chan struct{}

	mu      sync.Mutex
	last    kvmaccess.WatchID
	watches []*fakeWatch
	made    int
	addErr  error // of the next Add
	newErr  error // of each New
}

func newFakeWatcher(h *fakeHost) *fakeWatcher {
	return &fakeWatcher{h: h, events: make(chan any, 1024), closed: make(chan struct{})}
}

type fakeWatch struct {
	w     *fakeWatcher
	guest *fakeGuest
	stop  chan struct{}

	mu    sync.Mutex
	items []kvmaccess.Item
	seen  map[uint64]uint64 // value by cookie, of the last event
	stat  kvmaccess.WatchStats
}

func (w *fakeWatcher) New(_ context.Context, vm kvmaccess.VMID, c kvmaccess.WatchConfig) (watch, error) {
	w.h.mu.Lock()
	g := w.h.guests[w.h.vms[vm].PID]
	w.h.mu.Unlock()
	if g == nil {
		return nil, &kvmaccess.Error{Op: "watch_new", VM: vm, Errno: unix.ENOENT, Message: "no VM"}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.newErr != nil {
		return nil, w.newErr
	}
	w.last++
	w.made++
	x := &fakeWatch{w: w, guest: g, stop: make(chan struct{}), seen: map[uint64]uint64{}}
	x.stat = kvmaccess.WatchStats{ID: w.last, VM: vm, Period: c.Period, Effective: c.Period, Budget: c.Budget}
	w.watches = append(w.watches, x)
	go x.run()
	return x, nil
}

func (x *fakeWatch) run() {
	ticker := time.NewTicker(x.stat.Period)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			x.tick()
		case <-x.stop:
			return
		case <-x.w.closed:
			return
		}
	}
}

func (x *fakeWatch) tick() {
	x.guest.mu.Lock()
	value, took := x.guest.value, x.guest.tick
	x.guest.mu.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.stat.Ticks++
	x.stat.Time += took
	for _, it := range x.items {
		last, was := x.seen[it.Cookie]
		state := kvmaccess.StateDifferent
		if value == it.Value {
			state = kvmaccess.StateExpected
		}
		if was && last == value || !was && value == it.Value {
			continue
		}
		x.seen[it.Cookie] = value
		if value == it.Value {
			delete(x.seen, it.Cookie)
		}
		x.stat.Events++
		x.w.events <- kvmaccess.WatchEvent{
			Watch: x.stat.ID, VM: x.stat.VM, State: state, Time: monotonic(), Cookie: it.Cookie, Kind: it.Kind,
			Register: it.Register, Data: binary.NativeEndian.AppendUint64(nil, value),
		}
	}
}

func (w *fakeWatcher) Receive(ctx context.Context) (kvmaccess.WatchEvent, error) {
	select {
	case e := <-w.events:
		if err, ok := e.(error); ok {
			return kvmaccess.WatchEvent{}, err
		}
		return e.(kvmaccess.WatchEvent), nil
	case <-w.closed:
		return kvmaccess.WatchEvent{}, net.ErrClosed
	case <-ctx.Done():
		return kvmaccess.WatchEvent{}, ctx.Err()
	}
}

func (w *fakeWatcher) Close() error {
	close(w.closed)
	return nil
}

// stats are those of all watches that there are.
func (w *fakeWatcher) stats() []kvmaccess.WatchStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []kvmaccess.WatchStats
	for _, x := range w.watches {
		x.mu.Lock()
		all = append(all, x.stat)
		x.mu.Unlock()
	}
	return all
}

// end ends all watches of a VM, as its end or the module's does.
func (w *fakeWatcher) end(vm kvmaccess.VMID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watches = slices.DeleteFunc(w.watches, func(x *fakeWatch) bool {
		if x.stat.VM != vm {
			return false
		}
		close(x.stop)
		w.events <- kvmaccess.WatchEvent{Watch: x.stat.ID, VM: vm, State: kvmaccess.StateEnded}
		return true
	})
}

func (x *fakeWatch) Ident() kvmaccess.WatchID { return x.stat.ID }

func (x *fakeWatch) Add(_ context.Context, items ...kvmaccess.Item) (kvmaccess.WatchStats, error) {
	x.w.mu.Lock()
	err := x.w.addErr
	x.w.addErr = nil
	x.w.mu.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	if err != nil {
		return x.stat, err
	}
	x.items = append(x.items, items...)
	x.stat.Items = len(x.items)
	return x.stat, nil
}

func (x *fakeWatch) Remove(_ context.Context, cookie uint64) (kvmaccess.WatchStats, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	n := len(x.items)
	x.items = slices.DeleteFunc(x.items, func(it kvmaccess.Item) bool { return it.Cookie == cookie })
	if x.stat.Items = len(x.items); n == len(x.items) {
		return x.stat, unix.ENOENT
	}
	delete(x.seen, cookie)
	return x.stat, nil
}

func (x *fakeWatch) Close(context.Context) (kvmaccess.WatchStats, error) {
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	i := slices.Index(x.w.watches, x)
	if i < 0 {
		return kvmaccess.WatchStats{}, errors.New("no such watch")
	}
	x.w.watches = slices.Delete(x.w.watches, i, i+1)
	close(x.stop)
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.stat, nil
}

func (x *fakeWatch) Stats(context.Context) (kvmaccess.WatchStats, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.stat, nil
}
