/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_ACCOUNT_H
#define _KVMACCESS_ACCOUNT_H

#include <linux/atomic.h>

#include "uapi/kvmaccess.h"

struct kvmaccess_account_op {
	atomic64_t count;
	atomic64_t errors;
	atomic64_t time;	/* ns */
	atomic64_t bytes;
};

/* What was done and what it cost: one for each VM and one for all. */
struct kvmaccess_account {
	struct kvmaccess_account_op ops[KVMACCESS_CMD_WATCH_EVENT + 1];
	atomic64_t worker;	/* ns */
	atomic64_t interrupt;	/* ns */
	atomic64_t captures;
	atomic64_t retries;
	atomic64_t interrupts;
	atomic64_t events;
};

extern struct kvmaccess_account kvmaccess_account;

void kvmaccess_account_op(struct kvmaccess_account *vm, enum kvmaccess_cmd cmd,
			  u64 start, int err, u64 bytes);
void kvmaccess_account_tick(struct kvmaccess_account *vm, u64 ns, u64 bytes);
void kvmaccess_account_quick(struct kvmaccess_account *vm, u64 ns, u64 bytes,
			     u32 interrupts);
void kvmaccess_account_worker(struct kvmaccess_account *vm, u64 ns);
void kvmaccess_account_capture(struct kvmaccess_account *vm, u32 retries,
			       u32 interrupts, u64 interrupt);

#endif /* _KVMACCESS_ACCOUNT_H */
