// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"fmt"
	"slices"

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
	// Seal tells when what all this was made of is changed.
	Seal *Seal
	// Doubts are contradictions in what the guest says of itself. An honest
	// kernel has none.
	Doubts []Doubt

	cache    *Cache
	found    *location
	decoding *decoding // types that were begun with; nil: none
	newest   string    // module, when ReadModules read them
}

// View is the kernel read through Space.View: for one operation of many small
// reads, by one goroutine, and to be dropped with it.
func (k *Kernel) View() *Kernel {
	v := *k
	v.Space = k.Space.View()
	return &v
}

// Doubt is a contradiction between two things that a guest says of itself: one
// of them, or what was made of it, is wrong.
type Doubt struct {
	Object string `json:"object"` // one of DoubtObjects
	Reason string `json:"reason"`
}

// What there can be doubts of.
const (
	DoubtSymbols = "symbol table"
	DoubtTypes   = "BTF"
	DoubtModules = "modules"
	DoubtTables  = "page tables"
	DoubtBases   = "memory layout"
	DoubtBanner  = "banner"
)

// DoubtObjects lists them.
func DoubtObjects() []string {
	return []string{DoubtSymbols, DoubtTypes, DoubtModules, DoubtTables, DoubtBases, DoubtBanner}
}

func (k *Kernel) doubt(object, format string, args ...any) {
	k.Doubts = append(k.Doubts, Doubt{object, fmt.Sprintf(format, args...)})
}

// undoubt drops the doubts of some objects, to be found anew.
func (k *Kernel) undoubt(objects ...string) {
	k.Doubts = slices.DeleteFunc(slices.Clone(k.Doubts), func(d Doubt) bool { return slices.Contains(objects, d.Object) })
}
