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
 *  WATCH_NEW    VM_ID, PERIOD, [BUDGET, KEY]         KVMACCESS_A_WATCH_*
 *  WATCH_ADD    ID, ITEM...                          KVMACCESS_A_WATCH_*
 *  WATCH_DEL    ID, [COOKIE]                         KVMACCESS_A_WATCH_*
 *  WATCH_GET    do: ID; dump: -                      KVMACCESS_A_WATCH_*
 *
 * A dump gives one message an object and sets NLM_F_DUMP_INTR on it when the
 * set of objects changed while it ran: read it again then.
 *
 * VM_CREATED and VM_DESTROYED are notifications to the multicast group "vm";
 * they carry KVMACCESS_A_VM_*. A VM's id is given once and is never given
 * again while the module is loaded.
 *
 * Watches
 * -------
 * A watch compares items of one VM, in place, every PERIOD ns. It belongs to
 * the socket that made it, alone may be changed by it, and ends with it. Items
 * are of four kinds, each in an ITEM of WATCH_ADD with a COOKIE, which means
 * nothing to the module and need not be unique:
 *
 *  BYTES     GPA, DATA: the bytes there are DATA, which does not cross a
 *            boundary of 4096 bytes
 *  ENTRY     GPA, VALUE, [MASK]: the 8 bytes there, and MASK, are VALUE; an
 *            entry of a page table without its accessed and dirty bits, for
 *            instance. GPA is a multiple of 8
 *  DIGEST    GPA, DATA: each page from there on has its digest in DATA, 8
 *            bytes each. GPA is a multiple of 4096. At most BUDGET bytes are
 *            walked in a tick, in turn
 *  REGISTER  REGISTER, VALUE, [MASK], [VCPU_ID]: the register, and MASK, is
 *            VALUE, on this vCPU or on each
 *
 * GPAs are those of address space 0. Either all items of a message are added
 * or none. WATCH_DEL with COOKIE takes away the items that have it, without
 * the watch.
 *
 * WATCH_EVENT carries KVMACCESS_A_EVENT_* to the owner alone, when an item is
 * found in another STATE than before: different, different in another way, as
 * expected again, not resident, or in no memslot. Nothing is faulted in, and
 * looking at a page does not make it one that is in use. It is not resident if
 * it was not twice in a row: a host that exchanges a page for another has none
 * for an instant. Of a guest whose memory is encrypted, what is compared is
 * what the host has. OFFSET counts from the item's GPA to the first byte that
 * differs (the page, for a digest), EXPECTED and DATA are what should be there
 * and what is, up to KVMACCESS_WATCH_EVENT_BYTES of it, or the value of an
 * entry, register or digest. Each item may send 16 events at once and 100 a
 * second from then on, each watch 512 and 1000. An item that may not keeps
 * what it has to tell, the latest state of it; COALESCED counts the changes in
 * between. Events that are not read have a quarter of the socket's buffer
 * (SO_RCVBUF), 512 KiB at most, so that answers find room and come soon; those
 * beyond wait in their items in the same way. LOST counts the events that did
 * not reach the owner since the one before, for want of memory; those items try
 * again. STATE_ENDED without a COOKIE says that the VM is gone or that the
 * module is being unloaded; the watch does nothing more.
 *
 * A vCPU that has not run since the last tick costs nothing. One that has is
 * captured as by VCPU_GET, if there are REGISTERs at all. One that never ran
 * is not looked at; nor is one in system management mode, or with a nested
 * guest, whose registers are not those that the items are about. Where the
 * state is UNSETTLED, registers that KVM writes in more than one step
 * (everything but MSRs) are different only if they still are when the vCPU has
 * run again. What a VMM writes to a vCPU that does not run is found when it
 * does.
 *
 * The digest of a page is made of its 512 words w (64 bits, little endian) and
 * a KEY of 128 bits: k[i] = SipHash-2-4(KEY, i), i as 8 bytes, little endian;
 * sum = the sum over even i of (w[i] + k[i]) * (w[i+1] + k[i+1]), factors
 * modulo 2^64, sum modulo 2^128; the digest is SipHash-2-4(KEY, sum), sum as 16
 * bytes, little endian. KEY is to be random and secret.
 *
 * The first tick is at a random time within the first period. A tick that takes
 * more than half of the period, or its share of half a CPU with those of all
 * watches, stretches the period: EFFECTIVE says to what. Without DIGESTs, and
 * with 128 items, 32 KiB and 16 vCPUs at most, ticks that find all as expected
 * are those of a timer, in its interrupt; all of these take 50 us of a CPU at
 * once and one fourth of its time at most. All else is done by a thread.
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
 *  E2BIG          more ranges or bytes than a request may ask for, or more
 *                 items or bytes than a watch may have
 *  ENOSPC         there are KVMACCESS_MAX_WATCHES watches
 *  ENOENT         no VM has this id (any more); no watch of this socket has
 *                 this id, or no item of it this cookie
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

/* Limits of watches: their number, and of each period, ns, items, bytes. */
#define KVMACCESS_MAX_WATCHES		8192
#define KVMACCESS_WATCH_MIN_PERIOD	500000
#define KVMACCESS_WATCH_MAX_PERIOD	3600000000000
#define KVMACCESS_WATCH_MAX_ITEMS	16384
#define KVMACCESS_WATCH_MAX_MEMORY	67108864	/* of DATA; 24 bytes for a digest's 8 */
#define KVMACCESS_WATCH_MAX_BUDGET	16777216
#define KVMACCESS_WATCH_MAX_DIGESTS	4096	/* of an item */
#define KVMACCESS_WATCH_KEY_BYTES	16
#define KVMACCESS_WATCH_EVENT_BYTES	64

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
	KVMACCESS_CMD_WATCH_NEW,
	KVMACCESS_CMD_WATCH_ADD,
	KVMACCESS_CMD_WATCH_DEL,
	KVMACCESS_CMD_WATCH_GET,
	KVMACCESS_CMD_WATCH_EVENT,

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
	KVMACCESS_CAP_WATCH	= 1 << 3,	/* WATCH_NEW; REGISTERs need VCPU */
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
	KVMACCESS_A_OP_COUNT,		/* u64: requests; each object of a dump; ticks */
	KVMACCESS_A_OP_ERRORS,		/* u64: of them failed */
	KVMACCESS_A_OP_TIME,		/* u64: ns from request to reply, or of ticks */
	KVMACCESS_A_OP_BYTES,		/* u64: bytes of guest memory read */

	__KVMACCESS_A_OP_MAX,
	KVMACCESS_A_OP_MAX = __KVMACCESS_A_OP_MAX - 1
};

/*
 * Without VM_ID the account of the whole module, VMs that are gone included.
 * CPU time of a request is spent in three places: in the requester's thread
 * (its own system time), in the module's worker threads (WORKER; all ticks
 * are there) and in interrupts of the CPUs that vCPUs run on (INTERRUPT). The latter two are
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

enum kvmaccess_kind {
	KVMACCESS_KIND_UNSPEC,
	KVMACCESS_KIND_BYTES,
	KVMACCESS_KIND_ENTRY,
	KVMACCESS_KIND_DIGEST,
	KVMACCESS_KIND_REGISTER,
};

/* What can be watched: registers that a running kernel leaves alone. */
enum kvmaccess_register {
	KVMACCESS_REGISTER_UNSPEC,
	KVMACCESS_REGISTER_CR0,
	KVMACCESS_REGISTER_CR3,
	KVMACCESS_REGISTER_CR4,
	KVMACCESS_REGISTER_EFER,
	KVMACCESS_REGISTER_GDTR_BASE,
	KVMACCESS_REGISTER_GDTR_LIMIT,
	KVMACCESS_REGISTER_IDTR_BASE,
	KVMACCESS_REGISTER_IDTR_LIMIT,
	KVMACCESS_REGISTER_TR_BASE,
	KVMACCESS_REGISTER_TR_SELECTOR,
	KVMACCESS_REGISTER_LDTR_SELECTOR,
	KVMACCESS_REGISTER_DR0,
	KVMACCESS_REGISTER_DR1,
	KVMACCESS_REGISTER_DR2,
	KVMACCESS_REGISTER_DR3,
	KVMACCESS_REGISTER_DR7,
	KVMACCESS_REGISTER_STAR,
	KVMACCESS_REGISTER_LSTAR,
	KVMACCESS_REGISTER_CSTAR,
	KVMACCESS_REGISTER_SFMASK,
	KVMACCESS_REGISTER_SYSENTER_CS,
	KVMACCESS_REGISTER_SYSENTER_ESP,
	KVMACCESS_REGISTER_SYSENTER_EIP,
	KVMACCESS_REGISTER_PAT,
};

/* How an item, or a watch, is. */
enum kvmaccess_state {
	KVMACCESS_STATE_EXPECTED,
	KVMACCESS_STATE_DIFFERENT,
	KVMACCESS_STATE_NOT_RESIDENT,	/* the host has no page in place */
	KVMACCESS_STATE_NO_MEMSLOT,	/* nothing is at its address */
	KVMACCESS_STATE_ENDED,		/* of a watch */
};

/* Bits of KVMACCESS_A_WATCH_FLAGS. */
enum kvmaccess_watch_flag {
	KVMACCESS_WATCH_F_ENDED	= 1 << 0,	/* its VM is gone */
};

/*
 * GPA and so on as the item's kind needs them. A MASK that is absent is all
 * ones; VALUE has no bit that MASK has not.
 */
enum kvmaccess_a_item {
	KVMACCESS_A_ITEM_UNSPEC,
	KVMACCESS_A_ITEM_PAD,
	KVMACCESS_A_ITEM_COOKIE,	/* u64 */
	KVMACCESS_A_ITEM_KIND,		/* u32: enum kvmaccess_kind */
	KVMACCESS_A_ITEM_GPA,		/* u64 */
	KVMACCESS_A_ITEM_DATA,		/* binary */
	KVMACCESS_A_ITEM_VALUE,		/* u64 */
	KVMACCESS_A_ITEM_MASK,		/* u64 */
	KVMACCESS_A_ITEM_REGISTER,	/* u32: enum kvmaccess_register */
	KVMACCESS_A_ITEM_VCPU_ID,	/* u32: the VMM's number; absent: all vCPUs */

	__KVMACCESS_A_ITEM_MAX,
	KVMACCESS_A_ITEM_MAX = __KVMACCESS_A_ITEM_MAX - 1
};

/* KEY, ITEM and COOKIE are in requests only, the rest from FLAGS on in replies. */
enum kvmaccess_a_watch {
	KVMACCESS_A_WATCH_UNSPEC,
	KVMACCESS_A_WATCH_PAD,
	KVMACCESS_A_WATCH_ID,		/* u64: never given again while the module is loaded */
	KVMACCESS_A_WATCH_VM_ID,	/* u64 */
	KVMACCESS_A_WATCH_PERIOD,	/* u64: ns */
	KVMACCESS_A_WATCH_BUDGET,	/* u32: bytes of DIGESTs a tick; absent: 0 */
	KVMACCESS_A_WATCH_KEY,		/* binary, of DIGESTs */
	KVMACCESS_A_WATCH_ITEM,		/* nest, repeated: KVMACCESS_A_ITEM_* */
	KVMACCESS_A_WATCH_COOKIE,	/* u64 */
	KVMACCESS_A_WATCH_FLAGS,	/* u32: enum kvmaccess_watch_flag bits */
	KVMACCESS_A_WATCH_PORTID,	/* u32: of the socket that owns it */
	KVMACCESS_A_WATCH_EFFECTIVE,	/* u64: ns, PERIOD or what it was stretched to */
	KVMACCESS_A_WATCH_ITEMS,	/* u32 */
	KVMACCESS_A_WATCH_MEMORY,	/* u64: bytes of DATA that are kept */
	KVMACCESS_A_WATCH_BYTES,	/* u64: compared in each tick */
	KVMACCESS_A_WATCH_DIGESTED,	/* u64: bytes that DIGESTs cover */
	KVMACCESS_A_WATCH_TICKS,	/* u64 */
	KVMACCESS_A_WATCH_MISSED,	/* u64: ticks left out: one was under way */
	KVMACCESS_A_WATCH_LATE,		/* u64: ticks that began more than 1 ms after their time */
	KVMACCESS_A_WATCH_LATEST,	/* u64: ns that a tick began after its time, at most */
	KVMACCESS_A_WATCH_TIME,		/* u64: ns of all ticks */
	KVMACCESS_A_WATCH_LONGEST,	/* u64: ns of a tick, at most */
	KVMACCESS_A_WATCH_COMPARED,	/* u64: bytes compared so far, DIGESTs included */
	KVMACCESS_A_WATCH_PASSES,	/* u64: times that all DIGESTs have been walked */
	KVMACCESS_A_WATCH_CAPTURES,	/* u64: vCPU states taken */
	KVMACCESS_A_WATCH_SKIPPED,	/* u64: vCPUs that had not run, in all ticks */
	KVMACCESS_A_WATCH_UNSETTLED,	/* u64: captures at which some registers were in doubt */
	KVMACCESS_A_WATCH_FAILED,	/* u64: captures that failed */
	KVMACCESS_A_WATCH_DIFFERENT,	/* u32: items, pages, registers of a vCPU */
	KVMACCESS_A_WATCH_NOT_RESIDENT,	/* u32: likewise */
	KVMACCESS_A_WATCH_NO_MEMSLOT,	/* u32: likewise */
	KVMACCESS_A_WATCH_EVENTS,	/* u64: events sent */
	KVMACCESS_A_WATCH_COALESCED,	/* u64: changes that another event stands for */
	KVMACCESS_A_WATCH_LOST,		/* u64: events that could not be delivered */

	__KVMACCESS_A_WATCH_MAX,
	KVMACCESS_A_WATCH_MAX = __KVMACCESS_A_WATCH_MAX - 1
};

enum kvmaccess_a_event {
	KVMACCESS_A_EVENT_UNSPEC,
	KVMACCESS_A_EVENT_PAD,
	KVMACCESS_A_EVENT_WATCH_ID,	/* u64 */
	KVMACCESS_A_EVENT_VM_ID,	/* u64 */
	KVMACCESS_A_EVENT_STATE,	/* u32: enum kvmaccess_state */
	KVMACCESS_A_EVENT_TIME,		/* u64: ns of CLOCK_MONOTONIC when it was found */
	KVMACCESS_A_EVENT_TICK,		/* u64: number of the tick, from 1 */
	KVMACCESS_A_EVENT_COALESCED,	/* u64: changes before this one, untold */
	KVMACCESS_A_EVENT_LOST,		/* u64: events since the last that arrived */
	KVMACCESS_A_EVENT_COOKIE,	/* u64 */
	KVMACCESS_A_EVENT_KIND,		/* u32: enum kvmaccess_kind */
	KVMACCESS_A_EVENT_GPA,		/* u64: of what differs, else of the item */
	KVMACCESS_A_EVENT_OFFSET,	/* u32: of that in the item, bytes */
	KVMACCESS_A_EVENT_EXPECTED,	/* binary */
	KVMACCESS_A_EVENT_DATA,		/* binary, absent where it cannot be read */
	KVMACCESS_A_EVENT_VCPU_ID,	/* u32: of a REGISTER */
	KVMACCESS_A_EVENT_REGISTER,	/* u32: enum kvmaccess_register */
	KVMACCESS_A_EVENT_CONDITION,	/* u32: enum kvmaccess_condition */

	__KVMACCESS_A_EVENT_MAX,
	KVMACCESS_A_EVENT_MAX = __KVMACCESS_A_EVENT_MAX - 1
};

#endif /* _UAPI_KVMACCESS_H */
