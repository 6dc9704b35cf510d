/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * KvmAccess: the state of running KVM guests over generic netlink.
 *
 * Access
 * ------
 * Every command and the multicast group need CAP_SYS_ADMIN in the initial
 * user namespace, and the family exists in the initial network namespace
 * only: reading a guest's memory is more than network administration. All
 * others get EPERM.
 *
 * Commands
 * --------
 * A reply carries the command of its request. Each command has its own
 * attribute set at the top level of the message; unknown attributes in a
 * request are refused with EINVAL.
 *
 *  command      request                              reply
 *  INFO         -                                    KVMACCESS_A_INFO_*
 *  VM_GET       do: VM_ID; dump: -                   KVMACCESS_A_VM_*
 *  MEMSLOT_GET  do: VM_ID, AS_ID, SLOT; dump: VM_ID  KVMACCESS_A_MEMSLOT_*
 *  VCPU_GET     do: VM_ID, ID; dump: VM_ID           KVMACCESS_A_VCPU_*
 *  TABLE_GET    VM_ID, VCPU_ID, KIND,                KVMACCESS_A_TABLE_*
 *               [OFFSET, LENGTH]
 *  MEM_READ     VM_ID, RANGE..., [VCPU_ID, [ROOT]]   KVMACCESS_A_MEM_*
 *  STATS        do: [VM_ID]; dump: -                 KVMACCESS_A_STATS_*
 *
 * A dump gives one message an object and sets NLM_F_DUMP_INTR on it when the
 * set of objects changed while it ran: read it again then.
 *
 * VM_CREATED and VM_DESTROYED are notifications to the multicast group "vm";
 * they carry KVMACCESS_A_VM_*. A VM's id is given once and is never given
 * again while the module is loaded.
 *
 * Memory
 * ------
 * MEM_READ takes up to KVMACCESS_MAX_RANGES ranges with together up to
 * KVMACCESS_MAX_BYTES bytes. Without VCPU_ID addresses are guest-physical.
 * With VCPU_ID they are guest-virtual, translated by the page tables that
 * this vCPU uses; ROOT replaces its CR3 (the kernel's root of a guest with
 * page-table isolation, for instance). The reply has one RANGE for each of
 * the request's, in the same order, with either DATA, or ERROR and FAULT. A
 * request of which no range could be read fails with the first range's error
 * and its explanation. Nothing is ever faulted in, on either side: a page
 * that the host swapped out, or that the guest never touched, is ENODATA, and
 * process_vm_readv(2) on the VMM at the memslot's host address gets it.
 *
 * Errors, each with an explanation in the extended acknowledgment
 * ----------------------------------------------------------------
 *  EPERM          the caller lacks CAP_SYS_ADMIN
 *  EINVAL         an attribute is missing, malformed, or out of range; a
 *                 length of 0; a guest-virtual address that is not canonical
 *  E2BIG          more ranges or bytes than a request may ask for
 *  ENOENT         no VM has this id (any more)
 *  ENXIO          the VM has no such vCPU or memslot
 *  ESHUTDOWN      the VM is being destroyed
 *  EFAULT         a guest-physical address lies in no memslot
 *  EADDRNOTAVAIL  the guest's page tables do not map a guest-virtual address
 *  ENODATA        the page is not resident in the host
 *  EACCES         the guest's state is encrypted (SEV-ES, SEV-SNP, TDX)
 *  EAGAIN         the vCPU could not be caught at one place: ask again
 *  EOPNOTSUPP     this host lacks what the command needs; see INFO
 *  EMSGSIZE       the reply outgrew its buffer
 *  EPROTONOSUPPORT  the module is being unloaded; without an explanation
 */
#ifndef _UAPI_KVMACCESS_H
#define _UAPI_KVMACCESS_H

#define KVMACCESS_GENL_NAME	"kvmaccess"
#define KVMACCESS_GENL_VERSION	1
#define KVMACCESS_MCGRP_VM	"vm"

/* Limits of one request. */
#define KVMACCESS_MAX_RANGES	64
#define KVMACCESS_MAX_BYTES	28672

enum kvmaccess_cmd {
	KVMACCESS_CMD_UNSPEC,
	KVMACCESS_CMD_INFO,
	KVMACCESS_CMD_VM_GET,
	KVMACCESS_CMD_MEMSLOT_GET,
	KVMACCESS_CMD_VCPU_GET,
	KVMACCESS_CMD_TABLE_GET,
	KVMACCESS_CMD_MEM_READ,
	KVMACCESS_CMD_STATS,
	KVMACCESS_CMD_VM_CREATED,
	KVMACCESS_CMD_VM_DESTROYED,

	__KVMACCESS_CMD_MAX,
	KVMACCESS_CMD_MAX = __KVMACCESS_CMD_MAX - 1
};

/* How this host's processors virtualize. */
enum kvmaccess_vendor {
	KVMACCESS_VENDOR_NONE,	/* neither kvm-amd nor kvm-intel is in use */
	KVMACCESS_VENDOR_SVM,
	KVMACCESS_VENDOR_VMX,
};

/* What works on this host; bits of KVMACCESS_A_INFO_CAPS. */
enum kvmaccess_cap {
	KVMACCESS_CAP_MEMORY	= 1 << 0,	/* MEM_READ */
	KVMACCESS_CAP_VCPU	= 1 << 1,	/* VCPU_GET, TABLE_GET, guest-virtual MEM_READ */
	KVMACCESS_CAP_EVENTS	= 1 << 2,	/* VM_CREATED and VM_DESTROYED are sent at once */
};

enum kvmaccess_a_info {
	KVMACCESS_A_INFO_UNSPEC,
	KVMACCESS_A_INFO_VERSION,	/* string: version of the module */
	KVMACCESS_A_INFO_VENDOR,	/* u32: enum kvmaccess_vendor */
	KVMACCESS_A_INFO_CAPS,		/* u32: enum kvmaccess_cap bits */
	KVMACCESS_A_INFO_MISSING,	/* string, repeated: symbol or layout not found */
	KVMACCESS_A_INFO_MAX_RANGES,	/* u32 */
	KVMACCESS_A_INFO_MAX_BYTES,	/* u32 */

	__KVMACCESS_A_INFO_MAX,
	KVMACCESS_A_INFO_MAX = __KVMACCESS_A_INFO_MAX - 1
};

/* Bits of KVMACCESS_A_VM_FLAGS. */
enum kvmaccess_vm_flag {
	KVMACCESS_VM_F_PROTECTED	= 1 << 0,	/* state or memory is encrypted */
};

enum kvmaccess_a_vm {
	KVMACCESS_A_VM_UNSPEC,
	KVMACCESS_A_VM_PAD,
	KVMACCESS_A_VM_ID,		/* u64 */
	KVMACCESS_A_VM_PID,		/* u32: thread group id of the VMM, initial pid namespace */
	KVMACCESS_A_VM_VCPUS,		/* u32: number of vCPUs created so far */
	KVMACCESS_A_VM_MEMSLOTS,	/* u32: number of memslots in use */
	KVMACCESS_A_VM_MEMORY,		/* u64: bytes in address space 0's memslots */
	KVMACCESS_A_VM_SEEN,		/* u64: ns of CLOCK_BOOTTIME when first seen */
	KVMACCESS_A_VM_FLAGS,		/* u32: enum kvmaccess_vm_flag bits */

	__KVMACCESS_A_VM_MAX,
	KVMACCESS_A_VM_MAX = __KVMACCESS_A_VM_MAX - 1
};

enum kvmaccess_a_memslot {
	KVMACCESS_A_MEMSLOT_UNSPEC,
	KVMACCESS_A_MEMSLOT_PAD,
	KVMACCESS_A_MEMSLOT_VM_ID,	/* u64 */
	KVMACCESS_A_MEMSLOT_AS_ID,	/* u32: address space, 1 is system management mode */
	KVMACCESS_A_MEMSLOT_SLOT,	/* u32: the VMM's number of the slot */
	KVMACCESS_A_MEMSLOT_GPA,	/* u64: first guest-physical address */
	KVMACCESS_A_MEMSLOT_SIZE,	/* u64: bytes */
	KVMACCESS_A_MEMSLOT_HVA,	/* u64: address of it in the VMM */
	KVMACCESS_A_MEMSLOT_FLAGS,	/* u32: KVM_MEM_* of linux/kvm.h */

	__KVMACCESS_A_MEMSLOT_MAX,
	KVMACCESS_A_MEMSLOT_MAX = __KVMACCESS_A_MEMSLOT_MAX - 1
};

/*
 * Where a vCPU was when its state was taken. All registers are of one instant.
 * In HOST and PREEMPTED KVM itself may be carrying out the instruction that
 * the guest left off at, and writes its results one by one: that instant is
 * then no boundary between two instructions, and UNSETTLED is set; so it is
 * where an exception is still to be delivered whose CR2 is there already. A
 * vCPU on a CPU is looked at several times before it is given so.
 */
enum kvmaccess_condition {
	KVMACCESS_CONDITION_UNKNOWN,
	KVMACCESS_CONDITION_GUEST,	/* executing guest code until the capture's interrupt */
	KVMACCESS_CONDITION_HOST,	/* on a CPU, in the host part of an ioctl (KVM_RUN) */
	KVMACCESS_CONDITION_PREEMPTED,	/* in KVM_RUN, thread preempted on the host */
	KVMACCESS_CONDITION_HALTED,	/* in KVM_RUN, blocked: HLT or waiting for SIPI */
	KVMACCESS_CONDITION_USER,	/* out of KVM_RUN, in the VMM's user space */
	KVMACCESS_CONDITION_NEW,	/* has never run */
};

/* How the state was taken. */
enum kvmaccess_method {
	KVMACCESS_METHOD_UNKNOWN,
	KVMACCESS_METHOD_LOCAL,		/* on the requester's CPU, interrupts off */
	KVMACCESS_METHOD_INTERRUPT,	/* by an interrupt to the vCPU's CPU */
	KVMACCESS_METHOD_MEMORY,	/* in memory: the vCPU's last CPU is offline */
	KVMACCESS_METHOD_LOADED,	/* by loading the vCPU: its last CPU is offline */
};

/*
 * Bits of KVMACCESS_A_VCPU_FLAGS. With EMULATING, KVM waits for the VMM to do
 * the input or output of an instruction; the general registers are those that
 * KVM_GET_REGS would give.
 */
enum kvmaccess_vcpu_flag {
	KVMACCESS_VCPU_F_NESTED		= 1 << 0,	/* the state is a nested guest's (L2) */
	KVMACCESS_VCPU_F_SMM		= 1 << 1,	/* in system management mode */
	KVMACCESS_VCPU_F_EMULATING	= 1 << 2,	/* amid an instruction in user space */
	KVMACCESS_VCPU_F_UNSETTLED	= 1 << 3,	/* KVM may be amid an instruction */
};

/*
 * Table registers have only BASE and LIMIT. ATTRS are access rights in the
 * format of a VMCS: bits 3:0 type, 4 S, 6:5 DPL, 7 P, 12 AVL, 13 L, 14 D/B,
 * 15 G, 16 unusable (Intel SDM vol. 3, "Guest Register State").
 */
enum kvmaccess_a_segment {
	KVMACCESS_A_SEGMENT_UNSPEC,
	KVMACCESS_A_SEGMENT_PAD,
	KVMACCESS_A_SEGMENT_SELECTOR,	/* u32 */
	KVMACCESS_A_SEGMENT_BASE,	/* u64 */
	KVMACCESS_A_SEGMENT_LIMIT,	/* u32: bytes - 1 */
	KVMACCESS_A_SEGMENT_ATTRS,	/* u32 */

	__KVMACCESS_A_SEGMENT_MAX,
	KVMACCESS_A_SEGMENT_MAX = __KVMACCESS_A_SEGMENT_MAX - 1
};

enum kvmaccess_a_vcpu {
	KVMACCESS_A_VCPU_UNSPEC,
	KVMACCESS_A_VCPU_PAD,
	KVMACCESS_A_VCPU_VM_ID,		/* u64 */
	KVMACCESS_A_VCPU_ID,		/* u32: the VMM's number of the vCPU (its APIC id) */
	KVMACCESS_A_VCPU_TID,		/* u32: last thread of it, initial pid namespace; 0: none */
	KVMACCESS_A_VCPU_CONDITION,	/* u32: enum kvmaccess_condition */
	KVMACCESS_A_VCPU_METHOD,	/* u32: enum kvmaccess_method */
	KVMACCESS_A_VCPU_CPU,		/* u32: host CPU it runs on or ran on last; absent: none */
	KVMACCESS_A_VCPU_TIME,		/* u64: ns of CLOCK_MONOTONIC at the capture */
	KVMACCESS_A_VCPU_DURATION,	/* u64: ns from the start of the capture to its end */
	KVMACCESS_A_VCPU_HANDLER,	/* u64: ns of that with the vCPU's CPU interrupted */
	KVMACCESS_A_VCPU_RETRIES,	/* u32 */
	KVMACCESS_A_VCPU_FLAGS,		/* u32: enum kvmaccess_vcpu_flag bits */
	KVMACCESS_A_VCPU_CPL,		/* u32: 0 to 3 */
	KVMACCESS_A_VCPU_RAX,		/* u64, and so on to PAT but for the segments */
	KVMACCESS_A_VCPU_RBX,
	KVMACCESS_A_VCPU_RCX,
	KVMACCESS_A_VCPU_RDX,
	KVMACCESS_A_VCPU_RSI,
	KVMACCESS_A_VCPU_RDI,
	KVMACCESS_A_VCPU_RBP,
	KVMACCESS_A_VCPU_RSP,
	KVMACCESS_A_VCPU_R8,
	KVMACCESS_A_VCPU_R9,
	KVMACCESS_A_VCPU_R10,
	KVMACCESS_A_VCPU_R11,
	KVMACCESS_A_VCPU_R12,
	KVMACCESS_A_VCPU_R13,
	KVMACCESS_A_VCPU_R14,
	KVMACCESS_A_VCPU_R15,
	KVMACCESS_A_VCPU_RIP,
	KVMACCESS_A_VCPU_RFLAGS,
	KVMACCESS_A_VCPU_CR0,
	KVMACCESS_A_VCPU_CR2,
	KVMACCESS_A_VCPU_CR3,
	KVMACCESS_A_VCPU_CR4,
	KVMACCESS_A_VCPU_CR8,
	KVMACCESS_A_VCPU_EFER,
	KVMACCESS_A_VCPU_CS,		/* nest: KVMACCESS_A_SEGMENT_* */
	KVMACCESS_A_VCPU_DS,
	KVMACCESS_A_VCPU_ES,
	KVMACCESS_A_VCPU_FS,
	KVMACCESS_A_VCPU_GS,
	KVMACCESS_A_VCPU_SS,
	KVMACCESS_A_VCPU_TR,
	KVMACCESS_A_VCPU_LDTR,
	KVMACCESS_A_VCPU_GDTR,
	KVMACCESS_A_VCPU_IDTR,
	KVMACCESS_A_VCPU_DR0,		/* u64 */
	KVMACCESS_A_VCPU_DR1,
	KVMACCESS_A_VCPU_DR2,
	KVMACCESS_A_VCPU_DR3,
	KVMACCESS_A_VCPU_DR6,
	KVMACCESS_A_VCPU_DR7,
	KVMACCESS_A_VCPU_STAR,
	KVMACCESS_A_VCPU_LSTAR,
	KVMACCESS_A_VCPU_CSTAR,
	KVMACCESS_A_VCPU_SFMASK,
	KVMACCESS_A_VCPU_SYSENTER_CS,
	KVMACCESS_A_VCPU_SYSENTER_ESP,
	KVMACCESS_A_VCPU_SYSENTER_EIP,
	KVMACCESS_A_VCPU_KERNEL_GS_BASE,
	KVMACCESS_A_VCPU_PAT,

	__KVMACCESS_A_VCPU_MAX,
	KVMACCESS_A_VCPU_MAX = __KVMACCESS_A_VCPU_MAX - 1
};

enum kvmaccess_table {
	KVMACCESS_TABLE_UNSPEC,
	KVMACCESS_TABLE_GDT,
	KVMACCESS_TABLE_IDT,
};

/*
 * OFFSET and LENGTH are bytes into the table; without LENGTH the reply goes
 * to the end of the table or up to KVMACCESS_MAX_BYTES, whichever is nearer.
 * An OFFSET beyond LIMIT is EINVAL.
 */
enum kvmaccess_a_table {
	KVMACCESS_A_TABLE_UNSPEC,
	KVMACCESS_A_TABLE_PAD,
	KVMACCESS_A_TABLE_VM_ID,	/* u64 */
	KVMACCESS_A_TABLE_VCPU_ID,	/* u32 */
	KVMACCESS_A_TABLE_KIND,		/* u32: enum kvmaccess_table */
	KVMACCESS_A_TABLE_OFFSET,	/* u32 */
	KVMACCESS_A_TABLE_LENGTH,	/* u32 */
	KVMACCESS_A_TABLE_BASE,		/* u64: guest-virtual address of the table */
	KVMACCESS_A_TABLE_LIMIT,	/* u32: bytes - 1 */
	KVMACCESS_A_TABLE_DATA,		/* binary */
	KVMACCESS_A_TABLE_CONDITION,	/* u32: enum kvmaccess_condition */

	__KVMACCESS_A_TABLE_MAX,
	KVMACCESS_A_TABLE_MAX = __KVMACCESS_A_TABLE_MAX - 1
};

enum kvmaccess_a_range {
	KVMACCESS_A_RANGE_UNSPEC,
	KVMACCESS_A_RANGE_PAD,
	KVMACCESS_A_RANGE_ADDRESS,	/* u64 */
	KVMACCESS_A_RANGE_LENGTH,	/* u32: bytes */
	KVMACCESS_A_RANGE_DATA,		/* binary, LENGTH bytes */
	KVMACCESS_A_RANGE_ERROR,	/* u32: errno, positive */
	KVMACCESS_A_RANGE_FAULT,	/* u64: the address at which reading failed */

	__KVMACCESS_A_RANGE_MAX,
	KVMACCESS_A_RANGE_MAX = __KVMACCESS_A_RANGE_MAX - 1
};

enum kvmaccess_a_mem {
	KVMACCESS_A_MEM_UNSPEC,
	KVMACCESS_A_MEM_PAD,
	KVMACCESS_A_MEM_VM_ID,		/* u64 */
	KVMACCESS_A_MEM_VCPU_ID,	/* u32 */
	KVMACCESS_A_MEM_ROOT,		/* u64: in the format of CR3 */
	KVMACCESS_A_MEM_RANGE,		/* nest, repeated: KVMACCESS_A_RANGE_* */

	__KVMACCESS_A_MEM_MAX,
	KVMACCESS_A_MEM_MAX = __KVMACCESS_A_MEM_MAX - 1
};

/* One command's account. */
enum kvmaccess_a_op {
	KVMACCESS_A_OP_UNSPEC,
	KVMACCESS_A_OP_PAD,
	KVMACCESS_A_OP_CMD,		/* u32: enum kvmaccess_cmd */
	KVMACCESS_A_OP_COUNT,		/* u64: requests; a dump counts each object */
	KVMACCESS_A_OP_ERRORS,		/* u64: of them failed */
	KVMACCESS_A_OP_TIME,		/* u64: ns from request to reply, waiting included */
	KVMACCESS_A_OP_BYTES,		/* u64: bytes of guest memory read */

	__KVMACCESS_A_OP_MAX,
	KVMACCESS_A_OP_MAX = __KVMACCESS_A_OP_MAX - 1
};

/*
 * Without VM_ID the account of the whole module, VMs that are gone included.
 * CPU time of a request is spent in three places: in the requester's thread
 * (its own system time), in the module's worker thread (WORKER) and in
 * interrupts of the CPUs that vCPUs run on (INTERRUPT). The latter two are
 * nobody's but the module's, so the cost of monitoring is the requester's
 * CPU time + WORKER + INTERRUPT.
 */
enum kvmaccess_a_stats {
	KVMACCESS_A_STATS_UNSPEC,
	KVMACCESS_A_STATS_PAD,
	KVMACCESS_A_STATS_VM_ID,	/* u64 */
	KVMACCESS_A_STATS_WORKER,	/* u64: ns of CPU */
	KVMACCESS_A_STATS_INTERRUPT,	/* u64: ns of CPU */
	KVMACCESS_A_STATS_CAPTURES,	/* u64: vCPU states taken */
	KVMACCESS_A_STATS_RETRIES,	/* u64: attempts that had to be repeated */
	KVMACCESS_A_STATS_INTERRUPTS,	/* u64: interrupts sent to other CPUs */
	KVMACCESS_A_STATS_EVENTS,	/* u64: VM_CREATED and VM_DESTROYED sent */
	KVMACCESS_A_STATS_OP,		/* nest, repeated: KVMACCESS_A_OP_* */

	__KVMACCESS_A_STATS_MAX,
	KVMACCESS_A_STATS_MAX = __KVMACCESS_A_STATS_MAX - 1
};

#endif /* _UAPI_KVMACCESS_H */
