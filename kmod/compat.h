/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_COMPAT_H
#define _KVMACCESS_COMPAT_H

#include <linux/genetlink.h>
#include <linux/kvm_host.h>
#include <linux/version.h>
#include <net/genetlink.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "KvmAccess needs Linux 6.1 or later"
#endif

/* 7287904c8771 ("genetlink: allow making ops and dumps use the same info"), 6.7 */
static inline struct nlattr **
kvmaccess_compat_dump_attrs(struct netlink_callback *cb)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	return genl_dumpit_info(cb)->info.attrs;
#else
	return genl_dumpit_info(cb)->attrs;
#endif
}

#endif /* _KVMACCESS_COMPAT_H */
