/* SPDX-License-Identifier: GPL-2.0-only */
/* What a watch is, for those who look and tell: watch.c says whose is what. */
#ifndef _KVMACCESS_TICK_H
#define _KVMACCESS_TICK_H

#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/list.h>
#include <linux/refcount.h>
#include <linux/smp.h>
#include <linux/spinlock.h>

#include "item.h"
#include "watch.h"

struct kvmaccess_digest;

struct kvmaccess_watched_vcpu {
	struct kvm_vcpu *vcpu;
	u64 exits;
	u64 tsc;
	bool clean;	/* if these are the same, nothing is to be found */
};

struct kvmaccess_watch {
	refcount_t refs;
	struct kvmaccess_vm *vm;	/* kept, not held */
	struct list_head of_vm;		/* or of those that end together */
	struct hrtimer timer;
	struct kthread_work work;
	struct kvmaccess_digest *digest;	/* NULL: no key was given */
	struct sock *sk;		/* its owner; only its memory outlives its end */
	bool deaf;			/* its owner hears nothing any more */

	u32 busy;	/* from the timer that began a tick until its end */
	u64 deadline;	/* of that tick */
	u64 missed;	/* the timer's */
	u64 cost;	/* of a tick, ns, averaged */
	u64 load;	/* its part of total_load */

	raw_spinlock_t lock;	/* held by the timer while it looks */
	bool quick;		/* it may do so */
	call_single_data_t call;	/* to look at another CPU */
	unsigned int interrupts;	/* for that, in this tick */
	bool untold;		/* the worker still has something to tell */

	/* The worker's, and the timer's while it may look. */
	struct list_head memory;	/* BYTES and ENTRY */
	struct list_head digests;
	struct list_head registers;
	unsigned int nr_registers;
	u64 generation;			/* of the memslots by which the timer knows memory */
	u64 wanted;			/* BIT_ULL()s of those, and maybe of others */
	struct kvmaccess_watched_vcpu *vcpus;
	unsigned int nr_vcpus;
	bool under_way;			/* a tick has been counted */
	bool walking;			/* and has had its first slice */
	unsigned int slices;		/* so far */
	struct list_head *next;		/* of memory, for the next slice */
	u64 to_digest;			/* bytes, in this tick */
	struct kvmaccess_item *at;	/* of digests, for the next one; NULL: the first */
	u32 at_page;
	unsigned int next_vcpu;
	u64 now;			/* when the slice began */
	u64 spent;			/* by the slices of this tick so far, ns */
	u64 allowed;			/* as that of items */
	u64 lost;			/* since an event arrived */
	struct kvmaccess_watch_stats stats;
};

/* tick.c */
int __init kvmaccess_tick_init(void);
void kvmaccess_tick_exit(void);
void kvmaccess_tick_new(struct kvmaccess_watch *watch);
void kvmaccess_tick_start(struct kvmaccess_watch *watch);
void kvmaccess_tick_stop(struct kvmaccess_watch *watch);
void kvmaccess_tick_vm_gone(struct kvmaccess_watch *watch);
void kvmaccess_tick_do(struct kthread_work *work);
void kvmaccess_tick_keep_timer_off(struct kvmaccess_watch *watch);
u64 kvmaccess_tick_worker_time(void);
u64 kvmaccess_tick_period(const struct kvmaccess_watch *watch);

/* look.c */
void __init kvmaccess_look_init(void);
void kvmaccess_look_begin(struct kvmaccess_watch *watch);
bool __must_check kvmaccess_look(struct kvmaccess_watch *watch);
void kvmaccess_look_prepare(struct kvmaccess_watch *watch);
bool kvmaccess_look_is_memory_expected(struct kvmaccess_watch *watch);
int kvmaccess_look_at_vcpus_here(struct kvmaccess_watch *watch);

/* The timer has looked at all vCPUs, or cannot; else it goes on at another CPU. */
enum { KVMACCESS_LOOK_DONE = -1, KVMACCESS_LOOK_FAILED = -2 };

/* watch.c */
void kvmaccess_watch_drop_items(struct kvmaccess_watch *watch);

/* event.c */
void kvmaccess_event_observe(struct kvmaccess_watch *watch, struct kvmaccess_track *track,
			     enum kvmaccess_state state, u64 seen);
void kvmaccess_event_tell(struct kvmaccess_watch *watch, struct kvmaccess_item *item,
			  struct kvmaccess_track *track, struct kvmaccess_watch_event *event);
void kvmaccess_event_end(struct kvmaccess_watch *watch);

#endif /* _KVMACCESS_TICK_H */
