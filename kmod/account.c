// SPDX-License-Identifier: GPL-2.0-only
#include <linux/ktime.h>
#include <linux/timekeeping.h>

#include "account.h"

struct kvmaccess_account kvmaccess_account;

static void op_add(struct kvmaccess_account_op *op, u64 ns, int err, u64 bytes)
{
	atomic64_inc(&op->count);
	atomic64_add(ns, &op->time);
	if (err)
		atomic64_inc(&op->errors);
	if (bytes)
		atomic64_add(bytes, &op->bytes);
}

/* @vm is NULL for a request that no VM was found for. */
void kvmaccess_account_op(struct kvmaccess_account *vm, enum kvmaccess_cmd cmd,
			  u64 start, int err, u64 bytes)
{
	u64 ns = ktime_get_ns() - start;

	op_add(&kvmaccess_account.ops[cmd], ns, err, bytes);
	if (vm)
		op_add(&vm->ops[cmd], ns, err, bytes);
}

/* A tick of a watch, which is the account of its events. */
void kvmaccess_account_tick(struct kvmaccess_account *vm, u64 ns, u64 bytes)
{
	op_add(&kvmaccess_account.ops[KVMACCESS_CMD_WATCH_EVENT], ns, 0, bytes);
	op_add(&vm->ops[KVMACCESS_CMD_WATCH_EVENT], ns, 0, bytes);
	kvmaccess_account_worker(vm, ns);
}

/* The same of one in the timer's interrupt, and those that it sent. */
void kvmaccess_account_quick(struct kvmaccess_account *vm, u64 ns, u64 bytes,
			     u32 interrupts)
{
	op_add(&kvmaccess_account.ops[KVMACCESS_CMD_WATCH_EVENT], ns, 0, bytes);
	op_add(&vm->ops[KVMACCESS_CMD_WATCH_EVENT], ns, 0, bytes);
	atomic64_add(ns, &kvmaccess_account.interrupt);
	atomic64_add(ns, &vm->interrupt);
	if (interrupts) {
		atomic64_add(interrupts, &kvmaccess_account.interrupts);
		atomic64_add(interrupts, &vm->interrupts);
	}
}

/* The module's own total is the workers' run time, not a sum of these. */
void kvmaccess_account_worker(struct kvmaccess_account *vm, u64 ns)
{
	atomic64_add(ns, &vm->worker);
}

static void capture_add(struct kvmaccess_account *a, u32 retries,
			u32 interrupts, u64 interrupt)
{
	atomic64_inc(&a->captures);
	if (retries)
		atomic64_add(retries, &a->retries);
	if (interrupts) {
		atomic64_add(interrupts, &a->interrupts);
		atomic64_add(interrupt, &a->interrupt);
	}
}

void kvmaccess_account_capture(struct kvmaccess_account *vm, u32 retries,
			       u32 interrupts, u64 interrupt)
{
	capture_add(&kvmaccess_account, retries, interrupts, interrupt);
	capture_add(vm, retries, interrupts, interrupt);
}
