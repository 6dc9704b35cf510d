/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_WATCH_H
#define _KVMACCESS_WATCH_H

#include <linux/list.h>
#include <linux/types.h>

#include "uapi/kvmaccess.h"

struct kvmaccess_vm;
struct kvmaccess_watch;
struct netlink_ext_ack;
struct sock;

/* What somebody wants. */
struct kvmaccess_watch_config {
	struct sock *sk;	/* that it belongs to */
	u32 portid;		/* the same's */
	u64 period;		/* ns */
	u32 budget;		/* bytes of digests a tick */
	const void *key;	/* of digests; NULL: none */
};

/* What was done so far, and how things stand. */
struct kvmaccess_watch_stats {
	u64 id;
	u64 vm_id;
	u32 portid;
	u32 flags;		/* enum kvmaccess_watch_flag */
	u64 period;
	u64 effective;
	u32 budget;
	u32 items;
	u64 memory;		/* of expected bytes and digests */
	u64 bytes;		/* compared each tick */
	u64 digested;		/* walked by digest */
	u64 ticks;
	u64 missed;
	u64 late;
	u64 latest;
	u64 time;
	u64 longest;
	u64 compared;
	u64 passes;
	u64 captures;
	u64 skipped;
	u64 unsettled;
	u64 failed;
	u32 in_state[KVMACCESS_STATE_ENDED];
	u64 events;
	u64 coalesced;
	u64 lost;
};

struct kvmaccess_watch_event {
	u64 watch;
	u64 vm_id;
	u64 cookie;
	enum kvmaccess_kind kind;	/* UNSPEC: the watch itself */
	enum kvmaccess_state state;
	u64 gpa;
	u32 offset;
	const void *expected;
	const void *data;	/* NULL: not known */
	u32 length;
	u32 vcpu;
	enum kvmaccess_register reg;
	enum kvmaccess_condition condition;
	u64 time;
	u64 tick;
	u64 coalesced;
	u64 lost;
};

int __init kvmaccess_watch_init(void);
void kvmaccess_watch_stop(void);
void kvmaccess_watch_exit(void);
void kvmaccess_watch_vm_gone(struct kvmaccess_vm *vm);

struct kvmaccess_watch * __must_check
kvmaccess_watch_new(struct kvmaccess_vm *vm, const struct kvmaccess_watch_config *config,
		    struct netlink_ext_ack *extack);
struct kvmaccess_watch * __must_check kvmaccess_watch_get(u64 id, u32 portid);
struct kvmaccess_watch * __must_check kvmaccess_watch_get_next(u64 after, u64 last);
u64 kvmaccess_watch_last(void);
u64 kvmaccess_watch_id(struct kvmaccess_watch *watch);
struct kvmaccess_vm * __must_check kvmaccess_watch_hold_vm(struct kvmaccess_watch *watch);
void kvmaccess_watch_put(struct kvmaccess_watch *watch);
bool kvmaccess_watch_has_key(struct kvmaccess_watch *watch);
int __must_check kvmaccess_watch_add(struct kvmaccess_watch *watch, struct list_head *items,
				     struct netlink_ext_ack *extack);
int __must_check kvmaccess_watch_remove(struct kvmaccess_watch *watch, u64 cookie);
int __must_check kvmaccess_watch_del(struct kvmaccess_watch *watch);
void kvmaccess_watch_stats(struct kvmaccess_watch *watch, struct kvmaccess_watch_stats *stats);

#endif /* _KVMACCESS_WATCH_H */
