/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_VM_H
#define _KVMACCESS_VM_H

#include <linux/kvm_host.h>
#include <linux/list.h>
#include <linux/refcount.h>
#include <linux/workqueue.h>

#include "account.h"
#include "api.h"

struct netlink_ext_ack;

/*
 * One VM that this module has seen. The entry outlives the VM for as long as
 * somebody uses it; @kvm is only an address unless kvmaccess_vm_get() has
 * given a reference.
 */
struct kvmaccess_vm {
	struct hlist_node hash;
	struct list_head list;
	struct rcu_head rcu;
	struct work_struct last_put;
	refcount_t refs;
	atomic_t looking;	/* who keep the VM from going without a reference */
	bool gone;
	bool fresh;
	bool unseen;
	unsigned int pending;	/* events to tell other modules, by BIT(cmd) */
	struct list_head notify;
	struct list_head watches;	/* see watch.c */
	pid_t pid;
	u64 id;
	u64 seen;
	u64 walk;
	struct kvm *kvm;
	struct kvmaccess_account account;
};

int __init kvmaccess_vm_init(void);
void kvmaccess_vm_start(void);
void kvmaccess_vm_stop(void);
void kvmaccess_vm_exit(void);

bool kvmaccess_vm_has_events(void);
struct kvmaccess_vm * __must_check
kvmaccess_vm_get(u64 id, struct netlink_ext_ack *extack);
bool kvmaccess_vm_holds_in_interrupts(void);
bool __must_check kvmaccess_vm_look(struct kvmaccess_vm *vm);
void kvmaccess_vm_looked(struct kvmaccess_vm *vm);
bool __must_check kvmaccess_vm_hold(struct kvmaccess_vm *vm);
void kvmaccess_vm_keep(struct kvmaccess_vm *vm);
void kvmaccess_vm_forget(struct kvmaccess_vm *vm);
u64 kvmaccess_vm_last(void);
struct kvmaccess_vm * __must_check kvmaccess_vm_get_next(u64 after, u64 last);
void kvmaccess_vm_put(struct kvmaccess_vm *vm);
u32 kvmaccess_vm_generation(void);
void kvmaccess_vm_info(struct kvmaccess_vm *vm, struct kvmaccess_vm_info *info);
void kvmaccess_vm_identify(struct kvmaccess_vm *vm, struct kvmaccess_vm_info *info);
struct kvm_vcpu *kvmaccess_vm_vcpu(struct kvmaccess_vm *vm, u32 id);

#endif /* _KVMACCESS_VM_H */
