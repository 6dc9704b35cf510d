// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// Info says what the module is and what works on this host.
func (c *Client) Info(ctx context.Context) (Info, error) {
	q, err := c.request(cmdInfo, 0)
	if err != nil {
		return Info{}, err
	}
	defer c.release(q)
	b, err := c.execute(ctx, q)
	if err != nil {
		return Info{}, err
	}
	return parseInfo(b)
}

// VMs lists the VMs of this host.
func (c *Client) VMs(ctx context.Context) ([]VM, error) {
	q, err := c.request(cmdVMGet, 0)
	if err != nil {
		return nil, err
	}
	defer c.release(q)
	return list(ctx, c, q, parseVM)
}

// VM describes one VM. The error is ErrNoVM once it is gone.
func (c *Client) VM(ctx context.Context, vm VMID) (VM, error) {
	q, err := c.request(cmdVMGet, vm)
	if err != nil {
		return VM{}, err
	}
	defer c.release(q)
	q.u64(aVMID, uint64(vm))
	b, err := c.execute(ctx, q)
	if err != nil {
		return VM{}, err
	}
	return parseVM(b)
}

// Memslots lists a VM's memslots, of all address spaces.
func (c *Client) Memslots(ctx context.Context, vm VMID) ([]Memslot, error) {
	q, err := c.request(cmdMemslotGet, vm)
	if err != nil {
		return nil, err
	}
	defer c.release(q)
	q.u64(aMemslotVMID, uint64(vm))
	return list(ctx, c, q, parseMemslot)
}

// Memslot describes slot of address space as (0; 1 is system management mode).
// The error is ErrNoVCPU if there is none.
func (c *Client) Memslot(ctx context.Context, vm VMID, as, slot uint32) (Memslot, error) {
	q, err := c.request(cmdMemslotGet, vm)
	if err != nil {
		return Memslot{}, err
	}
	defer c.release(q)
	q.u64(aMemslotVMID, uint64(vm))
	q.u32(aMemslotASID, as)
	q.u32(aMemslotSlot, slot)
	b, err := c.execute(ctx, q)
	if err != nil {
		return Memslot{}, err
	}
	return parseMemslot(b)
}

// VCPUs captures each vCPU of a VM, one after the other.
func (c *Client) VCPUs(ctx context.Context, vm VMID) ([]VCPU, error) {
	q, err := c.request(cmdVCPUGet, vm)
	if err != nil {
		return nil, err
	}
	defer c.release(q)
	q.u64(aVCPUVMID, uint64(vm))
	return list(ctx, c, q, parseVCPU)
}

// VCPU captures the vCPU that the VMM numbers id. The error is ErrNoVCPU if
// there is none, ErrUnsettled if it moved between CPUs all the while, and
// ErrProtected if its state is encrypted.
func (c *Client) VCPU(ctx context.Context, vm VMID, id uint32) (VCPU, error) {
	q, err := c.request(cmdVCPUGet, vm)
	if err != nil {
		return VCPU{}, err
	}
	defer c.release(q)
	q.u64(aVCPUVMID, uint64(vm))
	q.u32(aVCPUID, id)
	b, err := c.execute(ctx, q)
	if err != nil {
		return VCPU{}, err
	}
	return parseVCPU(b)
}

// maxTableReads bounds how often Table begins again because the guest moved
// the table while it was read in parts.
const maxTableReads = 4

// Table reads a vCPU's descriptor table whole, up to 64 KiB.
func (c *Client) Table(ctx context.Context, vm VMID, vcpu uint32, kind TableKind) (Table, error) {
	q, err := c.request(cmdTableGet, vm)
	if err != nil {
		return Table{}, err
	}
	defer c.release(q)
next:
	for range maxTableReads {
		var whole Table
		for {
			q.request(c.family.ID, cmdTableGet, vm)
			q.u64(aTableVMID, uint64(vm))
			q.u32(aTableVCPUID, vcpu)
			q.u32(aTableKind, uint32(kind))
			if len(whole.Data) > 0 {
				q.u32(aTableOffset, uint32(len(whole.Data)))
			}
			b, err := c.execute(ctx, q)
			if len(whole.Data) > 0 && errors.Is(err, unix.EINVAL) {
				// It has become shorter than what has been read of it.
				continue next
			}
			if err != nil {
				return Table{}, err
			}
			part, err := parseTable(b, uint32(len(whole.Data)))
			if err != nil {
				return Table{}, err
			}
			if len(whole.Data) > 0 && (part.Base != whole.Base || part.Limit != whole.Limit) {
				continue next
			}
			data := append(whole.Data, part.Data...)
			whole = part
			whole.Data = data
			if len(data) == int(whole.Limit)+1 {
				return whole, nil
			}
		}
	}
	return Table{}, &Error{
		Op: q.name(), VM: vm, Errno: unix.EAGAIN,
		Message: "the guest moved the table each time that it was read: ask again",
	}
}

// Stats is the account of the whole module, VMs that are gone included.
func (c *Client) Stats(ctx context.Context) (Stats, error) { return c.stats(ctx, 0) }

// VMStats is the account of one VM.
func (c *Client) VMStats(ctx context.Context, vm VMID) (Stats, error) { return c.stats(ctx, vm) }

// StatsPerVM lists the accounts of all VMs.
func (c *Client) StatsPerVM(ctx context.Context) ([]Stats, error) {
	q, err := c.request(cmdStats, 0)
	if err != nil {
		return nil, err
	}
	defer c.release(q)
	return list(ctx, c, q, parseStats)
}

func (c *Client) stats(ctx context.Context, vm VMID) (Stats, error) {
	q, err := c.request(cmdStats, vm)
	if err != nil {
		return Stats{}, err
	}
	defer c.release(q)
	if vm != 0 {
		q.u64(aStatsVMID, uint64(vm))
	}
	b, err := c.execute(ctx, q)
	if err != nil {
		return Stats{}, err
	}
	return parseStats(b)
}
