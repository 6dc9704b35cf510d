/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_KSYMS_H
#define _KVMACCESS_KSYMS_H

#include <linux/kvm_host.h>

/* Symbols and layouts that were looked for and not found, for INFO. */
#define KVMACCESS_KSYMS_MISSING_MAX 16

/*
 * What KVM keeps to itself. Each pointer has the type that the kernel's own
 * headers give the symbol where they declare it, so that a change of type
 * breaks the build and not the host. All of it belongs to kvm.ko, which
 * cannot be unloaded under this module: kvm_put_kvm() is linked to directly.
 */
struct kvmaccess_ksyms {
	typeof(kvm_lock) *lock;
	typeof(vm_list) *vms;
	typeof(kvm_x86_ops) *ops;
	struct kvm_vcpu * __percpu *running;
	/* By kvmaccess_ksyms_call(), each with a vCPU. */
	const void *get_cr8;
	const void *vcpu_load;
	const void *vcpu_put;
	unsigned long destroy_vm;	/* kvm_arch_destroy_vm(), to be hooked */
};

extern struct kvmaccess_ksyms kvmaccess_ksyms;

int __init kvmaccess_ksyms_init(void);
unsigned long kvmaccess_ksyms_call(const void *function, const void *argument);
void kvmaccess_ksyms_miss(const char *what);
const char *kvmaccess_ksyms_missing(unsigned int i);

#endif /* _KVMACCESS_KSYMS_H */
