/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_DIGEST_H
#define _KVMACCESS_DIGEST_H

#include <linux/siphash.h>

#define KVMACCESS_DIGEST_WORDS	(PAGE_SIZE / sizeof(u64))

/* One key, and what the words of a page are hashed with. */
struct kvmaccess_digest {
	siphash_key_t key;
	u64 words[KVMACCESS_DIGEST_WORDS];
};

struct kvmaccess_digest * __must_check kvmaccess_digest_new(const void *key);
int __must_check kvmaccess_digest_page(const struct kvmaccess_digest *digest,
				       const void *page, u64 *value);

#endif /* _KVMACCESS_DIGEST_H */
