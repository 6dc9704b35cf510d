// SPDX-License-Identifier: MIT

// Package watch measures what watches in the kernel cost, and how soon they
// find a change.
package watch

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/objects"
	"github.com/kvmaccess/kvmaccess/bench/soaker"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Tick is what one tick costs in one situation, repetition by repetition. All
// numbers are of instructions, a tick.
type Tick struct {
	VCPU         string    `json:"vcpu"` // "has not run" or "runs"
	Items        string    `json:"items"`
	Bytes        uint64    `json:"bytes"` // that are compared
	Ticks        uint64    `json:"ticks"` // in all repetitions
	Captures     uint64    `json:"captures"`
	Skipped      uint64    `json:"skipped"`
	Instructions []float64 `json:"instructions"` // that the counting loop lacks
	Account      []float64 `json:"account"`      // of the module, from within its timer's function
	Trace        *Trace    `json:"trace,omitempty"`
}

// What a vCPU does between two ticks.
const (
	Idle = "has not run"
	Busy = "runs"
	// Linuxed is that of a stock guest that idles.
	Linuxed = "wakes now and then"
)

// Kinds of items, each beside those before.
const (
	NoItems       = "none"
	BytesItems    = "8 KiB"
	RegisterItems = "8 KiB and 17 registers"
)

// compared is how many bytes are watched, in two pages.
const compared = 8 << 10

// tickPeriod is that of the ticks that are counted.
const tickPeriod = time.Millisecond

// Ticks measures what a tick costs, n times in each situation, on a host with
// one CPU.
func Ticks(ctx context.Context, n int, alive func(string)) (ticks []Tick, err error) {
	b, err := inside.OpenBench()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	for _, vcpu := range []string{Idle, Busy} {
		more, err := ticksOf(ctx, b, vcpu, n, alive)
		if err != nil {
			return nil, fmt.Errorf("a vCPU that %s: %w", vcpu, err)
		}
		ticks = append(ticks, more...)
	}
	return ticks, nil
}

func ticksOf(ctx context.Context, b *inside.Bench, vcpu string, n int, alive func(string)) (ticks []Tick, err error) {
	g, err := inside.StartTiny(ctx, b.Client, b.KVM, vcpu == Busy)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	count := g.Count
	if vcpu == Idle {
		// A vCPU that does not run has no loop to count.
		loops, err := inside.StartSoakers()
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, loops.Stop()) }()
		count = loops.Count
	}
	if err := inside.Pause(ctx, time.Second); err != nil {
		return nil, err
	}
	data, err := g.Fill(compared)
	if err != nil {
		return nil, err
	}
	v, err := b.Client.VCPU(ctx, g.VM.ID, 0)
	if err != nil {
		return nil, err
	}
	bytes := kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: inside.TinyData, Data: data}
	for _, kind := range []struct {
		name  string
		items []kvmaccess.Item
	}{
		{NoItems, nil},
		{BytesItems, []kvmaccess.Item{bytes}},
		{RegisterItems, append(objects.Registers(v, 2), bytes)},
	} {
		t := Tick{VCPU: vcpu, Items: kind.name}
		for range n {
			if err := t.take(ctx, b, g.VM.ID, count, kind.items, nil); err != nil {
				return nil, fmt.Errorf("items %s: %w", kind.name, err)
			}
			alive(fmt.Sprint("ticks, vCPU ", vcpu, ", items ", kind.name))
		}
		t.Trace = new(Trace)
		plain := t
		for range traced {
			if err := plain.take(ctx, b, g.VM.ID, count, kind.items, t.Trace); err != nil {
				return nil, fmt.Errorf("items %s, traced: %w", kind.name, err)
			}
		}
		ticks = append(ticks, t)
	}
	return ticks, nil
}

// traced is how many windows are traced.
const traced = 3

// tickWindow is how long each window is.
const tickWindow = time.Second

// take takes one repetition: a window with the watch between two halves of one
// without. With a trace it is that which is added to.
func (t *Tick) take(ctx context.Context, b *inside.Bench, vm kvmaccess.VMID, count func() uint64, items []kvmaccess.Item, trace *Trace) (err error) {
	off, err := inside.Window(ctx, count, tickWindow/2)
	if err != nil {
		return err
	}
	w, err := b.Watch(ctx, vm, kvmaccess.WatchConfig{Period: tickPeriod}, items...)
	if err != nil {
		return err
	}
	open := true
	defer func() {
		if open {
			_, end := w.Close(ctx)
			err = errors.Join(err, end)
		}
	}()
	if err := inside.Pause(ctx, 100*time.Millisecond); err != nil {
		return err
	}
	if trace != nil {
		if err := startTrace(); err != nil {
			return err
		}
	}
	before, err := w.Stats(ctx)
	if err != nil {
		return err
	}
	on, err := inside.Window(ctx, count, tickWindow)
	if err != nil {
		return err
	}
	after, err := w.Stats(ctx)
	if err != nil {
		return err
	}
	if trace != nil {
		if err := trace.stop(); err != nil {
			return err
		}
	}
	open = false
	if _, err := w.Close(ctx); err != nil {
		return err
	}
	if after.Events > 0 || after.Missed > before.Missed {
		return fmt.Errorf("nothing changes, and no tick should be missed: %+v", after)
	}
	if err := inside.Pause(ctx, 100*time.Millisecond); err != nil {
		return err
	}
	again, err := inside.Window(ctx, count, tickWindow/2)
	if err != nil {
		return err
	}
	off = off.Add(again)
	n := after.Ticks - before.Ticks
	lacks := inside.Lacks(off, on) * soaker.LoopInstructions / float64(n)
	if trace != nil {
		trace.Instructions = append(trace.Instructions, lacks)
		return nil
	}
	t.Bytes = after.Bytes
	t.Ticks += n
	t.Captures += after.Captures - before.Captures
	t.Skipped += after.Skipped - before.Skipped
	t.Instructions = append(t.Instructions, lacks)
	t.Account = append(t.Account, float64(after.Time-before.Time)/float64(n))
	return nil
}
