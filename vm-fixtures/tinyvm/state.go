// SPDX-License-Identifier: MIT

package tinyvm

// Regs are the general registers: struct kvm_regs.
type Regs struct {
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11, R12, R13, R14, R15   uint64
	RIP, RFLAGS                            uint64
}

// Segment is a segment register: struct kvm_segment.
type Segment struct {
	Base                           uint64
	Limit                          uint32
	Selector                       uint16
	Type, Present, DPL, DB, S      uint8
	L, G, AVL, Unusable, reserved0 uint8
}

// Table is GDTR or IDTR: struct kvm_dtable.
type Table struct {
	Base      uint64
	Limit     uint16
	reserved0 [3]uint16
}

// SRegs are the special registers: struct kvm_sregs.
type SRegs struct {
	CS, DS, ES, FS, GS, SS, TR, LDT Segment
	GDT, IDT                        Table
	CR0, CR2, CR3, CR4, CR8         uint64
	EFER, APICBase                  uint64
	Interrupts                      [4]uint64 // bitmap of the one to inject
}

// DebugRegs are the debug registers: struct kvm_debugregs.
type DebugRegs struct {
	DB        [4]uint64 // DR0 to DR3
	DR6, DR7  uint64
	Flags     uint64
	reserved0 [9]uint64
}

// VCPUEvents are pending events: struct kvm_vcpu_events.
type VCPUEvents struct {
	ExceptionInjected, ExceptionNr, HasErrorCode, ExceptionPending uint8
	ErrorCode                                                      uint32
	InterruptInjected, InterruptNr, InterruptSoft, InterruptShadow uint8
	NMIInjected, NMIPending, NMIMasked, _                          uint8
	SIPIVector                                                     uint32
	Flags                                                          uint32 // KVM_VCPUEVENT_VALID_*
	SMM, SMIPending, SMMInsideNMI, SMILatchedINIT                  uint8
	_                                                              [27]uint8
	ExceptionHasPayload                                            uint8
	ExceptionPayload                                               uint64
}

// MSR is a model-specific register: struct kvm_msr_entry.
type MSR struct {
	Index, _ uint32
	Value    uint64
}

// Model-specific registers: Intel SDM vol. 4, AMD APM vol. 2 appendix A.
const (
	MSRSysenterCS   = 0x174
	MSRSysenterESP  = 0x175
	MSRSysenterEIP  = 0x176
	MSRPAT          = 0x277
	MSREFER         = 0xc0000080
	MSRSTAR         = 0xc0000081
	MSRLSTAR        = 0xc0000082
	MSRCSTAR        = 0xc0000083
	MSRSFMASK       = 0xc0000084
	MSRFSBase       = 0xc0000100
	MSRGSBase       = 0xc0000101
	MSRKernelGSBase = 0xc0000102

	// x2APIC: Intel SDM vol. 3, "x2APIC Register Address Space".
	MSRX2APICEOI          = 0x80b
	MSRX2APICSpurious     = 0x80f
	MSRX2APICICR          = 0x830
	MSRX2APICTimer        = 0x832
	MSRX2APICInitialCount = 0x838
	MSRX2APICDivide       = 0x83e
)

const (
	msrHeader  = 8
	msrEntries = 64
)

// msrList is struct kvm_msrs.
type msrList struct {
	n, _    uint32
	entries [msrEntries]MSR
}

// Bits of control registers: Intel SDM vol. 3, "Control Registers".
const (
	CR0PE   = 1 << 0
	CR0MP   = 1 << 1
	CR0TS   = 1 << 3
	CR0ET   = 1 << 4
	CR0NE   = 1 << 5
	CR0WP   = 1 << 16
	CR0PG   = 1 << 31
	CR4TSD  = 1 << 2
	CR4PSE  = 1 << 4
	CR4PAE  = 1 << 5
	CR4PGE  = 1 << 7
	CR4LA57 = 1 << 12
	EFERSCE = 1 << 0
	EFERLME = 1 << 8
	EFERLMA = 1 << 10
)

// memoryRegion is struct kvm_userspace_memory_region.
type memoryRegion struct {
	slot, flags    uint32
	gpa, size, hva uint64
}

// msi is struct kvm_msi.
type msi struct {
	addressLow, addressHigh, data, flags, device uint32
	_                                            [12]byte
}
