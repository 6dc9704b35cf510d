// SPDX-License-Identifier: MIT

package watch

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/objects"
	"github.com/kvmaccess/kvmaccess/bench/soaker"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// Linux is what watches of a stock guest cost beside those of the curve.
type Linux struct {
	Kernel   string   `json:"kernel"` // of host and guest
	Pass     Pass     `json:"pass"`
	Slowdown Slowdown `json:"slowdown"`
}

// Pass is what it costs to walk the kernel's text and read-only data.
type Pass struct {
	Text      uint64        `json:"text_bytes"`
	Rodata    uint64        `json:"rodata_bytes"`
	Period    time.Duration `json:"period_ns"` // of ticks
	Budget    int           `json:"budget"`    // bytes in a tick
	Each      time.Duration `json:"each_ns"`   // full pass
	Passes    uint64        `json:"passes"`    // in all repetitions
	Different int           `json:"different"` // pages, in the end
	// CPUPercent is what the counting loop lacks, Account what the module says,
	// in percent of one CPU, repetition by repetition.
	CPUPercent []float64 `json:"cpu_percent"`
	Account    []float64 `json:"account_percent"`
}

// Slowdown is how long the guest's work took, in ns, in pairs: without a watch
// and with one of all five kinds of objects.
type Slowdown struct {
	Period  time.Duration `json:"period_ns"`
	Without []int64       `json:"without_ns"`
	With    []int64       `json:"with_ns"`
}

// A full pass takes passEach; it goes on each passPeriod.
const (
	passEach   = 10 * time.Second
	passPeriod = 100 * time.Millisecond
)

// slowPeriod is that of the watch while the guest works on slowMiB.
const (
	slowPeriod = 10 * time.Millisecond
	slowMiB    = 8
)

// MeasureLinux measures n passes and so many pairs, on a host with one CPU.
func MeasureLinux(ctx context.Context, n, pairs int, alive func(string)) (l *Linux, err error) {
	if err := inside.LoadModule(); err != nil {
		return nil, err
	}
	host, err := inside.Describe()
	if err != nil {
		return nil, err
	}
	c, err := kvmaccess.New()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	g, err := fixture.Start(ctx, fixture.Config{Name: "watched"})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Kill()) }()
	alive("the guest is up")
	found, err := objects.Find(ctx, c, g.PID)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, found.Memory.Close()) }()
	w, err := kvmaccess.NewWatcher()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	if err := inside.Pause(ctx, 5*time.Second); err != nil {
		return nil, err
	}
	alive("the objects are found")
	l = &Linux{Kernel: host.Kernel}
	if err := l.Slowdown.take(ctx, w, g, found, pairs, alive); err != nil {
		return nil, fmt.Errorf("slowdown: %w", err)
	}
	if err := l.Pass.take(ctx, w, found, n, alive); err != nil {
		return nil, fmt.Errorf("text and read-only data: %w", err)
	}
	return l, nil
}

func (s *Slowdown) take(ctx context.Context, w *kvmaccess.Watcher, g *fixture.Guest, found *objects.Objects, pairs int, alive func(string)) error {
	s.Period = slowPeriod
	items, err := found.Items(ctx)
	if err != nil {
		return err
	}
	work := func(to *[]int64, watched bool) error {
		if watched {
			watch, err := w.New(ctx, found.VM.ID, kvmaccess.WatchConfig{Period: slowPeriod})
			if err != nil {
				return err
			}
			if _, err := watch.Add(ctx, items...); err != nil {
				return err
			}
			defer watch.Close(ctx)
		}
		// Those before and after it begin alike.
		if err := inside.Pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
		took, err := inside.Work(ctx, g, slowMiB)
		*to = append(*to, int64(took))
		return err
	}
	if _, err := inside.Work(ctx, g, slowMiB); err != nil { // what is needed only once
		return err
	}
	for i := range pairs {
		order := []bool{i%2 == 0, i%2 != 0}
		for _, watched := range order {
			to := &s.Without
			if watched {
				to = &s.With
			}
			if err := work(to, watched); err != nil {
				return err
			}
		}
		alive(fmt.Sprintf("slowdown: %d of %d", i+1, pairs))
	}
	return nil
}

func (p *Pass) take(ctx context.Context, w *kvmaccess.Watcher, found *objects.Objects, n int, alive func(string)) (err error) {
	var key kvmaccess.WatchKey
	if _, err := rand.Read(key[:]); err != nil {
		return err
	}
	var items []kvmaccess.Item
	for i, x := range []struct {
		guest.Extent
		size *uint64
	}{{found.Kernel.Text, &p.Text}, {found.Kernel.Rodata, &p.Rodata}} {
		*x.size = x.Size()
		more, err := digests(ctx, found, x.Extent, key, uint64(1+i))
		if err != nil {
			return err
		}
		items = append(items, more...)
		alive("digests are made")
	}
	pages := 0
	for _, i := range items {
		pages += len(i.Digests)
	}
	ticks := int(passEach / passPeriod)
	p.Period, p.Each = passPeriod, passEach
	p.Budget = (pages + ticks - 1) / ticks * kvmaccess.PageSize
	loops, err := inside.StartSoakers()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loops.Stop()) }()
	for i := range n {
		off, err := inside.Window(ctx, loops.Count, passEach/2)
		if err != nil {
			return err
		}
		watch, err := w.New(ctx, found.VM.ID, kvmaccess.WatchConfig{Period: passPeriod, Budget: p.Budget, Key: &key})
		if err != nil {
			return err
		}
		if _, err := watch.Add(ctx, items...); err != nil {
			return err
		}
		if err := inside.Pause(ctx, time.Second); err != nil {
			return err
		}
		before, err := watch.Stats(ctx)
		if err != nil {
			return err
		}
		on, err := inside.Window(ctx, loops.Count, passEach)
		if err != nil {
			return err
		}
		after, err := watch.Close(ctx)
		if err != nil {
			return err
		}
		if err := inside.Pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
		again, err := inside.Window(ctx, loops.Count, passEach/2)
		if err != nil {
			return err
		}
		p.Passes += after.Passes - before.Passes
		p.CPUPercent = append(p.CPUPercent, 100*inside.Lacks(off.Add(again), on)*soaker.LoopInstructions/float64(on.Elapsed))
		p.Account = append(p.Account, 100*float64(after.Time-before.Time)/float64(on.Elapsed))
		p.Different = before.Different + before.NotResident + before.NoMemslot
		alive(fmt.Sprintf("passes: %d of %d", i+1, n))
	}
	return nil
}

// digests are items of the pages of an extent, which lie side by side in
// guest-physical memory as far as the kernel's page tables have large pages.
func digests(ctx context.Context, found *objects.Objects, x guest.Extent, key kvmaccess.WatchKey, cookie uint64) ([]kvmaccess.Item, error) {
	d := kvmaccess.NewDigester(key)
	var items []kvmaccess.Item
	end := (x.End + kvmaccess.PageSize - 1) &^ (kvmaccess.PageSize - 1)
	for gva := x.Start &^ (kvmaccess.PageSize - 1); gva < end; {
		t, err := guest.Translate(ctx, found.Memory, found.Kernel.Space.Mode, found.Kernel.Space.Root, gva)
		if err != nil {
			return nil, err
		}
		size := max(t.PageSize, kvmaccess.PageSize)
		data := make([]byte, min(size-gva%size, end-gva))
		if err := found.Memory.ReadPhysical(ctx, t.GPA, data); err != nil {
			return nil, err
		}
		item := kvmaccess.Item{Cookie: cookie, Kind: kvmaccess.KindDigest, GPA: t.GPA}
		for at := 0; at < len(data); at += kvmaccess.PageSize {
			v, err := d.Page(data[at : at+kvmaccess.PageSize])
			if err != nil {
				return nil, err
			}
			item.Digests = append(item.Digests, v)
		}
		if i := len(items) - 1; i >= 0 && items[i].GPA+uint64(len(items[i].Digests))*kvmaccess.PageSize == item.GPA {
			items[i].Digests = append(items[i].Digests, item.Digests...)
		} else {
			items = append(items, item)
		}
		gva += uint64(len(data))
	}
	return items, nil
}
