// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Source is what a guest is read through: a live VM, a snapshot, a memory dump.
type Source interface {
	Memory
	// VCPUs returns all vCPUs' states; none if only memory is at hand.
	VCPUs(ctx context.Context) ([]kvmaccess.VCPU, error)
}

// Region is a run of guest-physical memory.
type Region struct {
	GPA  uint64 `json:"gpa"`
	Size uint64 `json:"size"` // bytes
}

// Regions is what a Source may have, too. Where there is no vCPU's state, it is
// needed to find the kernel.
type Regions interface {
	// Regions lists the memory that there is, by ascending address.
	Regions(ctx context.Context) ([]Region, error)
}

// Kernel is a guest's Linux kernel, found in its memory.
type Kernel struct {
	Space *Space // through the kernel's own page tables
	Image *Image // symbols where they run: the kernel's, then its modules'
	Types *Types // nil: none, for the reason TypesErr
	// TypesErr says why there are no types.
	TypesErr error

	CPUs        []kvmaccess.VCPU // as of the attachment; none of a dump without them
	Text        Extent           // _stext.._etext
	Rodata      Extent           // __start_rodata..__end_rodata
	Bases       Bases
	Fingerprint Fingerprint
	// Tables are where the kernel has its symbol table, in memory that it does
	// not change.
	Tables []Extent
	// Doubts are contradictions in what the guest says of itself. An honest
	// kernel has none.
	Doubts []Doubt
}

// Doubt is a contradiction between two things that a guest says of itself: one
// of them, or what was made of it, is wrong.
type Doubt struct {
	Object string `json:"object"` // symbol, table or register
	Reason string `json:"reason"`
}

func (k *Kernel) doubt(object, format string, args ...any) {
	k.Doubts = append(k.Doubts, Doubt{object, fmt.Sprintf(format, args...)})
}

// View is the kernel read through Space.View: for one operation of many small
// reads, by one goroutine, and to be dropped with it.
func (k *Kernel) View() *Kernel {
	v := *k
	v.Space = k.Space.View()
	return &v
}
