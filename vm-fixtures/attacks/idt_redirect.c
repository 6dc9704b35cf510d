// SPDX-License-Identifier: GPL-2.0-only
/*
 * Redirects a gate of the IDT, which all CPUs share, to code of this module
 * that goes on to the original handler. With page-table isolation that code
 * is not mapped at an interrupt out of user mode: not for pti=on.
 */
#include "attack.h"
#include <asm/desc.h>
#include <asm/ibt.h>
#include <asm/nospec-branch.h>

static int vector = 14; /* page fault */
module_param(vector, int, 0444);

void idt_redirected(void);
unsigned long idt_original;

asm(".pushsection .text\n"
	".type idt_redirected, @function\n"
	"idt_redirected:\n\t"
	ASM_ENDBR
	ANNOTATE_RETPOLINE_SAFE "\n\t"
	"jmp *idt_original(%rip)\n"
	".size idt_redirected, . - idt_redirected\n"
	".popsection");

static gate_desc *gate;
static gate_desc saved;

static int __init idt_redirect_init(void)
{
	gate_desc *table = (gate_desc *)symbol_address("idt_table");
	unsigned long to = (unsigned long)idt_redirected;
	gate_desc new;

	if (!table)
		return -ENOENT;
	gate = &table[vector];
	saved = *gate;
	new = saved;
	idt_original = gate_offset(gate);
	new.offset_low = (u16)to;
	new.offset_middle = (u16)(to >> 16);
	new.offset_high = (u32)(to >> 32);
	write_protected(gate, &new, sizeof(new));
	report("idt", -1, vector, idt_original, gate_offset(gate));
	return 0;
}

static void __exit idt_redirect_exit(void)
{
	write_protected(gate, &saved, sizeof(saved));
}

module_init(idt_redirect_init);
module_exit(idt_redirect_exit);
MODULE_DESCRIPTION("Attack: IDT gate redirected");
MODULE_LICENSE("GPL v2");
