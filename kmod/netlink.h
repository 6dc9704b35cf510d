/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_NETLINK_H
#define _KVMACCESS_NETLINK_H

#include <linux/init.h>
#include <net/netlink.h>

#include "uapi/kvmaccess.h"

struct genl_family;
struct genl_info;
struct kvmaccess_vm;
struct kvmaccess_watch_event;

extern struct genl_family kvmaccess_netlink_family;

int __init kvmaccess_netlink_init(void);
void kvmaccess_netlink_exit(void);
void kvmaccess_netlink_event(struct kvmaccess_vm *vm, enum kvmaccess_cmd cmd);

/* netlink_watch.c */
extern const struct nla_policy kvmaccess_netlink_watch_new_policy[];
extern const struct nla_policy kvmaccess_netlink_watch_add_policy[];
extern const struct nla_policy kvmaccess_netlink_watch_del_policy[];
extern const struct nla_policy kvmaccess_netlink_watch_get_policy[];
int kvmaccess_netlink_watch_new(struct sk_buff *skb, struct genl_info *info);
int kvmaccess_netlink_watch_add(struct sk_buff *skb, struct genl_info *info);
int kvmaccess_netlink_watch_del(struct sk_buff *skb, struct genl_info *info);
int kvmaccess_netlink_watch_get(struct sk_buff *skb, struct genl_info *info);
int kvmaccess_netlink_watch_dump(struct sk_buff *skb, struct netlink_callback *cb);
int __must_check kvmaccess_netlink_watch_event(u32 portid,
					       const struct kvmaccess_watch_event *event);

#endif /* _KVMACCESS_NETLINK_H */
