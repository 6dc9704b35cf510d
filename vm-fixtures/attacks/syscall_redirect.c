// SPDX-License-Identifier: GPL-2.0-only
/* Redirects an entry of the system call table to a function of this module. */
#include "attack.h"

static int entry = 217; /* getdents64, as one that hides files does */
module_param(entry, int, 0444);

static unsigned long *table;
static unsigned long original;

static asmlinkage long redirected(const struct pt_regs *regs)
{
	return ((long (*)(const struct pt_regs *))original)(regs);
}

static int __init syscall_redirect_init(void)
{
	unsigned long new = (unsigned long)redirected;

	table = (unsigned long *)symbol_address("sys_call_table");
	if (!table)
		return -ENOENT;
	original = table[entry];
	write_protected(&table[entry], &new, sizeof(new));
	report("sys_call_table", -1, entry, original, table[entry]);
	return 0;
}

static void __exit syscall_redirect_exit(void)
{
	write_protected(&table[entry], &original, sizeof(original));
}

module_init(syscall_redirect_init);
module_exit(syscall_redirect_exit);
MODULE_DESCRIPTION("Attack: system call table entry redirected");
MODULE_LICENSE("GPL v2");
