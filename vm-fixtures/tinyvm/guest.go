// SPDX-License-Identifier: MIT

package tinyvm

import (
	"errors"
	"fmt"
)

// Config says what Guest to make.
type Config struct {
	Mode    Mode
	Code    []byte // goes to Code, where each vCPU begins
	Memory  uint64 // bytes from address 0; 0: DefaultMemory
	VCPUs   int    // 0: 1
	IRQChip bool
}

// DefaultMemory of a Guest, in bytes, of which it touches a few pages.
const DefaultMemory = 2 << 20

// Guest is a VM with memory, descriptor tables, page tables that map all of it
// to its own addresses, code, and vCPUs that are ready to run it.
type Guest struct {
	*VM
	Memory *Memory
	Tables *Tables // nil without paging
	Next   uint64  // where the next page table would go
	VCPUs  []*VCPU

	threads []*Thread
}

// Spin counts in RAX for ever, in the mode's word.
func Spin(m Mode) []byte {
	if m.Paging().Levels > 3 {
		return []byte{
			0x48, 0xff, 0xc0, // inc rax
			0xeb, 0xfb, // jmp to it
		}
	}
	return []byte{
		0x40,       // inc eax, in real mode inc ax
		0xeb, 0xfd, // jmp to it
	}
}

// Halt waits for an interrupt for ever, in any mode. With an irqchip it waits
// in the kernel, else each HLT is an exit.
func Halt() []byte {
	return []byte{
		0xfb,       // sti
		0xf4,       // hlt
		0xeb, 0xfc, // jmp to sti
	}
}

// NewGuest makes a guest.
func (k *KVM) NewGuest(c Config) (g *Guest, err error) {
	vm, err := k.NewVM(c.IRQChip)
	if err != nil {
		return nil, err
	}
	g = &Guest{VM: vm, Next: PageTables}
	defer func() {
		if err != nil {
			g, err = nil, errors.Join(err, vm.Close())
		}
	}()
	if c.Memory == 0 {
		c.Memory = DefaultMemory
	}
	if g.Memory, err = vm.AddMemory(0, 0, c.Memory); err != nil {
		return g, err
	}
	if err = vm.PrepareTables(); err != nil {
		return g, err
	}
	if err = vm.Write(Code, c.Code); err != nil {
		return g, err
	}
	var root uint64
	if p := c.Mode.Paging(); p.Levels > 0 {
		if g.Tables, err = vm.NewTables(p, &g.Next); err != nil {
			return g, err
		}
		if err = g.Tables.Map(0, 0, c.Memory, Page4K, EntryWrite); err != nil {
			return g, err
		}
		root = g.Tables.Root
	}
	for id := range max(1, c.VCPUs) {
		v, err := vm.NewVCPU(uint32(id))
		if err != nil {
			return g, err
		}
		g.VCPUs = append(g.VCPUs, v)
		if err := v.Enter(c.Mode, root, Code); err != nil {
			return g, err
		}
		if id > 0 && c.IRQChip {
			if err := v.SetRunnable(); err != nil {
				return g, err
			}
		}
	}
	return g, nil
}

// Start runs all vCPUs, on the host CPUs given, if any are.
func (g *Guest) Start(h Handler, cpus ...int) error {
	for _, v := range g.VCPUs[len(g.threads):] {
		t, err := v.Start(h, cpus...)
		if err != nil {
			return err
		}
		g.threads = append(g.threads, t)
	}
	return nil
}

// Threads are those of Start.
func (g *Guest) Threads() []*Thread { return g.threads }

// Stop ends what Start began. The vCPUs keep their state.
func (g *Guest) Stop() error {
	var errs []error
	for i, t := range g.threads {
		if err := t.Stop(); err != nil {
			errs = append(errs, fmt.Errorf("vCPU %d: %w", i, err))
		}
	}
	g.threads = nil
	return errors.Join(errs...)
}

// Close stops the guest and destroys it.
func (g *Guest) Close() error { return errors.Join(g.Stop(), g.VM.Close()) }
