/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_HOSTPAGE_H
#define _KVMACCESS_HOSTPAGE_H

#include <linux/math.h>
#include <linux/mm.h>
#include <linux/pgtable.h>
#include <linux/types.h>
#include <asm/asm.h>
#include <asm/e820/types.h>

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

/* An entry of a table of pages; 0, as one that leads nowhere, if it cannot be read. */
static __always_inline u64 kvmaccess_hostpage_entry(const u64 *at)
{
	u64 entry = 0;

	asm volatile("1: movq %[at], %[e]\n\t"
		     "2:\n\t"
		     KVMACCESS_HOSTPAGE_FIXUP(1b, 2b)
		     : [e] "+r"(entry) : [at] "m"(*at));
	return entry;
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

/* Go to 9 if the word at .Lat differs or cannot be read, or on to the next. */
#define KVMACCESS_HOSTPAGE_WORD	"8: movq .Lat(%[have],%[i]), %[word]\n\t"	\
			"cmpq .Lat(%[want],%[i]), %[word]\n\t"		\
			"jne 9f\n\t"					\
			KVMACCESS_HOSTPAGE_FIXUP(8b, 9f)		\
			".set .Lat, .Lat + 8\n\t"

/*
 * Whether so many bytes, of a page, can be read and are as expected. Three
 * instructions for 8 bytes, and two more each time that a loop goes round: of
 * 256 bytes, of 32, and of 8.
 */
static __always_inline bool
kvmaccess_hostpage_is(const void *at, const void *expected, u32 length)
{
	u32 words = round_down(length, 8);
	/* What is left, subtracted from what a turn takes; above 0 there is no turn. */
	long i = 256 - (long)words;
	u64 word;
	u8 byte;

	asm volatile("testq %[i], %[i]\n\t"
		     "jg 2f\n\t"
		     "1:\n\t"
		     ".set .Lat, -256\n\t"
		     ".rept 32\n\t"
		     KVMACCESS_HOSTPAGE_WORD
		     ".endr\n\t"
		     "addq $256, %[i]\n\t"
		     "jle 1b\n\t"
		     "2: subq $(256 - 32), %[i]\n\t"
		     "jg 4f\n\t"
		     "3:\n\t"
		     ".set .Lat, -32\n\t"
		     ".rept 4\n\t"
		     KVMACCESS_HOSTPAGE_WORD
		     ".endr\n\t"
		     "addq $32, %[i]\n\t"
		     "jle 3b\n\t"
		     "4: subq $(32 - 8), %[i]\n\t"
		     "jg 9f\n\t"
		     "5:\n\t"
		     ".set .Lat, -8\n\t"
		     KVMACCESS_HOSTPAGE_WORD
		     "addq $8, %[i]\n\t"
		     "jle 5b\n\t"
		     "9:\n\t"
		     : [i] "+r"(i), [word] "=&r"(word)
		     : [have] "r"(at + words), [want] "r"(expected + words)
		     : "cc", "memory");
	/* Amid a turn. */
	if (i <= 0)
		return false;
	for (; words < length; words++) {
		if (!kvmaccess_hostpage_get_byte(&byte, at + words) ||
		    byte != ((const u8 *)expected)[words])
			return false;
	}
	return true;
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

/* Whether this is where the kernel maps memory, but for holes; see hostpage.c. */
static __always_inline bool kvmaccess_hostpage_is_memory(u64 pa, unsigned long size)
{
	unsigned long end = (unsigned long)READ_ONCE(high_memory) - PAGE_OFFSET;

	return pa >= ISA_END_ADDRESS && pa + size <= end;
}

/* Find the page of @hva if it is a large one that is within the 1 GiB of the last one. */
static __always_inline bool __must_check
kvmaccess_hostpage_next(unsigned long hva, struct kvmaccess_hostpage_path *path)
{
	const u64 *table = path->table;
	u64 entry, pa;

	if (path->wide != hva >> PUD_SHIFT || !table)
		return false;
	entry = kvmaccess_hostpage_entry(table + ((hva >> PMD_SHIFT) & (PTRS_PER_PMD - 1)));
	if ((entry & (_PAGE_PRESENT | _PAGE_PSE)) != (_PAGE_PRESENT | _PAGE_PSE))
		return false;
	pa = entry & PTE_PFN_MASK & PMD_MASK;
	if (!kvmaccess_hostpage_is_memory(pa, PMD_SIZE))
		return false;
	path->at = __va(pa);
	path->large = true;
	path->region = hva >> PMD_SHIFT;
	return true;
}

/*
 * Where, *@at, the kernel has what the VMM has at @hva; false if no page is in
 * place there. With interrupts off, since @path began as KVMACCESS_HOSTPAGE_PATH.
 * What is there is to be read as above only.
 */
static __always_inline bool __must_check
kvmaccess_hostpage_by(struct mm_struct *mm, unsigned long hva,
		      struct kvmaccess_hostpage_path *path, const void **at)
{
	if (path->region != hva >> PMD_SHIFT && !kvmaccess_hostpage_next(hva, path) &&
	    !kvmaccess_hostpage_find(mm, hva, path))
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
