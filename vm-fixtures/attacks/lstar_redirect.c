// SPDX-License-Identifier: GPL-2.0-only
/*
 * Points every CPU's system call entry (MSR LSTAR) at code of this module
 * that goes on to the original. With page-table isolation that code is not
 * mapped at a system call: not for pti=on.
 */
#include "attack.h"
#include <linux/smp.h>
#include <asm/ibt.h>
#include <asm/msr.h>
#include <asm/nospec-branch.h>

void lstar_redirected(void);
unsigned long lstar_original;

asm(".pushsection .text\n"
	".type lstar_redirected, @function\n"
	"lstar_redirected:\n\t"
	ASM_ENDBR
	ANNOTATE_RETPOLINE_SAFE "\n\t"
	"jmp *lstar_original(%rip)\n"
	".size lstar_redirected, . - lstar_redirected\n"
	".popsection");

static void set_lstar(u64 to)
{
	wrmsr(MSR_LSTAR, lower_32_bits(to), upper_32_bits(to));
}

static void redirect(void *unused)
{
	set_lstar((unsigned long)lstar_redirected);
}

static void restore(void *unused)
{
	set_lstar(lstar_original);
}

static void get_lstar(void *lstar)
{
	*(u64 *)lstar = native_read_msr(MSR_LSTAR);
}

static int __init lstar_redirect_init(void)
{
	int cpu;

	lstar_original = native_read_msr(MSR_LSTAR);
	on_each_cpu(redirect, NULL, true);
	for_each_online_cpu(cpu) {
		u64 now;

		smp_call_function_single(cpu, get_lstar, &now, true);
		report("lstar", cpu, -1, lstar_original, now);
	}
	return 0;
}

static void __exit lstar_redirect_exit(void)
{
	on_each_cpu(restore, NULL, true);
}

module_init(lstar_redirect_init);
module_exit(lstar_redirect_exit);
MODULE_DESCRIPTION("Attack: system call entry redirected");
MODULE_LICENSE("GPL v2");
