/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_VCPU_H
#define _KVMACCESS_VCPU_H

#include <linux/kvm_host.h>

#include "api.h"

struct kvmaccess_vm;
struct netlink_ext_ack;

/* Registers that are wanted, by BIT_ULL(KVMACCESS_REGISTER_*); all that there are. */
#define KVMACCESS_VCPU_ALL	(~0ULL)

/* Whether something of the segment register VCPU_SREG_* is wanted. */
static inline bool kvmaccess_vcpu_wants_segment(u64 wanted, unsigned int i)
{
	if (wanted == KVMACCESS_VCPU_ALL)
		return true;
	if (i == VCPU_SREG_TR)
		return wanted & (BIT_ULL(KVMACCESS_REGISTER_TR_BASE) |
				 BIT_ULL(KVMACCESS_REGISTER_TR_SELECTOR));
	return i == VCPU_SREG_LDTR && wanted & BIT_ULL(KVMACCESS_REGISTER_LDTR_SELECTOR);
}

/* What differs between SVM and VMX. */
struct kvmaccess_vcpu_vendor {
	enum kvmaccess_vendor id;
	const char *module;
	const char *prefix;	/* of its functions */

	/* Find layouts; called with the vendor's module loaded. */
	int (*init)(void);

	/*
	 * The CPU whose interrupts keep the vCPU's state from changing: while
	 * one is handled there and this keeps naming that CPU, the vCPU is
	 * loaded there, and has been interrupted, or nowhere. -1: there is no
	 * such CPU. An error where this vCPU can never be read.
	 */
	int (*home)(struct kvm_vcpu *vcpu);

	/*
	 * Read the registers that KVM does not keep in struct kvm_vcpu_arch,
	 * with interrupts off on the vCPU's home: those that are wanted, and
	 * maybe others. Caches that KVM fills on demand must not be filled from
	 * here: the thread that has been interrupted may be filling them.
	 */
	int (*read)(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *state, u64 wanted);

	/* The state is memory that can be read from any CPU. */
	bool in_memory;
};

extern const struct kvmaccess_vcpu_vendor kvmaccess_vcpu_svm;
extern const struct kvmaccess_vcpu_vendor kvmaccess_vcpu_vmx;

const struct kvmaccess_vcpu_vendor *kvmaccess_vcpu_vendor(void);
void kvmaccess_vcpu_read_msrs(struct kvm_vcpu *vcpu,
			      struct kvmaccess_vcpu_state *state,
			      u64 wanted, unsigned long except);
int __must_check kvmaccess_vcpu_capture_here(struct kvmaccess_vm *vm,
					     struct kvm_vcpu *vcpu, u64 wanted,
					     struct kvmaccess_vcpu_state *state);
int __must_check kvmaccess_vcpu_capture(struct kvmaccess_vm *vm,
					struct kvm_vcpu *vcpu,
					struct kvmaccess_vcpu_state *state,
					struct netlink_ext_ack *extack);

#endif /* _KVMACCESS_VCPU_H */
