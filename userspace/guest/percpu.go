// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
)

// maxCPUs bounds the CPUs of a guest (CONFIG_NR_CPUS with MAXSMP).
const maxCPUs = 8192

// PossibleCPUs lists the numbers of the CPUs that the guest's kernel can have,
// and OnlineCPUs of those that it has. The error is an *ObjectError.
func (k *Kernel) PossibleCPUs(ctx context.Context) ([]int, error) {
	return k.cpumask(ctx, "__cpu_possible_mask")
}

// OnlineCPUs: see PossibleCPUs.
func (k *Kernel) OnlineCPUs(ctx context.Context) ([]int, error) {
	return k.cpumask(ctx, "__cpu_online_mask")
}

func (k *Kernel) cpumask(ctx context.Context, name string) ([]int, error) {
	o, err := k.variable(ctx, name, "cpumask")
	if err != nil {
		return nil, err
	}
	mask, err := o.Bytes("bits")
	if err != nil {
		return nil, err
	}
	var cpus []int
	for i := 0; i+8 <= len(mask) && i*8 < maxCPUs; i += 8 {
		for word := binary.LittleEndian.Uint64(mask[i:]); word != 0; word &= word - 1 {
			cpus = append(cpus, i*8+bits.TrailingZeros64(word))
		}
	}
	if len(cpus) == 0 {
		return nil, o.fail(fmt.Errorf("%s is empty", name))
	}
	return cpus, nil
}

// variable reads a variable of the kernel that is a struct.
func (k *Kernel) variable(ctx context.Context, name, typeName string) (*Object, error) {
	at, err := k.symbol(name)
	if err != nil {
		return nil, err
	}
	return k.Object(ctx, typeName, at)
}

// PerCPU is the guest-virtual address of a CPU's own copy of a variable. The
// symbol's value is an offset, or since 6.15 an address in the image; what
// __per_cpu_offset holds is the distance in both. The error is an *ObjectError.
func (k *Kernel) PerCPU(ctx context.Context, symbol string, cpu int) (uint64, error) {
	at, ok := k.Image.Lookup(symbol)
	if !ok {
		return 0, &ObjectError{symbol, 0, ErrNoSymbol}
	}
	offset, err := k.cpuOffset(ctx, cpu)
	if err != nil {
		return 0, err
	}
	if err := k.pointer(at+offset, 1); err != nil {
		return 0, &ObjectError{fmt.Sprintf("%s of CPU %d", symbol, cpu), at + offset, err}
	}
	return at + offset, nil
}

// cpuOffset is how far a CPU's own data lie from where symbols have them; it is
// the base of GS in the kernel.
func (k *Kernel) cpuOffset(ctx context.Context, cpu int) (uint64, error) {
	const table = "__per_cpu_offset"
	at, err := k.symbol(table)
	if err != nil {
		return 0, err
	}
	if cpu < 0 || cpu >= maxCPUs {
		return 0, &ObjectError{table, at, fmt.Errorf("no CPU has the number %d", cpu)}
	}
	offset, err := k.Space.Pointer(ctx, at+8*uint64(cpu))
	if err != nil {
		return 0, &ObjectError{table, at + 8*uint64(cpu), err}
	}
	return offset, nil
}

// LinuxCPU is the number that the guest's kernel gives a vCPU, an index into
// CPUs: the one whose own data GS points to, in the kernel or for when it enters
// it. The error is an *ObjectError.
func (k *Kernel) LinuxCPU(ctx context.Context, vcpu int) (int, error) {
	if vcpu < 0 || vcpu >= len(k.CPUs) {
		return 0, fmt.Errorf("vCPU %d: the guest has %d", vcpu, len(k.CPUs))
	}
	offsets, err := k.cpuOffsets(ctx)
	if err != nil {
		return 0, err
	}
	return k.linuxCPU(vcpu, offsets)
}

func (k *Kernel) linuxCPU(vcpu int, offsets map[uint64]int) (int, error) {
	state := &k.CPUs[vcpu]
	for _, base := range []uint64{state.GS.Base, state.KernelGSBase} {
		if cpu, ok := offsets[base]; ok {
			return cpu, nil
		}
	}
	return 0, &ObjectError{fmt.Sprintf("GS of vCPU %d", state.ID), state.GS.Base, fmt.Errorf("neither it nor %#x is a CPU's own data", state.KernelGSBase)}
}

// cpuOffsets are the CPUs that there can be by how far their own data lie away.
func (k *Kernel) cpuOffsets(ctx context.Context) (map[uint64]int, error) {
	cpus, err := k.PossibleCPUs(ctx)
	if err != nil {
		return nil, err
	}
	offsets := map[uint64]int{}
	for _, cpu := range cpus {
		offset, err := k.cpuOffset(ctx, cpu)
		if err != nil {
			return nil, err
		}
		if _, ok := offsets[offset]; !ok && offset != 0 {
			offsets[offset] = cpu
		}
	}
	return offsets, nil
}
