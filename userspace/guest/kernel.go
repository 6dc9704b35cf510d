// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"time"

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
}

// View is the kernel read through Space.View: for one operation of many small
// reads, by one goroutine, and to be dropped with it.
func (k *Kernel) View() *Kernel {
	v := *k
	v.Space = k.Space.View()
	return &v
}

// Bases are where a kernel has its regions of virtual memory in this boot.
// 0: not known.
type Bases struct {
	Text      uint64 `json:"text"`       // KASLR slide of the image, against 0xffffffff81000000
	DirectMap uint64 `json:"direct_map"` // of all physical memory: page_offset_base
	Vmalloc   uint64 `json:"vmalloc"`    // vmalloc_base
	Vmemmap   uint64 `json:"vmemmap"`    // vmemmap_base: struct page of each frame
	Physical  uint64 `json:"physical"`   // guest-physical address of _text
}

// Fingerprint says which kernel runs, and which run of it this is. What the
// guest does not tell is empty.
type Fingerprint struct {
	Release      string    `json:"release"`                // as uname -r
	Version      string    `json:"version"`                // the banner: "Linux version ..."
	BuildID      string    `json:"build_id,omitempty"`     // GNU build id of vmlinux, hexadecimal
	CommandLine  string    `json:"command_line,omitempty"` // saved_command_line
	BootTime     time.Time `json:"boot_time,omitzero"`
	Distribution string    `json:"distribution,omitempty"` // "Debian 6.1.148-1": from the banner
	Tables       string    `json:"tables,omitempty"`       // SHA-256 of the symbol tables' bytes, hexadecimal
}
