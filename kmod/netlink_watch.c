// SPDX-License-Identifier: GPL-2.0-only
/* Requests about watches, and their events. */
#include <linux/ktime.h>
#include <linux/timekeeping.h>
#include <net/genetlink.h>
#include <net/sock.h>

#include "account.h"
#include "item.h"
#include "netlink.h"
#include "request.h"
#include "vcpu.h"
#include "vm.h"
#include "watch.h"

const struct nla_policy kvmaccess_netlink_watch_new_policy[] = {
	[KVMACCESS_A_WATCH_VM_ID]	= { .type = NLA_U64 },
	[KVMACCESS_A_WATCH_PERIOD]	= { .type = NLA_U64 },
	[KVMACCESS_A_WATCH_BUDGET]	= { .type = NLA_U32 },
	[KVMACCESS_A_WATCH_KEY]		= NLA_POLICY_EXACT_LEN(KVMACCESS_WATCH_KEY_BYTES),
};

static const struct nla_policy item_policy[] = {
	[KVMACCESS_A_ITEM_COOKIE]	= { .type = NLA_U64 },
	[KVMACCESS_A_ITEM_KIND]		= { .type = NLA_U32 },
	[KVMACCESS_A_ITEM_GPA]		= { .type = NLA_U64 },
	[KVMACCESS_A_ITEM_DATA]		= {
		.type = NLA_BINARY,
		.len = KVMACCESS_WATCH_MAX_DIGESTS * sizeof(u64),
	},
	[KVMACCESS_A_ITEM_VALUE]	= { .type = NLA_U64 },
	[KVMACCESS_A_ITEM_MASK]		= { .type = NLA_U64 },
	[KVMACCESS_A_ITEM_REGISTER]	= { .type = NLA_U32 },
	[KVMACCESS_A_ITEM_VCPU_ID]	= { .type = NLA_U32 },
};

const struct nla_policy kvmaccess_netlink_watch_add_policy[] = {
	[KVMACCESS_A_WATCH_ID]		= { .type = NLA_U64 },
	[KVMACCESS_A_WATCH_ITEM]	= NLA_POLICY_NESTED(item_policy),
};

const struct nla_policy kvmaccess_netlink_watch_del_policy[] = {
	[KVMACCESS_A_WATCH_ID]		= { .type = NLA_U64 },
	[KVMACCESS_A_WATCH_COOKIE]	= { .type = NLA_U64 },
};

const struct nla_policy kvmaccess_netlink_watch_get_policy[] = {
	[KVMACCESS_A_WATCH_ID]		= { .type = NLA_U64 },
};

static int stats_fill(struct sk_buff *skb, struct kvmaccess_watch *watch)
{
	struct kvmaccess_watch_stats s;

	kvmaccess_watch_stats(watch, &s);
	if (put_u64(skb, KVMACCESS_A_WATCH_ID, s.id) ||
	    put_u64(skb, KVMACCESS_A_WATCH_VM_ID, s.vm_id) ||
	    put_u64(skb, KVMACCESS_A_WATCH_PERIOD, s.period) ||
	    nla_put_u32(skb, KVMACCESS_A_WATCH_BUDGET, s.budget) ||
	    nla_put_u32(skb, KVMACCESS_A_WATCH_FLAGS, s.flags) ||
	    nla_put_u32(skb, KVMACCESS_A_WATCH_PORTID, s.portid) ||
	    put_u64(skb, KVMACCESS_A_WATCH_EFFECTIVE, s.effective) ||
	    nla_put_u32(skb, KVMACCESS_A_WATCH_ITEMS, s.items) ||
	    put_u64(skb, KVMACCESS_A_WATCH_MEMORY, s.memory) ||
	    put_u64(skb, KVMACCESS_A_WATCH_BYTES, s.bytes) ||
	    put_u64(skb, KVMACCESS_A_WATCH_DIGESTED, s.digested) ||
	    put_u64(skb, KVMACCESS_A_WATCH_TICKS, s.ticks) ||
	    put_u64(skb, KVMACCESS_A_WATCH_MISSED, s.missed) ||
	    put_u64(skb, KVMACCESS_A_WATCH_LATE, s.late) ||
	    put_u64(skb, KVMACCESS_A_WATCH_LATEST, s.latest) ||
	    put_u64(skb, KVMACCESS_A_WATCH_TIME, s.time) ||
	    put_u64(skb, KVMACCESS_A_WATCH_LONGEST, s.longest) ||
	    put_u64(skb, KVMACCESS_A_WATCH_COMPARED, s.compared) ||
	    put_u64(skb, KVMACCESS_A_WATCH_PASSES, s.passes) ||
	    put_u64(skb, KVMACCESS_A_WATCH_CAPTURES, s.captures) ||
	    put_u64(skb, KVMACCESS_A_WATCH_SKIPPED, s.skipped) ||
	    put_u64(skb, KVMACCESS_A_WATCH_UNSETTLED, s.unsettled) ||
	    put_u64(skb, KVMACCESS_A_WATCH_FAILED, s.failed) ||
	    nla_put_u32(skb, KVMACCESS_A_WATCH_DIFFERENT,
			s.in_state[KVMACCESS_STATE_DIFFERENT]) ||
	    nla_put_u32(skb, KVMACCESS_A_WATCH_NOT_RESIDENT,
			s.in_state[KVMACCESS_STATE_NOT_RESIDENT]) ||
	    nla_put_u32(skb, KVMACCESS_A_WATCH_NO_MEMSLOT,
			s.in_state[KVMACCESS_STATE_NO_MEMSLOT]) ||
	    put_u64(skb, KVMACCESS_A_WATCH_EVENTS, s.events) ||
	    put_u64(skb, KVMACCESS_A_WATCH_COALESCED, s.coalesced) ||
	    put_u64(skb, KVMACCESS_A_WATCH_LOST, s.lost))
		return -EMSGSIZE;
	return 0;
}

/* The watch that a request names; only its owner's socket may if @own. */
static struct kvmaccess_watch *get_watch(struct genl_info *info, bool own)
{
	struct nlattr *attr = info->attrs[KVMACCESS_A_WATCH_ID];
	struct kvmaccess_watch *watch;

	if (!attr)
		return ERR_PTR(kvmaccess_request_miss(info->extack, "ID is missing"));
	watch = kvmaccess_watch_get(nla_get_u64(attr), own ? info->snd_portid : 0);
	if (!watch)
		return ERR_PTR(kvmaccess_request_refuse(info->extack, attr, -ENOENT, own ?
			"no watch of this socket has this id" :
			"no watch has this id, or not any more"));
	return watch;
}

/* WATCH_NEW */

static int parse_config(struct sk_buff *skb, struct genl_info *info,
			struct kvmaccess_watch_config *config)
{
	struct nlattr *period = info->attrs[KVMACCESS_A_WATCH_PERIOD];
	struct nlattr *budget = info->attrs[KVMACCESS_A_WATCH_BUDGET];
	struct nlattr *key = info->attrs[KVMACCESS_A_WATCH_KEY];

	*config = (struct kvmaccess_watch_config){
		.sk = NETLINK_CB(skb).sk,
		.portid = info->snd_portid,
	};
	if (!period)
		return kvmaccess_request_miss(info->extack, "PERIOD is missing");
	config->period = nla_get_u64(period);
	if (config->period < KVMACCESS_WATCH_MIN_PERIOD ||
	    config->period > KVMACCESS_WATCH_MAX_PERIOD)
		return kvmaccess_request_refuse(info->extack, period, -EINVAL,
						"PERIOD is not from 500 us to 1 h, in ns");
	if (budget)
		config->budget = nla_get_u32(budget);
	if (config->budget > KVMACCESS_WATCH_MAX_BUDGET)
		return kvmaccess_request_refuse(info->extack, budget, -EINVAL,
						"BUDGET is more than 16 MiB");
	if (key)
		config->key = nla_data(key);
	return 0;
}

int kvmaccess_netlink_watch_new(struct sk_buff *skb, struct genl_info *info)
{
	struct kvmaccess_watch_config config;
	struct kvmaccess_request r;
	struct kvmaccess_watch *watch;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (!err)
		err = parse_config(skb, info, &config);
	if (!err)
		err = kvmaccess_request_begin(&r, info, info->attrs[KVMACCESS_A_WATCH_VM_ID],
					      true, KVMACCESS_REPLY_SIZE);
	if (err)
		return err;

	watch = kvmaccess_watch_new(r.vm, &config, info->extack);
	if (IS_ERR(watch))
		return kvmaccess_request_end(&r, PTR_ERR(watch), 0);
	err = stats_fill(r.skb, watch);
	/* Without its id it is of no use. */
	if (err && kvmaccess_watch_del(watch))
		err = -ENOENT;
	kvmaccess_watch_put(watch);
	return kvmaccess_request_end(&r, err, 0);
}

/* WATCH_ADD */

static int parse_masked(struct nlattr **tb, const struct nlattr *attr,
			struct kvmaccess_item *item, struct netlink_ext_ack *extack)
{
	struct nlattr *value = tb[KVMACCESS_A_ITEM_VALUE];
	struct nlattr *mask = tb[KVMACCESS_A_ITEM_MASK];

	if (!value)
		return kvmaccess_request_refuse(extack, attr, -EINVAL,
						"an ENTRY or REGISTER needs VALUE");
	item->value = nla_get_u64(value);
	item->mask = mask ? nla_get_u64(mask) : ~0ULL;
	if (item->value & ~item->mask)
		return kvmaccess_request_refuse(extack, value, -EINVAL,
						"VALUE has bits that MASK has not");
	return 0;
}

static bool is_protected(struct kvm *kvm)
{
	struct kvm_vcpu *vcpu;
	unsigned long i;

	kvm_for_each_vcpu(i, vcpu, kvm) {
		if (vcpu->arch.guest_state_protected)
			return true;
	}
	return false;
}

static int parse_register(struct nlattr **tb, const struct nlattr *attr,
			  struct kvmaccess_item *item, struct kvmaccess_vm *vm,
			  struct netlink_ext_ack *extack)
{
	struct nlattr *reg = tb[KVMACCESS_A_ITEM_REGISTER];
	struct nlattr *id = tb[KVMACCESS_A_ITEM_VCPU_ID];

	if (!reg)
		return kvmaccess_request_refuse(extack, attr, -EINVAL,
						"a REGISTER item needs REGISTER");
	if (nla_get_u32(reg) < KVMACCESS_REGISTER_CR0 || nla_get_u32(reg) > KVMACCESS_REGISTER_PAT)
		return kvmaccess_request_refuse(extack, reg, -EINVAL,
						"there is no such register to watch");
	kvmaccess_item_set_register(item, nla_get_u32(reg));
	if (!kvmaccess_vcpu_vendor())
		return kvmaccess_request_refuse(extack, attr, -EOPNOTSUPP,
			"registers cannot be read on this host: see what INFO says is missing");
	if (is_protected(vm->kvm))
		return kvmaccess_request_refuse(extack, attr, -EACCES,
						"the registers of this guest are encrypted");
	item->vcpu = -1;
	if (!id)
		return 0;
	item->vcpu = nla_get_u32(id);
	if (!kvmaccess_vm_vcpu(vm, item->vcpu))
		return kvmaccess_request_refuse(extack, id, -ENXIO,
						"the VM has no vCPU with this id");
	return 0;
}

static struct kvmaccess_item *new_memory(struct nlattr **tb, const struct nlattr *attr,
					 enum kvmaccess_kind kind,
					 struct netlink_ext_ack *extack)
{
	struct nlattr *data = tb[KVMACCESS_A_ITEM_DATA];
	struct nlattr *address = tb[KVMACCESS_A_ITEM_GPA];
	const char *why = NULL;
	struct kvmaccess_item *item;
	u32 length, i;
	u64 gpa;

	if (!address || (kind != KVMACCESS_KIND_ENTRY && (!data || !nla_len(data))))
		return ERR_PTR(kvmaccess_request_refuse(extack, attr, -EINVAL,
			"an item of memory needs GPA, and BYTES and DIGEST need DATA"));
	gpa = nla_get_u64(address);
	length = data ? nla_len(data) : 0;

	switch (kind) {
	case KVMACCESS_KIND_ENTRY:
		length = sizeof(u64);
		if (gpa % length)
			why = "the GPA of an ENTRY is not a multiple of 8";
		break;
	case KVMACCESS_KIND_DIGEST:
		if (offset_in_page(gpa))
			why = "the GPA of a DIGEST is not a multiple of 4096";
		else if (length % sizeof(u64))
			why = "the DATA of a DIGEST is not a multiple of 8 bytes";
		length = length / sizeof(u64) * PAGE_SIZE;
		break;
	default:
		if (length > PAGE_SIZE - offset_in_page(gpa))
			why = "BYTES cross a boundary of 4096 bytes: split them";
	}
	/* No processor has more than 52 bits. */
	if (!why && (gpa >= BIT_ULL(52) || length > BIT_ULL(52) - gpa))
		why = "a GPA is beyond the end of the address space";
	if (why)
		return ERR_PTR(kvmaccess_request_refuse(extack, address, -EINVAL, why));

	item = kvmaccess_item_new(kind, length);
	if (IS_ERR(item))
		return item;
	item->gpa = gpa;
	if (kind == KVMACCESS_KIND_BYTES) {
		memcpy(item->bytes, nla_data(data), length);
	} else if (kind == KVMACCESS_KIND_DIGEST) {
		/* Attributes are aligned to 4 bytes only. */
		for (i = 0; i < length >> PAGE_SHIFT; i++)
			memcpy(&item->pages[i].expected, nla_data(data) + i * sizeof(u64),
			       sizeof(u64));
	}
	return item;
}

static struct kvmaccess_item *parse_item(const struct nlattr *attr,
					 struct kvmaccess_watch *watch, struct kvmaccess_vm *vm,
					 struct netlink_ext_ack *extack)
{
	struct nlattr *tb[KVMACCESS_A_ITEM_MAX + 1];
	struct kvmaccess_item *item;
	enum kvmaccess_kind kind;
	int err;

	err = nla_parse_nested(tb, KVMACCESS_A_ITEM_MAX, attr, item_policy, extack);
	if (err)
		return ERR_PTR(err);
	if (!tb[KVMACCESS_A_ITEM_KIND] || !tb[KVMACCESS_A_ITEM_COOKIE])
		return ERR_PTR(kvmaccess_request_refuse(extack, attr, -EINVAL,
							"an ITEM needs KIND and COOKIE"));
	kind = nla_get_u32(tb[KVMACCESS_A_ITEM_KIND]);
	switch (kind) {
	case KVMACCESS_KIND_DIGEST:
		if (!kvmaccess_watch_has_key(watch))
			return ERR_PTR(kvmaccess_request_refuse(extack, attr, -EINVAL,
				"DIGESTs need a watch with KEY, and BUDGET of a page at least"));
		fallthrough;
	case KVMACCESS_KIND_BYTES:
	case KVMACCESS_KIND_ENTRY:
		item = new_memory(tb, attr, kind, extack);
		break;
	case KVMACCESS_KIND_REGISTER:
		item = kvmaccess_item_new(kind, 0);
		break;
	default:
		return ERR_PTR(kvmaccess_request_refuse(extack, tb[KVMACCESS_A_ITEM_KIND],
							-EINVAL, "there is no such KIND"));
	}
	if (IS_ERR(item))
		return item;
	item->cookie = nla_get_u64(tb[KVMACCESS_A_ITEM_COOKIE]);
	if (kind == KVMACCESS_KIND_ENTRY || kind == KVMACCESS_KIND_REGISTER)
		err = parse_masked(tb, attr, item, extack);
	if (!err && kind == KVMACCESS_KIND_REGISTER)
		err = parse_register(tb, attr, item, vm, extack);
	if (err) {
		kvmaccess_item_free(item);
		return ERR_PTR(err);
	}
	return item;
}

/* Also after an error what is in @items is to be freed. */
static int parse_items(struct genl_info *info, struct kvmaccess_watch *watch,
		       struct kvmaccess_vm *vm, struct list_head *items)
{
	struct kvmaccess_item *item;
	const struct nlattr *attr;
	unsigned int count = 0;
	int rem;

	nlmsg_for_each_attr(attr, info->nlhdr, GENL_HDRLEN, rem) {
		if (nla_type(attr) != KVMACCESS_A_WATCH_ITEM)
			continue;
		if (++count > KVMACCESS_WATCH_MAX_ITEMS)
			return kvmaccess_request_refuse(info->extack, attr, -E2BIG,
							"more items than a watch may have");
		item = parse_item(attr, watch, vm, info->extack);
		if (IS_ERR(item))
			return PTR_ERR(item);
		list_add_tail(&item->list, items);
	}
	return count ? 0 : kvmaccess_request_miss(info->extack, "ITEM is missing");
}

int kvmaccess_netlink_watch_add(struct sk_buff *skb, struct genl_info *info)
{
	struct kvmaccess_item *item, *next;
	struct kvmaccess_watch *watch;
	struct kvmaccess_request r;
	LIST_HEAD(items);
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (err)
		return err;
	watch = get_watch(info, true);
	if (IS_ERR(watch))
		return PTR_ERR(watch);
	err = kvmaccess_request_begin(&r, info, NULL, false, KVMACCESS_REPLY_SIZE);
	if (err)
		goto out;

	r.vm = kvmaccess_watch_hold_vm(watch);
	if (r.vm)
		err = parse_items(info, watch, r.vm, &items);
	else
		err = -ESHUTDOWN;
	if (!err)
		err = kvmaccess_watch_add(watch, &items, info->extack);
	if (err == -ESHUTDOWN)
		kvmaccess_request_explain(info->extack, "the VM of the watch is gone");
	if (!err)
		err = stats_fill(r.skb, watch);
	err = kvmaccess_request_end(&r, err, 0);
	list_for_each_entry_safe(item, next, &items, list)
		kvmaccess_item_free(item);
out:
	kvmaccess_watch_put(watch);
	return err;
}

/* WATCH_DEL */

int kvmaccess_netlink_watch_del(struct sk_buff *skb, struct genl_info *info)
{
	struct nlattr *cookie = info->attrs[KVMACCESS_A_WATCH_COOKIE];
	struct kvmaccess_watch *watch;
	struct kvmaccess_request r;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (err)
		return err;
	watch = get_watch(info, true);
	if (IS_ERR(watch))
		return PTR_ERR(watch);
	err = kvmaccess_request_begin(&r, info, NULL, false, KVMACCESS_REPLY_SIZE);
	if (err)
		goto out;

	if (cookie) {
		err = kvmaccess_watch_remove(watch, nla_get_u64(cookie));
		if (err)
			kvmaccess_request_refuse(info->extack, cookie, err,
						 "no item of the watch has this COOKIE");
	} else {
		err = kvmaccess_watch_del(watch);
		if (err)
			kvmaccess_request_explain(info->extack, "the watch is being deleted");
	}
	if (!err)
		err = stats_fill(r.skb, watch);
	err = kvmaccess_request_end(&r, err, 0);
out:
	kvmaccess_watch_put(watch);
	return err;
}

/* WATCH_GET */

int kvmaccess_netlink_watch_get(struct sk_buff *skb, struct genl_info *info)
{
	struct kvmaccess_watch *watch;
	struct kvmaccess_request r;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (err)
		return err;
	watch = get_watch(info, false);
	if (IS_ERR(watch))
		return PTR_ERR(watch);
	err = kvmaccess_request_begin(&r, info, NULL, false, KVMACCESS_REPLY_SIZE);
	if (!err)
		err = kvmaccess_request_end(&r, stats_fill(r.skb, watch), 0);
	kvmaccess_watch_put(watch);
	return err;
}

/* A dump's position, in netlink_callback::ctx. */
struct cursor {
	u64 id;
	u64 last;
};

int kvmaccess_netlink_watch_dump(struct sk_buff *skb, struct netlink_callback *cb)
{
	struct cursor *cursor = (void *)cb->ctx;
	struct kvmaccess_watch *watch;
	u64 start;
	void *head;
	int err;

	BUILD_BUG_ON(sizeof(*cursor) > sizeof(cb->ctx));

	if (!cursor->last)
		cursor->last = kvmaccess_watch_last();
	for (;;) {
		start = ktime_get_ns();
		watch = kvmaccess_watch_get_next(cursor->id, cursor->last);
		if (!watch)
			return skb->len;
		head = kvmaccess_request_put(skb, cb, KVMACCESS_CMD_WATCH_GET);
		err = head ? stats_fill(skb, watch) : -EMSGSIZE;
		if (!err) {
			genlmsg_end(skb, head);
			cursor->id = kvmaccess_watch_id(watch);
			kvmaccess_account_op(NULL, KVMACCESS_CMD_WATCH_GET, start, 0, 0);
		} else if (head) {
			genlmsg_cancel(skb, head);
		}
		kvmaccess_watch_put(watch);
		if (err)
			return skb->len ?: err;
	}
}

/* WATCH_EVENT */

static int event_fill(struct sk_buff *skb, const struct kvmaccess_watch_event *e)
{
	if (put_u64(skb, KVMACCESS_A_EVENT_WATCH_ID, e->watch) ||
	    put_u64(skb, KVMACCESS_A_EVENT_VM_ID, e->vm_id) ||
	    nla_put_u32(skb, KVMACCESS_A_EVENT_STATE, e->state) ||
	    put_u64(skb, KVMACCESS_A_EVENT_TIME, e->time) ||
	    put_u64(skb, KVMACCESS_A_EVENT_TICK, e->tick) ||
	    put_u64(skb, KVMACCESS_A_EVENT_COALESCED, e->coalesced) ||
	    put_u64(skb, KVMACCESS_A_EVENT_LOST, e->lost))
		return -EMSGSIZE;
	if (e->kind == KVMACCESS_KIND_UNSPEC)
		return 0;

	if (put_u64(skb, KVMACCESS_A_EVENT_COOKIE, e->cookie) ||
	    nla_put_u32(skb, KVMACCESS_A_EVENT_KIND, e->kind) ||
	    (e->expected && nla_put(skb, KVMACCESS_A_EVENT_EXPECTED, e->length, e->expected)) ||
	    (e->data && nla_put(skb, KVMACCESS_A_EVENT_DATA, e->length, e->data)))
		return -EMSGSIZE;
	if (e->kind == KVMACCESS_KIND_REGISTER)
		return nla_put_u32(skb, KVMACCESS_A_EVENT_VCPU_ID, e->vcpu) ?:
		       nla_put_u32(skb, KVMACCESS_A_EVENT_REGISTER, e->reg) ?:
		       nla_put_u32(skb, KVMACCESS_A_EVENT_CONDITION, e->condition);
	return put_u64(skb, KVMACCESS_A_EVENT_GPA, e->gpa) ?:
	       nla_put_u32(skb, KVMACCESS_A_EVENT_OFFSET, e->offset);
}

/* Send an event to one socket, without waiting for memory or for room there. */
int kvmaccess_netlink_watch_event(u32 portid, const struct kvmaccess_watch_event *e)
{
	struct sk_buff *skb;
	void *head;
	int err;

	/* 18 attributes at most, of 12 bytes each but for two. */
	skb = genlmsg_new(384, GFP_NOWAIT | __GFP_NOWARN);
	if (!skb)
		return -ENOMEM;
	head = genlmsg_put(skb, 0, 0, &kvmaccess_netlink_family, 0, KVMACCESS_CMD_WATCH_EVENT);
	err = head ? event_fill(skb, e) : -EMSGSIZE;
	if (err) {
		nlmsg_free(skb);
		return err;
	}
	genlmsg_end(skb, head);
	return genlmsg_unicast(&init_net, skb, portid);
}
