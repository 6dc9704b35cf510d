// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/mdlayher/genetlink"
	"golang.org/x/sys/unix"
)

// Client asks the kernel module. It is safe for concurrent use; requests that
// run at the same time have a socket each.
type Client struct {
	dial   func() (*genetlink.Conn, error)
	family genetlink.Family

	mu     sync.Mutex
	idle   []*conn
	closed bool
}

// maxIdle is how many sockets a Client keeps for later requests.
const maxIdle = 4

// maxDumps bounds how often a dump is begun again because the objects changed
// while it ran.
const maxDumps = 8

// New connects to the module. Without the module the error is ErrNoModule,
// with one of another contract a *VersionError.
func New() (*Client, error) {
	return initClient(func() (*genetlink.Conn, error) { return genetlink.Dial(netlinkConfig()) })
}

// initClient is New on other connections than the kernel's.
func initClient(dial func() (*genetlink.Conn, error)) (*Client, error) {
	g, err := dial()
	if err != nil {
		return nil, fmt.Errorf("kvmaccess: generic netlink: %w", err)
	}
	family, err := findFamily(g)
	if err != nil {
		_ = g.Close()
		return nil, err
	}
	c := &Client{dial: dial, family: family}
	q, err := newConn(g)
	if err != nil {
		_ = g.Close()
		return nil, err
	}
	c.idle = append(c.idle, q)
	return c, nil
}

func findFamily(g *genetlink.Conn) (genetlink.Family, error) {
	family, err := g.GetFamily(genlName)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return family, ErrNoModule
	case err != nil:
		return family, fmt.Errorf("kvmaccess: looking for the generic netlink family: %w", err)
	case family.Version != genlVersion:
		return family, &VersionError{Client: genlVersion, Module: family.Version}
	}
	return family, nil
}

// Close releases the sockets. Requests that run go on to their end; later ones
// fail with net.ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, q := range c.idle {
		errs = append(errs, q.g.Close())
	}
	c.idle, c.closed = nil, true
	return errors.Join(errs...)
}

// request takes a socket and begins a request on it; release it afterwards.
func (c *Client) request(op uint8, vm VMID) (*conn, error) {
	q, err := c.take()
	if err != nil {
		return nil, err
	}
	q.request(c.family.ID, op, vm)
	return q, nil
}

func (c *Client) take() (*conn, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, fmt.Errorf("kvmaccess: client: %w", net.ErrClosed)
	}
	if n := len(c.idle); n > 0 {
		q := c.idle[n-1]
		c.idle = c.idle[:n-1]
		c.mu.Unlock()
		return q, nil
	}
	c.mu.Unlock()

	g, err := c.dial()
	if err != nil {
		return nil, fmt.Errorf("kvmaccess: generic netlink: %w", err)
	}
	q, err := newConn(g)
	if err != nil {
		_ = g.Close()
		return nil, err
	}
	return q, nil
}

func (c *Client) release(q *conn) {
	c.mu.Lock()
	keep := !q.broken && !c.closed && len(c.idle) < maxIdle
	if keep {
		c.idle = append(c.idle, q)
	}
	c.mu.Unlock()
	if !keep {
		_ = q.g.Close()
	}
}

// execute carries out the request on q and maps what went wrong. The reply is
// valid until q is released.
func (c *Client) execute(ctx context.Context, q *conn) ([]byte, error) {
	b, err := q.do(ctx)
	if err != nil {
		return nil, c.explain(err)
	}
	return b, nil
}

// list carries out a dump and parses each message, again if the objects
// changed meanwhile.
func list[T any](ctx context.Context, c *Client, q *conn, parse func([]byte) (T, error)) ([]T, error) {
	for range maxDumps {
		all := []T{}
		changed, err := q.dump(ctx, func(b []byte) error {
			v, err := parse(b)
			all = append(all, v)
			return err
		})
		if err != nil {
			return nil, c.explain(err)
		}
		if !changed {
			return all, nil
		}
	}
	return nil, &Error{
		Op: q.name(), VM: q.vm, Errno: unix.EAGAIN,
		Message: fmt.Sprintf("the list changed each of the %d times that it was read: ask again", maxDumps),
	}
}

// explain tells a VM that is gone from a module that is gone: generic netlink
// answers ENOENT without an explanation when no family has the number, and
// EPROTONOSUPPORT to a dump while the module is being unloaded.
func (c *Client) explain(err error) error {
	var e *Error
	switch {
	case !errors.As(err, &e) || e.Message != "":
		return err
	case e.Errno == unix.EPROTONOSUPPORT:
		return ErrNoModule
	case e.Errno != unix.ENOENT:
		return err
	}
	g, derr := c.dial()
	if derr != nil {
		return err
	}
	defer g.Close()
	family, ferr := findFamily(g)
	switch {
	case ferr != nil:
		return ferr
	case family.ID != c.family.ID:
		return ErrReloaded
	}
	return err
}
