// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// WatchID identifies a watch for as long as the module is loaded; it is never
// reused.
type WatchID uint64

// WatchConfig says how a VM is to be watched.
type WatchConfig struct {
	Period time.Duration // from WatchMinPeriod to WatchMaxPeriod
	Budget int           // bytes of digests in a tick, PageSize to WatchMaxBudget; 0: no digests
	Key    *WatchKey     // of digests; nil: none
}

// Item is one thing to watch. What is expected is Data, of which each part
// that Add makes is within a page; or Digests, of the pages from GPA on, which
// is a multiple of PageSize; or Value, of the 8 bytes at GPA, a multiple of 8,
// or of the Register, of which only the bits of Mask count.
type Item struct {
	Cookie   uint64 // comes with each event; Items may share one
	Kind     ItemKind
	GPA      uint64 // in address space 0
	Data     []byte
	Digests  []uint64
	Value    uint64
	Mask     uint64 // 0: all bits
	Register Register
	VCPU     *uint32 // the VMM's number of it; nil: each vCPU
}

// WatchEvent says that an item is not as it was, or that a watch is at its end.
type WatchEvent struct {
	Watch     WatchID       `json:"watch"`
	VM        VMID          `json:"vm"`
	State     ItemState     `json:"state"`     // StateEnded: of the watch, and nothing below Lost is set
	Time      time.Duration `json:"time"`      // CLOCK_MONOTONIC when it was found
	Tick      uint64        `json:"tick"`      // from 1
	Coalesced uint64        `json:"coalesced"` // changes of the item since its last event, but for this one
	Lost      uint64        `json:"lost"`      // events of the watch since the last one that arrived; their items try again

	Cookie   uint64   `json:"cookie"`
	Kind     ItemKind `json:"kind"`
	GPA      uint64   `json:"gpa,omitempty"`    // of the first byte that differs, else of the item or page
	Offset   uint32   `json:"offset,omitempty"` // of that in the item, or in the part of it that Add made
	Expected []byte   `json:"expected,omitempty"`
	Data     []byte   `json:"data,omitempty"` // up to WatchEventBytes; nil: as expected, or not readable

	VCPU      uint32    `json:"vcpu,omitempty"`
	Register  Register  `json:"register,omitempty"`
	Condition Condition `json:"condition,omitempty"`
}

// WatchStats is what a watch did and how things stand.
type WatchStats struct {
	ID          WatchID       `json:"id"`
	VM          VMID          `json:"vm"`
	Period      time.Duration `json:"period"`
	Budget      int           `json:"budget"` // bytes of digests in a tick
	Flags       WatchFlags    `json:"flags"`
	PortID      uint32        `json:"port_id"`   // of the socket that owns it
	Effective   time.Duration `json:"effective"` // Period, or what it was stretched to
	Items       int           `json:"items"`
	Memory      uint64        `json:"memory"`    // bytes that are expected, and kept
	Bytes       uint64        `json:"bytes"`     // compared in each tick
	Digested    uint64        `json:"digested"`  // bytes that digests cover
	Ticks       uint64        `json:"ticks"`     //
	Missed      uint64        `json:"missed"`    // ticks that did not take place: the one before was under way
	Late        uint64        `json:"late"`      // ticks that began more than 1 ms after their time
	Latest      time.Duration `json:"latest"`    // what a tick began after its time, at most
	Time        time.Duration `json:"time"`      // of all ticks
	Longest     time.Duration `json:"longest"`   // tick
	Compared    uint64        `json:"compared"`  // bytes so far, digests included
	Passes      uint64        `json:"passes"`    // times that all digests have been walked
	Captures    uint64        `json:"captures"`  // of vCPUs
	Skipped     uint64        `json:"skipped"`   // vCPUs that had not run, in all ticks
	Unsettled   uint64        `json:"unsettled"` // captures at which some registers were in doubt
	Failed      uint64        `json:"failed"`    // captures
	Different   int           `json:"different"` // items, pages of digests and vCPUs of registers, now
	NotResident int           `json:"not_resident"`
	NoMemslot   int           `json:"no_memslot"`
	Events      uint64        `json:"events"`    // sent
	Coalesced   uint64        `json:"coalesced"` // changes that another event stands for
	Lost        uint64        `json:"lost"`      // events that could not be delivered
}

// maxEvents is how many events wait in a Watcher before it drops some.
const maxEvents = 1 << 16

// watchBuffer is the size of the socket's buffer, in bytes. Of that the module
// gives events 512 KiB; the rest is for answers, and for watches that end at once.
const watchBuffer = 8 << 20

// Watcher owns watches and receives their events, by one socket. All of them
// end with it, and with the process. It is safe for concurrent use.
type Watcher struct {
	g      socket
	family uint16

	requests sync.Mutex // one at a time

	mu      sync.Mutex
	wanted  uint32 // sequence of the request under way; 0: none
	answer  chan answer
	events  []WatchEvent
	dropped bool
	err     error         // why nothing comes any more
	news    chan struct{} // closed when there is more of the above
	done    chan struct{} // the reader has ended
}

type answer struct {
	b   []byte
	err error
}

// NewWatcher opens a socket for watches. Close it.
func NewWatcher() (*Watcher, error) {
	g, err := genetlink.Dial(netlinkConfig())
	if err != nil {
		return nil, fmt.Errorf("kvmaccess: generic netlink: %w", err)
	}
	family, err := findFamily(g)
	if err != nil {
		_ = g.Close()
		return nil, err
	}
	if err := enlarge(g); err != nil {
		_ = g.Close()
		return nil, err
	}
	return newWatcher(g, family.ID), nil
}

// enlarge gives the socket a buffer for all events that may come at once,
// beyond what programs may usually ask for. Without the right to that the usual
// size has to do; a program without it is refused all watches anyway.
func enlarge(g *genetlink.Conn) error {
	raw, err := g.SyscallConn()
	if err != nil {
		return fmt.Errorf("kvmaccess: watches: %w", err)
	}
	return raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, watchBuffer)
	})
}

func newWatcher(g socket, family uint16) *Watcher {
	w := &Watcher{
		g: g, family: family,
		answer: make(chan answer, 1), news: make(chan struct{}), done: make(chan struct{}),
	}
	go w.read()
	return w
}

// Close ends all watches of the Watcher, and a Receive that waits.
func (w *Watcher) Close() error {
	err := w.g.Close()
	<-w.done
	return err
}

// read takes what comes apart into answers and events.
func (w *Watcher) read() {
	defer close(w.done)
	for {
		gmsgs, nmsgs, err := w.g.Receive()
		if err != nil {
			if !w.failed(err) {
				return
			}
			continue
		}
		for i, m := range gmsgs {
			switch h := nmsgs[i].Header; {
			case h.Type != netlink.HeaderType(w.family):
			case h.Sequence != 0:
				w.reply(h.Sequence, answer{b: m.Data})
			case m.Header.Command == cmdWatchEvent:
				e, err := parseWatchEvent(m.Data)
				if err != nil {
					w.end(err)
					return
				}
				w.event(e)
			}
		}
	}
}

// failed reports whether the socket is of use any longer.
func (w *Watcher) failed(err error) bool {
	var op *netlink.OpError
	var errno unix.Errno
	switch {
	case errors.As(err, &op) && op.Sequence != 0 && errors.As(op.Err, &errno):
		w.reply(op.Sequence, answer{err: &Error{Errno: errno, Message: op.Message}})
		return true
	case errors.Is(err, unix.ENOBUFS):
		// Of an event the module knows and sends it again, of an answer it
		// does not.
		w.mu.Lock()
		wanted := w.wanted
		w.mu.Unlock()
		w.reply(wanted, answer{err: &Error{Errno: unix.ENOBUFS, Message: "the reply was lost among events"}})
		return true
	}
	w.end(err)
	return false
}

func (w *Watcher) reply(sequence uint32, a answer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if sequence == 0 || sequence != w.wanted {
		return
	}
	w.wanted = 0
	w.answer <- a
}

func (w *Watcher) event(e WatchEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.events) < maxEvents {
		w.events = append(w.events, e)
	} else {
		w.dropped = true
	}
	w.wake()
}

func (w *Watcher) end(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
	w.wake()
}

func (w *Watcher) wake() {
	close(w.news)
	w.news = make(chan struct{})
}

// Receive waits for the next event, of any watch. ErrEventsLost says that this
// program did not receive for so long that events had to be dropped: what they
// told is to be found out otherwise. After Close the error is net.ErrClosed.
// Once ctx has ended there is no event, though more may wait: they may come
// faster than they are taken.
func (w *Watcher) Receive(ctx context.Context) (WatchEvent, error) {
	for {
		if err := ctx.Err(); err != nil {
			return WatchEvent{}, fmt.Errorf("kvmaccess: receive: %w", err)
		}
		w.mu.Lock()
		switch {
		case len(w.events) > 0:
			e := w.events[0]
			w.events = w.events[1:]
			w.mu.Unlock()
			return e, nil
		case w.dropped:
			w.dropped = false
			w.mu.Unlock()
			return WatchEvent{}, ErrEventsLost
		case w.err != nil:
			defer w.mu.Unlock()
			return WatchEvent{}, w.closed()
		}
		news := w.news
		w.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
		}
	}
}

// closed is why the socket is of no use.
func (w *Watcher) closed() error {
	select {
	case <-w.done:
		return fmt.Errorf("kvmaccess: watches: %w", errors.Join(net.ErrClosed, w.err))
	default:
		return fmt.Errorf("kvmaccess: watches: %w", w.err)
	}
}

// request carries out one command.
func (w *Watcher) request(ctx context.Context, cmd uint8, vm VMID, attrs []byte) (WatchStats, error) {
	name := commandNames[cmd]
	if err := ctx.Err(); err != nil {
		return WatchStats{}, fmt.Errorf("kvmaccess: %s: %w", name, err)
	}
	w.requests.Lock()
	defer w.requests.Unlock()

	// Until the message is sent, and its sequence known, no answer can be taken.
	w.mu.Lock()
	select {
	case <-w.answer: // of one that was given up
	default:
	}
	sent, err := w.g.Send(genetlink.Message{
		Header: genetlink.Header{Command: cmd, Version: genlVersion}, Data: attrs,
	}, w.family, netlink.Request)
	w.wanted = sent.Header.Sequence
	w.mu.Unlock()
	if err != nil {
		return WatchStats{}, fmt.Errorf("kvmaccess: %s: %w", name, err)
	}
	var a answer
	select {
	case a = <-w.answer:
	case <-ctx.Done():
		return WatchStats{}, fmt.Errorf("kvmaccess: %s: %w", name, ctx.Err())
	case <-w.done:
		w.mu.Lock()
		defer w.mu.Unlock()
		return WatchStats{}, w.closed()
	}
	var e *Error
	if errors.As(a.err, &e) {
		e.Op, e.VM = name, vm
	}
	if a.err != nil {
		return WatchStats{}, a.err
	}
	return parseWatchStats(a.b)
}

// Watch is a watch of one VM.
type Watch struct {
	ID WatchID
	VM VMID

	w *Watcher
}

// New makes a watch, without items to begin with.
func (w *Watcher) New(ctx context.Context, vm VMID, c WatchConfig) (*Watch, error) {
	b := appendU64(nil, aWatchVMID, uint64(vm))
	b = appendU64(b, aWatchPeriod, uint64(max(0, c.Period)))
	if c.Budget < 0 || c.Budget > math.MaxInt32 {
		return nil, fmt.Errorf("kvmaccess: a budget of %d bytes: %w", c.Budget, ErrInvalid)
	}
	if c.Budget > 0 {
		b = appendU32(b, aWatchBudget, uint32(c.Budget))
	}
	if c.Key != nil {
		b = appendBytes(b, aWatchKey, c.Key[:])
	}
	s, err := w.request(ctx, cmdWatchNew, vm, b)
	if err != nil {
		return nil, err
	}
	return &Watch{ID: s.ID, VM: s.VM, w: w}, nil
}

// maxAdd bounds a message of Add, in bytes: a refusal comes with all of it.
const maxAdd = 48 << 10

// Add adds items. Data that crosses the end of a page and long Digests are
// split, and many items are added by several messages: after an error some of
// them may have been added. WatchMaxItems counts the parts. ENOBUFS, of this and
// of the others that change a watch, says that the answer had no place among
// events: what was asked for has been done or not, which Stats tells.
func (w *Watch) Add(ctx context.Context, items ...Item) (WatchStats, error) {
	head := appendU64(nil, aWatchID, uint64(w.ID))
	b := slices.Clone(head)
	var s WatchStats
	flush := func() (err error) {
		if len(b) > len(head) {
			s, err = w.w.request(ctx, cmdWatchAdd, w.VM, b)
		}
		b = append(b[:0], head...)
		return err
	}
	for _, item := range items {
		for part := range item.parts {
			a, err := part.append(nil)
			if err != nil {
				return s, err
			}
			if len(b)+len(a) > maxAdd {
				if err := flush(); err != nil {
					return s, err
				}
			}
			b = append(b, a...)
		}
	}
	if err := flush(); err != nil {
		return s, err
	}
	if s.ID == 0 {
		return w.Stats(ctx)
	}
	return s, nil
}

// parts are Items that the module takes.
func (i Item) parts(yield func(Item) bool) {
	switch i.Kind {
	case KindBytes:
		for len(i.Data) > PageSize-int(i.GPA%PageSize) {
			n := PageSize - int(i.GPA%PageSize)
			part := i
			part.Data = i.Data[:n]
			if !yield(part) {
				return
			}
			i.GPA, i.Data = i.GPA+uint64(n), i.Data[n:]
		}
	case KindDigest:
		for len(i.Digests) > WatchMaxDigests {
			part := i
			part.Digests = i.Digests[:WatchMaxDigests]
			if !yield(part) {
				return
			}
			i.GPA, i.Digests = i.GPA+WatchMaxDigests*PageSize, i.Digests[WatchMaxDigests:]
		}
	}
	yield(i)
}

// append appends the item as an attribute.
func (i Item) append(b []byte) ([]byte, error) {
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	b = appendU64(b, aItemCookie, i.Cookie)
	b = appendU32(b, aItemKind, uint32(i.Kind))
	mask := i.Mask
	if mask == 0 {
		mask = math.MaxUint64
	}
	switch i.Kind {
	case KindBytes:
		b = appendU64(b, aItemGPA, i.GPA)
		b = appendBytes(b, aItemData, i.Data)
	case KindEntry:
		b = appendU64(b, aItemGPA, i.GPA)
		b = appendU64(b, aItemValue, i.Value)
		b = appendU64(b, aItemMask, mask)
	case KindDigest:
		b = appendU64(b, aItemGPA, i.GPA)
		data := make([]byte, 0, 8*len(i.Digests))
		for _, d := range i.Digests {
			data = binary.NativeEndian.AppendUint64(data, d)
		}
		b = appendBytes(b, aItemData, data)
	case KindRegister:
		b = appendU32(b, aItemRegister, uint32(i.Register))
		b = appendU64(b, aItemValue, i.Value)
		b = appendU64(b, aItemMask, mask)
		if i.VCPU != nil {
			b = appendU32(b, aItemVCPUID, *i.VCPU)
		}
	default:
		return b, fmt.Errorf("kvmaccess: an item of kind %v: %w", i.Kind, ErrInvalid)
	}
	binary.NativeEndian.PutUint16(b[start:], uint16(len(b)-start))
	binary.NativeEndian.PutUint16(b[start+2:], aWatchItem|netlink.Nested)
	return b, nil
}

// Remove takes the items with this cookie off the watch. ErrNoVM, of all
// errors, says that there is none: it is the errno's.
func (w *Watch) Remove(ctx context.Context, cookie uint64) (WatchStats, error) {
	b := appendU64(nil, aWatchID, uint64(w.ID))
	return w.w.request(ctx, cmdWatchDel, w.VM, appendU64(b, aWatchCookie, cookie))
}

// Close ends the watch and returns its last account.
func (w *Watch) Close(ctx context.Context) (WatchStats, error) {
	return w.w.request(ctx, cmdWatchDel, w.VM, appendU64(nil, aWatchID, uint64(w.ID)))
}

// maxAsked bounds how often Stats asks while its answers are lost among events.
const maxAsked = 16

// Stats is the account of the watch. ENOBUFS says that events, of a guest that
// makes many, left no place for any answer.
func (w *Watch) Stats(ctx context.Context) (s WatchStats, err error) {
	for range maxAsked {
		s, err = w.w.request(ctx, cmdWatchGet, w.VM, appendU64(nil, aWatchID, uint64(w.ID)))
		// To ask again does no harm.
		if !errors.Is(err, unix.ENOBUFS) {
			break
		}
	}
	return s, err
}

// Watches lists the accounts of all watches, whoever owns them.
func (c *Client) Watches(ctx context.Context) ([]WatchStats, error) {
	q, err := c.request(cmdWatchGet, 0)
	if err != nil {
		return nil, err
	}
	defer c.release(q)
	return list(ctx, c, q, parseWatchStats)
}

func parseWatchStats(b []byte) (WatchStats, error) {
	var v WatchStats
	a := attrs{set: "watch", b: b}
	for a.next() {
		switch a.typ {
		case aWatchID:
			v.ID = WatchID(a.u64())
		case aWatchVMID:
			v.VM = VMID(a.u64())
		case aWatchPeriod:
			v.Period = a.duration()
		case aWatchBudget:
			v.Budget = a.number(math.MaxInt32)
		case aWatchFlags:
			v.Flags = WatchFlags(a.u32())
		case aWatchPortid:
			v.PortID = a.u32()
		case aWatchEffective:
			v.Effective = a.duration()
		case aWatchItems:
			v.Items = a.number(math.MaxInt32)
		case aWatchMemory:
			v.Memory = a.u64()
		case aWatchBytes:
			v.Bytes = a.u64()
		case aWatchDigested:
			v.Digested = a.u64()
		case aWatchTicks:
			v.Ticks = a.u64()
		case aWatchMissed:
			v.Missed = a.u64()
		case aWatchLate:
			v.Late = a.u64()
		case aWatchLatest:
			v.Latest = a.duration()
		case aWatchTime:
			v.Time = a.duration()
		case aWatchLongest:
			v.Longest = a.duration()
		case aWatchCompared:
			v.Compared = a.u64()
		case aWatchPasses:
			v.Passes = a.u64()
		case aWatchCaptures:
			v.Captures = a.u64()
		case aWatchSkipped:
			v.Skipped = a.u64()
		case aWatchUnsettled:
			v.Unsettled = a.u64()
		case aWatchFailed:
			v.Failed = a.u64()
		case aWatchDifferent:
			v.Different = a.number(math.MaxInt32)
		case aWatchNotResident:
			v.NotResident = a.number(math.MaxInt32)
		case aWatchNoMemslot:
			v.NoMemslot = a.number(math.MaxInt32)
		case aWatchEvents:
			v.Events = a.u64()
		case aWatchCoalesced:
			v.Coalesced = a.u64()
		case aWatchLost:
			v.Lost = a.u64()
		}
	}
	return v, a.finish(aWatchID, aWatchLost, aWatchKey, aWatchItem, aWatchCookie)
}

func parseWatchEvent(b []byte) (WatchEvent, error) {
	var v WatchEvent
	a := attrs{set: "event", b: b}
	for a.next() {
		switch a.typ {
		case aEventWatchID:
			v.Watch = WatchID(a.u64())
		case aEventVMID:
			v.VM = VMID(a.u64())
		case aEventState:
			v.State = ItemState(a.u32())
		case aEventTime:
			v.Time = a.duration()
		case aEventTick:
			v.Tick = a.u64()
		case aEventCoalesced:
			v.Coalesced = a.u64()
		case aEventLost:
			v.Lost = a.u64()
		case aEventCookie:
			v.Cookie = a.u64()
		case aEventKind:
			v.Kind = ItemKind(a.u32())
		case aEventGPA:
			v.GPA = a.u64()
		case aEventOffset:
			v.Offset = a.u32()
		case aEventExpected:
			v.Expected = a.part()
		case aEventData:
			v.Data = a.part()
		case aEventVCPUID:
			v.VCPU = a.u32()
		case aEventRegister:
			v.Register = Register(a.u32())
		case aEventCondition:
			v.Condition = Condition(a.u32())
		}
	}
	return v, a.finish(aEventWatchID, aEventCondition, aEventCookie, aEventKind, aEventGPA, aEventOffset,
		aEventExpected, aEventData, aEventVCPUID, aEventRegister, aEventCondition)
}

// part is a copy of up to WatchEventBytes.
func (a *attrs) part() []byte {
	b := a.bytes()
	if a.err == nil && (len(b) == 0 || len(b) > WatchEventBytes) {
		a.err = wireError("%s: attribute %d has %d bytes, want 1 to %d", a.set, a.typ, len(b), WatchEventBytes)
	}
	return slices.Clone(b)
}

// appendBytes appends an attribute of up to 65531 bytes.
func appendBytes(b []byte, typ uint16, p []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(attrHeader+len(p)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, p...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}
