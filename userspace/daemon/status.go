// SPDX-License-Identifier: MIT

package daemon

import (
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// DefaultSocket is where the daemon's API listens unless told otherwise.
const DefaultSocket = "/run/kvmaccess/kvmaccessd.sock"

// Record is a finding as the daemon keeps it: with its place in the journal.
type Record struct {
	// Seq counts findings from 1 on, through restarts, without gaps.
	Seq uint64 `json:"seq"`
	integrity.Finding
}

// State says how far the watch of a VM is.
type State string

// States of a VM's watch; the first three are those of an integrity.Monitor.
const (
	// StateWaiting: the guest cannot be read yet (it has not set up its
	// tables, or its vCPUs have never run); asked again at a slower pace.
	StateWaiting State = "waiting"
	// StateRegisters: the guest's memory cannot be read, encrypted or gone, and
	// Reason says why; its registers are checked as those of others. All of it
	// is as soon as it can be read.
	StateRegisters State = "registers"
	// StateWatching: it is checked, in poll mode by every tick, in watch mode
	// by the module and whenever that says so.
	StateWatching State = "watching"
	// StateFailing: it was watched, and now its ticks fail.
	StateFailing State = "failing"
	// StateProtected: its registers are encrypted, as its memory is; nothing
	// can be checked.
	StateProtected State = "protected"
)

// VMStatus is one VM and how it is watched. Durations are in ns.
type VMStatus struct {
	ID     kvmaccess.VMID `json:"id"`
	Name   string         `json:"name"` // QEMU's -name guest=
	UUID   string         `json:"uuid"` // QEMU's -uuid
	PID    int            `json:"pid"`
	VCPUs  int            `json:"vcpus"`
	Memory uint64         `json:"memory"` // bytes

	State  State         `json:"state"`
	Reason string        `json:"reason,omitempty"` // why it is not watched, or not in full
	Mode   Mode          `json:"mode"`
	Period time.Duration `json:"period"`
	Watch  *WatchAccount `json:"watch,omitempty"` // nil: poll mode
	// Symbols is the symbol file in use; without one the guest's own symbols
	// are, out of its memory.
	Symbols string `json:"symbols,omitempty"`
	// Kernel is the guest's, as found in its memory; nil: it was not, and
	// Reason says why, or a symbol file is in use.
	Kernel   *guest.Fingerprint `json:"kernel,omitempty"`
	Baseline *time.Time         `json:"baseline,omitempty"` // when it was taken; nil: none yet
	Findings uint64             `json:"findings"`           // raised of this VM so far, restarts included

	Account
}

// Account is what ticks of the daemon did and took: in poll mode one each
// period, in watch mode one at each of the module's events, and a few more.
// All of it counts from the start of the daemon on. Durations are in ns.
type Account struct {
	// Ticks done, failed ones included.
	Ticks uint64 `json:"ticks"`
	// Missed ticks: the schedule had to leave them out because the tick
	// before them was late or took too long. Ticks + Missed is what the
	// period asked for.
	Missed uint64 `json:"missed"`
	// Failed ticks, of Ticks: the VM could not be read.
	Failed uint64 `json:"failed"`
	// Accepted changes: a guest may make them, by a rule that the log names.
	Accepted uint64 `json:"accepted"`
	// LateMax and LateSum: from a tick's deadline to its beginning, in watch
	// mode from when the module found what it is about. Missed ticks are in
	// neither.
	LateMax time.Duration `json:"late_max"`
	LateSum time.Duration `json:"late_sum"`
	// TickMax and TickSum: wall time from a tick's beginning to its end.
	TickMax time.Duration `json:"tick_max"`
	TickSum time.Duration `json:"tick_sum"`
	// Reads of guest memory beside those of ticks, and which way they went: to
	// attach to a guest, and of what ticks found not resident. What ticks read
	// is in Stats.Module, as mem_read.
	Reads kvmaccess.MemoryStats `json:"reads"`
}

// Stats is what monitoring costs. Between two of them, the cost as a fraction
// of one CPU is
//
//	(ΔCPU + ΔModule.Worker + ΔModule.Interrupt) / ΔTime
//
// All durations are in ns.
type Stats struct {
	// Time is CLOCK_MONOTONIC, read together with CPU and Module.
	Time time.Duration `json:"time"`
	// Uptime of the daemon.
	Uptime time.Duration `json:"uptime"`
	// CPU time of the daemon, all threads, user and system
	// (CLOCK_PROCESS_CPUTIME_ID); User and System are the same by
	// getrusage(2), in whole µs.
	CPU    time.Duration `json:"cpu"`
	User   time.Duration `json:"user"`
	System time.Duration `json:"system"`
	// Module is the module's own account, nil when it could not be asked
	// (ModuleError says why). It starts at zero when the module is loaded.
	Module      *kvmaccess.Stats `json:"module,omitempty"`
	ModuleError string           `json:"module_error,omitempty"`

	// Wakeups of the scheduler; ticks that fall together share one.
	Wakeups uint64 `json:"wakeups"`
	// Account sums over all VMs, those that are gone included.
	Account
	Findings uint64 `json:"findings"` // raised since the start of the daemon
	// Budget is what was chosen by the CPU budget; nil: there is none.
	Budget *BudgetStatus `json:"budget,omitempty"`

	VMs []VMAccount `json:"vms"` // present VMs
}

// VMAccount is one VM's part of Stats.
type VMAccount struct {
	ID       kvmaccess.VMID `json:"id"`
	Name     string         `json:"name"`
	Mode     Mode           `json:"mode"`
	Period   time.Duration  `json:"period"` // ns
	Findings uint64         `json:"findings"`
	Watch    *WatchAccount  `json:"watch,omitempty"` // nil: poll mode
	Account
}

// Health is what is wrong with the daemon, if anything.
type Health struct {
	OK       bool            `json:"ok"`
	Problems []Problem       `json:"problems"` // [] if OK
	PID      int             `json:"pid"`
	Started  time.Time       `json:"started"`
	Mode     Mode            `json:"mode"`
	Period   time.Duration   `json:"period"` // default, ns; 0: the budget chooses it
	Budget   *BudgetStatus   `json:"budget,omitempty"`
	Module   *kvmaccess.Info `json:"module,omitempty"`
	VMs      int             `json:"vms"`
	// Unwritten findings wait to be written to the findings file.
	Unwritten int `json:"unwritten"`
}

// Problem is something that keeps the daemon from doing all of its work.
type Problem struct {
	Subject string    `json:"subject"` // what it is about: "module", "watches", "findings", "store", "symbols NAME"
	Message string    `json:"message"`
	Since   time.Time `json:"since"`
}
