/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_NETLINK_H
#define _KVMACCESS_NETLINK_H

#include <linux/init.h>

#include "uapi/kvmaccess.h"

struct kvmaccess_vm;

int __init kvmaccess_netlink_init(void);
void kvmaccess_netlink_exit(void);
void kvmaccess_netlink_event(struct kvmaccess_vm *vm, enum kvmaccess_cmd cmd);

#endif /* _KVMACCESS_NETLINK_H */
