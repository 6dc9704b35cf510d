// SPDX-License-Identifier: MIT

package stress

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// watch sets watches on all VMs there are, lets them tick, and ends them in one
// of all ways, over and over. What they find is anything.
func (rs *readers) watch(ctx context.Context, stream uint64) error {
	r := rand.New(rand.NewPCG(stream, uint64(time.Now().UnixNano())))
	c, err := kvmaccess.New()
	if err != nil {
		return err
	}
	defer c.Close()
	for ctx.Err() == nil {
		vms, err := c.VMs(ctx)
		if err != nil {
			return err
		}
		w, err := kvmaccess.NewWatcher()
		if err != nil {
			return err
		}
		for _, vm := range vms {
			if err := rs.watchVM(ctx, w, r, vm.ID); err != nil {
				return errors.Join(err, w.Close())
			}
		}
		rs.hear(ctx, w, time.Duration(r.IntN(30))*time.Millisecond)
		// The socket takes with it what is left.
		if err := w.Close(); err != nil {
			return err
		}
	}
	return nil
}

// watchVM makes one watch; the VM and the module may go at any moment.
func (rs *readers) watchVM(ctx context.Context, w *kvmaccess.Watcher, r *rand.Rand, vm kvmaccess.VMID) error {
	config := kvmaccess.WatchConfig{Period: pick(r, kvmaccess.WatchMinPeriod, time.Millisecond, 10*time.Millisecond, time.Hour)}
	if r.IntN(2) == 0 {
		config.Budget, config.Key = pick(r, kvmaccess.PageSize, 1<<20), &kvmaccess.WatchKey{byte(r.Uint32())}
	}
	watch, err := w.New(ctx, vm, config)
	if err != nil {
		return rs.watched("new watch", vm, err)
	}
	rs.watches.Add(1)
	for range 1 + r.IntN(3) {
		_, err = watch.Add(ctx, randomItems(r, config.Key != nil)...)
		if err := rs.watched("items", vm, err); err != nil {
			return err
		}
	}
	switch r.IntN(4) {
	case 0:
		_, err = watch.Remove(ctx, uint64(r.Uint32N(4)))
	case 1:
		_, err = watch.Close(ctx)
	case 2:
		_, err = watch.Stats(ctx)
	}
	return rs.watched("a watch", vm, err)
}

// watched counts the errors that are explained and returns the others.
func (rs *readers) watched(what string, vm kvmaccess.VMID, err error) error {
	switch {
	case err == nil:
		rs.reads.Add(1)
	case rs.isExplained(err), errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EPROTONOSUPPORT):
		rs.report.fail(err)
	default:
		return fmt.Errorf("%s of VM %d: %w", what, vm, err)
	}
	return nil
}

// hear receives for a time.
func (rs *readers) hear(ctx context.Context, w *kvmaccess.Watcher, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	for {
		e, err := w.Receive(ctx)
		if err != nil {
			return
		}
		rs.findings.Add(1)
		if e.State == kvmaccess.StateEnded {
			rs.ends.Add(1)
		}
	}
}

// randomItems are some of each kind, of memory that is there and that is not.
func randomItems(r *rand.Rand, digests bool) []kvmaccess.Item {
	var items []kvmaccess.Item
	for range 1 + r.IntN(8) {
		gpa := uint64(r.Uint32N(5<<20)) &^ 0xfff
		item := kvmaccess.Item{Cookie: uint64(r.Uint32N(4)), GPA: gpa}
		switch kind := r.IntN(4); {
		case kind == 0:
			item.Kind, item.GPA, item.Data = kvmaccess.KindBytes, gpa+uint64(r.IntN(4096)), random(r, 1+r.IntN(9000))
		case kind == 1:
			item.Kind, item.GPA, item.Mask = kvmaccess.KindEntry, gpa+8*uint64(r.IntN(512)), r.Uint64()|1
		case kind == 2 && digests:
			item.Kind, item.Digests = kvmaccess.KindDigest, make([]uint64, 1+r.IntN(64))
		default:
			item.Kind = kvmaccess.KindRegister
			item.Register = kvmaccess.Register(1 + r.Uint32N(uint32(kvmaccess.RegisterPAT)))
		}
		items = append(items, item)
	}
	return items
}
