// SPDX-License-Identifier: MIT

package inside

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/bench/objects"
	"github.com/kvmaccess/kvmaccess/bench/soaker"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// Tiny is a guest of a few instructions, run by this process.
type Tiny struct {
	*tinyvm.Guest
	VM kvmaccess.VM

	counter *uint64
}

// Places in the memory of a Tiny, which it does not touch but for its counter.
const (
	TinyCounter = 0x20000
	TinyData    = 0x40000 // up to the end of the memory but for page tables, see tinyvm.PageTables
)

// StartTiny starts a guest that halts, in the kernel, or that counts turns of
// the same loop as Soakers' in its memory.
func StartTiny(ctx context.Context, c *kvmaccess.Client, k *tinyvm.KVM, counts bool) (*Tiny, error) {
	all, err := startTinies(ctx, c, k, counts, 1, func(*Tiny) error { return nil })
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// StartTinies starts n guests, whose vCPUs have the lowest priority there is:
// a thousand that count leave time for those that measure.
func StartTinies(ctx context.Context, c *kvmaccess.Client, k *tinyvm.KVM, counts bool, n int, alive func(string)) ([]*Tiny, error) {
	started := 0
	return startTinies(ctx, c, k, counts, n, func(t *Tiny) error {
		if started++; started%20 == 0 {
			alive("guests are started")
		}
		for _, thread := range t.Threads() {
			attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}
			if err := unix.SchedSetAttr(thread.TID(), &attr, 0); err != nil {
				return fmt.Errorf("SCHED_IDLE: %w", err)
			}
		}
		return nil
	})
}

func startTinies(ctx context.Context, c *kvmaccess.Client, k *tinyvm.KVM, counts bool, n int, each func(*Tiny) error) (all []*Tiny, err error) {
	defer func() {
		if err != nil {
			for _, t := range all {
				err = errors.Join(err, t.Close())
			}
			all = nil
		}
	}()
	code := tinyvm.Halt()
	if counts {
		code = append([]byte{0x48, 0xbf}, binary.LittleEndian.AppendUint64(nil, TinyCounter)...) // mov rdi, imm64
		code = append(code, soaker.Loop()...)
	}
	for i := range n {
		g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: code, IRQChip: true})
		if err != nil {
			return all, fmt.Errorf("guest %d: %w", i+1, err)
		}
		t := &Tiny{Guest: g}
		all = append(all, t)
		page, err := t.Bytes(TinyCounter, 8)
		if err != nil {
			return all, err
		}
		t.counter = (*uint64)(unsafe.Pointer(&page[0]))
		if err := each(t); err != nil {
			return all, err
		}
	}
	vms, err := objects.VMsOf(ctx, c, os.Getpid())
	if err != nil {
		return all, err
	}
	if len(vms) < n {
		return all, fmt.Errorf("%d VMs of %d", len(vms), n)
	}
	// Ids go up, so the newest are the last.
	for i, t := range all {
		t.VM = vms[len(vms)-n+i]
		if err := t.Start(tinyvm.Ignore); err != nil {
			return all, err
		}
		if err := each(t); err != nil {
			return all, err
		}
	}
	return all, nil
}

// Count is how many turns of the loop it made.
func (t *Tiny) Count() uint64 { return atomic.LoadUint64(t.counter) }

// Fill writes n bytes that are no pattern at TinyData, and returns them.
func (t *Tiny) Fill(n int) ([]byte, error) {
	data := make([]byte, n)
	x := uint64(0x9e3779b97f4a7c15)
	for i := range data {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		data[i] = byte(x >> 32)
	}
	return data, t.Write(TinyData, data)
}

// Bench is what measurements with tiny guests need.
type Bench struct {
	Client  *kvmaccess.Client
	KVM     *tinyvm.KVM
	Watcher *kvmaccess.Watcher
}

// OpenBench loads the module and opens it and KVM. Close it.
func OpenBench() (b *Bench, err error) {
	if err := LoadModule(); err != nil {
		return nil, err
	}
	b = new(Bench)
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()
	if b.Client, err = kvmaccess.New(); err != nil {
		return b, err
	}
	if b.KVM, err = tinyvm.Open(); err != nil {
		return b, err
	}
	b.Watcher, err = kvmaccess.NewWatcher()
	return b, err
}

// Close closes what is open.
func (b *Bench) Close() error {
	var errs []error
	if b.Watcher != nil {
		errs = append(errs, b.Watcher.Close())
	}
	if b.KVM != nil {
		errs = append(errs, b.KVM.Close())
	}
	if b.Client != nil {
		errs = append(errs, b.Client.Close())
	}
	return errors.Join(errs...)
}

// Watch makes a watch with these items.
func (b *Bench) Watch(ctx context.Context, vm kvmaccess.VMID, c kvmaccess.WatchConfig, items ...kvmaccess.Item) (*kvmaccess.Watch, error) {
	w, err := b.Watcher.New(ctx, vm, c)
	if err != nil {
		return nil, err
	}
	if len(items) > 0 {
		if _, err := w.Add(ctx, items...); err != nil {
			_, end := w.Close(ctx)
			return nil, errors.Join(err, end)
		}
	}
	return w, nil
}
