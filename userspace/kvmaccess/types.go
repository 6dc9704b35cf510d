// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"time"
)

// VMID identifies a VM for as long as the module is loaded; it is never reused.
type VMID uint64

// Info says what the loaded module is and what works on this host.
type Info struct {
	Version   string   `json:"version"`
	Vendor    Vendor   `json:"vendor"`
	Caps      Caps     `json:"caps"`
	Missing   []string `json:"missing,omitempty"` // symbols and layouts not found
	MaxRanges int      `json:"max_ranges"`        // per memory request
	MaxBytes  int      `json:"max_bytes"`         // per memory request
}

// VM is one virtual machine of this host.
type VM struct {
	ID       VMID          `json:"id"`
	PID      int           `json:"pid"` // of the VMM, initial pid namespace
	VCPUs    int           `json:"vcpus"`
	Memslots int           `json:"memslots"`
	Memory   uint64        `json:"memory"` // bytes
	Seen     time.Duration `json:"seen"`   // CLOCK_BOOTTIME when first seen
	Flags    VMFlags       `json:"flags"`
}

// Memslot maps a range of guest-physical addresses to the VMM's memory.
type Memslot struct {
	VM    VMID   `json:"vm"`
	AS    uint32 `json:"as"` // address space; 1 is system management mode
	Slot  uint32 `json:"slot"`
	GPA   uint64 `json:"gpa"`
	Size  uint64 `json:"size"` // bytes
	HVA   uint64 `json:"hva"`
	Flags uint32 `json:"flags"` // KVM_MEM_*
}

// Segment is a segment register with its hidden part.
type Segment struct {
	Selector uint16 `json:"selector"`
	Base     uint64 `json:"base"`
	Limit    uint32 `json:"limit"` // bytes - 1
	Attrs    uint32 `json:"attrs"` // access rights as in a VMCS (Intel SDM vol. 3)
}

// TableRegister is GDTR or IDTR.
type TableRegister struct {
	Base  uint64 `json:"base"`
	Limit uint16 `json:"limit"` // bytes - 1
}

// Registers is the architectural state of a vCPU at one instant.
type Registers struct {
	RAX    uint64 `json:"rax"`
	RBX    uint64 `json:"rbx"`
	RCX    uint64 `json:"rcx"`
	RDX    uint64 `json:"rdx"`
	RSI    uint64 `json:"rsi"`
	RDI    uint64 `json:"rdi"`
	RBP    uint64 `json:"rbp"`
	RSP    uint64 `json:"rsp"`
	R8     uint64 `json:"r8"`
	R9     uint64 `json:"r9"`
	R10    uint64 `json:"r10"`
	R11    uint64 `json:"r11"`
	R12    uint64 `json:"r12"`
	R13    uint64 `json:"r13"`
	R14    uint64 `json:"r14"`
	R15    uint64 `json:"r15"`
	RIP    uint64 `json:"rip"`
	RFLAGS uint64 `json:"rflags"`

	CR0  uint64 `json:"cr0"`
	CR2  uint64 `json:"cr2"`
	CR3  uint64 `json:"cr3"`
	CR4  uint64 `json:"cr4"`
	CR8  uint64 `json:"cr8"`
	EFER uint64 `json:"efer"`

	CS   Segment `json:"cs"`
	DS   Segment `json:"ds"`
	ES   Segment `json:"es"`
	FS   Segment `json:"fs"`
	GS   Segment `json:"gs"`
	SS   Segment `json:"ss"`
	TR   Segment `json:"tr"`
	LDTR Segment `json:"ldtr"`

	GDTR TableRegister `json:"gdtr"`
	IDTR TableRegister `json:"idtr"`

	DR0 uint64 `json:"dr0"`
	DR1 uint64 `json:"dr1"`
	DR2 uint64 `json:"dr2"`
	DR3 uint64 `json:"dr3"`
	DR6 uint64 `json:"dr6"`
	DR7 uint64 `json:"dr7"`

	STAR         uint64 `json:"star"`
	LSTAR        uint64 `json:"lstar"`
	CSTAR        uint64 `json:"cstar"`
	SFMASK       uint64 `json:"sfmask"`
	SysenterCS   uint64 `json:"sysenter_cs"`
	SysenterESP  uint64 `json:"sysenter_esp"`
	SysenterEIP  uint64 `json:"sysenter_eip"`
	KernelGSBase uint64 `json:"kernel_gs_base"`
	PAT          uint64 `json:"pat"`
}

// VCPU is the state of one vCPU at one instant, and how it was taken.
type VCPU struct {
	VM        VMID          `json:"vm"`
	ID        uint32        `json:"id"`  // the VMM's number of it, its APIC id
	TID       int           `json:"tid"` // thread that last ran it; 0: none
	Condition Condition     `json:"condition"`
	Method    Method        `json:"method"`
	CPU       int           `json:"cpu"`      // host CPU; -1: none
	Time      time.Duration `json:"time"`     // CLOCK_MONOTONIC at the capture
	Duration  time.Duration `json:"duration"` // of the capture
	Handler   time.Duration `json:"handler"`  // of that with the vCPU's CPU interrupted
	Retries   int           `json:"retries"`
	Flags     VCPUFlags     `json:"flags"`
	CPL       int           `json:"cpl"`

	Registers `json:"registers"`
}

// VCPUPartial in VCPU.Flags, which the module never sets: the state comes out
// of a memory dump that lacks STAR, LSTAR, CSTAR, SFMASK, SYSENTER_*, PAT, CR8
// and the debug registers. These are 0, and EFER is what the rest implies.
const VCPUPartial VCPUFlags = 1 << 31

// Table is a descriptor table of a vCPU, whole or a part of it.
type Table struct {
	VM        VMID      `json:"vm"`
	VCPU      uint32    `json:"vcpu"`
	Kind      TableKind `json:"kind"`
	Base      uint64    `json:"base"` // guest-virtual
	Limit     uint16    `json:"limit"`
	Data      []byte    `json:"data"`
	Condition Condition `json:"condition"`
}

// Range is what to read: Length bytes at Address.
type Range struct {
	Address uint64 `json:"address"`
	Length  uint32 `json:"length"`
}

// RangeData is what was read of one Range. Either Err is nil and Data holds
// Length bytes, or Err says why not.
type RangeData struct {
	Range
	Data []byte `json:"data,omitempty"`
	Err  error  `json:"-"`
}

// Op is one command's account.
type Op struct {
	Command string        `json:"command"`
	Count   uint64        `json:"count"`
	Errors  uint64        `json:"errors"`
	Time    time.Duration `json:"time"`  // from request to reply, waiting included
	Bytes   uint64        `json:"bytes"` // of guest memory
}

// Stats is the account of a VM or, with VM zero, of the whole module. What
// monitoring costs is the requester's own CPU time + Worker + Interrupt.
type Stats struct {
	VM         VMID          `json:"vm,omitempty"`
	Worker     time.Duration `json:"worker"`    // CPU time of the module's thread
	Interrupt  time.Duration `json:"interrupt"` // CPU time in interrupts of vCPUs' CPUs
	Captures   uint64        `json:"captures"`
	Retries    uint64        `json:"retries"`
	Interrupts uint64        `json:"interrupts"`
	Events     uint64        `json:"events"`
	Ops        []Op          `json:"ops"`
}

// Event is a VM that came or went.
type Event struct {
	Kind EventKind `json:"kind"`
	VM   VM        `json:"vm"`
}
