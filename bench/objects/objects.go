// SPDX-License-Identifier: MIT

// Package objects finds the paper's five kinds of objects in a Linux guest:
// registers, GDT, IDT, system call table and memory.
package objects

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Region is memory of the guest that does not change.
type Region struct {
	Name   string
	GVA    uint64
	Length int
	Parts  []Part // in the order of their addresses
	Data   []byte // as it was found
}

// Part is a piece of a Region within one page.
type Part struct {
	GPA, GVA uint64
	Length   int
}

// SyscallTable is the name of that Region.
const SyscallTable = "system call table"

// Objects of a guest with one vCPU.
type Objects struct {
	VM      kvmaccess.VM
	Memory  *kvmaccess.Memory
	Kernel  *guest.Kernel
	Regions []Region // GDT, IDT, system call table, memory
	VCPU    kvmaccess.VCPU
}

// source is a VM as guest.Attach reads it.
type source struct {
	*kvmaccess.Memory
	client *kvmaccess.Client
	id     kvmaccess.VMID
}

func (s source) VCPUs(ctx context.Context) ([]kvmaccess.VCPU, error) {
	return s.client.VCPUs(ctx, s.id)
}

// VMsOf are the VMs of a process, the oldest first.
func VMsOf(ctx context.Context, c *kvmaccess.Client, pid int) ([]kvmaccess.VM, error) {
	vms, err := c.VMs(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(vms, func(vm kvmaccess.VM) bool { return vm.PID != pid }), nil
}

// Find attaches to the guest of the QEMU of this process id. Close its Memory.
func Find(ctx context.Context, c *kvmaccess.Client, pid int) (o *Objects, err error) {
	vms, err := VMsOf(ctx, c, pid)
	if err != nil {
		return nil, err
	}
	if len(vms) != 1 {
		return nil, fmt.Errorf("process %d has %d VMs", pid, len(vms))
	}
	vm := vms[0]
	o = &Objects{VM: vm, Memory: kvmaccess.NewMemory(c, vm)}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.Memory.Close())
		}
	}()
	if o.Kernel, err = guest.Attach(ctx, source{o.Memory, c, vm.ID}, guest.AttachOptions{NoTypes: true}); err != nil {
		return nil, err
	}
	if o.VCPU, err = c.VCPU(ctx, vm.ID, 0); err != nil {
		return nil, err
	}
	entry, ok := o.Kernel.Image.Lookup("entry_SYSCALL_64")
	if !ok {
		return nil, errors.New("the guest has no symbol entry_SYSCALL_64")
	}
	tables, err := o.Kernel.SyscallTables(ctx)
	if err != nil {
		return nil, err
	}
	calls := slices.IndexFunc(tables, func(t guest.SyscallTable) bool { return t.Name == "sys_call_table" })
	if calls < 0 {
		return nil, errors.New("the guest has no sys_call_table")
	}
	for _, r := range []Region{
		{Name: "GDT", GVA: o.VCPU.GDTR.Base, Length: int(o.VCPU.GDTR.Limit) + 1},
		{Name: "IDT", GVA: o.VCPU.IDTR.Base, Length: int(o.VCPU.IDTR.Limit) + 1},
		{Name: SyscallTable, GVA: tables[calls].Address, Length: 8 * len(tables[calls].Calls)},
		{Name: "memory", GVA: entry, Length: sample.MemoryRange},
	} {
		if err := o.read(ctx, &r); err != nil {
			return nil, fmt.Errorf("%s: %w", r.Name, err)
		}
		o.Regions = append(o.Regions, r)
	}
	return o, nil
}

// read finds where a region is, and what is there.
func (o *Objects) read(ctx context.Context, r *Region) error {
	for at, left := r.GVA, r.Length; left > 0; {
		t, err := guest.Translate(ctx, o.Memory, o.Kernel.Space.Mode, o.Kernel.Space.Root, at)
		if err != nil {
			return err
		}
		n := min(left, kvmaccess.PageSize-int(at%kvmaccess.PageSize))
		r.Parts = append(r.Parts, Part{GPA: t.GPA, GVA: at, Length: n})
		data := make([]byte, n)
		if err := o.Memory.ReadPhysical(ctx, t.GPA, data); err != nil {
			return err
		}
		r.Data = append(r.Data, data...)
		at += uint64(n)
		left -= n
	}
	return nil
}

// accessed and dirty are set by the processor in page-table entries.
const accessed, dirty = 1 << 5, 1 << 6

// entries notes the page-table entries that are read through it.
type entries struct {
	guest.Memory
	found map[uint64]uint64
}

func (e *entries) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	err := e.Memory.ReadPhysical(ctx, gpa, p)
	if err == nil && len(p) == 8 {
		var v uint64
		for i, b := range p {
			v |= uint64(b) << (8 * i)
		}
		e.found[gpa] = v
	}
	return err
}

// Items are what a watch of all five kinds takes: the regions byte for byte,
// the page-table entries on the way to them, and the registers that stay.
func (o *Objects) Items(ctx context.Context) ([]kvmaccess.Item, error) {
	var items []kvmaccess.Item
	path := &entries{o.Memory, map[uint64]uint64{}}
	for i, r := range o.Regions {
		at := 0
		for _, p := range r.Parts {
			items = append(items, kvmaccess.Item{Cookie: uint64(1 + i), Kind: kvmaccess.KindBytes, GPA: p.GPA, Data: r.Data[at : at+p.Length]})
			at += p.Length
			if _, err := guest.Translate(ctx, path, o.Kernel.Space.Mode, o.Kernel.Space.Root, p.GVA); err != nil {
				return nil, err
			}
		}
	}
	for gpa, v := range path.found {
		const mask = ^uint64(accessed | dirty)
		items = append(items, kvmaccess.Item{Cookie: 100, Kind: kvmaccess.KindEntry, GPA: gpa, Value: v & mask, Mask: mask})
	}
	return append(items, Registers(o.VCPU, 200)...), nil
}

// Registers are those of a vCPU that do not change while Linux runs, as items:
// what is watched, and PAT.
func Registers(v kvmaccess.VCPU, cookie uint64) []kvmaccess.Item {
	var items []kvmaccess.Item
	for _, r := range append(integrity.WatchedRegisters(), integrity.WatchedRegister{Register: kvmaccess.RegisterPAT}) {
		it := r.Item(&v.Registers)
		it.Cookie = cookie
		items = append(items, it)
		cookie++
	}
	return items
}
