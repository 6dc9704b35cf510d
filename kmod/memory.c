// SPDX-License-Identifier: GPL-2.0-only
/*
 * Guest memory is memory of the VMM's address space. It is read from a kernel
 * thread that adopts that address space for the time of one request, with
 * page faults disabled: whatever the guest, the VMM or a pager in user space
 * does, a reading ends after a bounded number of steps, populates nothing,
 * takes no lock that the VMM takes and leaves the host's page tables alone.
 * A page that is not there at the moment is the answer, not a reason to wait:
 * requests run with the lock of generic netlink held for reading.
 *
 * Memslots are looked up and their memory is read within one section of
 * kvm->srcu. KVM waits for it before it tells the VMM that a memslot is gone,
 * so the address cannot be given to anything else in between.
 */
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/kvm_host.h>
#include <linux/mmu_context.h>
#include <linux/sched/mm.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>

#include "account.h"
#include "compat.h"
#include "memory.h"
#include "vcpu.h"
#include "vm.h"

struct job {
	struct kthread_work work;
	struct completion done;
	struct kvmaccess_memory memory;
	kvmaccess_memory_fn fn;
	void *arg;
	u64 time;
	int err;
};

static struct kthread_worker *worker;

static void job_fn(struct kthread_work *work)
{
	struct job *job = container_of(work, struct job, work);
	struct kvm *kvm = job->memory.kvm;
	u64 start = ktime_get_ns();
	int idx;

	/* kvm->mm is kept by the VM, its content by the VMM's threads. */
	if (!mmget_not_zero(kvm->mm)) {
		job->err = -ESHUTDOWN;
	} else {
		kthread_use_mm(kvm->mm);
		idx = srcu_read_lock(&kvm->srcu);
		job->err = job->fn(&job->memory, job->arg);
		srcu_read_unlock(&kvm->srcu, idx);
		kthread_unuse_mm(kvm->mm);
		/* The VMM may have died meanwhile: tear it down elsewhere. */
		mmput_async(kvm->mm);
	}

	job->time = ktime_get_ns() - start;
	/* The job is on the requester's stack. */
	complete(&job->done);
}

/*
 * Call @fn where it can read the memory of @vm, which the caller holds.
 * Returns what @fn returns, or -ESHUTDOWN if the VMM is gone.
 */
int kvmaccess_memory_run(struct kvmaccess_vm *vm, u32 as_id,
			 kvmaccess_memory_fn fn, void *arg)
{
	struct job job = {
		.memory = { .kvm = vm->kvm, .as_id = as_id },
		.fn = fn,
		.arg = arg,
	};

	kthread_init_work(&job.work, job_fn);
	init_completion(&job.done);
	kthread_queue_work(worker, &job.work);
	/* Bounded: no job waits for anything. */
	wait_for_completion(&job.done);

	kvmaccess_account_worker(&vm->account, job.time);
	return job.err;
}

/*
 * Read @len bytes at guest-physical address @gpa. Returns -EFAULT where no
 * memslot is, -ENODATA where the host has no page in place.
 */
int kvmaccess_memory_read(struct kvmaccess_memory *memory, u64 gpa, void *to,
			  u32 len)
{
	struct kvm_memslots *slots = __kvm_memslots(memory->kvm, memory->as_id);
	struct kvm_memory_slot *slot;

	while (len) {
		gfn_t gfn = gpa >> PAGE_SHIFT;
		u32 part = min_t(u32, len, PAGE_SIZE - offset_in_page(gpa));
		unsigned long hva;

		memory->fault = gpa;
		slot = search_memslots(slots, gfn, false);
		/* Invalid: on its way out or to another place. */
		if (!slot || slot->flags & KVM_MEMSLOT_INVALID)
			return -EFAULT;

		hva = __gfn_to_hva_memslot(slot, gfn) + offset_in_page(gpa);
		if (copy_from_user_nofault(to, (void __user *)hva, part))
			return -ENODATA;
		gpa += part;
		to += part;
		len -= part;
	}
	return 0;
}

#define ENTRY_PRESENT	BIT_ULL(0)
#define ENTRY_LARGE	BIT_ULL(7)
#define ENTRY_ADDRESS	GENMASK_ULL(51, 12)

static int read_entry(struct kvmaccess_memory *memory, u64 gpa, bool wide,
		      u64 *entry)
{
	u32 narrow;
	int err;

	if (wide)
		return kvmaccess_memory_read(memory, gpa, entry, sizeof(*entry));

	err = kvmaccess_memory_read(memory, gpa, &narrow, sizeof(narrow));
	*entry = narrow;
	return err;
}

/*
 * Intel SDM vol. 3, 4.3 to 4.5: five steps at most, whatever the tables say.
 * Access rights do not matter here, reserved bits are not checked.
 */
static int translate(struct kvmaccess_memory *memory,
		     const struct kvmaccess_paging *p, u64 gva, u64 *gpa)
{
	unsigned int bits = p->wide ? 9 : 10;
	u64 entry, table, size;
	unsigned int level;
	int err;

	if (!p->levels) {
		*gpa = gva;
		return 0;
	}

	/* The table of four pointers of PAE is aligned to 32 bytes only. */
	table = p->root & (p->levels == 3 ? GENMASK_ULL(31, 5) :
			   p->wide ? ENTRY_ADDRESS : GENMASK_ULL(31, 12));

	for (level = p->levels; level; level--) {
		unsigned int shift = PAGE_SHIFT + (level - 1) * bits;
		u64 index = (gva >> shift) & (BIT_ULL(bits) - 1);

		if (p->levels == 3 && level == 3)
			index &= 3;
		err = read_entry(memory, table + index * (p->wide ? 8 : 4),
				 p->wide, &entry);
		if (err)
			return err;
		if (!(entry & ENTRY_PRESENT))
			return -EADDRNOTAVAIL;

		size = BIT_ULL(shift);
		if (level > 1 && (entry & ENTRY_LARGE) && (p->wide || p->large)) {
			/* 1 GiB in long mode, 2 MiB, 4 MiB: nothing larger. */
			if (level > (p->levels > 3 ? 3 : 2))
				return -EADDRNOTAVAIL;
			table = entry & ENTRY_ADDRESS & ~(size - 1);
			/* Bits 39:32 of a 4 MiB page are in 20:13. */
			if (!p->wide)
				table |= (entry & GENMASK_ULL(20, 13)) << 19;
			break;
		}
		table = entry & ENTRY_ADDRESS;
	}
	*gpa = table | (gva & (size - 1));
	return 0;
}

/*
 * Read @len bytes at guest-virtual address @gva. Returns -EADDRNOTAVAIL where
 * the guest maps nothing, else as kvmaccess_memory_read().
 */
int kvmaccess_memory_read_virtual(struct kvmaccess_memory *memory,
				  const struct kvmaccess_paging *p, u64 gva,
				  void *to, u32 len)
{
	int err = 0;
	u64 gpa;

	while (len && !err) {
		u32 part = min_t(u32, len, PAGE_SIZE - offset_in_page(gva));

		err = translate(memory, p, gva, &gpa);
		if (!err)
			err = kvmaccess_memory_read(memory, gpa, to, part);
		if (err)
			break;
		gva += part;
		to += part;
		len -= part;
	}
	memory->fault = gva;
	return err;
}

void kvmaccess_memory_paging(const struct kvmaccess_vcpu_state *state,
			     struct kvmaccess_paging *paging)
{
	paging->root = state->cr3;
	paging->wide = state->cr4 & X86_CR4_PAE;
	paging->large = state->cr4 & X86_CR4_PSE;

	if (!(state->cr0 & X86_CR0_PG))
		paging->levels = 0;
	else if (!paging->wide)
		paging->levels = 2;
	else if (!(state->efer & EFER_LMA))
		paging->levels = 3;
	else
		paging->levels = state->cr4 & X86_CR4_LA57 ? 5 : 4;
}

/* Outside of long mode: below 4 GiB. */
bool kvmaccess_memory_is_canonical(const struct kvmaccess_paging *p, u64 gva,
				   u32 len)
{
	unsigned int bits = p->levels == 5 ? 57 : 48;
	u64 last = gva + len - 1;

	if (last < gva)
		return false;
	if (p->levels < 4)
		return last <= U32_MAX;
	return (s64)(gva << (64 - bits)) >> (64 - bits) == gva &&
	       (s64)(last << (64 - bits)) >> (64 - bits) == last &&
	       !((gva ^ last) & BIT_ULL(63));
}

/* The explanation of an error of one of the above. */
const char *kvmaccess_memory_strerror(int err)
{
	switch (err) {
	case -EFAULT:
		return "a guest-physical address lies in no memslot";
	case -EADDRNOTAVAIL:
		return "the guest's page tables do not map the address";
	case -ENODATA:
		return "the page is not resident in the host: swapped out, or never touched";
	case -ESHUTDOWN:
		return "the VM is being destroyed";
	default:
		return "the guest's memory could not be read";
	}
}

/* CPU time that the worker has used so far, in ns. */
u64 kvmaccess_memory_worker_time(void)
{
	return READ_ONCE(worker->task->se.sum_exec_runtime);
}

int __init kvmaccess_memory_init(void)
{
	worker = kthread_run_worker(0, "kvmaccess");
	return PTR_ERR_OR_ZERO(worker);
}

void kvmaccess_memory_exit(void)
{
	kthread_destroy_worker(worker);
}
