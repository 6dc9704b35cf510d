// SPDX-License-Identifier: GPL-2.0-only
/*
 * Watches: items of a VM that are compared with what is expected of them, each
 * period, in place. When is in tick.c, what in look.c, what is told in event.c.
 *
 * Whoever changes a watch's items has the worker do it, between two slices: the
 * items and how they were found are the worker's, and the timer's while the
 * worker lets it look (tick.c). Others read the account as it is.
 *
 * Lifetime: a watch is in the array of watches from kvmaccess_watch_new() to
 * its end: by request, with its socket, or with the module. Whoever takes it
 * out of there stops its timer and its work, and drops the array's reference;
 * the last one frees it, with its items. The VM is held for the time of a slice
 * only; between ticks the watch keeps no more than its entry. Where the VM is
 * gone the watch stays, without items, until its owner lets go of it.
 *
 * Memory: a watch has KVMACCESS_WATCH_MAX_MEMORY for what is expected, and 128
 * bytes for each of KVMACCESS_WATCH_MAX_ITEMS; it is its owner's, by the control
 * group of whoever asked, and so is bounded for one that has a limit.
 *
 * Locks: watches_mutex protects the array and the lists of each VM's watches.
 */
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/netlink.h>
#include <linux/slab.h>
#include <linux/xarray.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#include "digest.h"
#include "tick.h"
#include "vm.h"

/* Each vCPU of each of them has a state of its own. */
#define MAX_REGISTERS	256

/* Something that the worker does between two slices. */
struct job {
	struct kthread_work work;
	struct kvmaccess_watch *watch;
	struct list_head *items;
	u64 cookie;
	const char *why;
	int err;
};

static DEFINE_MUTEX(watches_mutex);
static DEFINE_XARRAY(watches);
static unsigned int nr_watches;
static u64 last_id;
static bool stopped;

/* Items */

/* What @item adds to the account, or takes from it with @sign -1. */
static void count_item(struct kvmaccess_watch *w, const struct kvmaccess_item *item, int sign)
{
	w->stats.items += sign;
	w->stats.memory += sign * (s64)kvmaccess_item_memory(item);
	if (item->kind == KVMACCESS_KIND_DIGEST) {
		w->stats.digested += sign * (s64)item->length;
	} else if (item->kind == KVMACCESS_KIND_REGISTER) {
		w->nr_registers += sign;
		w->wanted |= BIT_ULL(item->reg);
	} else {
		w->stats.bytes += sign * (s64)item->length;
	}
}

/* Take it out of the account and of what is under way; it is still to be freed. */
static void take_item(struct kvmaccess_watch *w, struct kvmaccess_item *item)
{
	u32 i;

	if (w->next == &item->list)
		w->next = item->list.next;
	if (w->at == item)
		w->at = NULL;
	count_item(w, item, -1);
	if (item->kind == KVMACCESS_KIND_DIGEST) {
		for (i = 0; i < item->length >> PAGE_SHIFT; i++)
			w->stats.in_state[item->pages[i].track.state]--;
	} else if (item->kind == KVMACCESS_KIND_REGISTER) {
		for (i = 0; i < item->nr_vcpus; i++)
			w->stats.in_state[item->vcpus[i].track.state]--;
	} else {
		w->stats.in_state[item->track.state]--;
	}
}

/* All of them, of a watch at which nobody looks. */
void kvmaccess_watch_drop_items(struct kvmaccess_watch *w)
{
	struct list_head *lists[] = { &w->memory, &w->digests, &w->registers };
	struct kvmaccess_item *item, *next;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(lists); i++) {
		list_for_each_entry_safe(item, next, lists[i], list) {
			take_item(w, item);
			list_del(&item->list);
			kvmaccess_item_free(item);
		}
	}
}

static int run(struct job *job, kthread_work_func_t fn)
{
	kthread_init_work(&job->work, fn);
	kvmaccess_tick_do(&job->work);
	return job->err;
}

static struct list_head *list_for(struct kvmaccess_watch *w, const struct kvmaccess_item *item)
{
	switch (item->kind) {
	case KVMACCESS_KIND_DIGEST:
		return &w->digests;
	case KVMACCESS_KIND_REGISTER:
		return &w->registers;
	default:
		return &w->memory;
	}
}

static int check_room(struct job *job)
{
	const struct kvmaccess_watch *w = job->watch;
	const struct kvmaccess_item *item;
	u64 items = w->stats.items, memory = w->stats.memory;
	unsigned int registers = w->nr_registers;

	list_for_each_entry(item, job->items, list) {
		items++;
		memory += kvmaccess_item_memory(item);
		registers += item->kind == KVMACCESS_KIND_REGISTER;
	}
	if (items > KVMACCESS_WATCH_MAX_ITEMS)
		job->why = "more items than a watch may have: use another one";
	else if (memory > KVMACCESS_WATCH_MAX_MEMORY)
		job->why = "more bytes than a watch may keep: use digests or another watch";
	else if (registers > MAX_REGISTERS)
		job->why = "more REGISTERs than a watch may have: use another one";
	else
		return 0;
	return -E2BIG;
}

static void add_fn(struct kthread_work *work)
{
	struct job *job = container_of(work, struct job, work);
	struct kvmaccess_watch *w = job->watch;
	struct kvmaccess_item *item, *next;

	job->err = w->stats.flags & KVMACCESS_WATCH_F_ENDED ? -ESHUTDOWN : check_room(job);
	if (job->err)
		return;
	kvmaccess_tick_keep_timer_off(w);
	list_for_each_entry_safe(item, next, job->items, list) {
		count_item(w, item, 1);
		list_move_tail(&item->list, list_for(w, item));
	}
	/* Places for the new registers, which no vCPU has been compared with. */
	w->nr_vcpus = 0;
	kvfree(w->vcpus);
	w->vcpus = NULL;
}

static void remove_fn(struct kthread_work *work)
{
	struct job *job = container_of(work, struct job, work);
	struct kvmaccess_watch *w = job->watch;
	struct list_head *lists[] = { &w->memory, &w->digests, &w->registers };
	struct kvmaccess_item *item, *next;
	unsigned int i;

	kvmaccess_tick_keep_timer_off(w);
	job->err = -ENOENT;
	for (i = 0; i < ARRAY_SIZE(lists); i++) {
		list_for_each_entry_safe(item, next, lists[i], list) {
			if (item->cookie != job->cookie)
				continue;
			take_item(w, item);
			list_move(&item->list, job->items);
			job->err = 0;
		}
	}
	/* What is left of the tick under way. */
	w->to_digest = min(w->to_digest, w->stats.digested);
}

/* Add items, which are taken off the list; all of them or none. */
int kvmaccess_watch_add(struct kvmaccess_watch *w, struct list_head *items,
			struct netlink_ext_ack *extack)
{
	struct job job = { .watch = w, .items = items };
	int err = run(&job, add_fn);

	if (err == -ESHUTDOWN)
		NL_SET_ERR_MSG(extack, "the VM is gone");
	else if (err && extack)
		extack->_msg = job.why;
	return err;
}

int kvmaccess_watch_remove(struct kvmaccess_watch *w, u64 cookie)
{
	struct kvmaccess_item *item, *next;
	LIST_HEAD(items);
	struct job job = { .watch = w, .cookie = cookie, .items = &items };
	int err = run(&job, remove_fn);

	list_for_each_entry_safe(item, next, &items, list)
		kvmaccess_item_free(item);
	return err;
}

/* Life */

struct kvmaccess_watch *kvmaccess_watch_new(struct kvmaccess_vm *vm,
					    const struct kvmaccess_watch_config *config,
					    struct netlink_ext_ack *extack)
{
	struct kvmaccess_watch *w;
	int err;

	w = kzalloc(sizeof(*w), GFP_KERNEL_ACCOUNT);
	if (!w)
		return ERR_PTR(-ENOMEM);
	if (config->key) {
		w->digest = kvmaccess_digest_new(config->key);
		if (IS_ERR(w->digest)) {
			err = PTR_ERR(w->digest);
			goto err_free;
		}
	}
	/* The array's and the caller's. */
	refcount_set(&w->refs, 2);
	kvmaccess_tick_new(w);
	INIT_LIST_HEAD(&w->memory);
	INIT_LIST_HEAD(&w->digests);
	INIT_LIST_HEAD(&w->registers);
	w->next = &w->memory;
	w->stats.vm_id = vm->id;
	w->sk = config->sk;
	sock_hold(w->sk);
	w->stats.portid = config->portid;
	w->stats.period = config->period;
	w->stats.effective = config->period;
	w->stats.budget = config->budget;
	w->vm = vm;

	mutex_lock(&watches_mutex);
	if (stopped) {
		err = -EPROTONOSUPPORT;
	} else if (nr_watches >= KVMACCESS_MAX_WATCHES) {
		NL_SET_ERR_MSG(extack, "there are as many watches as there may be");
		err = -ENOSPC;
	} else {
		w->stats.id = last_id + 1;
		err = xa_err(xa_store(&watches, w->stats.id, w, GFP_KERNEL_ACCOUNT));
	}
	if (!err) {
		last_id++;
		nr_watches++;
		kvmaccess_vm_keep(vm);
		list_add_tail(&w->of_vm, &vm->watches);
		kvmaccess_tick_start(w);
	}
	mutex_unlock(&watches_mutex);
	if (!err)
		return w;

	sock_put(w->sk);
	kfree_sensitive(w->digest);
err_free:
	kfree(w);
	return ERR_PTR(err);
}

void kvmaccess_watch_put(struct kvmaccess_watch *w)
{
	if (!refcount_dec_and_test(&w->refs))
		return;
	kvmaccess_watch_drop_items(w);
	kvfree(w->vcpus);
	kfree_sensitive(w->digest);
	kvmaccess_vm_forget(w->vm);
	sock_put(w->sk);
	kfree(w);
}

/* Find a watch of this socket, or of any if that is 0; to be put. */
struct kvmaccess_watch *kvmaccess_watch_get(u64 id, u32 portid)
{
	struct kvmaccess_watch *w;

	mutex_lock(&watches_mutex);
	w = xa_load(&watches, id);
	if (w && (!portid || w->stats.portid == portid))
		refcount_inc(&w->refs);
	else
		w = NULL;
	mutex_unlock(&watches_mutex);
	return w;
}

/* The watch with the lowest id above @after and up to @last, or NULL. */
struct kvmaccess_watch *kvmaccess_watch_get_next(u64 after, u64 last)
{
	unsigned long id = after + 1;
	struct kvmaccess_watch *w;

	mutex_lock(&watches_mutex);
	w = xa_find(&watches, &id, last, XA_PRESENT);
	if (w)
		refcount_inc(&w->refs);
	mutex_unlock(&watches_mutex);
	return w;
}

/* The highest id of all watches so far. */
u64 kvmaccess_watch_last(void)
{
	return READ_ONCE(last_id);
}

u64 kvmaccess_watch_id(struct kvmaccess_watch *w)
{
	return w->stats.id;
}

/* The VM of the watch, held; NULL if it is gone. */
struct kvmaccess_vm *kvmaccess_watch_hold_vm(struct kvmaccess_watch *w)
{
	struct kvmaccess_vm *vm = NULL;

	/* Those that are being ended with the module may not look any more. */
	mutex_lock(&watches_mutex);
	if (!stopped && kvmaccess_vm_hold(w->vm))
		vm = w->vm;
	mutex_unlock(&watches_mutex);
	return vm;
}

/* For digests, with a budget to walk them. */
bool kvmaccess_watch_has_key(struct kvmaccess_watch *w)
{
	return w->digest && w->stats.budget >= PAGE_SIZE;
}

/* Nobody finds the watch from here on. */
static void unlist(struct kvmaccess_watch *w)
{
	lockdep_assert_held(&watches_mutex);

	xa_erase(&watches, w->stats.id);
	nr_watches--;
	list_del(&w->of_vm);
}

int kvmaccess_watch_del(struct kvmaccess_watch *w)
{
	bool found;

	mutex_lock(&watches_mutex);
	found = xa_load(&watches, w->stats.id) == w;
	if (found)
		unlist(w);
	mutex_unlock(&watches_mutex);
	/* Somebody else was faster. */
	if (!found)
		return -ENOENT;
	kvmaccess_tick_stop(w);
	kvmaccess_watch_put(w);
	return 0;
}

/* As it is while the worker may be at it. */
void kvmaccess_watch_stats(struct kvmaccess_watch *w, struct kvmaccess_watch_stats *stats)
{
	/* Each number is right, and that is all. */
	*stats = data_race(w->stats);
	stats->missed = READ_ONCE(w->missed);
	stats->effective = kvmaccess_tick_period(w);
}

/* The VM of @vm is gone: end its watches now and not at their next ticks. */
void kvmaccess_watch_vm_gone(struct kvmaccess_vm *vm)
{
	struct kvmaccess_watch *w;

	mutex_lock(&watches_mutex);
	list_for_each_entry(w, &vm->watches, of_vm)
		kvmaccess_tick_vm_gone(w);
	mutex_unlock(&watches_mutex);
}

/*
 * All watches of this socket, or of all if it is 0, are unlisted and put on
 * @ending. None of them is heard from here on if @deaf.
 */
static void unlist_all(u32 portid, bool deaf, struct list_head *ending)
{
	struct kvmaccess_watch *w;
	unsigned long id;

	mutex_lock(&watches_mutex);
	xa_for_each(&watches, id, w) {
		if (portid && w->stats.portid != portid)
			continue;
		unlist(w);
		WRITE_ONCE(w->deaf, deaf);
		list_add_tail(&w->of_vm, ending);
	}
	mutex_unlock(&watches_mutex);
}

/* A socket is closed, maybe because its process was killed. */
static int on_netlink(struct notifier_block *nb, unsigned long event, void *data)
{
	const struct netlink_notify *n = data;
	struct kvmaccess_watch *w, *next;
	LIST_HEAD(ending);

	if (event != NETLINK_URELEASE || n->protocol != NETLINK_GENERIC ||
	    !net_eq(n->net, &init_net) || xa_empty(&watches))
		return NOTIFY_DONE;
	/* All at once: the end of each may take a slice of others. */
	unlist_all(n->portid, true, &ending);
	list_for_each_entry_safe(w, next, &ending, of_vm) {
		kvmaccess_tick_stop(w);
		kvmaccess_watch_put(w);
	}
	return NOTIFY_DONE;
}

static struct notifier_block netlink_notifier = {
	.notifier_call = on_netlink,
};

/* No watch ticks from now on, and none is made. */
void kvmaccess_watch_stop(void)
{
	struct kvmaccess_watch *w, *next;
	LIST_HEAD(ending);

	mutex_lock(&watches_mutex);
	stopped = true;
	mutex_unlock(&watches_mutex);
	netlink_unregister_notifier(&netlink_notifier);
	unlist_all(0, false, &ending);
	list_for_each_entry_safe(w, next, &ending, of_vm) {
		kvmaccess_tick_stop(w);
		kvmaccess_event_end(w);
		kvmaccess_watch_put(w);
	}
}

/* There are no requests any more. */
void kvmaccess_watch_exit(void)
{
	kvmaccess_tick_exit();
	xa_destroy(&watches);
}

int __init kvmaccess_watch_init(void)
{
	int err = kvmaccess_tick_init();

	if (err)
		return err;
	err = netlink_register_notifier(&netlink_notifier);
	if (err)
		kvmaccess_tick_exit();
	return err;
}
