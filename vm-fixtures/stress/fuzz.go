// SPDX-License-Identifier: MIT

package stress

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// FuzzConfig says what Fuzz sends.
type FuzzConfig struct {
	Messages int64  // in all
	Seed     uint64 // the messages of each socket follow from it and the VMs' ids
	Sockets  int    // which send in parallel; 0: 4
}

// fuzzBatch is how many messages a socket sends at once.
const fuzzBatch = 16

// Fuzz sends mutated requests about running VMs, one of which keeps being
// replaced. It is an error if an answer is malformed, if the module does not
// answer right afterwards, or if the kernel's memory has grown.
func Fuzz(ctx context.Context, c FuzzConfig) (*Report, error) {
	r := newReport(fmt.Sprintf("fuzz with seed %d", c.Seed))
	if c.Sockets == 0 {
		c.Sockets = 4
	}
	client, err := kvmaccess.New()
	if err != nil {
		return r, err
	}
	defer client.Close()
	guests, err := newCrowd(4)
	if err != nil {
		return r, err
	}
	err = fuzz(ctx, c, r, client, guests)
	if err == nil {
		err = guests.check(ctx, client)
	}
	return r, errors.Join(err, guests.close())
}

func fuzz(ctx context.Context, c FuzzConfig, r *Report, client *kvmaccess.Client, guests *crowd) error {
	f, err := findFamily()
	if err != nil {
		return err
	}
	var targets atomic.Pointer[target]
	retarget := func() error {
		vms, err := own(ctx, client)
		if err != nil {
			return err
		}
		t := &target{vcpus: 2}
		for _, v := range vms {
			t.vms = append(t.vms, uint64(v.ID))
		}
		targets.Store(t)
		return nil
	}
	if err := retarget(); err != nil {
		return err
	}

	// The first tenth fills what fills up once.
	warm := newReport("")
	if err := fuzzSockets(ctx, c, c.Messages/10, 0, f, &targets, warm); err != nil {
		return err
	}
	flat, err := newFlat(r)
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	churned := make(chan error, 1)
	go func() { churned <- churn(guests.kvm, stop, r, retarget) }()
	err = fuzzSockets(ctx, c, c.Messages, uint64(c.Sockets), f, &targets, r)
	close(stop)
	if err = errors.Join(err, <-churned); err != nil {
		return err
	}
	return flat.check(r)
}

// churn replaces one VM by the next, so that ids go stale.
func churn(k *tinyvm.KVM, stop <-chan struct{}, r *Report, each func() error) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		vm, err := k.NewVM(false)
		if err != nil {
			return err
		}
		if _, err = vm.NewVCPU(0); err == nil {
			err = each()
		}
		if err := errors.Join(err, vm.Close()); err != nil {
			return err
		}
		r.Add("VMs replaced", 1)
	}
}

// fuzzSockets sends n messages by all sockets, the streams numbered from first.
func fuzzSockets(ctx context.Context, c FuzzConfig, n int64, first uint64, f family, targets *atomic.Pointer[target], r *Report) error {
	var (
		wg   sync.WaitGroup
		left atomic.Int64
		errs = make([]error, c.Sockets)
	)
	left.Store(n)
	for i := range c.Sockets {
		wg.Go(func() {
			stream := rand.New(rand.NewPCG(c.Seed, first+uint64(i)))
			errs[i] = fuzzSocket(ctx, stream, f, targets, &left, r)
			if errs[i] != nil {
				left.Store(0)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func fuzzSocket(ctx context.Context, r *rand.Rand, f family, targets *atomic.Pointer[target], left *atomic.Int64, report *Report) (err error) {
	s, err := newSocket()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	var a answers
	var sent, datagrams int64
	var b []byte
	for left.Load() > 0 && ctx.Err() == nil {
		t := *targets.Load()
		if len(a.watches) > maxWatches {
			a.watches = a.watches[len(a.watches)-maxWatches:]
		}
		t.watches = a.watches
		b = b[:0]
		before := sent
		for range fuzzBatch {
			m := kinds[r.IntN(len(kinds))].make(r, t)
			if r.IntN(8) > 0 {
				m.mutate(r)
			}
			start := len(b)
			b = m.append(b, f.id)
			if r.IntN(4) == 0 {
				flip(r, b[start+unix.SizeofNlMsghdr:])
			}
			sent++
			// One that lies about its own length must be the last.
			if r.IntN(64) == 0 {
				binary.NativeEndian.PutUint32(b[start:], pick(r, r.Uint32N(64), r.Uint32N(1<<16), r.Uint32()))
				break
			}
			if r.IntN(64) == 0 {
				b = b[:start+r.IntN(len(b)-start+1)]
				break
			}
		}
		left.Add(before - sent)
		datagrams++
		if len(b) > 0 {
			if err := s.send(b); err != nil {
				a.refuse(err)
			}
		}
		if err := s.drain(&a); err != nil {
			return err
		}
	}
	report.Add("messages", sent)
	report.Add("datagrams", datagrams)
	report.addAnswers(&a)
	return ctx.Err()
}

// refuse counts a send that failed.
func (a *answers) refuse(err error) {
	var errno unix.Errno
	if errors.As(err, &errno) {
		if a.errs == nil {
			a.errs = map[unix.Errno]int64{}
		}
		a.errs[errno]++
	}
}

// flip flips up to eight bits.
func flip(r *rand.Rand, b []byte) {
	for range 1 + r.IntN(8) {
		b[r.IntN(len(b))] ^= 1 << r.IntN(8)
	}
}
