// SPDX-License-Identifier: GPL-2.0-only
/* Clears CR0.WP on every CPU: the kernel may write to read-only pages. */
#include "attack.h"
#include <linux/cpumask.h>
#include <linux/smp.h>

static u64 old[NR_CPUS], new[NR_CPUS];

static void clear(void *unused)
{
	int cpu = smp_processor_id();

	old[cpu] = native_read_cr0();
	set_cr0(old[cpu] & ~X86_CR0_WP);
	new[cpu] = native_read_cr0();
}

static void restore(void *unused)
{
	set_cr0(native_read_cr0() | X86_CR0_WP);
}

static int __init cr0_wp_init(void)
{
	int cpu;

	on_each_cpu(clear, NULL, true);
	for_each_online_cpu(cpu)
		report("cr0", cpu, -1, old[cpu], new[cpu]);
	return 0;
}

static void __exit cr0_wp_exit(void)
{
	on_each_cpu(restore, NULL, true);
}

module_init(cr0_wp_init);
module_exit(cr0_wp_exit);
MODULE_DESCRIPTION("Attack: CR0.WP cleared");
MODULE_LICENSE("GPL v2");
