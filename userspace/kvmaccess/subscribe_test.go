// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

// newSubscription receives, one after the other, what steps return.
func newSubscription(t *testing.T, steps ...func() ([]netlink.Message, error)) *Subscription {
	t.Helper()
	g := genetlink.NewConn(nltest.Dial(func([]netlink.Message) ([]netlink.Message, error) {
		if len(steps) == 0 {
			t.Fatal("asked for more than was sent")
		}
		step := steps[0]
		steps = steps[1:]
		return step()
	}))
	return &Subscription{g: g, family: testFamily.ID}
}

func notification(family uint16, cmd uint8, attrs []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(family)},
		Data:   join([]byte{cmd, genlVersion, 0, 0}, attrs),
	}
}

func TestReceive(t *testing.T) {
	attrs := specMessage(t, testSpec(t), "vm")
	vm, err := parseVM(attrs)
	if err != nil {
		t.Fatal(err)
	}
	send := func(msgs ...netlink.Message) func() ([]netlink.Message, error) {
		return func() ([]netlink.Message, error) { return msgs, nil }
	}
	s := newSubscription(t,
		send(notification(testFamily.ID, cmdVMCreated, attrs), notification(testFamily.ID, cmdVMDestroyed, attrs)),
		func() ([]netlink.Message, error) { return nil, unix.ENOBUFS },
		send(notification(testFamily.ID, 200, nil)), // of a newer module
		send(notification(testFamily.ID+1, cmdVMCreated, attrs)),
		send(notification(testFamily.ID, cmdVMCreated, attrs)),
		send(notification(testFamily.ID, cmdVMCreated, attrs[:8])),
	)
	type outcome struct {
		Event Event
		Lost  bool
	}
	var got []outcome
	for range 4 {
		e, err := s.Receive(t.Context())
		if err != nil && !errors.Is(err, ErrEventsLost) {
			t.Fatal(err)
		}
		got = append(got, outcome{e, err != nil})
	}
	want := []outcome{{Event{VMCreated, vm}, false}, {Event{VMDestroyed, vm}, false}, {Event{}, true}, {Event{VMCreated, vm}, false}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := s.Receive(t.Context()); err == nil || !strings.Contains(err.Error(), "malformed") {
		t.Errorf("malformed event: %v", err)
	}
}

// TestReceiveCancel waits on a real socket, in the group of nlctrl: the end of
// one context must end the wait, and not the next one.
func TestReceiveCancel(t *testing.T) {
	g, err := genetlink.Dial(netlinkConfig())
	if err != nil {
		t.Fatal(err)
	}
	s := &Subscription{g: g, family: unix.GENL_ID_CTRL}
	defer s.Close()
	for range 2 {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		_, err := s.Receive(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) < 25*time.Millisecond {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
	}
	done := make(chan error)
	go func() {
		_, err := s.Receive(t.Context())
		done <- err
	}()
	time.Sleep(10 * time.Millisecond)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("no error from a closed subscription")
	}
}

func TestFindGroup(t *testing.T) {
	f := testFamily
	if _, err := findGroup(f); err == nil {
		t.Error("a group was found in none")
	}
	f.Groups = []genetlink.MulticastGroup{{ID: 4, Name: "other"}, {ID: 5, Name: mcgrpVM}}
	if id, err := findGroup(f); id != 5 || err != nil {
		t.Errorf("group %d, %v", id, err)
	}
}
