// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// watches are the module's, of all VMs, by one socket. They end with it.
type watches struct {
	src   watchSource
	looks chan struct{} // filled by those who look at all of a kernel's code

	mu    sync.Mutex
	boxes map[kvmaccess.WatchID]*mailbox
}

func newWatches(src watchSource) *watches {
	return &watches{src: src, looks: make(chan struct{}, maxLooks), boxes: map[kvmaccess.WatchID]*mailbox{}}
}

// maxLooks is how many kernels' code is looked at at once, which takes some
// megabytes of memory each.
const maxLooks = 2

// mailbox takes the events of one VM's watches.
type mailbox struct {
	wake chan struct{} // receives when there is something to take

	mu     sync.Mutex
	events []kvmaccess.WatchEvent
	lost   bool // there were more
}

func newMailbox() *mailbox { return &mailbox{wake: make(chan struct{}, 1)} }

// maxMail bounds the events that wait for a VM: what they tell beyond that
// there are some is of use for a few only.
const maxMail = 1024

func (b *mailbox) put(e kvmaccess.WatchEvent) {
	b.mu.Lock()
	if len(b.events) < maxMail {
		b.events = append(b.events, e)
	} else {
		b.lost = true
	}
	b.mu.Unlock()
	b.ring()
}

// lose says that events may be missing.
func (b *mailbox) lose() {
	b.mu.Lock()
	b.lost = true
	b.mu.Unlock()
	b.ring()
}

func (b *mailbox) ring() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take empties the mailbox.
func (b *mailbox) take() (events []kvmaccess.WatchEvent, lost bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	events, lost = b.events, b.lost
	b.events, b.lost = nil, false
	return events, lost
}

// receive hands events to whom they are for until the socket fails or ctx ends.
func (w *watches) receive(ctx context.Context) error {
	for {
		e, err := w.src.Receive(ctx)
		switch {
		case errors.Is(err, kvmaccess.ErrEventsLost):
			w.mu.Lock()
			for _, b := range w.boxes {
				b.lose()
			}
			w.mu.Unlock()
		case err != nil:
			return err
		default:
			w.deliver(e)
		}
	}
}

func (w *watches) deliver(e kvmaccess.WatchEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// Else it is of a watch that was closed meanwhile.
	if b := w.boxes[e.Watch]; b != nil {
		b.put(e)
	}
}

// open makes a watch whose events go to the mailbox. It has no items yet, so
// that it tells nothing before open returns.
func (w *watches) open(ctx context.Context, vm kvmaccess.VMID, c kvmaccess.WatchConfig, b *mailbox) (watch, error) {
	x, err := w.src.New(ctx, vm, c)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.boxes[x.Ident()] = b
	return x, nil
}

// close ends a watch. Its last account is not to be had if the VM is gone.
func (w *watches) close(ctx context.Context, x watch) (kvmaccess.WatchStats, error) {
	w.mu.Lock()
	delete(w.boxes, x.Ident())
	w.mu.Unlock()
	return x.Close(ctx)
}

// sameWatch finds the account of a watch among those of all.
func sameWatch(all []kvmaccess.WatchStats, id kvmaccess.WatchID) (kvmaccess.WatchStats, bool) {
	i := slices.IndexFunc(all, func(s kvmaccess.WatchStats) bool { return s.ID == id })
	if i < 0 {
		return kvmaccess.WatchStats{}, false
	}
	return all[i], true
}
