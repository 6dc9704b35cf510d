// SPDX-License-Identifier: MIT

package watch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Changes is what became of changes of watched memory at random times.
type Changes struct {
	By      string          `json:"by"`   // Client or Daemon
	VCPU    string          `json:"vcpu"` // of the guest, meanwhile
	Period  time.Duration   `json:"period_ns"`
	Found   []time.Duration `json:"found_ns"`   // from each change to its finding
	Noticed []time.Duration `json:"noticed_ns"` // by the module, or when the daemon says that it made the finding
	Missed  int             `json:"missed"`
}

// Who finds changes.
const (
	Client = "Go client"
	Daemon = "kvmaccessd"
)

// DaemonLatency changes entries of a Linux guest's system call table n times, at
// random times, and waits for what kvmaccessd says of them.
func DaemonLatency(ctx context.Context, period time.Duration, n int, seed uint64, alive func(string)) (*Changes, error) {
	c := &Changes{By: Daemon, VCPU: Linuxed, Period: period}
	var err error
	c.Found, c.Noticed, c.Missed, err = inside.TimeFindings(ctx, period, n, rand.New(rand.NewPCG(seed, 2)), alive)
	return c, err
}

// quiet is at least between two changes, for the rate of events of an item is
// bounded.
const quiet = 25 * time.Millisecond

// Latency changes one byte of 8 KiB that are watched n times, at random times,
// while the guest's vCPU idles and while it runs. A change is found when the
// event has been received, the place read again, and what is there held against
// what was expected.
func Latency(ctx context.Context, period time.Duration, n int, seed uint64, alive func(string)) (all []Changes, err error) {
	b, err := inside.OpenBench()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	for _, vcpu := range []string{Idle, Busy} {
		c := Changes{By: Client, VCPU: vcpu, Period: period}
		if err := c.take(ctx, b, n, rand.New(rand.NewPCG(seed, 0)), alive); err != nil {
			return nil, fmt.Errorf("a vCPU that %s: %w", vcpu, err)
		}
		all = append(all, c)
	}
	return all, nil
}

func (c *Changes) take(ctx context.Context, b *inside.Bench, n int, random *rand.Rand, alive func(string)) (err error) {
	g, err := inside.StartTiny(ctx, b.Client, b.KVM, c.VCPU == Busy)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	want, err := g.Fill(compared)
	if err != nil {
		return err
	}
	live, err := g.Bytes(inside.TinyData, compared)
	if err != nil {
		return err
	}
	w, err := b.Watch(ctx, g.VM.ID, kvmaccess.WatchConfig{Period: c.Period},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: inside.TinyData, Data: want})
	if err != nil {
		return err
	}
	defer func() {
		_, end := w.Close(ctx)
		err = errors.Join(err, end)
	}()
	read := []kvmaccess.RangeData{{}}
	defer inside.HoldGarbage()()
	for i := range n {
		if err := inside.Sleep(ctx, quiet+time.Duration(random.Int64N(int64(2*c.Period)))); err != nil {
			return err
		}
		at := random.IntN(compared)
		changed, err := inside.Monotonic()
		if err != nil {
			return err
		}
		live[at] ^= byte(1 + random.IntN(255))
		e, err := receive(ctx, b.Watcher, kvmaccess.StateDifferent, 10*c.Period)
		if err != nil {
			return err
		}
		if e != nil {
			read[0].Range = kvmaccess.Range{Address: e.GPA, Length: uint32(len(e.Expected))}
			if err := b.Client.ReadPhysicalInto(ctx, g.VM.ID, read); err != nil {
				return err
			}
			if bytes.Equal(read[0].Data, e.Expected) || e.GPA != inside.TinyData+uint64(at) {
				return fmt.Errorf("byte %d is another, and was found as expected: %+v", at, e)
			}
			now, err := inside.Monotonic()
			if err != nil {
				return err
			}
			c.Found = append(c.Found, now-changed)
			c.Noticed = append(c.Noticed, e.Time-changed)
		} else {
			c.Missed++
		}
		if err := inside.Pause(ctx, quiet); err != nil {
			return err
		}
		live[at] = want[at]
		if e != nil {
			if back, err := receive(ctx, b.Watcher, kvmaccess.StateExpected, 10*c.Period); err != nil || back == nil {
				return errors.Join(fmt.Errorf("byte %d is as before, and no event says so", at), err)
			}
		}
		if i%50 == 0 {
			alive(fmt.Sprintf("latency, vCPU %s: %d of %d", c.VCPU, i, n))
		}
	}
	return nil
}

// receive returns the next event, which must be of this state, or nil if none
// comes in time.
func receive(ctx context.Context, w *kvmaccess.Watcher, state kvmaccess.ItemState, limit time.Duration) (*kvmaccess.WatchEvent, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	e, err := w.Receive(limited)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if e.State != state {
		return nil, fmt.Errorf("event %+v, want one of state %v", e, state)
	}
	return &e, nil
}
