// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Record takes a snapshot of all that a Monitor with these options looks at:
// registers, page tables, descriptor tables, and so on. A Monitor of the
// snapshot (guest.Snapshot.Machine) finds what one of the VM found.
func Record(ctx context.Context, src Source, vm kvmaccess.VM, opts Options) (*guest.Snapshot, error) {
	cpus, err := src.VCPUs(ctx, vm.ID)
	if err != nil {
		return nil, err
	}
	mem := opts.Memory
	if mem == nil {
		mem = sourceMemory{src, vm.ID}
	}
	recorder := guest.NewRecorder(mem)
	machine := &guest.Machine{VM: vm, CPUs: cpus, Memory: recorder}
	opts.Memory, opts.Baseline, opts.Settle = recorder, nil, -1
	m, err := NewMonitor(machine, VM{ID: vm.ID, PID: vm.PID}, opts)
	if err != nil {
		return nil, err
	}
	if _, err := m.Attach(ctx); err != nil {
		return nil, err
	}
	if s := m.Status(); s.State != StateWatching {
		return nil, fmt.Errorf("VM %d cannot be recorded: %s", vm.ID, s.Reason)
	}
	return &guest.Snapshot{VM: vm, CPUs: cpus, Pages: recorder.Pages}, nil
}
