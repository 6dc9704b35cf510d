// SPDX-License-Identifier: GPL-2.0-only
/*
 * When a watch looks, and who does.
 *
 * Most ticks find all as it should be, and the larger part of what such a tick
 * would cost is the switch to a thread and back. So a high-resolution timer of
 * each watch looks itself, in its interrupt, if there is not much to look at.
 * It can compare, and nothing more. Where it finds anything else than that all
 * is as expected, it queues the tick to one worker thread, which looks again.
 * Nothing is copied, allocated or sent unless something is not as it was at the
 * last tick.
 *
 * How long interrupts are off: a timer looks at QUICK_* things at most, for
 * about 25 us on a processor of today. Timers of many watches may expire at
 * once, so those of a CPU, and the interrupts that they send there, have QUICK_BURST
 * together, and one in QUICK_SHARE of the time from then on: beyond that
 * they queue, which takes a fraction of a microsecond, and the worker looks. It
 * has interrupts off for a page at a time.
 *
 * The worker is a real-time thread, or ticks would be late whenever the host is
 * busy. It is kept from taking the host with it: a tick looks at one slice (see
 * look.c: less than 1 ms) before it lets those of other watches go first, no
 * watch takes more than half of a CPU, nor do all together: their periods are
 * stretched. First ticks are at random times, lest watches that are made in a
 * row have theirs in a row for ever.
 *
 * From the timer on until the tick has ended ->busy says whose the account of
 * ticks is; and the timer looks at items only while ->quick allows for it, which
 * the worker takes back before it changes any. ->lock keeps one from doing so
 * while the other looks. It is held for as long as that takes, and one who waits
 * for it is the worker, or a timer that comes while an interrupt of the tick
 * before is under way elsewhere.
 *
 * A timer that is due while its watch is ->busy has missed its tick. CPUs that
 * go offline hand over their timers, and handle what interrupts are under way.
 */
#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/math64.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/smp.h>
#include <linux/timekeeping.h>

#include "account.h"
#include "compat.h"
#include "tick.h"
#include "vm.h"

/* What the timer's interrupt looks at. */
#define QUICK_BYTES	(32U << 10)
#define QUICK_ITEMS	128
#define QUICK_VCPUS	16

/* What such interrupts take of a CPU: a part of it, and ns at once. */
#define QUICK_SHARE	4
#define QUICK_BURST	(50 * NSEC_PER_USEC)

/* Ticks that share an interrupt with another timer are this late at most. */
#define SLACK		(50 * NSEC_PER_USEC)

/* What all watches together may take of a CPU, in millionths. */
#define MAX_LOAD	500000

/* What the timer's interrupt takes beside looking, ns. */
#define TIMER_COST	500

/* The worker's run time, in ns, after which what it takes beside is measured anew. */
#define MEASURED_TIME	(50 * NSEC_PER_MSEC)

/* Who is at a tick: nobody, the timer and interrupts that it sends, the worker. */
enum { IDLE, LOOKING, QUEUED };

static struct kthread_worker *worker;
static atomic64_t total_load;

/* The worker's: what a slice takes beside looking, ns, and what that is made of. */
static u64 overhead;
static u64 measured_from;	/* its run time then */
static u64 measured_slices;
static u64 measured_spent;

/* When what was taken of this CPU will have been its share. */
static DEFINE_PER_CPU(u64, quick_until);

/* CPU time that the worker has used so far, in ns. */
u64 kvmaccess_tick_worker_time(void)
{
	return READ_ONCE(worker->task->se.sum_exec_runtime);
}

/* From here on, until the end of the next tick, the timer does not look. */
void kvmaccess_tick_keep_timer_off(struct kvmaccess_watch *w)
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

/*
 * Half of the time is left to others, whatever a tick takes; and all watches
 * together leave half of a CPU. Called at the end of a tick, which took @beside
 * ns more than for looking.
 */
static void stretch(struct kvmaccess_watch *w, u64 beside)
{
	u64 spent = w->spent + beside;
	u64 effective;

	w->stats.time += w->spent;
	if (w->spent > w->stats.longest)
		w->stats.longest = w->spent;
	/* One that was kept waiting by an interrupt of another CPU is not the rule. */
	spent = min(spent, max(8 * w->cost, w->stats.period));
	w->cost = w->cost ? (7 * w->cost + spent) / 8 : spent;
	effective = max(w->stats.period, 2 * w->cost);
	set_load(w, w->cost * 1000000 / effective);
	WRITE_ONCE(w->stats.effective, effective);
}

/*
 * Account for a slice. To be woken up, to hold the VM and to account takes longer
 * than to look at little. How long is found out from the time that the scheduler
 * says the worker has run, which it notes now and then.
 */
static void measure(u64 spent)
{
	u64 ran = kvmaccess_tick_worker_time() - measured_from;

	measured_slices++;
	measured_spent += spent;
	if (ran < MEASURED_TIME)
		return;
	overhead = ran > measured_spent ? (ran - measured_spent) / measured_slices : 0;
	measured_from += ran;
	measured_slices = 0;
	measured_spent = 0;
}

/* In ns, as it is stretched now. */
u64 kvmaccess_tick_period(const struct kvmaccess_watch *w)
{
	u64 effective = READ_ONCE(w->stats.effective);
	u64 load = atomic64_read(&total_load);

	if (likely(load <= MAX_LOAD))
		return effective;
	return effective * (load / (MAX_LOAD / 16)) / 16;
}

static void count_tick(struct kvmaccess_watch *w)
{
	s64 late = w->now - w->deadline;

	w->stats.ticks++;
	if (late > (s64)NSEC_PER_MSEC)
		w->stats.late++;
	if (late > (s64)w->stats.latest)
		w->stats.latest = late;
}

static void begin(struct kvmaccess_watch *w)
{
	/* The timer may have begun it, and not have got to its end. */
	if (!w->under_way)
		count_tick(w);
	w->under_way = true;
	w->walking = true;
	w->slices = 0;
	kvmaccess_look_begin(w);
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
	bool quick = is_quick(w);

	w->walking = false;
	if (quick)
		kvmaccess_look_prepare(w);
	w->quick = quick;
	w->stats.compared += w->stats.bytes;
	kvmaccess_account_tick(&w->vm->account, w->spent, w->stats.bytes);
	stretch(w, TIMER_COST + w->slices * overhead);
	/* From here on the timer may queue the next one. */
	smp_store_release(&w->busy, IDLE);
}

/* There is no VM any more: the owner is told, and has the watch without its items. */
static void end(struct kvmaccess_watch *w)
{
	kvmaccess_tick_keep_timer_off(w);
	set_load(w, 0);
	kvmaccess_watch_drop_items(w);
	kvmaccess_event_end(w);
}

/* The worker's part. */
static void tick_fn(struct kthread_work *work)
{
	struct kvmaccess_watch *w = container_of(work, struct kvmaccess_watch, work);
	struct kvmaccess_vm *vm = w->vm;
	bool done;
	u64 spent;

	if (w->stats.flags & KVMACCESS_WATCH_F_ENDED)
		return;
	if (!kvmaccess_vm_hold(vm)) {
		end(w);
		return;
	}
	/* Queued because the VM was said to be gone. */
	if (READ_ONCE(w->busy) != QUEUED)
		goto out;
	/* The VMM has exited, or is about to; its memory goes before its VM does. */
	if (!atomic_read(&vm->kvm->mm->mm_users)) {
		end(w);
		goto out;
	}
	w->now = ktime_get_ns();
	if (!w->walking)
		begin(w);
	done = kvmaccess_look(w);
	spent = ktime_get_ns() - w->now;
	measure(spent);
	w->spent += spent;
	w->slices++;
	if (done)
		finish(w);
	else
		kthread_queue_work(worker, &w->work);
out:
	kvmaccess_vm_put(vm);
}

/* In the timer's interrupt */

static bool may_look_here(u64 now)
{
	return this_cpu_read(quick_until) <= now + QUICK_SHARE * QUICK_BURST;
}

static void queue_tick(struct kvmaccess_watch *w)
{
	WRITE_ONCE(w->busy, QUEUED);
	kthread_queue_work(worker, &w->work);
}

/* Account for a look at things here. Returns the time. */
static u64 spend(struct kvmaccess_watch *w)
{
	u64 now = ktime_get_ns(), spent = now - w->now;

	w->spent += spent;
	/* If it was longer, something else had the CPU: firmware, a hypervisor. */
	spent = min_t(u64, spent, NSEC_PER_MSEC);
	this_cpu_write(quick_until,
		       max(this_cpu_read(quick_until), w->now) + QUICK_SHARE * spent);
	return now;
}

/*
 * Have another CPU go on with the tick, which holds the VM from the first such
 * interrupt on: none knows whether the one after it comes soon.
 */
static bool go_on_at(struct kvmaccess_watch *w, int cpu)
{
	bool holds = w->interrupts;

	if (cpu < 0 || w->interrupts == 2 * QUICK_VCPUS ||
	    (!holds && !kvmaccess_vm_hold(w->vm)))
		return false;
	if (!smp_call_function_single_async(cpu, &w->call)) {
		w->interrupts++;
		return true;
	}
	if (!holds)
		kvmaccess_vm_put(w->vm);
	return false;
}

/*
 * Go on with a tick that has found all as expected so far, here or in an
 * interrupt of the CPU where the next vCPU is: then the result is true. The
 * caller keeps the VM from going. *@now is the time.
 */
static bool look_on(struct kvmaccess_watch *w, u64 *now)
{
	int cpu = kvmaccess_look_at_vcpus_here(w);

	*now = spend(w);
	if (cpu != KVMACCESS_LOOK_DONE) {
		if (go_on_at(w, cpu))
			return true;
		queue_tick(w);
		return false;
	}
	w->stats.compared += w->stats.bytes;
	stretch(w, TIMER_COST * (1 + w->interrupts));
	kvmaccess_account_quick(&w->vm->account, w->spent, w->stats.bytes, w->interrupts);
	/* From here on the timer may begin the next one. */
	smp_store_release(&w->busy, IDLE);
	return false;
}

static void on_call(void *info)
{
	struct kvmaccess_watch *w = info;
	bool goes_on = false;
	u64 now;

	raw_spin_lock(&w->lock);
	w->now = ktime_get_ns();
	if (w->quick && may_look_here(w->now))
		goes_on = look_on(w, &now);
	else
		queue_tick(w);
	if (!goes_on)
		kvmaccess_vm_put(w->vm);
	raw_spin_unlock(&w->lock);
}

/* Begin a tick, *@now, without the worker; false if it has to be the worker's. */
static bool look_quickly(struct kvmaccess_watch *w, u64 *now)
{
	bool begun;

	w->now = *now;
	if (!w->quick || !may_look_here(w->now) || !kvmaccess_vm_look(w->vm))
		return false;
	begun = kvmaccess_look_is_memory_expected(w);
	if (begun) {
		WRITE_ONCE(w->busy, LOOKING);
		count_tick(w);
		w->under_way = true;
		w->next_vcpu = 0;
		w->interrupts = 0;
		look_on(w, now);
	} else {
		*now = spend(w);
	}
	kvmaccess_vm_looked(w->vm);
	return begun;
}

static enum hrtimer_restart timer_fn(struct hrtimer *timer)
{
	struct kvmaccess_watch *w = container_of(timer, struct kvmaccess_watch, timer);
	u64 now, period, missed = 0;
	unsigned long flags;

	if (READ_ONCE(w->stats.flags) & KVMACCESS_WATCH_F_ENDED)
		return HRTIMER_NORESTART;

	raw_spin_lock_irqsave(&w->lock, flags);
	now = ktime_get_ns();
	/* Pairs with the releases at the ends of ticks. */
	if (smp_load_acquire(&w->busy) == IDLE) {
		w->deadline = ktime_to_ns(hrtimer_get_softexpires(timer));
		w->spent = 0;
		w->under_way = false;
		if (!look_quickly(w, &now))
			queue_tick(w);
	} else {
		missed = 1;
	}
	raw_spin_unlock_irqrestore(&w->lock, flags);

	period = kvmaccess_tick_period(w);
	if (likely(now < ktime_to_ns(hrtimer_get_expires(timer)) + period))
		hrtimer_add_expires_ns(timer, period);
	else
		missed += hrtimer_forward(timer, ns_to_ktime(now), ns_to_ktime(period)) - 1;
	WRITE_ONCE(w->missed, w->missed + missed);
	return HRTIMER_RESTART;
}

/* Life */

void kvmaccess_tick_new(struct kvmaccess_watch *w)
{
	raw_spin_lock_init(&w->lock);
	INIT_CSD(&w->call, on_call, w);
	kthread_init_work(&w->work, tick_fn);
	kvmaccess_compat_timer(&w->timer, timer_fn);
}

void kvmaccess_tick_start(struct kvmaccess_watch *w)
{
	u64 first = mul_u64_u32_shr(w->stats.period, get_random_u32(), 32);

	hrtimer_start_range_ns(&w->timer, ns_to_ktime(first),
			       min_t(u64, SLACK, w->stats.period / 32), HRTIMER_MODE_REL);
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

/*
 * When this returns the watch, which nobody finds any more, does not tick. What
 * a requester that had found it before still has done to its items is harmless.
 */
void kvmaccess_tick_stop(struct kvmaccess_watch *w)
{
	hrtimer_cancel(&w->timer);
	wait_for_calls(w);
	kthread_cancel_work_sync(&w->work);
	set_load(w, 0);
}

/* The VM of a watch that may be found is gone: end it now and not at its next tick. */
void kvmaccess_tick_vm_gone(struct kvmaccess_watch *w)
{
	kthread_queue_work(worker, &w->work);
}

/* Have the worker do something between two slices, and wait for that. */
void kvmaccess_tick_do(struct kthread_work *work)
{
	kthread_queue_work(worker, work);
	/* Bounded: a slice of each watch at most goes first. */
	kthread_flush_work(work);
}

int __init kvmaccess_tick_init(void)
{
	kvmaccess_look_init();
	worker = kthread_run_worker(0, "kvmaccess-watch");
	if (IS_ERR(worker))
		return PTR_ERR(worker);
	sched_set_fifo_low(worker->task);
	return 0;
}

void kvmaccess_tick_exit(void)
{
	kthread_destroy_worker(worker);
}
