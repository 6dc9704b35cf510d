/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_NOTIFY_H
#define _KVMACCESS_NOTIFY_H

#include "api.h"

bool kvmaccess_notify_wanted(void);
void kvmaccess_notify(enum kvmaccess_cmd cmd, struct kvmaccess_vm_info *info);

#endif /* _KVMACCESS_NOTIFY_H */
