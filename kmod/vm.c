// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which VMs there are, and since when.
 *
 * Identity: KVM names a VM by its address, which the next VM may get. An
 * entry here is therefore tied to one life of that address. The hook on
 * kvm_arch_destroy_vm(), through which every VM goes before its memory is
 * freed, ends it by setting ->gone; the walk of vm_list makes entries for
 * addresses that have no living one.
 *
 * References: between two requests none is held, so a VM goes when its VMM
 * goes. Where that happens during a request, dropping the request's reference
 * destroys the VM, which can take long: it is left to a work item then.
 *
 * Taking one needs neither a lock nor vm_list. Who does so announces it in
 * ->looking before he looks at ->gone, with interrupts off; the hook sets
 * ->gone before it looks at ->looking, and keeps KVM from going on until
 * nobody is looking: either he sees that the VM is gone, or KVM waits for the
 * few instructions that he needs to find out that its count is 0. Who is done
 * within that, as the timer of a watch is, needs no reference: what he looks at
 * goes after the hook, vCPUs, memslots and all. Either holds as long as no VM
 * passes by the hook. Kprobes can be switched off by root, by debugfs and,
 * where they rest on ftrace, by a sysctl, so the hook is ftrace's own and
 * permanent: the sysctl is refused. Without ftrace it is a kprobe after all,
 * and vm_list is searched.
 *
 * Locks: vms_mutex protects the list, the array and the hash table and is
 * taken before kvm_lock and before the list of watches. Nothing of KVM calls
 * here but the hooks, which take no lock at all: they may run in the context
 * of an int3, where even a raw spinlock that is taken elsewhere with
 * interrupts off would deadlock.
 */
#include <linux/ftrace.h>
#include <linux/hashtable.h>
#include <linux/irq_work.h>
#include <linux/kprobes.h>
#include <linux/netlink.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/rculist.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "compat.h"
#include "ksyms.h"
#include "netlink.h"
#include "notify.h"
#include "vm.h"
#include "watch.h"

static DEFINE_MUTEX(vms_mutex);
static DEFINE_HASHTABLE(vms_by_address, 10);
static LIST_HEAD(vms);
static DEFINE_XARRAY(vms_by_id);
static u64 last_id;
static u64 last_walk;
static u32 generation = 1;
static bool announcing;
static bool stopped;
static bool has_create_probe;
static bool has_destroy_hook;	/* which no VM passes by */
static LIST_HEAD(to_notify);	/* entries with events pending, each with a reference */

static struct workqueue_struct *wq;

static void free_entry(struct kvmaccess_vm *vm)
{
	if (refcount_dec_and_test(&vm->refs))
		kfree_rcu(vm, rcu);
}

/* Keep the entry; the VM may go. */
void kvmaccess_vm_keep(struct kvmaccess_vm *vm)
{
	refcount_inc(&vm->refs);
}

void kvmaccess_vm_forget(struct kvmaccess_vm *vm)
{
	free_entry(vm);
}

static void last_put_fn(struct work_struct *work)
{
	struct kvmaccess_vm *vm = container_of(work, struct kvmaccess_vm, last_put);

	kvm_put_kvm(vm->kvm);
	free_entry(vm);
}

/* Drop the reference to the VM and that to its entry. */
static void release(struct kvmaccess_vm *vm)
{
	/*
	 * At one this is the only holder, and the reference goes to the work
	 * item with the entry's. It cannot be queued already: it would have a
	 * reference of its own then, and the count would not be one.
	 */
	if (refcount_dec_not_one(&vm->kvm->users_count))
		free_entry(vm);
	else
		queue_work(wq, &vm->last_put);
}

static struct kvmaccess_vm *find_by_address(struct kvm *kvm)
{
	struct kvmaccess_vm *vm;

	hash_for_each_possible_rcu(vms_by_address, vm, hash, (unsigned long)kvm,
				   lockdep_is_held(&vms_mutex)) {
		if (vm->kvm == kvm && !READ_ONCE(vm->gone))
			return vm;
	}
	return NULL;
}

/* Whether @kvm, which may be gone, is in vm_list; if so it gets a reference. */
static bool hold_listed(struct kvm *wanted)
{
	bool held = false;
	struct kvm *kvm;

	mutex_lock(kvmaccess_ksyms.lock);
	list_for_each_entry(kvm, kvmaccess_ksyms.vms, vm_list) {
		if (kvm == wanted) {
			held = kvm_get_kvm_safe(kvm);
			break;
		}
	}
	mutex_unlock(kvmaccess_ksyms.lock);
	return held;
}

/* Whether VMs can be held, or looked at without, in an interrupt: nothing sleeps. */
bool kvmaccess_vm_holds_in_interrupts(void)
{
	return has_destroy_hook;
}

/*
 * Keep the VM of @vm, an entry that is kept, from going until kvmaccess_vm_looked(),
 * without a reference to it; false if it is gone. With interrupts off, where
 * kvmaccess_vm_holds_in_interrupts(). Its end may be waiting for that.
 */
bool kvmaccess_vm_look(struct kvmaccess_vm *vm)
{
	atomic_inc(&vm->looking);
	/* Pairs with that of wait_for_lookers(). */
	smp_mb__after_atomic();
	if (likely(!READ_ONCE(vm->gone) && refcount_read(&vm->kvm->users_count)))
		return true;
	kvmaccess_vm_looked(vm);
	return false;
}

void kvmaccess_vm_looked(struct kvmaccess_vm *vm)
{
	atomic_dec_return_release(&vm->looking);
}

/*
 * Take a reference to the VM of @vm, an entry that is kept; false if it is
 * gone. Until kvmaccess_vm_stop() only.
 */
bool kvmaccess_vm_hold(struct kvmaccess_vm *vm)
{
	unsigned long flags;
	bool held = false;

	if (has_destroy_hook) {
		local_irq_save(flags);
		if (kvmaccess_vm_look(vm)) {
			held = kvm_get_kvm_safe(vm->kvm);
			kvmaccess_vm_looked(vm);
		}
		local_irq_restore(flags);
	} else {
		held = hold_listed(vm->kvm);
	}
	if (!held)
		return false;

	refcount_inc(&vm->refs);
	/* Found in vm_list it may be the next one at this address. */
	if (READ_ONCE(vm->gone)) {
		release(vm);
		return false;
	}
	return true;
}

/* Of @vm, which is gone, nobody looks at the VM when this returns. */
static void wait_for_lookers(struct kvmaccess_vm *vm)
{
	WRITE_ONCE(vm->gone, true);
	/* Pairs with that of kvmaccess_vm_look(). */
	smp_mb();
	/*
	 * At most what a timer looks at on another CPU, which has its interrupts
	 * off and waits for nothing. Those to come see that the VM is gone.
	 */
	while (atomic_read_acquire(&vm->looking))
		cpu_relax();
}

static pid_t tgid_of(struct pid *pid, void *arg)
{
	struct kvm *kvm = arg;
	struct task_struct *task = pid ? pid_task(pid, PIDTYPE_PID) : NULL;

	/* The number may have been given to another process since. */
	return task && READ_ONCE(task->mm) == kvm->mm ?
	       task_tgid_nr_ns(task, &init_pid_ns) : 0;
}

/*
 * KVM notes the thread that created the VM. Where that thread has ended, any
 * vCPU's thread belongs to the same process.
 */
static void find_pid(struct kvmaccess_vm *vm)
{
	struct kvm *kvm = vm->kvm;
	struct kvm_vcpu *vcpu;
	unsigned long i;
	pid_t pid;

	rcu_read_lock();
	pid = tgid_of(find_pid_ns(kvm->userspace_pid, &init_pid_ns), kvm);
	kvm_for_each_vcpu(i, vcpu, kvm) {
		if (pid)
			break;
		pid = kvmaccess_compat_vcpu_pid(vcpu, tgid_of, kvm);
	}
	rcu_read_unlock();

	if (pid)
		WRITE_ONCE(vm->pid, pid);
}

/*
 * Other modules are told in a work item of their own: they may ask about the
 * VM in turn, which takes vms_mutex.
 */
static void notify_work_fn(struct work_struct *work)
{
	struct kvmaccess_vm_info info;
	struct kvmaccess_vm *vm;
	unsigned int pending;
	bool held;

	for (;;) {
		mutex_lock(&vms_mutex);
		vm = list_first_entry_or_null(&to_notify, struct kvmaccess_vm, notify);
		if (!vm) {
			mutex_unlock(&vms_mutex);
			return;
		}
		/* From here on it may be put on the list again. */
		list_del(&vm->notify);
		pending = vm->pending;
		vm->pending = 0;
		held = pending & BIT(KVMACCESS_CMD_VM_CREATED) &&
		       !stopped && kvmaccess_vm_hold(vm);
		mutex_unlock(&vms_mutex);

		if (pending & BIT(KVMACCESS_CMD_VM_CREATED)) {
			if (held) {
				kvmaccess_vm_info(vm, &info);
				kvmaccess_vm_put(vm);
			} else {
				kvmaccess_vm_identify(vm, &info);
			}
			kvmaccess_notify(KVMACCESS_CMD_VM_CREATED, &info);
		}
		if (pending & BIT(KVMACCESS_CMD_VM_DESTROYED)) {
			kvmaccess_vm_identify(vm, &info);
			kvmaccess_notify(KVMACCESS_CMD_VM_DESTROYED, &info);
		}
		free_entry(vm);
	}
}

static DECLARE_WORK(notify_work, notify_work_fn);

/* @vm is held if it has been created, and is not if it has been destroyed. */
static void announce(struct kvmaccess_vm *vm, enum kvmaccess_cmd cmd)
{
	lockdep_assert_held(&vms_mutex);

	if (!announcing)
		return;
	kvmaccess_netlink_event(vm, cmd);

	if (!kvmaccess_notify_wanted())
		return;
	if (!vm->pending) {
		refcount_inc(&vm->refs);
		list_add_tail(&vm->notify, &to_notify);
	}
	vm->pending |= BIT(cmd);
	queue_work(wq, &notify_work);
}

/*
 * Bring the entries in line with vm_list. kvm_lock is taken by the shrinker
 * of KVM's page tables, so nothing may be allocated under it: the walk starts
 * again whenever it needs another entry, once for each new VM.
 */
static void walk(void)
{
	struct kvmaccess_vm *vm, *next, *spare = NULL;
	bool again;
	struct kvm *kvm;

	lockdep_assert_held(&vms_mutex);

	last_walk++;
	do {
		again = false;
		mutex_lock(kvmaccess_ksyms.lock);
		list_for_each_entry(kvm, kvmaccess_ksyms.vms, vm_list) {
			vm = find_by_address(kvm);
			if (vm) {
				vm->walk = last_walk;
				continue;
			}
			/* Being destroyed, and never seen before. */
			if (!refcount_read(&kvm->users_count))
				continue;
			if (!spare) {
				again = true;
				break;
			}
			vm = spare;
			spare = NULL;
			refcount_set(&vm->refs, 1);
			INIT_WORK(&vm->last_put, last_put_fn);
			INIT_LIST_HEAD(&vm->watches);
			vm->kvm = kvm;
			vm->id = ++last_id;
			/* Into the place that was reserved. */
			xa_store(&vms_by_id, vm->id, vm, GFP_NOWAIT);
			vm->seen = ktime_get_boottime_ns();
			vm->walk = last_walk;
			vm->fresh = true;
			hash_add_rcu(vms_by_address, &vm->hash, (unsigned long)kvm);
			list_add_tail(&vm->list, &vms);
		}
		mutex_unlock(kvmaccess_ksyms.lock);
		/* Out of memory: the rest is found by the next walk. */
	} while (again && !xa_reserve(&vms_by_id, last_id + 1, GFP_KERNEL) &&
		 (spare = kzalloc(sizeof(*spare), GFP_KERNEL)));
	kfree(spare);

	list_for_each_entry_safe(vm, next, &vms, list) {
		if (vm->fresh) {
			vm->fresh = false;
			generation++;
			if (kvmaccess_vm_hold(vm)) {
				find_pid(vm);
				announce(vm, KVMACCESS_CMD_VM_CREATED);
				kvmaccess_vm_put(vm);
			} else {
				/* On its way out when it was found: nobody ever saw it. */
				vm->unseen = true;
			}
		}
		if (vm->walk == last_walk && !READ_ONCE(vm->gone))
			continue;
		/* From here on the hook does not find it. */
		wait_for_lookers(vm);
		generation++;
		hash_del_rcu(&vm->hash);
		list_del(&vm->list);
		xa_erase(&vms_by_id, vm->id);
		kvmaccess_watch_vm_gone(vm);
		if (!vm->unseen)
			announce(vm, KVMACCESS_CMD_VM_DESTROYED);
		free_entry(vm);
	}
}

static void walk_work_fn(struct work_struct *work)
{
	mutex_lock(&vms_mutex);
	if (!stopped)
		walk();
	mutex_unlock(&vms_mutex);
}

static DECLARE_WORK(walk_work, walk_work_fn);

static void kick_fn(struct irq_work *work)
{
	queue_work(wq, &walk_work);
}

static DEFINE_IRQ_WORK(kick, kick_fn);

static void destroyed(struct kvm *kvm)
{
	struct kvmaccess_vm *vm;

	rcu_read_lock();
	hash_for_each_possible_rcu(vms_by_address, vm, hash, (unsigned long)kvm) {
		if (vm->kvm == kvm)
			wait_for_lookers(vm);
	}
	rcu_read_unlock();

	irq_work_queue(&kick);
}

static int on_destroy(struct kprobe *probe, struct pt_regs *regs)
{
	destroyed((struct kvm *)regs_get_kernel_argument(regs, 0));
	return 0;
}

static struct kprobe destroy_probe = {
	.symbol_name = "kvm_arch_destroy_vm",
	.pre_handler = on_destroy,
};

#ifdef CONFIG_DYNAMIC_FTRACE_WITH_ARGS
static void notrace on_destroy_call(unsigned long ip, unsigned long parent_ip,
				    struct ftrace_ops *ops, struct ftrace_regs *regs)
{
	destroyed((struct kvm *)kvmaccess_compat_argument(regs));
}

static struct ftrace_ops destroy_ops = {
	.func = on_destroy_call,
	.flags = FTRACE_OPS_FL_PERMANENT,
};

static bool hook_destroy(void)
{
	unsigned long address = kvmaccess_ksyms.destroy_vm;

	return address && !ftrace_set_filter_ip(&destroy_ops, address, 0, 0) &&
	       !register_ftrace_function(&destroy_ops);
}

static void unhook_destroy(void)
{
	unregister_ftrace_function(&destroy_ops);
}
#else
static bool hook_destroy(void)
{
	return false;
}

static void unhook_destroy(void)
{
}
#endif

/* Skip, by a non-zero return, every ioctl of /dev/kvm but one. */
static int on_ioctl(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	return regs_get_kernel_argument(regs, 1) != KVM_CREATE_VM;
}

/* The VM is in vm_list now. */
static int on_created(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	if ((long)regs_return_value(regs) >= 0)
		irq_work_queue(&kick);
	return 0;
}

/*
 * A VM that is created while all instances are in use is not announced at
 * once but by the next walk.
 */
static struct kretprobe create_probe = {
	.kp.symbol_name = "kvm_dev_ioctl",
	.entry_handler = on_ioctl,
	.handler = on_created,
	.maxactive = 64,
};

bool kvmaccess_vm_has_events(void)
{
	return has_create_probe;
}

/* Changes whenever a VM comes or goes; never 0. */
u32 kvmaccess_vm_generation(void)
{
	return READ_ONCE(generation) ?: 1;
}

/*
 * Find a VM and hold it. To be released by kvmaccess_vm_put(), soon: while it
 * is held its destruction waits.
 */
struct kvmaccess_vm *kvmaccess_vm_get(u64 id, struct netlink_ext_ack *extack)
{
	struct kvmaccess_vm *vm, *found = ERR_PTR(-ENOENT);

	mutex_lock(&vms_mutex);
	vm = xa_load(&vms_by_id, id);
	/* It is not the VM that is gone; and without the hooks nothing tells one from the next. */
	if (stopped)
		found = ERR_PTR(-EPROTONOSUPPORT);
	else if (vm && kvmaccess_vm_hold(vm))
		found = vm;
	mutex_unlock(&vms_mutex);

	if (found == ERR_PTR(-ENOENT))
		NL_SET_ERR_MSG(extack, "no VM has this id, or not any more");
	return found;
}

/*
 * The highest id that any VM has so far. Whoever goes through all VMs ends
 * there: new ones may come as fast as he gets on.
 */
u64 kvmaccess_vm_last(void)
{
	u64 last;

	mutex_lock(&vms_mutex);
	/* VMs whose announcement has not been worked off yet. */
	if (!stopped)
		walk();
	last = last_id;
	mutex_unlock(&vms_mutex);
	return last;
}

/*
 * The VM with the lowest id above @after and up to @last, held; NULL where
 * there is none. An error while the module is being unloaded, as generic
 * netlink gives it then.
 */
struct kvmaccess_vm *kvmaccess_vm_get_next(u64 after, u64 last)
{
	struct kvmaccess_vm *vm, *found = NULL;
	unsigned long id;

	mutex_lock(&vms_mutex);
	if (stopped) {
		found = ERR_PTR(-EPROTONOSUPPORT);
		goto out;
	}
	xa_for_each_range(&vms_by_id, id, vm, after + 1, last) {
		if (kvmaccess_vm_hold(vm)) {
			found = vm;
			break;
		}
	}
out:
	mutex_unlock(&vms_mutex);
	return found;
}

void kvmaccess_vm_put(struct kvmaccess_vm *vm)
{
	release(vm);
}

/* What an entry knows by itself. */
void kvmaccess_vm_identify(struct kvmaccess_vm *vm, struct kvmaccess_vm_info *info)
{
	*info = (struct kvmaccess_vm_info){
		.id = vm->id,
		.seen = vm->seen,
		.pid = READ_ONCE(vm->pid),
	};
}

/* A vCPU of @vm, which is held and keeps it; NULL if there is none. */
struct kvm_vcpu *kvmaccess_vm_vcpu(struct kvmaccess_vm *vm, u32 id)
{
	return id < KVM_MAX_VCPU_IDS ? kvm_get_vcpu_by_id(vm->kvm, id) : NULL;
}

/* @vm is held. */
void kvmaccess_vm_info(struct kvmaccess_vm *vm, struct kvmaccess_vm_info *info)
{
	struct kvm_memslot_iter iter;
	struct kvm *kvm = vm->kvm;
	struct kvm_memslots *slots;
	struct kvm_vcpu *vcpu;
	unsigned long i;
	int as, idx;

	if (!READ_ONCE(vm->pid))
		find_pid(vm);
	kvmaccess_vm_identify(vm, info);

	kvm_for_each_vcpu(i, vcpu, kvm) {
		info->vcpus++;
		if (vcpu->arch.guest_state_protected)
			info->flags |= KVMACCESS_VM_F_PROTECTED;
	}

	idx = srcu_read_lock(&kvm->srcu);
	for (as = 0; as < kvmaccess_compat_as_num(kvm); as++) {
		slots = __kvm_memslots(kvm, as);
		kvm_for_each_memslot_in_gfn_range(&iter, slots, 0, ~0ULL) {
			info->memslots++;
			if (!as)
				info->memory += (u64)iter.slot->npages << PAGE_SHIFT;
		}
	}
	srcu_read_unlock(&kvm->srcu, idx);
}

/* Announce VMs from now on. */
void kvmaccess_vm_start(void)
{
	mutex_lock(&vms_mutex);
	announcing = true;
	walk();
	mutex_unlock(&vms_mutex);
}

/* No VM is found from now on, none is held when this returns but by requests. */
void kvmaccess_vm_stop(void)
{
	mutex_lock(&vms_mutex);
	stopped = true;
	announcing = false;
	mutex_unlock(&vms_mutex);

	if (has_create_probe)
		unregister_kretprobe(&create_probe);
	if (has_destroy_hook)
		unhook_destroy();
	else
		unregister_kprobe(&destroy_probe);
	irq_work_sync(&kick);
	cancel_work_sync(&walk_work);
}

/*
 * Nobody holds a VM any more. Nobody is to be notified either: who wants to be
 * uses this module's symbols, and it could not be unloaded.
 */
void kvmaccess_vm_exit(void)
{
	struct kvmaccess_vm *vm, *next;

	/* The last references that requests dropped; the last notifications. */
	destroy_workqueue(wq);
	list_for_each_entry_safe(vm, next, &vms, list)
		free_entry(vm);
	xa_destroy(&vms_by_id);
	/* Entries that are freed after a grace period. */
	rcu_barrier();
}

int __init kvmaccess_vm_init(void)
{
	int err;

	wq = alloc_workqueue("kvmaccess", WQ_UNBOUND, 0);
	if (!wq)
		return -ENOMEM;

	/* The hook comes first: no VM may go unseen once it is known. */
	has_destroy_hook = hook_destroy();
	err = has_destroy_hook ? 0 : register_kprobe(&destroy_probe);
	if (err) {
		pr_err("kvm_arch_destroy_vm() cannot be probed: error %d\n", err);
		destroy_workqueue(wq);
		return err;
	}

	err = register_kretprobe(&create_probe);
	if (err)
		kvmaccess_ksyms_miss("kvm_dev_ioctl");
	else
		has_create_probe = true;

	mutex_lock(&vms_mutex);
	walk();
	mutex_unlock(&vms_mutex);
	return 0;
}
