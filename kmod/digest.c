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
#include <linux/uaccess.h>

#include "digest.h"

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

/*
 * The digest of a page of the adopted address space, with page faults
 * disabled. Returns -ENODATA where the host has no page in place.
 */
int kvmaccess_digest_page(const struct kvmaccess_digest *digest,
			  const void __user *page, u64 *value)
{
	const u64 __user *word = page;
	const u64 *key = digest->words;
	unsigned __int128 sum = 0;
	unsigned int i;
	u64 a, b;

	if (!user_access_begin(page, PAGE_SIZE))
		return -ENODATA;
	for (i = 0; i < KVMACCESS_DIGEST_WORDS; i += 2) {
		unsafe_get_user(a, word + i, absent);
		unsafe_get_user(b, word + i + 1, absent);
		sum += (unsigned __int128)(a + key[i]) * (b + key[i + 1]);
	}
	user_access_end();
	*value = siphash_2u64((u64)sum, (u64)(sum >> 64), &digest->key);
	return 0;

absent:
	user_access_end();
	return -ENODATA;
}
