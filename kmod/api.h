/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What other kernel modules may ask of this one.
 *
 * All functions are called in process context and may sleep; none waits for a
 * guest, a VMM or a pager. A VM or vCPU may be gone by the time that a
 * function returns: what it returned was true at some instant of the call.
 * Errors are those of uapi/kvmaccess.h, negative.
 *
 * A module that uses any of them keeps kvmaccess.ko loaded: rmmod refuses to
 * remove it first. Before such a module goes it unregisters its notifiers.
 * What is asked for here is accounted for like a request over netlink.
 *
 * To build against it: this header, uapi/kvmaccess.h, and the Module.symvers
 * of a build of kvmaccess.ko in KBUILD_EXTRA_SYMBOLS; sample.c is an example.
 */
#ifndef _KVMACCESS_API_H
#define _KVMACCESS_API_H

#include <linux/kvm_host.h>
#include <linux/notifier.h>

#include "uapi/kvmaccess.h"

/* One VM, as VM_GET has it. */
struct kvmaccess_vm_info {
	u64 id;		/* never given again while kvmaccess.ko is loaded */
	u64 seen;	/* ns of CLOCK_BOOTTIME */
	pid_t pid;	/* thread group id of the VMM; 0 where it is not known */
	/* Not known of a VM that has been destroyed. */
	u32 vcpus;
	u32 memslots;
	u32 flags;	/* enum kvmaccess_vm_flag */
	u64 memory;	/* bytes */
};

enum kvmaccess_msr {
	KVMACCESS_MSR_STAR,
	KVMACCESS_MSR_LSTAR,
	KVMACCESS_MSR_CSTAR,
	KVMACCESS_MSR_SFMASK,
	KVMACCESS_MSR_SYSENTER_CS,
	KVMACCESS_MSR_SYSENTER_ESP,
	KVMACCESS_MSR_SYSENTER_EIP,
	KVMACCESS_MSR_KERNEL_GS_BASE,

	KVMACCESS_MSR_NUM
};

/* A vCPU at one instant, as VCPU_GET has it. */
struct kvmaccess_vcpu_state {
	/* How it was taken. */
	enum kvmaccess_condition condition;
	enum kvmaccess_method method;
	int cpu;	/* -1: it has been on none */
	pid_t tid;	/* of its last thread, for the caller's pid namespace */
	u32 retries;
	u32 flags;	/* enum kvmaccess_vcpu_flag */
	u64 time;	/* ns of CLOCK_MONOTONIC */
	u64 duration;	/* ns */
	u64 handler;	/* ns of that with its CPU interrupted */

	/* What the vCPU had. */
	u32 as_id;	/* address space: 1 in system management mode */
	u32 cpl;
	unsigned long gpr[16];	/* by VCPU_REGS_* */
	unsigned long rip;
	unsigned long rflags;
	unsigned long cr0, cr2, cr3, cr4, cr8;
	u64 efer;
	struct kvm_segment segment[8];	/* by VCPU_SREG_* */
	struct desc_ptr gdt;
	struct desc_ptr idt;
	unsigned long db[4], dr6, dr7;
	u64 msr[KVMACCESS_MSR_NUM];
	u64 pat;
};

/* What a watch, made by its owner by netlink, has found, as WATCH_EVENT has it. */
struct kvmaccess_watch_change {
	u64 watch;
	u64 vm;
	u64 cookie;	/* by which the owner knows the item */
	u64 time;	/* ns of CLOCK_MONOTONIC */
	u64 coalesced;	/* changes of the item before this one that were not told */
	u64 lost;	/* changes of any watch before this one that found no room here */
	enum kvmaccess_kind kind;	/* UNSPEC: the watch itself, which has ended */
	enum kvmaccess_state state;
	/* Of memory, where it differs or the item begins. */
	u64 gpa;
	/* Of a register. */
	u32 vcpu;
	enum kvmaccess_register reg;
	enum kvmaccess_condition condition;
	/* What is expected and what is there: so many bytes of it; 0: nothing to say. */
	u32 length;
	u8 expected[KVMACCESS_WATCH_EVENT_BYTES];
	u8 data[KVMACCESS_WATCH_EVENT_BYTES];
};

/* The page tables that the vCPU itself uses, in place of a root. */
#define KVMACCESS_ROOT_OF_VCPU	(~0ULL)

/*
 * Call @fn for each VM that is there now, by rising id, until it returns something else than 0,
 * which is returned then. Neither a lock nor the VM is held meanwhile.
 */
int kvmaccess_walk_vms(int (*fn)(const struct kvmaccess_vm_info *vm, void *arg),
		       void *arg);

/* Take the state of a vCPU, which goes on running; @vcpu is the VMM's number. */
int __must_check kvmaccess_read_vcpu(u64 vm, u32 vcpu,
				     struct kvmaccess_vcpu_state *state);

/*
 * Read @len bytes of guest memory to @to, memory of the kernel: at a
 * guest-physical address, or at a guest-virtual one by the page tables of a
 * vCPU, with @root, in the format of CR3, in place of its own. After an error
 * @to holds anything.
 */
int __must_check kvmaccess_read_physical(u64 vm, u64 gpa, void *to, u32 len);
int __must_check kvmaccess_read_virtual(u64 vm, u32 vcpu, u64 root, u64 gva,
					void *to, u32 len);

/*
 * Have @nb called for each VM that comes or goes from now on, with
 * KVMACCESS_CMD_VM_CREATED or KVMACCESS_CMD_VM_DESTROYED as the action and a
 * struct kvmaccess_vm_info as the data; and for what watches tell their owners,
 * with KVMACCESS_CMD_WATCH_EVENT and a struct kvmaccess_watch_change, some
 * microseconds after them. A notifier may call all of the above,
 * but not the two below; while it runs the others wait. Of one VM creation
 * comes before destruction. VMs that are there already: walk after registering.
 * When kvmaccess_unregister_notifier() returns, @nb is not running any more.
 */
int kvmaccess_register_notifier(struct notifier_block *nb);
int kvmaccess_unregister_notifier(struct notifier_block *nb);

#endif /* _KVMACCESS_API_H */
