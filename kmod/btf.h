/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_BTF_H
#define _KVMACCESS_BTF_H

#include <linux/types.h>

struct kvmaccess_btf;

struct kvmaccess_btf *kvmaccess_btf_open(const char *module);
void kvmaccess_btf_close(struct kvmaccess_btf *btf);
int __must_check kvmaccess_btf_member(struct kvmaccess_btf *btf,
				      const char *type, const char *member,
				      u32 *offset);

#endif /* _KVMACCESS_BTF_H */
