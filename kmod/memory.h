/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_MEMORY_H
#define _KVMACCESS_MEMORY_H

#include <linux/types.h>

struct kvm;
struct kvmaccess_vm;
struct kvmaccess_vcpu_state;
struct task_struct;

/* How a vCPU translates addresses. */
struct kvmaccess_paging {
	u64 root;		/* CR3 */
	unsigned int levels;	/* 0: paging is off */
	bool wide;		/* entries of 8 bytes */
	bool large;		/* without wide: 4 MiB pages */
};

/* Valid inside of kvmaccess_memory_run() only. */
struct kvmaccess_memory {
	struct kvm *kvm;
	u32 as_id;
	u64 fault;		/* where the last reading failed */
};

typedef int (*kvmaccess_memory_fn)(struct kvmaccess_memory *memory, void *arg);

int __init kvmaccess_memory_init(void);
void kvmaccess_memory_exit(void);
u64 kvmaccess_memory_worker_time(void);

int __must_check kvmaccess_memory_run(struct kvmaccess_vm *vm, u32 as_id,
				      kvmaccess_memory_fn fn, void *arg);
int __must_check kvmaccess_memory_read(struct kvmaccess_memory *memory,
				       u64 gpa, void *to, u32 len);
int __must_check kvmaccess_memory_read_virtual(struct kvmaccess_memory *memory,
					       const struct kvmaccess_paging *p,
					       u64 gva, void *to, u32 len);
void kvmaccess_memory_paging(const struct kvmaccess_vcpu_state *state,
			     struct kvmaccess_paging *paging);
bool kvmaccess_memory_is_canonical(const struct kvmaccess_paging *paging,
				   u64 gva, u32 len);
const char *kvmaccess_memory_strerror(int err);

#endif /* _KVMACCESS_MEMORY_H */
