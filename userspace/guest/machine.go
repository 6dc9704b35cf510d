// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Machine is a VM of which the vCPUs' states and the memory are at hand, a
// recorded one for instance. It answers as a kvmaccess.Client does.
type Machine struct {
	VM     kvmaccess.VM
	CPUs   []kvmaccess.VCPU
	Memory Memory
}

func (m *Machine) check(vm kvmaccess.VMID) error {
	if vm != m.VM.ID {
		return fmt.Errorf("VM %d: %w", vm, kvmaccess.ErrNoVM)
	}
	return nil
}

// VCPUs returns all vCPUs' states, or kvmaccess.ErrNoVM.
func (m *Machine) VCPUs(_ context.Context, vm kvmaccess.VMID) ([]kvmaccess.VCPU, error) {
	if err := m.check(vm); err != nil {
		return nil, err
	}
	return append([]kvmaccess.VCPU(nil), m.CPUs...), nil
}

// VCPU returns one vCPU's state, kvmaccess.ErrNoVM or ErrNoVCPU.
func (m *Machine) VCPU(_ context.Context, vm kvmaccess.VMID, id uint32) (kvmaccess.VCPU, error) {
	if err := m.check(vm); err != nil {
		return kvmaccess.VCPU{}, err
	}
	for _, cpu := range m.CPUs {
		if cpu.ID == id {
			return cpu, nil
		}
	}
	return kvmaccess.VCPU{}, fmt.Errorf("VM %d vCPU %d: %w", vm, id, kvmaccess.ErrNoVCPU)
}

// ReadPhysical reads guest-physical ranges; one that cannot be read carries
// the error.
func (m *Machine) ReadPhysical(ctx context.Context, vm kvmaccess.VMID, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error) {
	if err := m.check(vm); err != nil {
		return nil, err
	}
	return m.read(ranges, func(r kvmaccess.Range, p []byte) error {
		return m.Memory.ReadPhysical(ctx, r.Address, p)
	}), nil
}

// ReadVirtual reads guest-virtual ranges through the page tables at root, or
// at the vCPU's CR3 if root is 0; one that cannot be read carries the error.
func (m *Machine) ReadVirtual(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, root uint64, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error) {
	cpu, err := m.VCPU(ctx, vm, vcpu)
	if err != nil {
		return nil, err
	}
	if root == 0 {
		root = cpu.CR3
	}
	mode := ModeOf(&cpu.Registers)
	return m.read(ranges, func(r kvmaccess.Range, p []byte) error {
		err := ReadVirtual(ctx, m.Memory, mode, root, r.Address, p)
		var walk *WalkError
		if errors.As(err, &walk) {
			switch {
			case errors.Is(err, ErrNotPresent), errors.Is(err, ErrReserved):
				return fmt.Errorf("%w: %w", kvmaccess.ErrNotMapped, err)
			case errors.Is(err, ErrNotCanonical):
				return fmt.Errorf("%w: %w", kvmaccess.ErrInvalid, err)
			}
		}
		return err
	}), nil
}

func (m *Machine) read(ranges []kvmaccess.Range, read func(kvmaccess.Range, []byte) error) []kvmaccess.RangeData {
	out := make([]kvmaccess.RangeData, len(ranges))
	for i, r := range ranges {
		out[i].Range = r
		if r.Length == 0 || r.Length > kvmaccess.MaxBytes {
			out[i].Err = fmt.Errorf("%w: length %d, 1 to %d bytes can be read", kvmaccess.ErrInvalid, r.Length, kvmaccess.MaxBytes)
			continue
		}
		p := make([]byte, r.Length)
		if err := read(r, p); err != nil {
			out[i].Err = err
			continue
		}
		out[i].Data = p
	}
	return out
}
