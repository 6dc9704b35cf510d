// SPDX-License-Identifier: MIT

package stress

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// FaultsConfig says what Faults does.
type FaultsConfig struct {
	Duration time.Duration // of allocations failing at random
	Seed     uint64
	Module   string // kvmaccess.ko
}

// faultLimit is more allocations than anything here makes.
const faultLimit = 5000

// Faults lets allocations fail. One by one: the first, the second and so on of
// each kind of request, and of loading the module, until all of them have; and
// each 16th of creating a VM. Then a share of those that the module makes, at
// random, while VMs come and go and are read. It needs CONFIG_FAILSLAB.
func Faults(ctx context.Context, c FaultsConfig) (*Report, error) {
	r := newReport(fmt.Sprintf("faults with seed %d", c.Seed))
	if err := prepareFaults(); err != nil {
		return r, err
	}
	restore, err := quiet()
	if err != nil {
		return r, err
	}
	guests, err := newCrowd(3)
	if err != nil {
		return r, errors.Join(err, restore())
	}
	err = faults(ctx, c, r, guests)
	return r, errors.Join(err, guests.close(), restore())
}

func faults(ctx context.Context, c FaultsConfig, r *Report, guests *crowd) error {
	if err := eachFault(ctx, c, newReport(""), guests); err != nil {
		return err
	}
	flat, err := newFlat(r)
	if err != nil {
		return err
	}
	if err := eachFault(ctx, c, r, guests); err != nil {
		return err
	}
	if err := vmFaults(ctx, r, guests.kvm); err != nil {
		return err
	}
	if err := loadFaults(ctx, c, r); err != nil {
		return err
	}
	if err := randomFaults(ctx, c, r, guests); err != nil {
		return err
	}
	client, err := kvmaccess.New()
	if err != nil {
		return err
	}
	defer client.Close()
	if err := guests.check(ctx, client); err != nil {
		return err
	}
	return flat.check(r)
}

// eachFault lets each allocation fail of each kind of request, and of joining
// the multicast group.
func eachFault(ctx context.Context, c FaultsConfig, r *Report, guests *crowd) error {
	client, err := kvmaccess.New()
	if err != nil {
		return err
	}
	defer client.Close()
	vms, err := own(ctx, client)
	if err != nil {
		return err
	}
	t := target{vcpus: 1}
	for _, v := range vms {
		t.vms = append(t.vms, uint64(v.ID))
	}
	f, err := findFamily()
	if err != nil {
		return err
	}
	s, err := newSocket()
	if err != nil {
		return err
	}
	defer s.close()

	rng := rand.New(rand.NewPCG(c.Seed, 0))
	for _, kind := range kinds {
		m := kind.make(rng, t)
		b := m.append(nil, f.id)
		var a answers
		err := allFaults(ctx, r, "requests", 1, func() error {
			if err := s.send(b); err != nil {
				a.refuse(err)
			}
			if err := s.drain(&a); err != nil {
				a.refuse(err)
			}
			return nil
		}, nil)
		if err != nil {
			return fmt.Errorf("%s: %w", kind.name, err)
		}
		r.addAnswers(&a)
	}
	return allFaults(ctx, r, "subscriptions", 1, func() error {
		return unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(f.group))
	}, func() error {
		return unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_DROP_MEMBERSHIP, int(f.group))
	})
}

// vmFaults does it with the creation of VMs, of whose many allocations, most
// of them for files in debugfs, each 16th fails.
func vmFaults(ctx context.Context, r *Report, k *tinyvm.KVM) error {
	return allFaults(ctx, r, "VMs", 16, func() error {
		vm, err := k.NewVM(false)
		if err != nil {
			return err
		}
		_, err = vm.NewVCPU(0)
		return errors.Join(err, vm.Close())
	}, nil)
}

// allFaults does something with its first allocation failing, then with one
// that is step further on, and so on, until it has fewer. What went well all
// the same is undone.
func allFaults(ctx context.Context, r *Report, name string, step int, do, undo func() error) error {
	f, err := newNth()
	if err != nil {
		return err
	}
	defer f.close()
	for n := 1; n < faultLimit && ctx.Err() == nil; n += step {
		failed, err := f.do(n, do)
		if err != nil {
			r.fail(err)
		} else if undo != nil {
			if err := undo(); err != nil {
				return err
			}
		}
		if !failed {
			// Without a fault, no failure.
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			r.Add(name+" with a failed allocation", int64((n-1)/step))
			return nil
		}
	}
	return errors.Join(fmt.Errorf("%s: %d allocations and no end", name, faultLimit), ctx.Err())
}

// loadFaults does it with loading the module, which is loaded before and
// after. Unloading is left out: the kernel itself warns if it has no memory
// to take a probe away.
func loadFaults(ctx context.Context, c FaultsConfig, r *Report) error {
	if err := Unload(10 * time.Second); err != nil {
		return err
	}
	file, err := os.Open(c.Module)
	if err != nil {
		return err
	}
	defer file.Close()
	load := func() error { return unix.FinitModule(int(file.Fd()), "", 0) }
	unload := func() error { return Unload(10 * time.Second) }
	if err := allFaults(ctx, r, "times loaded", 1, load, unload); err != nil {
		return err
	}
	return load()
}

// randomFaults lets the module's allocations fail wherever it makes them, its
// workers included.
func randomFaults(ctx context.Context, c FaultsConfig, r *Report, guests *crowd) error {
	stop, err := failAtRandom(20)
	if err != nil {
		return err
	}
	read := startReaders(ctx, r, 3, unix.ENOMEM, unix.ENOBUFS)
	end := time.Now().Add(c.Duration)
	for time.Now().Before(end) && ctx.Err() == nil && err == nil && !read.failed() {
		var g []*tinyvm.Guest
		if g, err = guests.kvm.StartGuests(tinyvm.Halting, 1); err == nil {
			err = g[0].Close()
			r.Add("VMs meanwhile", 1)
		}
	}
	return errors.Join(err, stop(), read.stop(), ctx.Err())
}
