// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Source is what a Monitor reads a VM through; *kvmaccess.Client is one.
type Source interface {
	VCPUs(ctx context.Context, vm kvmaccess.VMID) ([]kvmaccess.VCPU, error)
	VCPU(ctx context.Context, vm kvmaccess.VMID, id uint32) (kvmaccess.VCPU, error)
	// ReadVirtual reads through the page tables of a vCPU, at root or, with
	// root 0, at its CR3. It returns one RangeData for each range.
	ReadVirtual(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, root uint64, ranges ...kvmaccess.Range) ([]kvmaccess.RangeData, error)
}

// MemoryRange is guest memory of which no byte may change.
type MemoryRange struct {
	Name    string `json:"name,omitempty"`   // what findings call it; default: its symbol or address
	Symbol  string `json:"symbol,omitempty"` // where it starts, instead of Address
	Address Hex    `json:"address,omitempty"`
	Length  uint32 `json:"length"` // bytes, 1 to 28672
}

// Options of a Monitor; the zero value works.
type Options struct {
	Symbols     *guest.Symbols // of the guest's kernel; nil: only what needs no symbols is checked
	Baseline    *Baseline      // of an earlier Monitor of this VM; nil: the first sight becomes it
	Checks      []Check        // default: Checks()
	Ranges      []MemoryRange  // further guest memory to watch
	Memory      guest.Memory   // physical memory for pages that the Source finds not resident; nil: these stay unread
	MaxFindings int            // that one Attach or Tick returns at most; default 256, the rest follows in the next ones
	Now         func() time.Time
}

// State says how far a Monitor is.
type State string

const (
	// StateWaiting: the guest has not come to run a kernel with its tables set
	// up (it is in firmware, in a boot loader or in early boot), or cannot be
	// read; Status.Reason tells. There are no findings then.
	StateWaiting State = "waiting"
	// StateWatching: there is a baseline and every Tick compares with it.
	StateWatching State = "watching"
)

// Status is how a Monitor fares.
type Status struct {
	State    State    `json:"state"`
	Reason   string   `json:"reason,omitempty"`  // why it waits
	Symbols  int      `json:"symbols"`           // in use; 0: none given or they do not fit the guest
	Slide    Hex      `json:"slide"`             // of the running kernel against the symbols
	Problems []string `json:"problems,omitempty"` // what cannot be checked, and why
	VCPUs    int      `json:"vcpus"`             // watched
	Waiting  int      `json:"waiting"`           // vCPUs that are not in the kernel yet
	Bytes    int      `json:"bytes"`             // of guest memory compared each tick
	Open     int      `json:"open"`              // findings that hold now
	Ticks    uint64   `json:"ticks"`
	Slow     uint64   `json:"slow"` // ticks that saw a difference and had to decode
}

// Monitor watches one VM. Its methods are for one goroutine at a time.
type Monitor struct{}

// NewMonitor makes a Monitor of vm. It reads nothing yet. The error says what
// is wrong with the options.
func NewMonitor(src Source, vm VM, opts Options) (*Monitor, error) { return &Monitor{}, nil }

// Attach looks at the whole VM, takes the baseline unless there is one
// already, and returns what differs from it or is not as an honest kernel has
// it. Findings that hold and were returned before are not returned again.
// An error is one of reading (a dying VM: kvmaccess.ErrNoVM or ErrDying); a
// guest that is not up yet is none, see Status.
func (m *Monitor) Attach(ctx context.Context) ([]Finding, error) { return nil, nil }

// Tick compares with what was seen last and returns what changed. It attaches
// if that has not succeeded yet.
func (m *Monitor) Tick(ctx context.Context) ([]Finding, error) { return nil, nil }

// Baseline returns what the Monitor compares with; its Version is 0 while
// there is none (see StateWaiting).
func (m *Monitor) Baseline() Baseline { return Baseline{} }

// Findings returns those that hold now, in the order of their keys.
func (m *Monitor) Findings() []Finding { return nil }

// Status says how the Monitor fares.
func (m *Monitor) Status() Status { return Status{} }
