// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is looked at in a tick: memory and registers, by the worker, which takes
 * it in slices and tells what it finds, or by a timer, which finds out whether
 * all is as expected, and nothing more.
 *
 * Memory is found by the memslots of the VM, within a section of kvm->srcu: KVM
 * waits for that before it tells the VMM that a memslot is gone. It is short,
 * and may be one of an interrupt. Of a guest whose memory is encrypted, what is
 * compared is what the host has.
 */
#include <linux/kvm_host.h>
#include <linux/list_sort.h>
#include <linux/random.h>
#include <linux/siphash.h>
#include <linux/slab.h>

#include "digest.h"
#include "hostpage.h"
#include "tick.h"
#include "vcpu.h"
#include "vm.h"

/* Bytes that are compared, and vCPUs, before other watches have their turn. */
#define SLICE		(2U << 20)
#define SLICE_VCPUS	32

/* What looking at an item costs beside its bytes, in bytes: finding its page. */
#define SLICE_ITEM	512

/* The worker's. */
static siphash_key_t seen_key;
static u8 bounce[PAGE_SIZE];
static struct kvmaccess_vcpu_state vcpu_state;

/* The timers'. */
static DEFINE_PER_CPU(struct kvmaccess_vcpu_state, quick_state);

/* Memory */

static unsigned long hva_of(struct kvm_memslots *slots, u64 gpa)
{
	struct kvm_memory_slot *slot = search_memslots(slots, gpa >> PAGE_SHIFT, false);

	/* Invalid: on its way out or to another place. */
	if (!slot || slot->flags & KVM_MEMSLOT_INVALID)
		return 0;
	return __gfn_to_hva_memslot(slot, gpa >> PAGE_SHIFT) + offset_in_page(gpa);
}

/* With interrupts off since @path began; false also where it cannot be told. */
static __always_inline bool is_expected(struct mm_struct *mm, const struct kvmaccess_item *item,
					struct kvmaccess_hostpage_path *path)
{
	const void *at;

	if (!kvmaccess_hostpage_by(mm, item->hva, path, &at))
		return false;
	if (item->kind == KVMACCESS_KIND_BYTES)
		return kvmaccess_hostpage_is(at, item->bytes, item->length);
	return kvmaccess_hostpage_has(at, item->mask, item->value);
}

/* An item of memory that is not as expected, or of which that is still to be told. */
static void look_closer(struct kvmaccess_watch *w, struct kvm *kvm,
			struct kvmaccess_item *item)
{
	struct kvmaccess_watch_event e = { .gpa = item->gpa };
	int err = item->hva ? kvmaccess_hostpage_copy(kvm->mm, item->hva, bounce,
						      item->length) : -EFAULT;
	u64 value;
	u32 i;

	if (err == -EAGAIN || err == -ESHUTDOWN) {
		/* The next tick can tell, or there is none. */
		w->untold = true;
		return;
	}
	if (err) {
		kvmaccess_event_observe(w, &item->track, err == -EFAULT ?
					KVMACCESS_STATE_NO_MEMSLOT :
					KVMACCESS_STATE_NOT_RESIDENT, 0);
	} else if (item->kind == KVMACCESS_KIND_BYTES) {
		for (i = 0; i < item->length && bounce[i] == item->bytes[i]; i++)
			;
		if (i < item->length) {
			e.gpa += i;
			e.offset = i;
			e.expected = item->bytes + i;
			e.data = bounce + i;
			e.length = min_t(u32, KVMACCESS_WATCH_EVENT_BYTES, item->length - i);
		}
		kvmaccess_event_observe(w, &item->track, e.data ? KVMACCESS_STATE_DIFFERENT :
					KVMACCESS_STATE_EXPECTED, e.data ?
					siphash(bounce, item->length, &seen_key) : 0);
	} else {
		memcpy(&value, bounce, sizeof(value));
		if ((value & item->mask) != item->value) {
			e.expected = &item->value;
			e.data = &value;
			e.length = sizeof(value);
		}
		kvmaccess_event_observe(w, &item->track, e.data ? KVMACCESS_STATE_DIFFERENT :
					KVMACCESS_STATE_EXPECTED, e.data ? value & item->mask : 0);
	}
	kvmaccess_event_tell(w, item, &item->track, &e);
}

/* The digest of the page at @hva; if it is not @expected, it is the VM's for certain. */
static int digest_page(struct kvmaccess_watch *w, struct mm_struct *mm, unsigned long hva,
		       u64 expected, u64 *value)
{
	unsigned long flags;
	const void *at;
	int err;

	local_irq_save(flags);
	at = kvmaccess_hostpage_at(mm, hva);
	err = at ? kvmaccess_digest_page(w->digest, at, value) : -ENODATA;
	local_irq_restore(flags);
	if (!err && *value == expected)
		return 0;
	err = kvmaccess_hostpage_copy(mm, hva, bounce, PAGE_SIZE);
	return err ?: kvmaccess_digest_page(w->digest, bounce, value);
}

static void look_at_page(struct kvmaccess_watch *w, struct kvm *kvm,
			 struct kvmaccess_item *item, u32 i)
{
	struct kvmaccess_item_page *page = &item->pages[i];
	struct kvmaccess_watch_event e = {
		.offset = i << PAGE_SHIFT,
		.gpa = item->gpa + ((u64)i << PAGE_SHIFT),
	};
	unsigned long hva = hva_of(__kvm_memslots(kvm, 0), e.gpa);
	int err = -EFAULT;
	u64 value;

	if (hva)
		err = digest_page(w, kvm->mm, hva, page->expected, &value);
	if (err == -EAGAIN || err == -ESHUTDOWN)
		return;
	if (err) {
		kvmaccess_event_observe(w, &page->track, hva ? KVMACCESS_STATE_NOT_RESIDENT :
					KVMACCESS_STATE_NO_MEMSLOT, 0);
	} else if (value != page->expected) {
		e.expected = &page->expected;
		e.data = &value;
		e.length = sizeof(value);
		kvmaccess_event_observe(w, &page->track, KVMACCESS_STATE_DIFFERENT, value);
	} else {
		kvmaccess_event_observe(w, &page->track, KVMACCESS_STATE_EXPECTED, 0);
	}
	kvmaccess_event_tell(w, item, &page->track, &e);
}

/* Go on with the pages of digests until the tick's or the slice's share is done. */
static bool walk_digests(struct kvmaccess_watch *w, struct kvm *kvm, u32 left)
{
	for (; w->to_digest; w->to_digest -= PAGE_SIZE) {
		if (left < PAGE_SIZE)
			return false;
		left -= PAGE_SIZE;
		if (!w->at) {
			w->at = list_first_entry(&w->digests, struct kvmaccess_item, list);
			w->at_page = 0;
		}
		look_at_page(w, kvm, w->at, w->at_page);
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

	for (; w->next != &w->memory; w->next = w->next->next) {
		struct kvmaccess_hostpage_path path = KVMACCESS_HOSTPAGE_PATH;
		unsigned long flags;
		bool expected;

		item = list_entry(w->next, struct kvmaccess_item, list);
		if (left < item->length + SLICE_ITEM)
			return false;
		left -= item->length + SLICE_ITEM;

		if (unlikely(item->generation != generation)) {
			item->hva = hva_of(slots, item->gpa);
			item->generation = generation;
		}
		local_irq_save(flags);
		expected = item->hva && is_expected(kvm->mm, item, &path);
		local_irq_restore(flags);
		if (unlikely(!expected || item->track.state || item->track.pending))
			look_closer(w, kvm, item);
	}
	return walk_digests(w, kvm, left);
}

static int compare_gpa(void *unused, const struct list_head *a, const struct list_head *b)
{
	u64 of_a = list_entry(a, struct kvmaccess_item, list)->gpa;
	u64 of_b = list_entry(b, struct kvmaccess_item, list)->gpa;

	return of_a < of_b ? -1 : of_a > of_b;
}

/*
 * Before the timer may look, and after all memory has been looked at: bring what
 * shares the way to its pages together, which is all that the order means, and
 * find out by which memslots it is known: none, if it was not by the same.
 */
void kvmaccess_look_prepare(struct kvmaccess_watch *w)
{
	struct kvmaccess_item *item;

	list_sort(NULL, &w->memory, compare_gpa);
	item = list_first_entry_or_null(&w->memory, struct kvmaccess_item, list);
	w->generation = item ? item->generation : 0;
	list_for_each_entry(item, &w->memory, list) {
		if (item->generation != w->generation) {
			w->generation = ~0ULL;
			break;
		}
	}
}

/*
 * Whether all memory is as it should be, in the timer's interrupt. False also
 * where the memslots are not those by which the worker found it.
 */
bool kvmaccess_look_is_memory_expected(struct kvmaccess_watch *w)
{
	struct kvm *kvm = w->vm->kvm;
	/* One of two that are part of struct kvm, of which nothing else is read. */
	struct kvm_memslots *slots = rcu_dereference_raw(kvm->memslots[0]);
	struct kvmaccess_hostpage_path path = KVMACCESS_HOSTPAGE_PATH;
	struct mm_struct *mm = kvm->mm;
	struct kvmaccess_item *item;

	if (w->generation != READ_ONCE(slots->generation) && !list_empty(&w->memory))
		return false;
	list_for_each_entry(item, &w->memory, list) {
		if (!is_expected(mm, item, &path))
			return false;
	}
	return true;
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
		u64 value = kvmaccess_item_register(item, s);
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
		kvmaccess_event_observe(w, &v->track, differs ? KVMACCESS_STATE_DIFFERENT :
			KVMACCESS_STATE_EXPECTED, differs ? value & item->mask : 0);
		kvmaccess_event_tell(w, item, &v->track, &e);
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
static bool may_have_run(const struct kvmaccess_watched_vcpu *v, u64 *tsc, u64 *exits)
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

/* A watch without memory for its vCPUs looks at them when it has some: nothing waits here. */
#define GFP_PLACES	(GFP_NOWAIT | __GFP_NOWARN)

static int grow_item(struct kvmaccess_item *item, unsigned int nr)
{
	struct kvmaccess_item_vcpu *vcpus;

	if (item->nr_vcpus >= nr)
		return 0;
	vcpus = kvcalloc(nr, sizeof(*vcpus), GFP_PLACES);
	if (!vcpus)
		return -ENOMEM;
	if (item->nr_vcpus)
		memcpy(vcpus, item->vcpus, item->nr_vcpus * sizeof(*vcpus));
	kvfree(item->vcpus);
	item->vcpus = vcpus;
	item->nr_vcpus = nr;
	return 0;
}

/*
 * Have a place for each vCPU that there is now; they are never fewer again. All
 * registers of a watch have 6 KiB for each of its vCPUs at most.
 */
static int grow(struct kvmaccess_watch *w, struct kvm *kvm)
{
	unsigned int nr = atomic_read(&kvm->online_vcpus);
	struct kvmaccess_watched_vcpu *vcpus;
	struct kvmaccess_item *item;
	unsigned int i;

	if (nr == w->nr_vcpus)
		return 0;
	list_for_each_entry(item, &w->registers, list) {
		if (grow_item(item, nr))
			return -ENOMEM;
	}
	vcpus = kvcalloc(nr, sizeof(*vcpus), GFP_PLACES);
	if (!vcpus)
		return -ENOMEM;
	for (i = 0; i < nr; i++)
		vcpus[i].vcpu = kvm_get_vcpu(kvm, i);
	kvfree(w->vcpus);
	w->vcpus = vcpus;
	w->nr_vcpus = nr;
	return 0;
}

/* Returns false if another slice is needed. */
static bool look_at_vcpus(struct kvmaccess_watch *w, struct kvm *kvm)
{
	unsigned int left = SLICE_VCPUS;

	if (list_empty(&w->registers))
		return true;
	if (grow(w, kvm)) {
		w->stats.failed++;
		return true;
	}
	for (; w->next_vcpu < w->nr_vcpus; w->next_vcpu++) {
		struct kvmaccess_watched_vcpu *v = &w->vcpus[w->next_vcpu];
		u64 tsc, exits;

		if (!left--)
			return false;
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
		v->clean = !look_at_registers(w, w->next_vcpu, exits);
	}
	return true;
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
		if (!kvmaccess_item_has_register(item, s) || item->vcpus[index].doubt)
			return false;
	}
	return true;
}

/*
 * Look at vCPUs from the next one on, in an interrupt: those that have not run,
 * and those whose home is this CPU. Returns the CPU to go on at, or one of
 * KVMACCESS_LOOK_*.
 */
int kvmaccess_look_at_vcpus_here(struct kvmaccess_watch *w)
{
	struct kvmaccess_vcpu_state *s = this_cpu_ptr(&quick_state);
	int cpu;

	if (list_empty(&w->registers))
		return KVMACCESS_LOOK_DONE;
	if (w->nr_vcpus != atomic_read(&w->vm->kvm->online_vcpus))
		return KVMACCESS_LOOK_FAILED;
	for (; w->next_vcpu < w->nr_vcpus; w->next_vcpu++) {
		struct kvmaccess_watched_vcpu *v = &w->vcpus[w->next_vcpu];
		u64 tsc, exits;

		if (!may_have_run(v, &tsc, &exits)) {
			w->stats.skipped++;
			continue;
		}
		cpu = kvmaccess_vcpu_capture_here(w->vm, v->vcpu, w->wanted, s);
		if (cpu)
			return cpu > 0 ? cpu - 1 : KVMACCESS_LOOK_FAILED;
		if (!are_registers_expected(w, w->next_vcpu, s))
			return KVMACCESS_LOOK_FAILED;
		w->stats.captures++;
		w->stats.unsettled += !!(s->flags & KVMACCESS_VCPU_F_UNSETTLED);
		v->tsc = tsc;
		v->exits = exits;
		v->clean = !(s->flags & KVMACCESS_VCPU_F_UNSETTLED);
	}
	return KVMACCESS_LOOK_DONE;
}

/* From the first item on. */
void kvmaccess_look_begin(struct kvmaccess_watch *w)
{
	w->untold = false;
	w->next = w->memory.next;
	w->to_digest = min_t(u64, w->stats.budget & PAGE_MASK, w->stats.digested);
	w->next_vcpu = 0;
}

/*
 * Look at the next slice, of a VM that is held, and tell what is found. Returns
 * false if there is more.
 */
bool kvmaccess_look(struct kvmaccess_watch *w)
{
	struct kvm *kvm = w->vm->kvm;
	int idx = srcu_read_lock(&kvm->srcu);
	bool done = look_at_memory(w, kvm);

	srcu_read_unlock(&kvm->srcu, idx);
	return done && look_at_vcpus(w, kvm);
}

void __init kvmaccess_look_init(void)
{
	get_random_bytes(&seen_key, sizeof(seen_key));
}
