// SPDX-License-Identifier: GPL-2.0-only
/*
 * A 64-bit digest of a page, under a secret key of 128 bits; uapi/kvmaccess.h
 * says what it is. A guest learns neither the key nor a digest, so that a hash
 * suffices whose collisions cannot be aimed at: the NH of VMAC (Krovetz and
 * Dai, 2007), a multiplication for every 16 bytes. Two pages that differ have
 * the same with a probability of 2^-63 at most. A keyed hash that is secure for
 * those who see its values costs eight times as much.
 */
#include <linux/slab.h>

#include "digest.h"
#include "hostpage.h"

/* To be freed by kfree_sensitive(). */
struct kvmaccess_digest *kvmaccess_digest_new(const void *key)
{
	struct kvmaccess_digest *digest;
	unsigned int i;

	digest = kmalloc(sizeof(*digest), GFP_KERNEL_ACCOUNT);
	if (!digest)
		return ERR_PTR(-ENOMEM);
	memcpy(&digest->key, key, sizeof(digest->key));
	for (i = 0; i < KVMACCESS_DIGEST_WORDS; i++)
		digest->words[i] = siphash_1u64(i, &digest->key);
	return digest;
}

/* Of what is at @page, where a page of the host is; -ENODATA if it cannot be read. */
int kvmaccess_digest_page(const struct kvmaccess_digest *digest, const void *page, u64 *value)
{
	u64 low = 0, high = 0;
	long i = -(long)PAGE_SIZE;
	bool absent = false;

	asm volatile("1:\n\t"
		     ".irp at, 0, 16, 32, 48\n\t"
		     "2: movq \\at(%[page],%[i]), %%rax\n\t"
		     "3: movq 8+\\at(%[page],%[i]), %%rdx\n\t"
		     "addq \\at(%[words],%[i]), %%rax\n\t"
		     "addq 8+\\at(%[words],%[i]), %%rdx\n\t"
		     "mulq %%rdx\n\t"
		     "addq %%rax, %[low]\n\t"
		     "adcq %%rdx, %[high]\n\t"
		     KVMACCESS_HOSTPAGE_FIXUP(2b, 4f)
		     KVMACCESS_HOSTPAGE_FIXUP(3b, 4f)
		     ".endr\n\t"
		     "addq $64, %[i]\n\t"
		     "jnz 1b\n\t"
		     "jmp 5f\n\t"
		     "4: movb $1, %[absent]\n\t"
		     "5:\n\t"
		     : [i] "+r"(i), [low] "+r"(low), [high] "+r"(high), [absent] "+m"(absent)
		     : [page] "r"(page + PAGE_SIZE),
		       [words] "r"((const void *)digest->words + PAGE_SIZE)
		     : "rax", "rdx", "cc", "memory");
	if (absent)
		return -ENODATA;
	*value = siphash_2u64(low, high, &digest->key);
	return 0;
}
