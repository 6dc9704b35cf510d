// SPDX-License-Identifier: MIT

// Package scale measures what watching many VMs costs.
package scale

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/objects"
	"github.com/kvmaccess/kvmaccess/bench/soaker"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// Row is what so many VMs cost, each with a watch of its own, repetition by
// repetition.
type Row struct {
	Kind      tinyvm.Kind   `json:"kind"` // of the guests
	VMs       int           `json:"vms"`
	Period    time.Duration `json:"period_ns"`    // asked for
	Effective time.Duration `json:"effective_ns"` // the longest that a watch was stretched to
	Ticks     uint64        `json:"ticks"`        // in all repetitions
	Missed    uint64        `json:"missed"`
	Late      uint64        `json:"late"` // by more than 1 ms
	Captures  uint64        `json:"captures"`
	Skipped   uint64        `json:"skipped"`
	// CPUPercent is what the counting loops lack, of one CPU; Instructions the
	// same for each tick.
	CPUPercent   []float64 `json:"cpu_percent"`
	Instructions []float64 `json:"instructions"`
}

// Period of all watches.
const Period = 50 * time.Millisecond

// compared is how many bytes of each VM are watched, beside 17 registers.
const compared = 8 << 10

// leastTicks are in a window.
const leastTicks = 400

// Measure watches numbers of guests that halt or spin, n times each, on a host
// with one CPU.
func Measure(ctx context.Context, kind tinyvm.Kind, numbers []int, n int, alive func(string)) (rows []Row, err error) {
	b, err := inside.OpenBench()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	var guests []*inside.Tiny
	defer func() {
		for _, g := range guests {
			err = errors.Join(err, g.Close())
		}
	}()
	count := func() (sum uint64) {
		for _, g := range guests {
			sum += g.Count()
		}
		return sum
	}
	if kind == tinyvm.Halting {
		loops, err := inside.StartSoakers()
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, loops.Stop()) }()
		count = loops.Count
	}
	var data []byte
	for _, number := range numbers {
		more, err := inside.StartTinies(ctx, b.Client, b.KVM, kind == tinyvm.Spinning, number-len(guests), alive)
		if err != nil {
			return nil, err
		}
		guests = append(guests, more...)
		for _, g := range more {
			if data, err = g.Fill(compared); err != nil {
				return nil, err
			}
		}
		// Each of those that spin has its turn.
		if err := inside.Pause(ctx, time.Second+time.Duration(number)*5*time.Millisecond); err != nil {
			return nil, err
		}
		v, err := b.Client.VCPU(ctx, guests[0].VM.ID, 0)
		if err != nil {
			return nil, err
		}
		items := append(objects.Registers(v, 2), kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: inside.TinyData, Data: data})
		row := Row{Kind: kind, VMs: number, Period: Period}
		for range n {
			if err := row.take(ctx, b, guests, count, items, alive); err != nil {
				return nil, fmt.Errorf("%d guests: %w", number, err)
			}
			alive(fmt.Sprint("measured ", number, " guests"))
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// take takes one repetition: a window with watches between two halves of one
// without.
func (r *Row) take(ctx context.Context, b *inside.Bench, guests []*inside.Tiny, count func() uint64, items []kvmaccess.Item, alive func(string)) error {
	length := max(time.Second, time.Duration(leastTicks/r.VMs)*r.Period)
	off, err := inside.Window(ctx, count, length/2)
	if err != nil {
		return err
	}
	watches := make([]*kvmaccess.Watch, len(guests))
	for i, g := range guests {
		if watches[i], err = b.Watch(ctx, g.VM.ID, kvmaccess.WatchConfig{Period: r.Period}, items...); err != nil {
			return err
		}
		if i%100 == 99 {
			alive(fmt.Sprint(i, " watches"))
		}
	}
	// The first ticks are the worker's.
	if err := inside.Pause(ctx, 500*time.Millisecond); err != nil {
		return err
	}
	before, err := b.Client.Watches(ctx)
	if err != nil {
		return err
	}
	rest := func() error { return inside.Pause(ctx, 50*time.Millisecond) }
	if err := rest(); err != nil {
		return err
	}
	on, err := inside.Window(ctx, count, length)
	if err != nil {
		return err
	}
	if err := rest(); err != nil {
		return err
	}
	after, err := b.Client.Watches(ctx)
	if err != nil {
		return err
	}
	if len(before) != len(guests) || len(after) != len(guests) {
		return fmt.Errorf("%d watches, then %d, of %d", len(before), len(after), len(guests))
	}
	effective := r.Period
	for i, s := range after {
		if s.Events > 0 || s.Different+s.NotResident+s.NoMemslot > 0 {
			return fmt.Errorf("nothing changes, and watch %d says %+v", i, s)
		}
		r.Ticks += s.Ticks - before[i].Ticks
		r.Missed += s.Missed - before[i].Missed
		r.Late += s.Late - before[i].Late
		r.Captures += s.Captures - before[i].Captures
		r.Skipped += s.Skipped - before[i].Skipped
		effective = max(effective, s.Effective)
	}
	for i, w := range watches {
		if _, err := w.Close(ctx); err != nil {
			return err
		}
		if i%100 == 99 {
			alive(fmt.Sprint(i, " watches ended"))
		}
	}
	if err := inside.Pause(ctx, 100*time.Millisecond); err != nil {
		return err
	}
	again, err := inside.Window(ctx, count, length/2)
	if err != nil {
		return err
	}
	lacks := inside.Lacks(off.Add(again), on) * soaker.LoopInstructions
	// Ticks in the window itself, without those beside it.
	ticks := float64(on.Elapsed) / float64(effective) * float64(r.VMs)
	r.Effective = max(r.Effective, effective)
	r.CPUPercent = append(r.CPUPercent, 100*lacks/float64(on.Elapsed))
	r.Instructions = append(r.Instructions, lacks/ticks)
	return nil
}

// Numbers of VMs that are measured, up to most: powers of ten.
func Numbers(most int) []int {
	var numbers []int
	for n := 1; n <= most; n *= 10 {
		numbers = append(numbers, n)
	}
	return numbers
}
