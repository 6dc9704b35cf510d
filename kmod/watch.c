// SPDX-License-Identifier: GPL-2.0-only
/*
 * Watches: items of a VM that are compared with what is expected of them, each
 * period, in place.
 *
 * Most ticks find all as it should be, and the larger part of what such a tick
 * would cost is the switch to a thread and back. So a high-resolution timer of
 * each watch looks itself, in its interrupt, if there is not much to look at.
 * It can compare, and nothing more. Where it finds anything else than that all
 * is as expected, it queues the tick to one worker thread, which adopts the
 * VMM's address space as memory.c does, and looks again. Nothing is copied,
 * allocated or sent unless something is not as it was at the last tick.
 *
 * Whoever changes a watch's items has the worker do it, between two ticks: the
 * items and how they were found are the worker's. From the timer on until the
 * tick has ended ->busy says whose the account of ticks is; and the timer looks
 * at items only while ->quick allows for it, which the worker takes back before
 * it adds or removes some. Others read the account as it is.
 *
 * The worker is a real-time thread, or ticks would be late whenever the host is
 * busy. It is kept from taking the host with it: a tick looks at SLICE bytes at
 * most before it lets those of other watches go first, and no watch takes more
 * than half of a CPU, nor all together: their periods are stretched.
 *
 * Lifetime: a watch is in the array of watches from kvmaccess_watch_new() to
 * its end: by request, with its socket, or with the module. Whoever takes it
 * out of there stops its timer and its work, and drops the array's reference;
 * the last one frees it. The VM is held for the time of a slice only; between
 * ticks the watch keeps no more than its entry. Where the VM is gone the watch
 * stays, without items, until its owner lets go of it.
 *
 * Locks: watches_mutex protects the array and the lists of each VM's watches.
 */
#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/mmu_context.h>
#include <linux/netlink.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/siphash.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>
#include <linux/xarray.h>
#include <net/net_namespace.h>

#include "account.h"
#include "compat.h"
#include "digest.h"
#include "item.h"
#include "memory.h"
#include "netlink.h"
#include "vcpu.h"
#include "vm.h"
#include "watch.h"

/* Bytes that are compared before other watches have their turn. */
#define SLICE		(2U << 20)

/* What looking at an item costs beside its bytes, in bytes. */
#define SLICE_ITEM	64

/* What the timer's interrupt looks at: some microseconds. */
#define QUICK_BYTES	(32U << 10)
#define QUICK_ITEMS	128
#define QUICK_VCPUS	16

/* Each vCPU of each of them has a state of its own. */
#define MAX_REGISTERS	256

/* Rates of events: what may come at once, and ns for each from then on. */
#define ITEM_BURST	16
#define ITEM_INTERVAL	(10 * NSEC_PER_MSEC)
#define WATCH_BURST	512
#define WATCH_INTERVAL	NSEC_PER_MSEC

/* Ticks that share an interrupt with another timer are this late at most. */
#define SLACK		(50 * NSEC_PER_USEC)

/* What all watches together may take of a CPU, in millionths. */
#define MAX_LOAD	500000

/* Who is at a tick: nobody, the timer and interrupts that it sends, the worker. */
enum { IDLE, LOOKING, QUEUED };

struct watched_vcpu {
	struct kvm_vcpu *vcpu;
	u64 exits;
	u64 tsc;
	bool clean;	/* if these are the same, nothing is to be found */
};

struct kvmaccess_watch {
	refcount_t refs;
	struct kvmaccess_vm *vm;	/* kept, not held */
	struct list_head of_vm;
	struct hrtimer timer;
	struct kthread_work work;
	struct kvmaccess_digest *digest;	/* NULL: no key was given */

	u32 busy;	/* from the timer that began a tick until its end */
	u64 deadline;	/* of that tick */
	u64 missed;	/* the timer's */
	u64 cost;	/* of a tick, ns, averaged */
	u64 load;	/* its part of total_load */

	raw_spinlock_t lock;	/* held by the timer while it looks */
	bool quick;		/* it may do so */
	call_single_data_t call;	/* to look at another CPU */
	unsigned int interrupts;	/* for that, in this tick */
	unsigned int next_vcpu;
	bool untold;		/* the worker still has something to tell */

	/* The worker's. */
	struct list_head memory;	/* BYTES and ENTRY */
	struct list_head digests;
	struct list_head registers;
	unsigned int nr_registers;
	struct watched_vcpu *vcpus;
	unsigned int nr_vcpus;
	bool under_way;			/* a tick has been counted */
	bool walking;			/* and has had its first slice */
	struct list_head *next;		/* of memory, for the next slice */
	u64 to_digest;			/* bytes, in this tick */
	struct kvmaccess_item *at;	/* of digests, for the next one; NULL: the first */
	u32 at_page;
	u64 now;			/* when the slice began */
	u64 spent;			/* by the slices of this tick so far, ns */
	u64 allowed;			/* as that of items */
	u64 lost;			/* since an event arrived */
	struct kvmaccess_watch_stats stats;
};

/* Something that the worker does between two ticks. */
struct job {
	struct kthread_work work;
	struct completion done;
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

static struct kthread_worker *worker;
static atomic64_t total_load;

/* The worker's. */
static siphash_key_t seen_key;
static u8 bounce[PAGE_SIZE];
static struct kvmaccess_vcpu_state vcpu_state;

/* The timers'. */
static DEFINE_PER_CPU(struct kvmaccess_vcpu_state, quick_state);

/* What @item adds to the account, or takes from it with @sign -1. */
static void count_item(struct kvmaccess_watch *w, const struct kvmaccess_item *item, int sign)
{
	w->stats.items += sign;
	w->stats.memory += sign * (s64)kvmaccess_item_memory(item);
	if (item->kind == KVMACCESS_KIND_DIGEST)
		w->stats.digested += sign * (s64)item->length;
	else if (item->kind == KVMACCESS_KIND_REGISTER)
		w->nr_registers += sign;
	else
		w->stats.bytes += sign * (s64)item->length;
}

static void drop_item(struct kvmaccess_watch *w, struct kvmaccess_item *item)
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
	list_del(&item->list);
	kvmaccess_item_free(item);
}

/* From here on, until the end of the next tick, the timer does not look. */
static void keep_timer_off(struct kvmaccess_watch *w)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&w->lock, flags);
	w->quick = false;
	raw_spin_unlock_irqrestore(&w->lock, flags);
}

/* The part of a CPU that the watch needs, in millionths. */
static void set_load(struct kvmaccess_watch *w, u64 load)
{
	if (load != w->load)
		atomic64_add(load - w->load, &total_load);
	w->load = load;
}

/* The worker has nothing to do with the watch any more. */
static void retire(struct kvmaccess_watch *w)
{
	struct list_head *lists[] = { &w->memory, &w->digests, &w->registers };
	struct kvmaccess_item *item, *next;
	unsigned int i;

	keep_timer_off(w);
	set_load(w, 0);
	for (i = 0; i < ARRAY_SIZE(lists); i++) {
		list_for_each_entry_safe(item, next, lists[i], list)
			drop_item(w, item);
	}
}

/* Events */

static bool is_allowed(u64 allowed, u64 now, u64 interval, unsigned int burst)
{
	return allowed <= now + (burst - 1) * interval;
}

/* Note how something is found. */
static void observe(struct kvmaccess_watch *w, struct kvmaccess_track *track,
		    enum kvmaccess_state state, u64 seen)
{
	if (likely(track->state == state && track->seen == seen))
		return;
	w->stats.in_state[track->state]--;
	w->stats.in_state[state]++;
	track->state = state;
	track->seen = seen;
	if (track->pending != U32_MAX)
		track->pending++;
}

/*
 * Send an event if there is something to tell, and it may be told by now. What
 * could not be told is told by a later tick.
 */
static void tell(struct kvmaccess_watch *w, struct kvmaccess_item *item,
		 struct kvmaccess_track *track, struct kvmaccess_watch_event *e)
{
	if (!track->pending)
		return;
	if (!is_allowed(item->allowed, w->now, ITEM_INTERVAL, ITEM_BURST) ||
	    !is_allowed(w->allowed, w->now, WATCH_INTERVAL, WATCH_BURST)) {
		w->untold = true;
		return;
	}
	item->allowed = max(item->allowed, w->now) + ITEM_INTERVAL;
	w->allowed = max(w->allowed, w->now) + WATCH_INTERVAL;

	e->watch = w->stats.id;
	e->vm_id = w->stats.vm_id;
	e->cookie = item->cookie;
	e->kind = item->kind;
	e->state = track->state;
	e->time = w->now;
	e->tick = w->stats.ticks;
	e->coalesced = track->pending - 1;
	e->lost = w->lost;
	if (kvmaccess_netlink_watch_event(w->stats.portid, e)) {
		w->stats.lost++;
		w->lost++;
		w->untold = true;
		return;
	}
	track->pending = 0;
	w->lost = 0;
	w->stats.events++;
	w->stats.coalesced += e->coalesced;
}

/* The VM is gone, or the module goes; the owner is told. */
static void end(struct kvmaccess_watch *w)
{
	struct kvmaccess_watch_event e = {
		.watch = w->stats.id,
		.vm_id = w->stats.vm_id,
		.state = KVMACCESS_STATE_ENDED,
		.time = ktime_get_ns(),
		.tick = w->stats.ticks,
		.lost = w->lost,
	};

	if (w->stats.flags & KVMACCESS_WATCH_F_ENDED)
		return;
	w->stats.flags |= KVMACCESS_WATCH_F_ENDED;
	if (kvmaccess_netlink_watch_event(w->stats.portid, &e))
		w->stats.lost++;
	else
		w->stats.events++;
}

/* Memory */

static unsigned long hva_of(struct kvm_memslots *slots, u64 gpa)
{
	struct kvm_memory_slot *slot = search_memslots(slots, gpa >> PAGE_SHIFT, false);

	/* Invalid: on its way out or to another place. */
	if (!slot || slot->flags & KVM_MEMSLOT_INVALID)
		return 0;
	return __gfn_to_hva_memslot(slot, gpa >> PAGE_SHIFT) + offset_in_page(gpa);
}

static int compare_entry(const struct kvmaccess_item *item, u64 *found)
{
	if (!user_access_begin((const void __user *)item->hva, sizeof(*found)))
		return -ENODATA;
	unsafe_get_user(*found, (const u64 __user *)item->hva, absent);
	user_access_end();
	return (*found & item->mask) != item->value;

absent:
	user_access_end();
	return -ENODATA;
}

/* An item of memory that is not as expected, or of which that is still to be told. */
static void look_closer(struct kvmaccess_watch *w, struct kvmaccess_item *item,
			int err, u32 offset, u64 found)
{
	struct kvmaccess_watch_event e = { .gpa = item->gpa };

	if (err == 1 && item->kind == KVMACCESS_KIND_ENTRY) {
		e.expected = &item->value;
		e.data = &found;
		e.length = sizeof(found);
		observe(w, &item->track, KVMACCESS_STATE_DIFFERENT, found & item->mask);
	} else if (err == 1 &&
		   !copy_from_user_nofault(bounce, (const void __user *)item->hva,
					   item->length)) {
		/* What was found there counts, even if the guest was faster. */
		memcpy(bounce + offset, &found,
		       min_t(u32, sizeof(found), item->length - offset));
		while (bounce[offset] == item->bytes[offset])
			offset++;
		e.gpa += offset;
		e.offset = offset;
		e.expected = item->bytes + offset;
		e.data = bounce + offset;
		e.length = min_t(u32, KVMACCESS_WATCH_EVENT_BYTES, item->length - offset);
		observe(w, &item->track, KVMACCESS_STATE_DIFFERENT,
			siphash(bounce, item->length, &seen_key));
	} else if (err) {
		observe(w, &item->track, err == -EFAULT ? KVMACCESS_STATE_NO_MEMSLOT :
			KVMACCESS_STATE_NOT_RESIDENT, 0);
	} else {
		observe(w, &item->track, KVMACCESS_STATE_EXPECTED, 0);
	}
	tell(w, item, &item->track, &e);
}

static void look_at_page(struct kvmaccess_watch *w, struct kvm_memslots *slots,
			 struct kvmaccess_item *item, u32 i)
{
	struct kvmaccess_item_page *page = &item->pages[i];
	struct kvmaccess_watch_event e = {
		.offset = i << PAGE_SHIFT,
		.gpa = item->gpa + ((u64)i << PAGE_SHIFT),
	};
	unsigned long hva = hva_of(slots, e.gpa);
	u64 value;

	if (!hva) {
		observe(w, &page->track, KVMACCESS_STATE_NO_MEMSLOT, 0);
	} else if (kvmaccess_digest_page(w->digest, (const void __user *)hva, &value)) {
		observe(w, &page->track, KVMACCESS_STATE_NOT_RESIDENT, 0);
	} else if (value != page->expected) {
		e.expected = &page->expected;
		e.data = &value;
		e.length = sizeof(value);
		observe(w, &page->track, KVMACCESS_STATE_DIFFERENT, value);
	} else {
		observe(w, &page->track, KVMACCESS_STATE_EXPECTED, 0);
	}
	tell(w, item, &page->track, &e);
}

/* Go on with the pages of digests until the tick's or the slice's share is done. */
static bool walk_digests(struct kvmaccess_watch *w, struct kvm_memslots *slots, u32 left)
{
	for (; w->to_digest; w->to_digest -= PAGE_SIZE) {
		if (left < PAGE_SIZE)
			return false;
		left -= PAGE_SIZE;
		if (!w->at) {
			w->at = list_first_entry(&w->digests, struct kvmaccess_item, list);
			w->at_page = 0;
		}
		look_at_page(w, slots, w->at, w->at_page);
		w->stats.compared += PAGE_SIZE;
		if (++w->at_page < w->at->length >> PAGE_SHIFT)
			continue;
		w->at_page = 0;
		if (!list_is_last(&w->at->list, &w->digests)) {
			w->at = list_next_entry(w->at, list);
			continue;
		}
		w->at = NULL;
		w->stats.passes++;
	}
	return true;
}

/* Returns false if another slice is needed. */
static bool look_at_memory(struct kvmaccess_watch *w, struct kvm *kvm)
{
	struct kvm_memslots *slots = __kvm_memslots(kvm, 0);
	u64 generation = slots->generation;
	struct kvmaccess_item *item;
	u32 left = SLICE;
	u64 found = 0;
	u32 offset = 0;
	int err;

	for (; w->next != &w->memory; w->next = w->next->next) {
		item = list_entry(w->next, struct kvmaccess_item, list);
		if (left < item->length + SLICE_ITEM)
			return false;
		left -= item->length + SLICE_ITEM;

		if (unlikely(item->generation != generation)) {
			item->hva = hva_of(slots, item->gpa);
			item->generation = generation;
		}
		if (unlikely(!item->hva))
			err = -EFAULT;
		else if (item->kind == KVMACCESS_KIND_BYTES)
			err = kvmaccess_item_compare((const void __user *)item->hva,
						     item->bytes, item->length,
						     &offset, &found);
		else
			err = compare_entry(item, &found);
		if (unlikely(err || item->track.state || item->track.pending))
			look_closer(w, item, err, offset, found);
	}
	return walk_digests(w, slots, left);
}

/* The same in the VMM's address space; an error if that is gone. */
static int adopt_and_look(struct kvmaccess_watch *w, struct kvm *kvm, bool *done)
{
	int idx;

	*done = true;
	if (w->next == &w->memory && !w->to_digest)
		return 0;
	if (!mmget_not_zero(kvm->mm))
		return -ESHUTDOWN;
	kthread_use_mm(kvm->mm);
	idx = srcu_read_lock(&kvm->srcu);
	pagefault_disable();
	*done = look_at_memory(w, kvm);
	pagefault_enable();
	srcu_read_unlock(&kvm->srcu, idx);
	kthread_unuse_mm(kvm->mm);
	/* The VMM may have died meanwhile: tear it down elsewhere. */
	mmput_async(kvm->mm);
	return 0;
}

/* Registers */

/* Returns whether the vCPU is to be looked at again though it has not run. */
static bool look_at_registers(struct kvmaccess_watch *w, unsigned int index, u64 exits)
{
	struct kvm_vcpu *vcpu = w->vcpus[index].vcpu;
	struct kvmaccess_vcpu_state *s = &vcpu_state;
	bool doubtful = s->flags & KVMACCESS_VCPU_F_UNSETTLED;
	bool nests = READ_ONCE(vcpu->stat.nested_run);
	struct kvmaccess_item *item;
	bool again = doubtful;

	w->stats.unsettled += doubtful;
	/* The registers are others'. */
	if (s->flags & (KVMACCESS_VCPU_F_SMM | KVMACCESS_VCPU_F_NESTED))
		return true;

	list_for_each_entry(item, &w->registers, list) {
		u64 value = kvmaccess_item_register(s, item->reg);
		struct kvmaccess_watch_event e = {
			.expected = &item->value,
			.data = &value,
			.length = sizeof(value),
			.vcpu = vcpu->vcpu_id,
			.reg = item->reg,
			.condition = s->condition,
		};
		struct kvmaccess_item_vcpu *v = &item->vcpus[index];
		bool differs = (value & item->mask) != item->value;

		if (item->vcpu >= 0 && item->vcpu != vcpu->vcpu_id)
			continue;
		/*
		 * KVM may be amid changing it: what the guest never has does not
		 * outlive its next entry. A guest that nests has another's
		 * registers for a moment, all of them.
		 */
		if (differs && doubtful && (nests || !kvmaccess_item_is_whole(item->reg)) &&
		    !(v->track.state == KVMACCESS_STATE_DIFFERENT &&
		      v->track.seen == (value & item->mask)) &&
		    (!v->doubt || v->doubt == exits + 1)) {
			v->doubt = exits + 1;
			continue;
		}
		v->doubt = 0;
		observe(w, &v->track, differs ? KVMACCESS_STATE_DIFFERENT :
			KVMACCESS_STATE_EXPECTED, differs ? value & item->mask : 0);
		tell(w, item, &v->track, &e);
		again |= v->track.pending;
	}
	return again;
}

/*
 * Whether the vCPU may have run since it was looked at; one that never ran has
 * not. With what is to be noted if it is looked at now.
 *
 * KVM writes last_guest_tsc after each exit, before it leaves guest mode, and
 * counts the exit some instructions later. So if the vCPU is out of guest mode,
 * and then the time of its last exit is still that from *before* it was looked
 * at, it has not been in the guest in between; only a guest that sets its own
 * clock back could make the time the same, and for that it exits, which is
 * counted. Should it enter right now, the next tick finds it there or finds
 * the exit. What the host changes in a vCPU that does not run (an ioctl, the
 * end of an emulated access) has no effect before it enters. A state that KVM
 * may have been amid changing is never clean: see look_at_registers().
 */
static bool may_have_run(const struct watched_vcpu *v, u64 *tsc, u64 *exits)
{
	const struct kvm_vcpu *vcpu = v->vcpu;
	int mode = READ_ONCE(vcpu->mode);

	/* Pairs with the barrier of KVM between the two. */
	smp_rmb();
	*tsc = READ_ONCE(vcpu->arch.last_guest_tsc);
	*exits = READ_ONCE(vcpu->stat.exits);
	if (READ_ONCE(vcpu->arch.last_vmentry_cpu) == -1)
		return false;
	return !v->clean || mode != OUTSIDE_GUEST_MODE || v->tsc != *tsc || v->exits != *exits;
}

static void look_at_vcpus(struct kvmaccess_watch *w)
{
	unsigned int i;

	for (i = 0; i < w->nr_vcpus; i++) {
		struct watched_vcpu *v = &w->vcpus[i];
		u64 tsc, exits;

		if (!may_have_run(v, &tsc, &exits)) {
			w->stats.skipped++;
			continue;
		}
		v->clean = false;
		if (kvmaccess_vcpu_capture(w->vm, v->vcpu, &vcpu_state, NULL)) {
			w->stats.failed++;
			continue;
		}
		w->stats.captures++;
		v->tsc = tsc;
		v->exits = exits;
		v->clean = !look_at_registers(w, i, exits);
	}
}

static int grow_item(struct kvmaccess_item *item, unsigned int nr)
{
	struct kvmaccess_item_vcpu *vcpus;

	if (item->nr_vcpus >= nr)
		return 0;
	vcpus = kvcalloc(nr, sizeof(*vcpus), GFP_KERNEL);
	if (!vcpus)
		return -ENOMEM;
	if (item->nr_vcpus)
		memcpy(vcpus, item->vcpus, item->nr_vcpus * sizeof(*vcpus));
	kvfree(item->vcpus);
	item->vcpus = vcpus;
	item->nr_vcpus = nr;
	return 0;
}

/* Have a place for each vCPU that there is now; they are never fewer again. */
static int grow(struct kvmaccess_watch *w, struct kvm *kvm)
{
	unsigned int nr = atomic_read(&kvm->online_vcpus);
	struct kvmaccess_item *item;
	struct watched_vcpu *vcpus;
	unsigned int i;

	list_for_each_entry(item, &w->registers, list) {
		if (grow_item(item, nr))
			return -ENOMEM;
	}
	if (nr == w->nr_vcpus)
		return 0;
	vcpus = kvcalloc(nr, sizeof(*vcpus), GFP_KERNEL);
	if (!vcpus)
		return -ENOMEM;
	for (i = 0; i < nr; i++)
		vcpus[i].vcpu = kvm_get_vcpu(kvm, i);
	kvfree(w->vcpus);
	w->vcpus = vcpus;
	w->nr_vcpus = nr;
	return 0;
}

/* Ticks */

/*
 * Half of the time is left to others, whatever a tick takes; and all watches
 * together leave half of a CPU. Called at the end of a tick.
 */
static void stretch(struct kvmaccess_watch *w, u64 spent)
{
	u64 effective;

	w->stats.time += spent;
	if (spent > w->stats.longest)
		w->stats.longest = spent;
	/* One that was kept waiting by an interrupt of another CPU is not the rule. */
	spent = min(spent, max(8 * w->cost, w->stats.period));
	w->cost = w->cost ? (7 * w->cost + spent) / 8 : spent;
	effective = max(w->stats.period, 2 * w->cost);
	set_load(w, w->cost * 1000000 / effective);
	WRITE_ONCE(w->stats.effective, effective);
}

static u64 effective_period(const struct kvmaccess_watch *w)
{
	u64 effective = READ_ONCE(w->stats.effective);
	u64 load = atomic64_read(&total_load);

	if (likely(load <= MAX_LOAD))
		return effective;
	return effective * (load / (MAX_LOAD / 16)) / 16;
}

static void count_tick(struct kvmaccess_watch *w)
{
	u64 late = w->now - w->deadline;

	w->stats.ticks++;
	if (late > NSEC_PER_MSEC)
		w->stats.late++;
	if (late > w->stats.latest)
		w->stats.latest = late;
}

static void begin(struct kvmaccess_watch *w)
{
	/* The timer may have begun it, and not have got to its end. */
	if (!w->under_way)
		count_tick(w);
	w->under_way = true;
	w->walking = true;
	w->untold = false;
	w->next = w->memory.next;
	w->to_digest = min_t(u64, w->stats.budget & PAGE_MASK, w->stats.digested);
}

/* Whether the next tick is likely to find everything as expected, at once. */
static bool is_quick(const struct kvmaccess_watch *w)
{
	return kvmaccess_vm_holds_in_interrupts() &&
	       !w->untold && !w->stats.digested && w->stats.bytes <= QUICK_BYTES &&
	       w->stats.items <= QUICK_ITEMS && w->nr_vcpus <= QUICK_VCPUS &&
	       !w->stats.in_state[KVMACCESS_STATE_DIFFERENT] &&
	       !w->stats.in_state[KVMACCESS_STATE_NOT_RESIDENT] &&
	       !w->stats.in_state[KVMACCESS_STATE_NO_MEMSLOT];
}

static void finish(struct kvmaccess_watch *w)
{
	w->walking = false;
	w->quick = is_quick(w);
	w->stats.compared += w->stats.bytes;
	kvmaccess_account_tick(&w->vm->account, w->spent, w->stats.bytes);
	stretch(w, w->spent);
	/* From here on the timer may queue the next one. */
	smp_store_release(&w->busy, IDLE);
}

static void tick_fn(struct kthread_work *work)
{
	struct kvmaccess_watch *w = container_of(work, struct kvmaccess_watch, work);
	struct kvmaccess_vm *vm = w->vm;
	bool done;

	if (w->stats.flags & KVMACCESS_WATCH_F_ENDED)
		return;
	if (!kvmaccess_vm_hold(vm)) {
		end(w);
		retire(w);
		return;
	}
	/* Queued because the VM was said to be gone. */
	if (READ_ONCE(w->busy) != QUEUED)
		goto out;
	w->now = ktime_get_ns();
	if (!w->walking)
		begin(w);
	if (adopt_and_look(w, vm->kvm, &done)) {
		end(w);
		retire(w);
		goto out;
	}
	if (done && !list_empty(&w->registers)) {
		if (w->nr_vcpus == atomic_read(&vm->kvm->online_vcpus) || !grow(w, vm->kvm))
			look_at_vcpus(w);
	}
	w->spent += ktime_get_ns() - w->now;
	if (done)
		finish(w);
	else
		kthread_queue_work(worker, &w->work);
out:
	kvmaccess_vm_put(vm);
}

/* In the timer's interrupt */

static bool is_memory_expected(struct kvmaccess_watch *w, struct kvm *kvm)
{
	struct kvm_memslots *slots = __kvm_memslots(kvm, 0);
	u64 generation = slots->generation;
	struct kvmaccess_item *item;
	const void *page;
	u64 value;

	list_for_each_entry(item, &w->memory, list) {
		if (item->generation != generation)
			return false;
		page = kvmaccess_memory_mapped(kvm->mm, item->hva);
		if (!page)
			return false;
		if (item->kind == KVMACCESS_KIND_BYTES) {
			if (!kvmaccess_item_is_equal(page, item->bytes, item->length))
				return false;
			continue;
		}
		__get_kernel_nofault(&value, page, u64, absent);
		if ((value & item->mask) != item->value)
			return false;
	}
	return true;

absent:
	return false;
}

static bool are_registers_expected(struct kvmaccess_watch *w, unsigned int index,
				   const struct kvmaccess_vcpu_state *s)
{
	struct kvmaccess_item *item;

	/* They are others', but then they were not looked at. */
	if (s->flags & (KVMACCESS_VCPU_F_SMM | KVMACCESS_VCPU_F_NESTED))
		return false;
	list_for_each_entry(item, &w->registers, list) {
		if (item->vcpu >= 0 && item->vcpu != w->vcpus[index].vcpu->vcpu_id)
			continue;
		if ((kvmaccess_item_register(s, item->reg) & item->mask) != item->value ||
		    item->vcpus[index].doubt)
			return false;
	}
	return true;
}

enum { DONE = -1, FAILED = -2 };

/*
 * Look at vCPUs from the next one on: those that have not run, and those whose
 * home is this CPU. Returns the CPU to go on at, or one of the above.
 */
static int look_at_vcpus_here(struct kvmaccess_watch *w, struct kvm *kvm)
{
	struct kvmaccess_vcpu_state *s = this_cpu_ptr(&quick_state);
	int cpu;

	if (list_empty(&w->registers))
		return DONE;
	if (w->nr_vcpus != atomic_read(&kvm->online_vcpus))
		return FAILED;
	for (; w->next_vcpu < w->nr_vcpus; w->next_vcpu++) {
		struct watched_vcpu *v = &w->vcpus[w->next_vcpu];
		u64 tsc, exits;

		if (!may_have_run(v, &tsc, &exits)) {
			w->stats.skipped++;
			continue;
		}
		cpu = kvmaccess_vcpu_capture_here(w->vm, v->vcpu, s);
		if (cpu)
			return cpu > 0 ? cpu - 1 : FAILED;
		if (!are_registers_expected(w, w->next_vcpu, s))
			return FAILED;
		w->stats.captures++;
		w->stats.unsettled += !!(s->flags & KVMACCESS_VCPU_F_UNSETTLED);
		v->tsc = tsc;
		v->exits = exits;
		v->clean = !(s->flags & KVMACCESS_VCPU_F_UNSETTLED);
	}
	return DONE;
}

static void queue_tick(struct kvmaccess_watch *w)
{
	WRITE_ONCE(w->busy, QUEUED);
	kthread_queue_work(worker, &w->work);
}

/*
 * Go on with a tick that has found all as expected so far, here or in an
 * interrupt of the CPU where the next vCPU is. The VM is held until it ends.
 */
static void look_on(struct kvmaccess_watch *w)
{
	struct kvmaccess_vm *vm = w->vm;
	int cpu = look_at_vcpus_here(w, vm->kvm);

	w->spent += ktime_get_ns() - w->now;
	if (cpu >= 0 && w->interrupts < 2 * QUICK_VCPUS &&
	    !smp_call_function_single_async(cpu, &w->call)) {
		w->interrupts++;
		return;
	}
	if (cpu != DONE) {
		kvmaccess_vm_put(vm);
		queue_tick(w);
		return;
	}
	w->stats.compared += w->stats.bytes;
	stretch(w, w->spent);
	kvmaccess_account_quick(&vm->account, w->spent, w->stats.bytes, w->interrupts);
	kvmaccess_vm_put(vm);
	/* From here on the timer may begin the next one. */
	smp_store_release(&w->busy, IDLE);
}

static void on_call(void *info)
{
	struct kvmaccess_watch *w = info;

	raw_spin_lock(&w->lock);
	w->now = ktime_get_ns();
	if (w->quick) {
		look_on(w);
	} else {
		kvmaccess_vm_put(w->vm);
		queue_tick(w);
	}
	raw_spin_unlock(&w->lock);
}

/* Begin a tick without the worker; false if it has to be the worker's. */
static bool look_quickly(struct kvmaccess_watch *w)
{
	struct kvm *kvm = w->vm->kvm;
	bool expected;
	int idx;

	if (!w->quick || !kvmaccess_vm_hold(w->vm))
		return false;
	w->now = ktime_get_ns();
	idx = srcu_read_lock(&kvm->srcu);
	expected = is_memory_expected(w, kvm);
	srcu_read_unlock(&kvm->srcu, idx);
	if (!expected) {
		kvmaccess_vm_put(w->vm);
		return false;
	}
	WRITE_ONCE(w->busy, LOOKING);
	count_tick(w);
	w->under_way = true;
	w->next_vcpu = 0;
	w->interrupts = 0;
	look_on(w);
	return true;
}

static enum hrtimer_restart timer_fn(struct hrtimer *timer)
{
	struct kvmaccess_watch *w = container_of(timer, struct kvmaccess_watch, timer);
	u64 period, missed = 0;
	unsigned long flags;

	if (READ_ONCE(w->stats.flags) & KVMACCESS_WATCH_F_ENDED)
		return HRTIMER_NORESTART;

	raw_spin_lock_irqsave(&w->lock, flags);
	/* Pairs with the releases at the ends of ticks. */
	if (smp_load_acquire(&w->busy) == IDLE) {
		w->deadline = ktime_to_ns(hrtimer_get_softexpires(timer));
		w->spent = 0;
		w->under_way = false;
		if (!look_quickly(w))
			queue_tick(w);
	} else {
		missed = 1;
	}
	raw_spin_unlock_irqrestore(&w->lock, flags);

	period = effective_period(w);
	/* Early by the timer's slack it is not yet late enough to be forwarded. */
	missed += (hrtimer_forward_now(timer, ns_to_ktime(period)) ?:
		   (hrtimer_add_expires_ns(timer, period), 1)) - 1;
	WRITE_ONCE(w->missed, w->missed + missed);
	return HRTIMER_RESTART;
}

/* Jobs */

static int run(struct job *job, kthread_work_func_t fn)
{
	kthread_init_work(&job->work, fn);
	init_completion(&job->done);
	kthread_queue_work(worker, &job->work);
	/* Bounded: one slice of each watch at most goes first. */
	wait_for_completion(&job->done);
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
	if (!job->err) {
		keep_timer_off(w);
		list_for_each_entry_safe(item, next, job->items, list) {
			count_item(w, item, 1);
			list_move_tail(&item->list, list_for(w, item));
		}
		/* Places for the new registers, which no vCPU has been compared with. */
		w->nr_vcpus = 0;
		kvfree(w->vcpus);
		w->vcpus = NULL;
	}
	complete(&job->done);
}

static void remove_fn(struct kthread_work *work)
{
	struct job *job = container_of(work, struct job, work);
	struct kvmaccess_watch *w = job->watch;
	struct list_head *lists[] = { &w->memory, &w->digests, &w->registers };
	struct kvmaccess_item *item, *next;
	unsigned int i;

	keep_timer_off(w);
	job->err = -ENOENT;
	for (i = 0; i < ARRAY_SIZE(lists); i++) {
		list_for_each_entry_safe(item, next, lists[i], list) {
			if (item->cookie != job->cookie)
				continue;
			drop_item(w, item);
			job->err = 0;
		}
	}
	/* What is left of the tick under way. */
	w->to_digest = min(w->to_digest, w->stats.digested);
	complete(&job->done);
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
	struct job job = { .watch = w, .cookie = cookie };

	return run(&job, remove_fn);
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
	raw_spin_lock_init(&w->lock);
	INIT_CSD(&w->call, on_call, w);
	INIT_LIST_HEAD(&w->memory);
	INIT_LIST_HEAD(&w->digests);
	INIT_LIST_HEAD(&w->registers);
	w->next = &w->memory;
	kthread_init_work(&w->work, tick_fn);
	kvmaccess_compat_timer(&w->timer, timer_fn);
	w->stats.vm_id = vm->id;
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
		hrtimer_start_range_ns(&w->timer, ns_to_ktime(config->period),
				       min_t(u64, SLACK, config->period / 32),
				       HRTIMER_MODE_REL);
	}
	mutex_unlock(&watches_mutex);
	if (!err)
		return w;

	kfree(w->digest);
err_free:
	kfree(w);
	return ERR_PTR(err);
}

void kvmaccess_watch_put(struct kvmaccess_watch *w)
{
	if (!refcount_dec_and_test(&w->refs))
		return;
	/* Its items went as it was taken out of the array. */
	kvfree(w->vcpus);
	kfree(w->digest);
	kvmaccess_vm_forget(w->vm);
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

static void quit_fn(struct kthread_work *work)
{
	struct job *job = container_of(work, struct job, work);

	retire(job->watch);
	complete(&job->done);
}

/* The timer is stopped; wait for the interrupts that it sent. */
static void wait_for_calls(struct kvmaccess_watch *w)
{
	bool looking;

	do {
		raw_spin_lock_irq(&w->lock);
		looking = w->busy == LOOKING;
		raw_spin_unlock_irq(&w->lock);
		cpu_relax();
	} while (looking);
}

/* Stop what has been unlisted. When this returns it does not tick any more. */
static void quit(struct kvmaccess_watch *w)
{
	struct job job = { .watch = w };

	hrtimer_cancel(&w->timer);
	wait_for_calls(w);
	kthread_cancel_work_sync(&w->work);
	run(&job, quit_fn);
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
	quit(w);
	kvmaccess_watch_put(w);
	return 0;
}

/* As it is while the worker may be at it. */
void kvmaccess_watch_stats(struct kvmaccess_watch *w, struct kvmaccess_watch_stats *stats)
{
	/* Each number is right, and that is all. */
	*stats = data_race(w->stats);
	stats->missed = READ_ONCE(w->missed);
	stats->effective = effective_period(w);
}

/* The VM of @vm is gone: end its watches now and not at their next ticks. */
void kvmaccess_watch_vm_gone(struct kvmaccess_vm *vm)
{
	struct kvmaccess_watch *w;

	mutex_lock(&watches_mutex);
	list_for_each_entry(w, &vm->watches, of_vm)
		kthread_queue_work(worker, &w->work);
	mutex_unlock(&watches_mutex);
}

/* Any watch of this socket, unlisted; NULL if it has none. */
static struct kvmaccess_watch *unlist_any(u32 portid)
{
	struct kvmaccess_watch *w, *found = NULL;
	unsigned long id;

	mutex_lock(&watches_mutex);
	xa_for_each(&watches, id, w) {
		if (portid && w->stats.portid != portid)
			continue;
		unlist(w);
		found = w;
		break;
	}
	mutex_unlock(&watches_mutex);
	return found;
}

/*
 * A socket is closed, maybe because its process was killed. Its number is free
 * for another one by now: a tick that finds something in these microseconds
 * may be heard there.
 */
static int on_netlink(struct notifier_block *nb, unsigned long event, void *data)
{
	const struct netlink_notify *n = data;
	struct kvmaccess_watch *w;

	if (event != NETLINK_URELEASE || n->protocol != NETLINK_GENERIC ||
	    !net_eq(n->net, &init_net) || xa_empty(&watches))
		return NOTIFY_DONE;
	while ((w = unlist_any(n->portid))) {
		quit(w);
		kvmaccess_watch_put(w);
	}
	return NOTIFY_DONE;
}

static struct notifier_block netlink_notifier = {
	.notifier_call = on_netlink,
};

/* CPU time that the worker has used so far, in ns. */
u64 kvmaccess_watch_worker_time(void)
{
	return READ_ONCE(worker->task->se.sum_exec_runtime);
}

/* No watch ticks from now on, and none is made. */
void kvmaccess_watch_stop(void)
{
	struct kvmaccess_watch *w;

	mutex_lock(&watches_mutex);
	stopped = true;
	mutex_unlock(&watches_mutex);
	netlink_unregister_notifier(&netlink_notifier);
	while ((w = unlist_any(0))) {
		quit(w);
		end(w);
		kvmaccess_watch_put(w);
	}
}

/* There are no requests any more. */
void kvmaccess_watch_exit(void)
{
	kthread_destroy_worker(worker);
	xa_destroy(&watches);
}

int __init kvmaccess_watch_init(void)
{
	int err;

	get_random_bytes(&seen_key, sizeof(seen_key));
	worker = kthread_create_worker(0, "kvmaccess-watch");
	if (IS_ERR(worker))
		return PTR_ERR(worker);
	sched_set_fifo_low(worker->task);
	err = netlink_register_notifier(&netlink_notifier);
	if (err)
		kthread_destroy_worker(worker);
	return err;
}
