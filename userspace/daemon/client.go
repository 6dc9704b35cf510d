// SPDX-License-Identifier: MIT

package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

// Client speaks to a running daemon. It is safe for concurrent use.
type Client struct {
	socket string
	http   http.Client
}

// APIError is a request that the daemon refused.
type APIError struct {
	Status  int // HTTP status
	Message string
}

func (e *APIError) Error() string { return e.Message }

// Query selects findings. The zero Query selects all.
type Query struct {
	VM    string    // id, name or UUID; "": all VMs
	After uint64    // only those with a greater Seq
	Since time.Time // only those from then on; unused if After is set
}

func (q Query) values() url.Values {
	v := url.Values{}
	if q.VM != "" {
		v.Set("vm", q.VM)
	}
	switch {
	case q.After != 0:
		v.Set("since", strconv.FormatUint(q.After, 10))
	case !q.Since.IsZero():
		v.Set("since", q.Since.Format(time.RFC3339Nano))
	}
	return v
}

// Dial finds the daemon that listens on a unix socket (DefaultSocket if "").
// Without one, the error wraps os.ErrNotExist or ECONNREFUSED and says how to
// start it; without the right to ask it, os.ErrPermission.
func Dial(socket string) (*Client, error) {
	if socket == "" {
		socket = DefaultSocket
	}
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, c.explain(err)
	}
	conn.Close()
	return c, nil
}

// Close closes idle connections. A running Follow ends by its context.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Health says what is wrong with the daemon, if anything.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	return h, c.get(ctx, "/v1/health", nil, &h)
}

// VMs lists the VMs and how each is watched, by id.
func (c *Client) VMs(ctx context.Context) ([]VMStatus, error) {
	var vms []VMStatus
	return vms, c.get(ctx, "/v1/vms", nil, &vms)
}

// Stats says what monitoring has cost so far.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var s Stats
	return s, c.get(ctx, "/v1/stats", nil, &s)
}

// Findings returns the findings so far that q selects, oldest first.
func (c *Client) Findings(ctx context.Context, q Query) ([]Record, error) {
	var records []Record
	return records, c.get(ctx, "/v1/findings", q.values(), &records)
}

// Follow yields the findings that q selects, first those so far and then each
// as it is made, until ctx ends (then without an error) or the daemon goes
// (then with one).
func (c *Client) Follow(ctx context.Context, q Query) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		values := q.values()
		values.Set("follow", "1")
		resp, err := c.do(ctx, http.MethodGet, "/v1/findings", values)
		if err != nil {
			if ctx.Err() == nil {
				yield(Record{}, err)
			}
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewReader(resp.Body)
		for {
			line, err := lines.ReadBytes('\n')
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				yield(Record{}, fmt.Errorf("kvmaccessd at %s closed the stream: %w", c.socket, err))
				return
			}
			if len(line) == 1 {
				continue
			}
			var r Record
			if err := json.Unmarshal(line, &r); err != nil {
				yield(Record{}, fmt.Errorf("kvmaccessd at %s sent a malformed finding: %w", c.socket, err))
				return
			}
			if !yield(r, nil) {
				return
			}
		}
	}
}

// Baseline returns what a VM (id, name or UUID) is compared with.
func (c *Client) Baseline(ctx context.Context, vm string) (integrity.Baseline, error) {
	var b integrity.Baseline
	return b, c.get(ctx, "/v1/baselines/"+url.PathEscape(vm), nil, &b)
}

// Rebaseline makes the present state of a VM (id, name or UUID) its baseline.
// What must hold on any honest kernel is checked again against it.
func (c *Client) Rebaseline(ctx context.Context, vm string) error {
	resp, err := c.do(ctx, http.MethodDelete, "/v1/baselines/"+url.PathEscape(vm), nil)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (c *Client) get(ctx context.Context, path string, query url.Values, into any) error {
	resp, err := c.do(ctx, http.MethodGet, path, query)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
		return fmt.Errorf("kvmaccessd at %s: GET %s: %w", c.socket, path, err)
	}
	return nil
}

// do returns a response with a status of success, whose body the caller closes.
func (c *Client) do(ctx context.Context, method, path string, query url.Values) (*http.Response, error) {
	address := "http://kvmaccessd" + path
	if len(query) > 0 {
		address += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var answer struct{ Error string }
	if json.Unmarshal(text, &answer) != nil || answer.Error == "" {
		answer.Error = fmt.Sprintf("kvmaccessd at %s: %s %s: %s", c.socket, method, path, resp.Status)
	}
	return nil, &APIError{Status: resp.StatusCode, Message: answer.Error}
}

func (c *Client) explain(err error) error {
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("kvmaccessd does not answer at %s: start it with systemctl start kvmaccessd, or name its socket: %w", c.socket, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("kvmaccessd at %s answers root only: %w", c.socket, err)
	}
	return fmt.Errorf("kvmaccessd at %s: %w", c.socket, err)
}
