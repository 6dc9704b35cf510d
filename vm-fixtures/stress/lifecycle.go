// SPDX-License-Identifier: MIT

package stress

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// LifecycleConfig says what Lifecycle does.
type LifecycleConfig struct {
	Rounds int    // VMs created and destroyed by this process
	Kills  int    // VMM processes killed, with three VMs each
	Seed   uint64 // which kind of life each VM has
}

// Lifecycle creates and destroys VMs while all of them are read and dumped
// and their events are received. Some get vCPUs, memslots that move and go,
// and guests that run; some belong to processes that are killed. The program
// must call tinyvm.Main before anything else.
func Lifecycle(ctx context.Context, c LifecycleConfig) (*Report, error) {
	r := newReport(fmt.Sprintf("lifecycle with seed %d", c.Seed))
	k, err := tinyvm.Open()
	if err != nil {
		return r, err
	}
	defer k.Close()
	// The first tenth fills what fills up once.
	warm := newReport("")
	if err := lifecycle(ctx, k, LifecycleConfig{Rounds: c.Rounds / 10, Kills: c.Kills / 10, Seed: c.Seed + 1}, warm); err != nil {
		return r, err
	}
	flat, err := newFlat(r)
	if err != nil {
		return r, err
	}
	if err := lifecycle(ctx, k, c, r); err != nil {
		return r, err
	}
	return r, flat.check(r)
}

func lifecycle(ctx context.Context, k *tinyvm.KVM, c LifecycleConfig, r *Report) error {
	client, err := kvmaccess.New()
	if err != nil {
		return err
	}
	defer client.Close()
	before, err := client.VMs(ctx)
	if err != nil {
		return err
	}
	read := startReaders(ctx, r, 3)
	err = errors.Join(lives(ctx, k, c, r), read.stop())
	if err == nil && read.reads.Load() == 0 {
		err = errors.New("nothing was read meanwhile")
	}
	if err != nil {
		return err
	}
	after, err := client.VMs(ctx)
	if err != nil {
		return err
	}
	for _, v := range after {
		if !slices.ContainsFunc(before, func(b kvmaccess.VM) bool { return b.ID == v.ID }) {
			return fmt.Errorf("a VM is left: %+v", v)
		}
	}
	return nil
}

// lives runs all rounds, in parallel, and the killings beside them.
func lives(ctx context.Context, k *tinyvm.KVM, c LifecycleConfig, r *Report) error {
	const parallel = 3
	var (
		wg   sync.WaitGroup
		next atomic.Int64
		errs = make([]error, parallel+1)
	)
	for i := range parallel {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(c.Seed, uint64(i)))
			for int(next.Add(1)) <= c.Rounds && ctx.Err() == nil {
				if errs[i] = life(k, rng, r); errs[i] != nil {
					return
				}
				r.Add("VMs created and destroyed", 1)
			}
		})
	}
	wg.Go(func() {
		for range c.Kills {
			if errs[parallel] = kill(); errs[parallel] != nil || ctx.Err() != nil {
				return
			}
			r.Add("VMMs killed", 1)
		}
	})
	wg.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

// kill kills a VMM right after its guests have begun to run.
func kill() error {
	v, err := tinyvm.StartVMM(tinyvm.Halting, 3)
	if err != nil {
		return err
	}
	return v.Kill()
}

// life is one VM's.
func life(k *tinyvm.KVM, rng *rand.Rand, r *Report) error {
	switch n := rng.IntN(100); {
	case n < 5:
		return lifeRunning(k, r)
	default:
		vm, err := k.NewVM(n < 15)
		if err != nil {
			return err
		}
		switch {
		case n < 40:
			err = lifeOfVCPUs(vm, rng, r)
		case n < 70:
			err = lifeOfMemslots(vm, rng, r)
		}
		return errors.Join(err, vm.Close())
	}
}

// lifeRunning is that of a guest that runs, for a moment.
func lifeRunning(k *tinyvm.KVM, r *Report) error {
	config, err := tinyvm.Spinning.Config()
	if err != nil {
		return err
	}
	g, err := k.NewGuest(config)
	if err != nil {
		return err
	}
	err = g.Start(tinyvm.Ignore)
	time.Sleep(time.Millisecond)
	r.Add("guests run", 1)
	return errors.Join(err, g.Close())
}

func lifeOfVCPUs(vm *tinyvm.VM, rng *rand.Rand, r *Report) error {
	for id := range 1 + rng.Uint32N(3) {
		if _, err := vm.NewVCPU(id); err != nil {
			return err
		}
		r.Add("vCPUs created", 1)
	}
	return nil
}

func lifeOfMemslots(vm *tinyvm.VM, rng *rand.Rand, r *Report) error {
	m, err := tinyvm.NewMemory(1<<20, tinyvm.Anonymous, "")
	if err != nil {
		return err
	}
	copy(m.Bytes(), pattern)
	for range 1 + rng.IntN(4) {
		s := tinyvm.Slot{
			Number: uint16(rng.IntN(2)), GPA: uint64(rng.IntN(4)) << 20, Size: 1 << 20, Memory: m,
			Flags: pick(rng, 0, uint32(tinyvm.SlotReadonly)),
		}
		// A slot's memory, size and read-only flag cannot change, nor may
		// two slots overlap: what is there goes first, but for a move.
		err := makeRoom(vm, s)
		if err == nil {
			err = vm.SetSlot(s)
		}
		if err != nil {
			return errors.Join(err, m.Close())
		}
		r.Add("memslots set", 1)
	}
	return m.Close()
}

// makeRoom deletes the slots that s would contradict.
func makeRoom(vm *tinyvm.VM, s tinyvm.Slot) error {
	for _, o := range vm.Slots() {
		moves := o.Number == s.Number && o.Flags == s.Flags
		if moves || o.Number != s.Number && o.GPA != s.GPA {
			continue
		}
		if err := vm.SetSlot(tinyvm.Slot{Number: o.Number}); err != nil {
			return err
		}
	}
	return nil
}
