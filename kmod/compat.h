/* SPDX-License-Identifier: GPL-2.0-only */
/* What changed between the kernels that this module builds for. */
#ifndef _KVMACCESS_COMPAT_H
#define _KVMACCESS_COMPAT_H

#include <linux/ftrace.h>
#include <linux/genetlink.h>
#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/version.h>
#include <net/genetlink.h>

/* Not on its own: it uses what the above declare. */
#include <asm/svm.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "KvmAccess needs Linux 6.1 or later"
#endif

/* "genetlink: use attrs from struct genl_info", 6.6 */
static inline struct nlattr **
kvmaccess_compat_dump_attrs(struct netlink_callback *cb)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
	return genl_dumpit_info(cb)->info.attrs;
#else
	return genl_dumpit_info(cb)->attrs;
#endif
}

/* "KVM: Allow arch code to track number of memslot address spaces per VM", 6.8 */
#ifdef KVM_ADDRESS_SPACE_NUM
#define kvmaccess_compat_as_num(kvm) KVM_ADDRESS_SPACE_NUM
#else
#define kvmaccess_compat_as_num(kvm) kvm_arch_nr_memslot_as_ids(kvm)
#endif

/*
 * Call @fn with the struct pid of the thread that last ran @vcpu, or NULL.
 * "KVM: Protect vCPU's "last run PID" with rwlock, not RCU", 6.13
 */
static inline pid_t kvmaccess_compat_vcpu_pid(struct kvm_vcpu *vcpu,
					      pid_t (*fn)(struct pid *pid, void *arg),
					      void *arg)
{
	pid_t ret;

	rcu_read_lock();
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	read_lock(&vcpu->pid_lock);
	ret = fn(vcpu->pid, arg);
	read_unlock(&vcpu->pid_lock);
#else
	ret = fn(rcu_dereference(vcpu->pid), arg);
#endif
	rcu_read_unlock();
	return ret;
}

/* RIP left the array of general registers, and both their bitmaps grew, in 7.2. */
#ifdef KVMACCESS_HAS_VCPU_REGS_RIP
static inline unsigned long kvmaccess_compat_rip(struct kvm_vcpu *vcpu)
{
	return vcpu->arch.regs[VCPU_REGS_RIP];
}

#define KVMACCESS_COMPAT_REG_RIP VCPU_REGS_RIP
#define KVMACCESS_COMPAT_REG_CR3 VCPU_EXREG_CR3
#else
static inline unsigned long kvmaccess_compat_rip(struct kvm_vcpu *vcpu)
{
	return vcpu->arch.rip;
}

#define KVMACCESS_COMPAT_REG_RIP VCPU_REG_RIP
#define KVMACCESS_COMPAT_REG_CR3 VCPU_REG_CR3
#endif

static inline bool kvmaccess_compat_is_dirty(struct kvm_vcpu *vcpu, unsigned int reg)
{
	return test_bit(reg, (const unsigned long *)&vcpu->arch.regs_dirty);
}

static inline bool kvmaccess_compat_is_tdx(struct kvm *kvm)
{
#ifdef KVM_X86_TDX_VM
	return kvm->arch.vm_type == KVM_X86_TDX_VM;
#else
	return false;
#endif
}

/* Whether guest-physical addresses are translated by the processor. */
static inline bool kvmaccess_compat_has_npt(const struct vmcb *vmcb)
{
#ifdef KVMACCESS_HAS_NESTED_CTL
	return vmcb->control.nested_ctl & SVM_NESTED_CTL_NP_ENABLE;
#else
	return vmcb->control.misc_ctl & SVM_MISC_ENABLE_NP;
#endif
}

/* "ftrace: abstract DYNAMIC_FTRACE_WITH_ARGS accesses", 6.2 */
#ifdef CONFIG_DYNAMIC_FTRACE_WITH_ARGS
static __always_inline unsigned long
kvmaccess_compat_argument(struct ftrace_regs *regs)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
	return ftrace_regs_get_argument(regs, 0);
#else
	return regs_get_kernel_argument(&regs->regs, 0);
#endif
}
#endif

/* "hrtimers: Introduce hrtimer_setup() to replace hrtimer_init()", 6.13 */
static inline void kvmaccess_compat_timer(struct hrtimer *timer,
					  enum hrtimer_restart (*fn)(struct hrtimer *))
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	hrtimer_setup(timer, fn, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
#else
	hrtimer_init(timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	timer->function = fn;
#endif
}

/*
 * "treewide: Introduce kthread_run_worker[_on_cpu]()", 6.14: a worker that is
 * only created waits for its first work uninterruptibly, and the kernel says
 * that it hangs when that is not there after two minutes.
 */
#ifndef kthread_run_worker
#define kthread_run_worker kthread_create_worker
#endif

#endif /* _KVMACCESS_COMPAT_H */
