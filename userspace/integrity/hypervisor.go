// SPDX-License-Identifier: MIT

package integrity

import (
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// exitLimit is what an exit from a VM leaves as the limits of GDT and IDT,
// whatever they were before (Intel SDM vol. 3, "Loading Host Segment and
// Descriptor-Table Registers"). A hypervisor in the guest may let it stand: KVM
// does, of the IDT for good, of the GDT until its thread has left the CPU.
const exitLimit = 0xffff

// hasVMs says whether a vCPU may have VMs of its own, by Intel's VMX.
func hasVMs(r *kvmaccess.Registers) bool { return r.CR4&guest.CR4VMXE != 0 }

// restoreLimits gives the tables of a vCPU that has VMs of its own the limits
// that they had last, or that Linux gives them.
func restoreLimits(r, last *kvmaccess.Registers) {
	if !hasVMs(r) {
		return
	}
	long := guest.ModeOf(r).Long()
	entries := gdtEntries32
	if long {
		entries = gdtEntries64
	}
	restoreLimit(&r.GDTR, last.GDTR, entries*8)
	restoreLimit(&r.IDTR, last.IDTR, 256*guest.GateSize(long))
}

func restoreLimit(t *kvmaccess.TableRegister, last kvmaccess.TableRegister, size int) {
	switch {
	case t.Limit != exitLimit:
	case t.Base == last.Base && last.Limit != 0:
		t.Limit = last.Limit
	default:
		t.Limit = uint16(size - 1)
	}
}

// loosen has the module compare of a limit that exits from VMs make larger no
// more than the bits that it has. What else it may become is seen when the
// Monitor looks.
func loosen(it *kvmaccess.Item) {
	if it.Register == kvmaccess.RegisterGDTRLimit || it.Register == kvmaccess.RegisterIDTRLimit {
		it.Mask = it.Value
	}
}
