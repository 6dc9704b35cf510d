/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_HOSTPAGE_H
#define _KVMACCESS_HOSTPAGE_H

#include <linux/types.h>
#include <asm/asm.h>

struct mm_struct;

/*
 * Where reading goes on at @to if it fails at @from: the kernel may have no
 * mapping of a page, or its memory may be broken, of which the processor tells
 * who reads it: no reason for the host to stop.
 */
#define KVMACCESS_HOSTPAGE_FIXUP(from, to)	\
	_ASM_EXTABLE_TYPE(from, to, EX_TYPE_DEFAULT_MCE_SAFE)

#define KVMACCESS_HOSTPAGE_GET(mov, value, from)			\
({									\
	bool got = true;						\
									\
	asm volatile("1: " mov " %[at], %[v]\n\t"			\
		     "jmp 3f\n\t"					\
		     "2: movb $0, %[ok]\n\t"				\
		     "3:\n\t"						\
		     KVMACCESS_HOSTPAGE_FIXUP(1b, 2b)			\
		     : [v] "+q"(value), [ok] "+m"(got) : [at] "m"(from));	\
	got;								\
})

/* Read 8 bytes; false if they cannot be read. */
static inline bool kvmaccess_hostpage_get_word(u64 *value, const void *at)
{
	*value = 0;
	return KVMACCESS_HOSTPAGE_GET("movq", *value, *(const u64 *)at);
}

static inline bool kvmaccess_hostpage_get_byte(u8 *value, const void *at)
{
	*value = 0;
	return KVMACCESS_HOSTPAGE_GET("movb", *value, *(const u8 *)at);
}

/* The way to a page, as far as it is also that of its neighbours. */
struct kvmaccess_hostpage_path {
	unsigned long region;	/* addresses, shifted by PMD_SHIFT; ~0: none */
	u64 entry;		/* the last that all of them have in common */
	unsigned int shift;	/* of what it maps, or PAGE_SHIFT: a table */
};

#define KVMACCESS_HOSTPAGE_PATH	{ .region = ~0UL }

const void * __must_check
kvmaccess_hostpage_by(struct mm_struct *mm, unsigned long hva,
		      struct kvmaccess_hostpage_path *path);
const void * __must_check kvmaccess_hostpage_at(struct mm_struct *mm, unsigned long hva);
int __must_check kvmaccess_hostpage_copy(struct mm_struct *mm, unsigned long hva,
					 void *to, u32 len);

#endif /* _KVMACCESS_HOSTPAGE_H */
