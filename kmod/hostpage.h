/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_HOSTPAGE_H
#define _KVMACCESS_HOSTPAGE_H

#include <linux/pgtable.h>
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
		     : [v] "+q"(value), [ok] "+q"(got) : [at] "m"(from));	\
	got;								\
})

/* Read 8 bytes; false if they cannot be read. */
static inline bool kvmaccess_hostpage_get_word(u64 *value, const void *at)
{
	*value = 0;
	return KVMACCESS_HOSTPAGE_GET("movq", *value, *(const u64 *)at);
}

/* Whether 8 bytes can be read, and have this value where @mask has ones. */
static __always_inline bool kvmaccess_hostpage_has(const void *at, u64 mask, u64 value)
{
	u64 differs = ~0ULL;

	asm volatile("1: movq %[at], %[d]\n\t"
		     "andq %[mask], %[d]\n\t"
		     "xorq %[value], %[d]\n\t"
		     "2:\n\t"
		     KVMACCESS_HOSTPAGE_FIXUP(1b, 2b)
		     : [d] "+r"(differs)
		     : [at] "m"(*(const u64 *)at), [mask] "rm"(mask), [value] "rm"(value)
		     : "cc");
	return !differs;
}

static inline bool kvmaccess_hostpage_get_byte(u8 *value, const void *at)
{
	*value = 0;
	return KVMACCESS_HOSTPAGE_GET("movb", *value, *(const u8 *)at);
}

/* The way to a page, as far as it is also that of its neighbours. */
struct kvmaccess_hostpage_path {
	unsigned long region;	/* addresses, shifted by PMD_SHIFT; ~0: none */
	const void *at;		/* what it is, or the table of its pages */
	bool large;		/* the former */
	unsigned long wide;	/* addresses, shifted by PUD_SHIFT; ~0: none */
	u64 entry;		/* in charge of all of those ... */
	const u64 *table;	/* ... and the table that it leads to; NULL: to a page */
};

#define KVMACCESS_HOSTPAGE_PATH	{ .region = ~0UL, .wide = ~0UL }

bool __must_check kvmaccess_hostpage_find(struct mm_struct *mm, unsigned long hva,
					  struct kvmaccess_hostpage_path *path);
const void * __must_check kvmaccess_hostpage_in(const void *table, unsigned long hva);

/*
 * Where, *@at, the kernel has what the VMM has at @hva; false if no page is in
 * place there. With interrupts off, since @path began as KVMACCESS_HOSTPAGE_PATH.
 * What is there is to be read as above only.
 */
static __always_inline bool __must_check
kvmaccess_hostpage_by(struct mm_struct *mm, unsigned long hva,
		      struct kvmaccess_hostpage_path *path, const void **at)
{
	if (path->region != hva >> PMD_SHIFT && !kvmaccess_hostpage_find(mm, hva, path))
		return false;
	if (likely(path->large)) {
		*at = path->at + (hva & ~PMD_MASK);
		return true;
	}
	*at = kvmaccess_hostpage_in(path->at, hva);
	return *at;
}

const void * __must_check kvmaccess_hostpage_at(struct mm_struct *mm, unsigned long hva);
int __must_check kvmaccess_hostpage_copy(struct mm_struct *mm, unsigned long hva,
					 void *to, u32 len);

#endif /* _KVMACCESS_HOSTPAGE_H */
