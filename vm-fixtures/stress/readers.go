// SPDX-License-Identifier: MIT

package stress

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// readers ask for everything about all VMs there are, over and over, watch
// them, and listen to events. The module may go and come back.
type readers struct {
	report *Report
	also   []error // explained here
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	first  error

	reads    atomic.Int64 // requests that went well
	events   atomic.Int64
	watches  atomic.Int64
	findings atomic.Int64 // events of watches
	ends     atomic.Int64 // of those, that their VM or the module is gone
}

// startReaders starts n clients, one subscriber and two who set watches, who go
// on after the errors that a VM's end explains, and after these.
func startReaders(ctx context.Context, r *Report, n int, also ...error) *readers {
	ctx, cancel := context.WithCancel(ctx)
	rs := &readers{report: r, cancel: cancel, also: also}
	for i := range n {
		rs.wg.Go(func() { rs.whileLoaded(ctx, func() error { return rs.read(ctx, uint64(i)) }) })
	}
	rs.wg.Go(func() { rs.whileLoaded(ctx, func() error { return rs.listen(ctx) }) })
	for i := range 2 {
		rs.wg.Go(func() { rs.whileLoaded(ctx, func() error { return rs.watch(ctx, uint64(n+i)) }) })
	}
	return rs
}

// stop ends them and returns the first error that nothing explains.
func (rs *readers) stop() error {
	rs.cancel()
	rs.wg.Wait()
	rs.report.Add("reads", rs.reads.Load())
	rs.report.Add("events", rs.events.Load())
	rs.report.Add("watches", rs.watches.Load())
	rs.report.Add("findings", rs.findings.Load())
	rs.report.Add("ends of watches", rs.ends.Load())
	return rs.first
}

// failed reports whether a reader has given up.
func (rs *readers) failed() bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.first != nil
}

// whileLoaded repeats what ends because the module goes.
func (rs *readers) whileLoaded(ctx context.Context, do func() error) {
	for ctx.Err() == nil {
		err := do()
		switch {
		case err == nil, ctx.Err() != nil:
		case rs.isExplained(err):
			rs.report.fail(err)
		case errors.Is(err, os.ErrNotExist), errors.Is(err, kvmaccess.ErrReloaded):
			rs.report.failed("module gone", 1)
			time.Sleep(time.Millisecond)
		default:
			rs.mu.Lock()
			if rs.first == nil {
				rs.first = err
			}
			rs.mu.Unlock()
			return
		}
	}
}

func (rs *readers) isExplained(err error) bool {
	for _, e := range rs.also {
		if errors.Is(err, e) {
			return true
		}
	}
	return isExplained(err)
}

func (rs *readers) read(ctx context.Context, stream uint64) error {
	c, err := kvmaccess.New()
	if err != nil {
		return err
	}
	defer c.Close()
	r := rand.New(rand.NewPCG(stream, uint64(time.Now().UnixNano())))
	for ctx.Err() == nil {
		vms, err := c.VMs(ctx)
		if err != nil {
			return err
		}
		rs.reads.Add(1)
		if len(vms) == 0 {
			time.Sleep(time.Millisecond)
		}
		for _, v := range vms {
			if err := rs.ask(ctx, c, r, v.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// ask makes one request about a VM that may go at any moment.
func (rs *readers) ask(ctx context.Context, c *kvmaccess.Client, r *rand.Rand, vm kvmaccess.VMID) error {
	var err error
	name := ""
	switch r.IntN(9) {
	case 0:
		name = "vm"
		_, err = c.VM(ctx, vm)
	case 1:
		name = "memslots"
		_, err = c.Memslots(ctx, vm)
	case 2:
		name = "memslot"
		_, err = c.Memslot(ctx, vm, 0, r.Uint32N(3))
	case 3:
		name = "vcpus"
		_, err = c.VCPUs(ctx, vm)
	case 4:
		name = "vcpu"
		_, err = c.VCPU(ctx, vm, r.Uint32N(3))
	case 5:
		name = "table"
		_, err = c.Table(ctx, vm, r.Uint32N(2), pick(r, kvmaccess.TableGDT, kvmaccess.TableIDT))
	case 6:
		name = "physical memory"
		_, err = c.ReadPhysical(ctx, vm, kvmaccess.Range{Address: uint64(r.Uint32N(4 << 20)), Length: 1 + r.Uint32N(8192)})
	case 7:
		name = "virtual memory"
		_, err = c.ReadVirtual(ctx, vm, r.Uint32N(2), 0, kvmaccess.Range{Address: uint64(r.Uint32N(4 << 20)), Length: 1 + r.Uint32N(8192)})
	case 8:
		name = "statistics"
		_, err = c.VMStats(ctx, vm)
	}
	switch {
	case err == nil:
		rs.reads.Add(1)
	case rs.isExplained(err):
		rs.report.fail(err)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, kvmaccess.ErrReloaded):
		return err
	default:
		return fmt.Errorf("%s of VM %d: %w", name, vm, err)
	}
	return nil
}

// listen checks that no VM is announced twice, and none goes that did not come.
func (rs *readers) listen(ctx context.Context) error {
	s, err := kvmaccess.Subscribe(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	alive := map[kvmaccess.VMID]bool{}
	var last kvmaccess.VMID
	for ctx.Err() == nil {
		// A subscription outlives the module, silently.
		waiting, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		e, err := s.Receive(waiting)
		cancel()
		switch {
		case errors.Is(err, kvmaccess.ErrEventsLost):
			rs.report.failed("events lost", 1)
			clear(alive)
			last = 0
			continue
		case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
			return nil
		case err != nil:
			return err
		}
		rs.events.Add(1)
		switch id := e.VM.ID; {
		case e.Kind == kvmaccess.VMCreated && id <= last:
			return fmt.Errorf("VM %d is announced after VM %d", id, last)
		case e.Kind == kvmaccess.VMCreated:
			alive[id], last = true, id
		case e.Kind == kvmaccess.VMDestroyed && !alive[id] && last > 0 && id > last:
			return fmt.Errorf("VM %d goes that never came", id)
		default:
			delete(alive, id)
		}
	}
	return nil
}
