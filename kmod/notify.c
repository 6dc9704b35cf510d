// SPDX-License-Identifier: GPL-2.0-only
/*
 * What other modules are told: VMs that come and go, and what watches find.
 *
 * One who is told may take as long as it likes. So that no tick waits for that,
 * changes are put in a queue, which a work item empties; one that finds it full
 * is counted, and the next change says how many there were.
 */
#include <linux/export.h>
#include <linux/kfifo.h>
#include <linux/notifier.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include "notify.h"
#include "watch.h"

/* Changes that wait to be told; a power of two. */
#define MAX_CHANGES	128

static BLOCKING_NOTIFIER_HEAD(chain);
static DEFINE_KFIFO(changes, struct kvmaccess_watch_change, MAX_CHANGES);
static DEFINE_SPINLOCK(changes_lock);	/* protects the above, but for its only reader */
static u64 lost;

/* Whether anybody would hear; one who registers right now did so too late. */
bool kvmaccess_notify_wanted(void)
{
	return rcu_access_pointer(chain.head);
}

void kvmaccess_notify(enum kvmaccess_cmd cmd, struct kvmaccess_vm_info *info)
{
	blocking_notifier_call_chain(&chain, cmd, info);
}

static void changes_fn(struct work_struct *work)
{
	struct kvmaccess_watch_change change;

	while (kfifo_get(&changes, &change))
		blocking_notifier_call_chain(&chain, KVMACCESS_CMD_WATCH_EVENT, &change);
}

static DECLARE_WORK(changes_work, changes_fn);

/* What the owner of a watch is told; never in an interrupt. */
void kvmaccess_notify_watch(const struct kvmaccess_watch_event *e)
{
	struct kvmaccess_watch_change change;

	if (!kvmaccess_notify_wanted())
		return;
	change = (struct kvmaccess_watch_change){
		.watch = e->watch,
		.vm = e->vm_id,
		.cookie = e->cookie,
		.time = e->time,
		.coalesced = e->coalesced,
		.kind = e->kind,
		.state = e->state,
		.gpa = e->gpa,
		.vcpu = e->vcpu,
		.reg = e->reg,
		.condition = e->condition,
	};
	if (e->data) {
		change.length = e->length;
		memcpy(change.expected, e->expected, e->length);
		memcpy(change.data, e->data, e->length);
	}
	spin_lock(&changes_lock);
	change.lost = lost;
	lost = kfifo_put(&changes, change) ? 0 : lost + 1;
	spin_unlock(&changes_lock);
	schedule_work(&changes_work);
}

/* There are no watches any more. */
void kvmaccess_notify_exit(void)
{
	cancel_work_sync(&changes_work);
}

int kvmaccess_register_notifier(struct notifier_block *nb)
{
	return blocking_notifier_chain_register(&chain, nb);
}
EXPORT_SYMBOL_GPL(kvmaccess_register_notifier);

int kvmaccess_unregister_notifier(struct notifier_block *nb)
{
	return blocking_notifier_chain_unregister(&chain, nb);
}
EXPORT_SYMBOL_GPL(kvmaccess_unregister_notifier);
