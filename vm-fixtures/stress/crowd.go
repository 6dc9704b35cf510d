// SPDX-License-Identifier: MIT

package stress

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// patternGPA is where the memory of each VM of a crowd holds pattern.
const patternGPA = 0x40000

var pattern = []byte("what a guest has at a place that is known")

// crowd is a number of VMs that run side by side: the first spins where a CPU is
// idle, all others halt; each third has two vCPUs.
type crowd struct {
	kvm    *tinyvm.KVM
	guests []*tinyvm.Guest
}

func newCrowd(n int) (*crowd, error) {
	k, err := tinyvm.Open()
	if err != nil {
		return nil, err
	}
	c := &crowd{kvm: k}
	for i := range n {
		if err := c.add(i); err != nil {
			return nil, errors.Join(err, c.close())
		}
	}
	return c, nil
}

func (c *crowd) add(i int) error {
	kind := tinyvm.Halting
	if i == 0 {
		kind = tinyvm.Spinning
	}
	config, err := kind.Config()
	if err != nil {
		return err
	}
	config.VCPUs = 1 + i%3/2
	g, err := c.kvm.NewGuest(config)
	if err != nil {
		return err
	}
	c.guests = append(c.guests, g)
	if err := g.Write(patternGPA, pattern); err != nil {
		return err
	}
	if err := g.Start(tinyvm.Ignore); err != nil {
		return err
	}
	if kind == tinyvm.Halting {
		return nil
	}
	// It is there to be interrupted, not to keep others from the CPU.
	return unix.SchedSetAttr(g.Threads()[0].TID(), &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0)
}

func (c *crowd) close() error {
	var errs []error
	for _, g := range c.guests {
		errs = append(errs, g.Close())
	}
	return errors.Join(append(errs, c.kvm.Close())...)
}

// check asks the module for what is known of each VM.
func (c *crowd) check(ctx context.Context, client *kvmaccess.Client) error {
	vms, err := own(ctx, client)
	if err != nil {
		return err
	}
	if len(vms) != len(c.guests) {
		return fmt.Errorf("the module knows %d of %d VMs", len(vms), len(c.guests))
	}
	for _, v := range vms {
		r, err := client.ReadVirtual(ctx, v.ID, 0, 0, kvmaccess.Range{Address: patternGPA, Length: uint32(len(pattern))})
		if err == nil {
			err = r[0].Err
		}
		if err != nil {
			return err
		}
		if string(r[0].Data) != string(pattern) {
			return fmt.Errorf("VM %d has %q at %#x, want %q", v.ID, r[0].Data, patternGPA, pattern)
		}
		cpus, err := client.VCPUs(ctx, v.ID)
		if err != nil {
			return err
		}
		if len(cpus) != v.VCPUs {
			return fmt.Errorf("VM %d has %d vCPUs, and states of %d", v.ID, v.VCPUs, len(cpus))
		}
		for _, s := range cpus {
			if s.RIP < tinyvm.Code || s.RIP > tinyvm.Code+8 || s.GDTR.Base != tinyvm.GDT {
				return fmt.Errorf("VM %d: RIP %#x, GDTR %#x: not those of the guest", v.ID, s.RIP, s.GDTR.Base)
			}
		}
	}
	return nil
}

// own lists this process's VMs.
func own(ctx context.Context, c *kvmaccess.Client) ([]kvmaccess.VM, error) {
	all, err := c.VMs(ctx)
	if err != nil {
		return nil, err
	}
	var vms []kvmaccess.VM
	for _, v := range all {
		if v.PID == os.Getpid() {
			vms = append(vms, v)
		}
	}
	return vms, nil
}

// explained are the errors that a VM's end, its comings and goings of vCPUs
// and memslots, or a guest that has not set up anything explain.
var explained = []error{
	kvmaccess.ErrNoVM, kvmaccess.ErrDying, kvmaccess.ErrUnsettled, kvmaccess.ErrNotResident,
	kvmaccess.ErrNoMemslot, kvmaccess.ErrNoVCPU, kvmaccess.ErrNotMapped,
}

func isExplained(err error) bool {
	for _, e := range explained {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
