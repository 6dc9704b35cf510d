/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_NOTIFY_H
#define _KVMACCESS_NOTIFY_H

#include "api.h"

struct kvmaccess_watch_event;

bool kvmaccess_notify_wanted(void);
void kvmaccess_notify(enum kvmaccess_cmd cmd, struct kvmaccess_vm_info *info);
void kvmaccess_notify_watch(const struct kvmaccess_watch_event *event);
void kvmaccess_notify_exit(void);

#endif /* _KVMACCESS_NOTIFY_H */
