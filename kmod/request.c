// SPDX-License-Identifier: GPL-2.0-only
/* What all requests over netlink have in common. */
#include <linux/capability.h>
#include <linux/ktime.h>
#include <linux/timekeeping.h>

#include "account.h"
#include "netlink.h"
#include "request.h"
#include "vm.h"

/*
 * Beyond what GENL_ADMIN_PERM asks for: of the opener of the socket, and of
 * the sender of this message.
 */
int kvmaccess_request_check(struct sk_buff *skb, struct netlink_ext_ack *extack)
{
	if (netlink_capable(skb, CAP_SYS_ADMIN))
		return 0;
	NL_SET_ERR_MSG(extack, "reading guests needs CAP_SYS_ADMIN in the initial user namespace");
	return -EPERM;
}

/* NL_SET_ERR_MSG() takes literals only. */
void kvmaccess_request_explain(struct netlink_ext_ack *extack, const char *text)
{
	if (extack)
		extack->_msg = text;
}

int kvmaccess_request_miss(struct netlink_ext_ack *extack, const char *text)
{
	kvmaccess_request_explain(extack, text);
	return -EINVAL;
}

/* Return @err, for which @attr is to blame. */
int kvmaccess_request_refuse(struct netlink_ext_ack *extack, const struct nlattr *attr,
			     int err, const char *text)
{
	kvmaccess_request_explain(extack, text);
	NL_SET_BAD_ATTR(extack, attr);
	return err;
}

static struct kvmaccess_vm *get_vm(struct nlattr *attr,
				   struct netlink_ext_ack *extack)
{
	struct kvmaccess_vm *vm;

	if (!attr)
		return ERR_PTR(kvmaccess_request_miss(extack, "VM_ID is missing"));
	vm = kvmaccess_vm_get(nla_get_u64(attr), extack);
	if (IS_ERR(vm))
		NL_SET_BAD_ATTR(extack, attr);
	return vm;
}

/* The command, which is the index of its account as well. */
static enum kvmaccess_cmd cmd_of(const struct kvmaccess_request *r)
{
	return r->info->genlhdr->cmd;
}

/*
 * Begin what kvmaccess_request_end() ends: hold the VM and allocate a reply
 * with room for @size bytes of attributes. Nothing is to be ended after an
 * error.
 */
int kvmaccess_request_begin(struct kvmaccess_request *r, struct genl_info *info,
			    struct nlattr *vm, bool needs_vm, size_t size)
{
	int err;

	*r = (struct kvmaccess_request){ .info = info, .start = ktime_get_ns() };

	if (vm || needs_vm) {
		r->vm = get_vm(vm, info->extack);
		if (IS_ERR(r->vm)) {
			err = PTR_ERR(r->vm);
			kvmaccess_account_op(NULL, cmd_of(r), r->start, err, 0);
			return err;
		}
	}

	err = -ENOMEM;
	r->skb = genlmsg_new(size, GFP_KERNEL);
	if (!r->skb)
		goto err_vm;
	r->head = genlmsg_put_reply(r->skb, info, &kvmaccess_netlink_family, 0,
				    info->genlhdr->cmd);
	if (r->head)
		return 0;

	nlmsg_free(r->skb);
err_vm:
	if (r->vm)
		kvmaccess_vm_put(r->vm);
	return err;
}

/* Account for the request, let go of its VM, and send the reply unless @err. */
int kvmaccess_request_end(struct kvmaccess_request *r, int err, u64 bytes)
{
	kvmaccess_account_op(r->vm ? &r->vm->account : NULL, cmd_of(r),
			     r->start, err, bytes);
	if (r->vm)
		kvmaccess_vm_put(r->vm);
	if (err) {
		nlmsg_free(r->skb);
		return err;
	}
	genlmsg_end(r->skb, r->head);
	return genlmsg_reply(r->skb, r->info);
}

/* How a dump starts. */
int kvmaccess_request_dump(struct netlink_callback *cb)
{
	return kvmaccess_request_check(cb->skb, cb->extack);
}

/* Begin a message of a dump. */
void *kvmaccess_request_put(struct sk_buff *skb, struct netlink_callback *cb, u8 cmd)
{
	void *head = genlmsg_put(skb, NETLINK_CB(cb->skb).portid, cb->nlh->nlmsg_seq,
				 &kvmaccess_netlink_family, NLM_F_MULTI, cmd);

	if (head)
		genl_dump_check_consistent(cb, head);
	return head;
}
