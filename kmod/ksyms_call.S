/* SPDX-License-Identifier: GPL-2.0-only */
#include <linux/linkage.h>
#include <asm/nospec-branch.h>
#include <asm/unwind_hints.h>

/*
 * unsigned long kvmaccess_ksyms_call(const void *function, const void *argument)
 *
 * Call by a return, not by an indirect branch: functions that nothing calls
 * through a pointer have lost their ENDBR at boot, and an indirect branch to
 * one of them is fatal on processors with indirect branch tracking.
 */
SYM_FUNC_START(kvmaccess_ksyms_call)
	pushq	%rdi
	movq	%rsi, %rdi
	UNWIND_HINT_FUNC
	RET
SYM_FUNC_END(kvmaccess_ksyms_call)
