// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Subscription receives an Event for each VM that comes or goes. One goroutine
// at a time may receive.
type Subscription struct {
	g      *genetlink.Conn
	family uint16
	queue  []Event
}

// Subscribe joins the module's multicast group, on a socket of its own.
// Subscribe first and list the VMs then, and none is missed. Joining needs
// CAP_SYS_ADMIN: ErrPermission.
func Subscribe(ctx context.Context) (*Subscription, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("kvmaccess: subscribe: %w", err)
	}
	g, err := genetlink.Dial(netlinkConfig())
	if err != nil {
		return nil, fmt.Errorf("kvmaccess: generic netlink: %w", err)
	}
	return initSubscription(g)
}

// initSubscription is Subscribe on another connection than the kernel's. It
// closes g if it fails.
func initSubscription(g *genetlink.Conn) (*Subscription, error) {
	s, err := subscribe(g)
	if err != nil {
		_ = g.Close()
		return nil, err
	}
	return s, nil
}

func subscribe(g *genetlink.Conn) (*Subscription, error) {
	family, err := findFamily(g)
	if err != nil {
		return nil, err
	}
	group, err := findGroup(family)
	if err != nil {
		return nil, err
	}
	if err := g.JoinGroup(group); err != nil {
		var errno unix.Errno
		if errors.As(err, &errno) {
			return nil, &Error{Op: "subscribe", Errno: errno}
		}
		return nil, fmt.Errorf("kvmaccess: subscribe: %w", err)
	}
	return &Subscription{g: g, family: family.ID}, nil
}

func findGroup(family genetlink.Family) (uint32, error) {
	for _, group := range family.Groups {
		if group.Name == mcgrpVM {
			return group.ID, nil
		}
	}
	return 0, fmt.Errorf("kvmaccess: the module has no multicast group %q", mcgrpVM)
}

// Receive waits for the next event. ErrEventsLost says that some were dropped
// because they were not received in time: list the VMs again, and go on.
func (s *Subscription) Receive(ctx context.Context) (Event, error) {
	for len(s.queue) == 0 {
		if err := s.fill(ctx); err != nil {
			return Event{}, err
		}
	}
	e := s.queue[0]
	s.queue = s.queue[1:]
	return e, nil
}

// fill waits for a datagram and queues its events.
func (s *Subscription) fill(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("kvmaccess: receive: %w", err)
	}
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = s.g.SetReadDeadline(time.Unix(1, 0))
		close(expired)
	})
	gmsgs, nmsgs, err := s.g.Receive()
	if !stop() {
		// Undo the deadline, so that another context can go on.
		<-expired
		_ = s.g.SetReadDeadline(time.Time{})
		if err != nil {
			return fmt.Errorf("kvmaccess: receive: %w", ctx.Err())
		}
	}
	switch {
	case errors.Is(err, unix.ENOBUFS):
		return ErrEventsLost
	case err != nil:
		return fmt.Errorf("kvmaccess: receive: %w", err)
	}
	for i, m := range gmsgs {
		if nmsgs[i].Header.Type != netlink.HeaderType(s.family) {
			continue
		}
		e, known, err := parseEvent(m)
		if err != nil {
			return err
		}
		if known {
			s.queue = append(s.queue, e)
		}
	}
	return nil
}

// parseEvent passes over notifications that it does not know.
func parseEvent(m genetlink.Message) (e Event, known bool, err error) {
	switch kind := EventKind(m.Header.Command); kind {
	case VMCreated, VMDestroyed:
		vm, err := parseVM(m.Data)
		return Event{Kind: kind, VM: vm}, err == nil, err
	default:
		return Event{}, false, nil
	}
}

// Close leaves the group and ends a Receive that waits.
func (s *Subscription) Close() error { return s.g.Close() }
