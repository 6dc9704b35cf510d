/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_REQUEST_H
#define _KVMACCESS_REQUEST_H

#include <net/genetlink.h>

struct kvmaccess_vm;

/* Room for everything in a reply but the bytes of guest memory. */
#define KVMACCESS_REPLY_SIZE NLMSG_DEFAULT_SIZE

/* A request that one message answers. */
struct kvmaccess_request {
	struct genl_info *info;
	struct kvmaccess_vm *vm;	/* held; NULL where the request is about none */
	struct sk_buff *skb;		/* the reply */
	void *head;
	u64 start;
};

static inline int put_u64(struct sk_buff *skb, int attr, u64 value)
{
	/* The PAD of every set is 1. */
	return nla_put_u64_64bit(skb, attr, value, 1);
}

int __must_check kvmaccess_request_check(struct sk_buff *skb,
					 struct netlink_ext_ack *extack);
void kvmaccess_request_explain(struct netlink_ext_ack *extack, const char *text);
int kvmaccess_request_miss(struct netlink_ext_ack *extack, const char *text);
int kvmaccess_request_refuse(struct netlink_ext_ack *extack, const struct nlattr *attr,
			     int err, const char *text);
int __must_check kvmaccess_request_begin(struct kvmaccess_request *r, struct genl_info *info,
					 struct nlattr *vm, bool needs_vm, size_t size);
int kvmaccess_request_end(struct kvmaccess_request *r, int err, u64 bytes);
int kvmaccess_request_dump(struct netlink_callback *cb);
void *kvmaccess_request_put(struct sk_buff *skb, struct netlink_callback *cb, u8 cmd);

#endif /* _KVMACCESS_REQUEST_H */
