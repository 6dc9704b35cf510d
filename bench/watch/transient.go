// SPDX-License-Identifier: MIT

package watch

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Transient is what was seen of changes that were undone.
type Transient struct {
	Period time.Duration   `json:"period_ns"`
	Length []time.Duration `json:"length_ns"` // from each change until it was undone
	Seen   []bool          `json:"seen"`
}

// TransientPeriods are those that changes are watched at.
var TransientPeriods = []time.Duration{time.Second, 10 * time.Millisecond, time.Millisecond}

// Transients makes n changes for each period at random times, of random
// lengths, from a hundredth of the period, but no less than 50 µs, to twice the
// period, and undoes them.
func Transients(ctx context.Context, n int, seed uint64, alive func(string)) (all []Transient, err error) {
	b, err := inside.OpenBench()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	g, err := inside.StartTiny(ctx, b.Client, b.KVM, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	random := rand.New(rand.NewPCG(seed, 1))
	for _, period := range TransientPeriods {
		t := Transient{Period: period}
		if err := t.take(ctx, b, g, n, random, alive); err != nil {
			return nil, fmt.Errorf("period %v: %w", period, err)
		}
		all = append(all, t)
	}
	return all, nil
}

func (t *Transient) take(ctx context.Context, b *inside.Bench, g *inside.Tiny, n int, random *rand.Rand, alive func(string)) (err error) {
	want, err := g.Fill(compared)
	if err != nil {
		return err
	}
	live, err := g.Bytes(inside.TinyData, compared)
	if err != nil {
		return err
	}
	w, err := b.Watch(ctx, g.VM.ID, kvmaccess.WatchConfig{Period: t.Period},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: inside.TinyData, Data: want})
	if err != nil {
		return err
	}
	defer func() {
		_, end := w.Close(ctx)
		err = errors.Join(err, end)
	}()
	least := max(50*time.Microsecond, t.Period/100)
	span := math.Log(float64(2*t.Period) / float64(least))
	for i := range n {
		if err := inside.Sleep(ctx, quiet+time.Duration(random.Int64N(int64(t.Period)))); err != nil {
			return err
		}
		length := time.Duration(float64(least) * math.Exp(span*random.Float64()))
		at := random.IntN(compared)
		from, err := inside.Monotonic()
		if err != nil {
			return err
		}
		live[at] ^= 1
		if err := inside.Sleep(ctx, length); err != nil {
			return err
		}
		live[at] = want[at]
		to, err := inside.Monotonic()
		if err != nil {
			return err
		}
		// What a tick saw it has told by the end of that tick.
		e, err := receive(ctx, b.Watcher, kvmaccess.StateDifferent, 5*time.Millisecond)
		if err != nil {
			return err
		}
		if e != nil {
			if back, err := receive(ctx, b.Watcher, kvmaccess.StateExpected, 2*t.Period+time.Second); err != nil || back == nil {
				return errors.Join(fmt.Errorf("byte %d is as before, and no event says so", at), err)
			}
		}
		t.Length, t.Seen = append(t.Length, to-from), append(t.Seen, e != nil)
		if i%20 == 0 {
			alive(fmt.Sprintf("transient changes, period %v: %d of %d", t.Period, i, n))
		}
	}
	return nil
}
