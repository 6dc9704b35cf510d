/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_HOSTPAGE_H
#define _KVMACCESS_HOSTPAGE_H

#include <linux/types.h>

struct mm_struct;

const void * __must_check kvmaccess_hostpage_at(struct mm_struct *mm, unsigned long hva);
int __must_check kvmaccess_hostpage_copy(struct mm_struct *mm, unsigned long hva,
					 void *to, u32 len);

#endif /* _KVMACCESS_HOSTPAGE_H */
