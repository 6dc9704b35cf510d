// SPDX-License-Identifier: GPL-2.0-only
/*
 * The generic netlink family; uapi/kvmaccess.h says what it speaks.
 *
 * Requests run in parallel. Generic netlink holds a lock for reading meanwhile
 * that every registration of a family waits for, so no handler may wait for
 * a guest, a VMM or a pager: see memory.c and vcpu.c.
 */
#include <linux/capability.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <net/genetlink.h>
#include <net/sock.h>

#include "account.h"
#include "compat.h"
#include "ksyms.h"
#include "memory.h"
#include "netlink.h"
#include "request.h"
#include "vcpu.h"
#include "version.h"
#include "vm.h"
#include "tick.h"

/* Takes none; with no policy at all it would take any. */
static const struct nla_policy info_policy[] = {
	[KVMACCESS_A_INFO_VERSION]	= { .type = NLA_REJECT },
};

static const struct nla_policy vm_policy[] = {
	[KVMACCESS_A_VM_ID]		= { .type = NLA_U64 },
};

static const struct nla_policy memslot_policy[] = {
	[KVMACCESS_A_MEMSLOT_VM_ID]	= { .type = NLA_U64 },
	[KVMACCESS_A_MEMSLOT_AS_ID]	= { .type = NLA_U32 },
	[KVMACCESS_A_MEMSLOT_SLOT]	= { .type = NLA_U32 },
};

static const struct nla_policy vcpu_policy[] = {
	[KVMACCESS_A_VCPU_VM_ID]	= { .type = NLA_U64 },
	[KVMACCESS_A_VCPU_ID]		= { .type = NLA_U32 },
};

static const struct nla_policy table_policy[] = {
	[KVMACCESS_A_TABLE_VM_ID]	= { .type = NLA_U64 },
	[KVMACCESS_A_TABLE_VCPU_ID]	= { .type = NLA_U32 },
	[KVMACCESS_A_TABLE_KIND]	= { .type = NLA_U32 },
	[KVMACCESS_A_TABLE_OFFSET]	= { .type = NLA_U32 },
	[KVMACCESS_A_TABLE_LENGTH]	= { .type = NLA_U32 },
};

static const struct nla_policy range_policy[] = {
	[KVMACCESS_A_RANGE_ADDRESS]	= { .type = NLA_U64 },
	[KVMACCESS_A_RANGE_LENGTH]	= { .type = NLA_U32 },
};

static const struct nla_policy mem_policy[] = {
	[KVMACCESS_A_MEM_VM_ID]		= { .type = NLA_U64 },
	[KVMACCESS_A_MEM_VCPU_ID]	= { .type = NLA_U32 },
	[KVMACCESS_A_MEM_ROOT]		= { .type = NLA_U64 },
	[KVMACCESS_A_MEM_RANGE]		= NLA_POLICY_NESTED(range_policy),
};

static const struct nla_policy stats_policy[] = {
	[KVMACCESS_A_STATS_VM_ID]	= { .type = NLA_U64 },
};

static struct kvm_vcpu *get_vcpu(struct kvmaccess_vm *vm, struct nlattr *attr,
				 struct netlink_ext_ack *extack)
{
	struct kvm_vcpu *vcpu;

	if (!attr)
		return ERR_PTR(kvmaccess_request_miss(extack, "the id of the vCPU is missing"));
	vcpu = kvmaccess_vm_vcpu(vm, nla_get_u32(attr));
	if (!vcpu) {
		NL_SET_ERR_MSG_ATTR(extack, attr, "the VM has no vCPU with this id");
		return ERR_PTR(-ENXIO);
	}
	return vcpu;
}

/* INFO */

static int info_fill(struct sk_buff *skb)
{
	const struct kvmaccess_vcpu_vendor *vendor = kvmaccess_vcpu_vendor();
	u32 caps = KVMACCESS_CAP_MEMORY | KVMACCESS_CAP_WATCH;
	const char *missing;
	unsigned int i;

	if (vendor)
		caps |= KVMACCESS_CAP_VCPU;
	if (kvmaccess_vm_has_events())
		caps |= KVMACCESS_CAP_EVENTS;

	if (nla_put_string(skb, KVMACCESS_A_INFO_VERSION, KVMACCESS_VERSION) ||
	    nla_put_u32(skb, KVMACCESS_A_INFO_VENDOR,
			vendor ? vendor->id : KVMACCESS_VENDOR_NONE) ||
	    nla_put_u32(skb, KVMACCESS_A_INFO_CAPS, caps) ||
	    nla_put_u32(skb, KVMACCESS_A_INFO_MAX_RANGES, KVMACCESS_MAX_RANGES) ||
	    nla_put_u32(skb, KVMACCESS_A_INFO_MAX_BYTES, KVMACCESS_MAX_BYTES))
		return -EMSGSIZE;

	for (i = 0; (missing = kvmaccess_ksyms_missing(i)); i++) {
		if (nla_put_string(skb, KVMACCESS_A_INFO_MISSING, missing))
			return -EMSGSIZE;
	}
	return 0;
}

static int info_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct kvmaccess_request r;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (!err)
		err = kvmaccess_request_begin(&r, info, NULL, false, KVMACCESS_REPLY_SIZE);
	if (err)
		return err;
	return kvmaccess_request_end(&r, info_fill(r.skb), 0);
}

/* VM_GET, and the events */

static int vm_fill(struct sk_buff *skb, const struct kvmaccess_vm_info *info)
{
	if (put_u64(skb, KVMACCESS_A_VM_ID, info->id) ||
	    nla_put_u32(skb, KVMACCESS_A_VM_PID, info->pid) ||
	    nla_put_u32(skb, KVMACCESS_A_VM_VCPUS, info->vcpus) ||
	    nla_put_u32(skb, KVMACCESS_A_VM_MEMSLOTS, info->memslots) ||
	    put_u64(skb, KVMACCESS_A_VM_MEMORY, info->memory) ||
	    put_u64(skb, KVMACCESS_A_VM_SEEN, info->seen) ||
	    nla_put_u32(skb, KVMACCESS_A_VM_FLAGS, info->flags))
		return -EMSGSIZE;
	return 0;
}

static int vm_fill_held(struct sk_buff *skb, struct kvmaccess_vm *vm)
{
	struct kvmaccess_vm_info info;

	kvmaccess_vm_info(vm, &info);
	return vm_fill(skb, &info);
}

static int vm_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct kvmaccess_request r;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (!err)
		err = kvmaccess_request_begin(&r, info, info->attrs[KVMACCESS_A_VM_ID], true,
					      KVMACCESS_REPLY_SIZE);
	if (err)
		return err;
	return kvmaccess_request_end(&r, vm_fill_held(r.skb, r.vm), 0);
}

/*
 * @vm of a VM_CREATED is held, that of a VM_DESTROYED is not: then only what
 * the entry knows is sent.
 */
void kvmaccess_netlink_event(struct kvmaccess_vm *vm, enum kvmaccess_cmd cmd)
{
	struct kvmaccess_vm_info info;
	struct sk_buff *skb;
	void *head;

	atomic64_inc(&kvmaccess_account.events);
	atomic64_inc(&vm->account.events);
	if (!genl_has_listeners(&kvmaccess_netlink_family, &init_net, 0))
		return;

	skb = genlmsg_new(KVMACCESS_REPLY_SIZE, GFP_KERNEL);
	head = skb ? genlmsg_put(skb, 0, 0, &kvmaccess_netlink_family, 0, cmd) : NULL;
	if (!head)
		goto lost;
	if (cmd == KVMACCESS_CMD_VM_CREATED)
		kvmaccess_vm_info(vm, &info);
	else
		kvmaccess_vm_identify(vm, &info);
	if (vm_fill(skb, &info))
		goto lost;
	genlmsg_end(skb, head);
	genlmsg_multicast(&kvmaccess_netlink_family, skb, 0, 0, GFP_KERNEL);
	return;

lost:
	nlmsg_free(skb);
	/* Subscribers see ENOBUFS, as when their own buffer is full. */
	genl_set_err(&kvmaccess_netlink_family, &init_net, 0, 0, -ENOBUFS);
}

/* Each dump's position, in netlink_callback::ctx. */
struct vm_cursor {
	u64 id;
	u64 last;
};

/* Dump one message for each VM, by rising id. */
static int dump_vms(struct sk_buff *skb, struct netlink_callback *cb, enum kvmaccess_cmd cmd,
		    int (*fill)(struct sk_buff *skb, struct kvmaccess_vm *vm))
{
	struct vm_cursor *cursor = (void *)cb->ctx;
	struct kvmaccess_vm *vm;
	u64 start;
	void *head;
	int err;

	BUILD_BUG_ON(sizeof(*cursor) > sizeof(cb->ctx));

	if (!cursor->last)
		cursor->last = kvmaccess_vm_last();
	for (;;) {
		start = ktime_get_ns();
		vm = kvmaccess_vm_get_next(cursor->id, cursor->last);
		if (IS_ERR(vm))
			return PTR_ERR(vm);
		if (!vm)
			return skb->len;
		cb->seq = kvmaccess_vm_generation();
		head = kvmaccess_request_put(skb, cb, cmd);
		err = head ? fill(skb, vm) : -EMSGSIZE;
		if (!err) {
			genlmsg_end(skb, head);
			cursor->id = vm->id;
			kvmaccess_account_op(&vm->account, cmd, start, 0, 0);
		} else if (head) {
			genlmsg_cancel(skb, head);
		}
		kvmaccess_vm_put(vm);
		if (err)
			return skb->len ?: err;
	}
}

static int vm_dumpit(struct sk_buff *skb, struct netlink_callback *cb)
{
	return dump_vms(skb, cb, KVMACCESS_CMD_VM_GET, vm_fill_held);
}

/* MEMSLOT_GET */

static int memslot_fill(struct sk_buff *skb, struct kvmaccess_vm *vm,
			const struct kvm_memory_slot *slot, u32 as_id)
{
	if (put_u64(skb, KVMACCESS_A_MEMSLOT_VM_ID, vm->id) ||
	    nla_put_u32(skb, KVMACCESS_A_MEMSLOT_AS_ID, as_id) ||
	    nla_put_u32(skb, KVMACCESS_A_MEMSLOT_SLOT, (u16)slot->id) ||
	    put_u64(skb, KVMACCESS_A_MEMSLOT_GPA, gfn_to_gpa(slot->base_gfn)) ||
	    put_u64(skb, KVMACCESS_A_MEMSLOT_SIZE, (u64)slot->npages << PAGE_SHIFT) ||
	    put_u64(skb, KVMACCESS_A_MEMSLOT_HVA, slot->userspace_addr) ||
	    nla_put_u32(skb, KVMACCESS_A_MEMSLOT_FLAGS, slot->flags))
		return -EMSGSIZE;
	return 0;
}

static int memslot_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct nlattr *as_attr = info->attrs[KVMACCESS_A_MEMSLOT_AS_ID];
	struct nlattr *attr = info->attrs[KVMACCESS_A_MEMSLOT_SLOT];
	struct kvm_memory_slot *slot = NULL;
	struct kvmaccess_request r;
	struct kvm *kvm;
	u32 as_id;
	int err, idx;

	err = kvmaccess_request_check(skb, info->extack);
	if (err)
		return err;
	if (!attr)
		return kvmaccess_request_miss(info->extack, "SLOT is missing");
	err = kvmaccess_request_begin(&r, info, info->attrs[KVMACCESS_A_MEMSLOT_VM_ID], true,
				      KVMACCESS_REPLY_SIZE);
	if (err)
		return err;

	kvm = r.vm->kvm;
	as_id = as_attr ? nla_get_u32(as_attr) : 0;
	idx = srcu_read_lock(&kvm->srcu);
	if (as_id < kvmaccess_compat_as_num(kvm))
		slot = id_to_memslot(__kvm_memslots(kvm, as_id), nla_get_u32(attr));
	if (slot) {
		err = memslot_fill(r.skb, r.vm, slot, as_id);
	} else {
		NL_SET_ERR_MSG_ATTR(info->extack, attr, "the VM has no memslot with this number");
		err = -ENXIO;
	}
	srcu_read_unlock(&kvm->srcu, idx);
	return kvmaccess_request_end(&r, err, 0);
}

struct memslot_cursor {
	u64 vm_id;
	gfn_t gfn;
	u32 as_id;
	bool done;
};

static int memslot_start(struct netlink_callback *cb)
{
	struct nlattr *attr = kvmaccess_compat_dump_attrs(cb)[KVMACCESS_A_MEMSLOT_VM_ID];
	struct memslot_cursor *cursor = (void *)cb->ctx;

	BUILD_BUG_ON(sizeof(*cursor) > sizeof(cb->ctx));

	/* No id is 0. An explanation can be given from the dump on only. */
	cursor->vm_id = attr ? nla_get_u64(attr) : 0;
	return kvmaccess_request_check(cb->skb, cb->extack);
}

/* A memslot that changes while they are dumped interrupts the dump. */
static u32 memslot_generation(struct kvm *kvm)
{
	u32 generation = 0;
	int as_id;

	for (as_id = 0; as_id < kvmaccess_compat_as_num(kvm); as_id++)
		generation += (u32)__kvm_memslots(kvm, as_id)->generation;
	return generation ?: 1;
}

static int memslot_dump_as(struct sk_buff *skb, struct netlink_callback *cb,
			   struct kvmaccess_vm *vm)
{
	struct memslot_cursor *cursor = (void *)cb->ctx;
	struct kvm_memslots *slots = __kvm_memslots(vm->kvm, cursor->as_id);
	struct kvm_memslot_iter iter;
	u64 start;
	void *head;

	kvm_for_each_memslot_in_gfn_range(&iter, slots, cursor->gfn, ~0ULL) {
		/* The one that the cursor stands in has been dumped. */
		if (iter.slot->base_gfn < cursor->gfn)
			continue;
		start = ktime_get_ns();
		head = kvmaccess_request_put(skb, cb, KVMACCESS_CMD_MEMSLOT_GET);
		if (!head)
			return -EMSGSIZE;
		if (memslot_fill(skb, vm, iter.slot, cursor->as_id)) {
			genlmsg_cancel(skb, head);
			return -EMSGSIZE;
		}
		genlmsg_end(skb, head);
		cursor->gfn = iter.slot->base_gfn + iter.slot->npages;
		kvmaccess_account_op(&vm->account, KVMACCESS_CMD_MEMSLOT_GET, start, 0, 0);
	}
	return 0;
}

static int memslot_dumpit(struct sk_buff *skb, struct netlink_callback *cb)
{
	struct memslot_cursor *cursor = (void *)cb->ctx;
	struct kvmaccess_vm *vm;
	int err = 0, idx;

	if (cursor->done)
		return 0;
	if (!cursor->vm_id)
		return kvmaccess_request_miss(cb->extack, "VM_ID is missing");
	vm = kvmaccess_vm_get(cursor->vm_id, cb->extack);
	if (IS_ERR(vm))
		return PTR_ERR(vm);

	idx = srcu_read_lock(&vm->kvm->srcu);
	cb->seq = memslot_generation(vm->kvm);
	while (cursor->as_id < kvmaccess_compat_as_num(vm->kvm)) {
		err = memslot_dump_as(skb, cb, vm);
		if (err)
			break;
		cursor->as_id++;
		cursor->gfn = 0;
	}
	srcu_read_unlock(&vm->kvm->srcu, idx);
	kvmaccess_vm_put(vm);

	cursor->done = !err;
	return skb->len ?: err;
}

/* VCPU_GET */

static int segment_fill(struct sk_buff *skb, int attr, const struct kvm_segment *s)
{
	struct nlattr *nest = nla_nest_start(skb, attr);
	u32 attrs = s->type | s->s << 4 | s->dpl << 5 | s->present << 7 |
		    s->avl << 12 | s->l << 13 | s->db << 14 | s->g << 15 |
		    !!s->unusable << 16;

	if (!nest ||
	    nla_put_u32(skb, KVMACCESS_A_SEGMENT_SELECTOR, s->selector) ||
	    put_u64(skb, KVMACCESS_A_SEGMENT_BASE, s->base) ||
	    nla_put_u32(skb, KVMACCESS_A_SEGMENT_LIMIT, s->limit) ||
	    nla_put_u32(skb, KVMACCESS_A_SEGMENT_ATTRS, attrs))
		return -EMSGSIZE;
	nla_nest_end(skb, nest);
	return 0;
}

static int table_register_fill(struct sk_buff *skb, int attr, const struct desc_ptr *d)
{
	struct nlattr *nest = nla_nest_start(skb, attr);

	if (!nest ||
	    put_u64(skb, KVMACCESS_A_SEGMENT_BASE, d->address) ||
	    nla_put_u32(skb, KVMACCESS_A_SEGMENT_LIMIT, d->size))
		return -EMSGSIZE;
	nla_nest_end(skb, nest);
	return 0;
}

/* GPRs in the order of the attributes from RAX on. */
static const u8 gprs[] = {
	VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX,
	VCPU_REGS_RSI, VCPU_REGS_RDI, VCPU_REGS_RBP, VCPU_REGS_RSP,
	VCPU_REGS_R8, VCPU_REGS_R9, VCPU_REGS_R10, VCPU_REGS_R11,
	VCPU_REGS_R12, VCPU_REGS_R13, VCPU_REGS_R14, VCPU_REGS_R15,
};

/* Segments in the order of the attributes from CS on. */
static const u8 segments[] = {
	VCPU_SREG_CS, VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_FS,
	VCPU_SREG_GS, VCPU_SREG_SS, VCPU_SREG_TR, VCPU_SREG_LDTR,
};

static int vcpu_fill(struct sk_buff *skb, struct kvmaccess_vm *vm,
		     struct kvm_vcpu *vcpu, const struct kvmaccess_vcpu_state *s)
{
	unsigned int i;

	BUILD_BUG_ON(KVMACCESS_A_VCPU_RIP - KVMACCESS_A_VCPU_RAX != ARRAY_SIZE(gprs));
	BUILD_BUG_ON(KVMACCESS_A_VCPU_GDTR - KVMACCESS_A_VCPU_CS != ARRAY_SIZE(segments));
	BUILD_BUG_ON(KVMACCESS_A_VCPU_PAT - KVMACCESS_A_VCPU_STAR != ARRAY_SIZE(s->msr));

	if (put_u64(skb, KVMACCESS_A_VCPU_VM_ID, vm->id) ||
	    nla_put_u32(skb, KVMACCESS_A_VCPU_ID, vcpu->vcpu_id) ||
	    nla_put_u32(skb, KVMACCESS_A_VCPU_TID, s->tid) ||
	    nla_put_u32(skb, KVMACCESS_A_VCPU_CONDITION, s->condition) ||
	    nla_put_u32(skb, KVMACCESS_A_VCPU_METHOD, s->method) ||
	    (s->cpu >= 0 && nla_put_u32(skb, KVMACCESS_A_VCPU_CPU, s->cpu)) ||
	    put_u64(skb, KVMACCESS_A_VCPU_TIME, s->time) ||
	    put_u64(skb, KVMACCESS_A_VCPU_DURATION, s->duration) ||
	    put_u64(skb, KVMACCESS_A_VCPU_HANDLER, s->handler) ||
	    nla_put_u32(skb, KVMACCESS_A_VCPU_RETRIES, s->retries) ||
	    nla_put_u32(skb, KVMACCESS_A_VCPU_FLAGS, s->flags) ||
	    nla_put_u32(skb, KVMACCESS_A_VCPU_CPL, s->cpl))
		return -EMSGSIZE;

	for (i = 0; i < ARRAY_SIZE(gprs); i++) {
		if (put_u64(skb, KVMACCESS_A_VCPU_RAX + i, s->gpr[gprs[i]]))
			return -EMSGSIZE;
	}
	if (put_u64(skb, KVMACCESS_A_VCPU_RIP, s->rip) ||
	    put_u64(skb, KVMACCESS_A_VCPU_RFLAGS, s->rflags) ||
	    put_u64(skb, KVMACCESS_A_VCPU_CR0, s->cr0) ||
	    put_u64(skb, KVMACCESS_A_VCPU_CR2, s->cr2) ||
	    put_u64(skb, KVMACCESS_A_VCPU_CR3, s->cr3) ||
	    put_u64(skb, KVMACCESS_A_VCPU_CR4, s->cr4) ||
	    (kvmaccess_ksyms.get_cr8 && put_u64(skb, KVMACCESS_A_VCPU_CR8, s->cr8)) ||
	    put_u64(skb, KVMACCESS_A_VCPU_EFER, s->efer))
		return -EMSGSIZE;
	for (i = 0; i < ARRAY_SIZE(segments); i++) {
		if (segment_fill(skb, KVMACCESS_A_VCPU_CS + i, &s->segment[segments[i]]))
			return -EMSGSIZE;
	}
	if (table_register_fill(skb, KVMACCESS_A_VCPU_GDTR, &s->gdt) ||
	    table_register_fill(skb, KVMACCESS_A_VCPU_IDTR, &s->idt))
		return -EMSGSIZE;
	for (i = 0; i < ARRAY_SIZE(s->db); i++) {
		if (put_u64(skb, KVMACCESS_A_VCPU_DR0 + i, s->db[i]))
			return -EMSGSIZE;
	}
	if (put_u64(skb, KVMACCESS_A_VCPU_DR6, s->dr6) ||
	    put_u64(skb, KVMACCESS_A_VCPU_DR7, s->dr7))
		return -EMSGSIZE;
	for (i = 0; i < ARRAY_SIZE(s->msr); i++) {
		if (put_u64(skb, KVMACCESS_A_VCPU_STAR + i, s->msr[i]))
			return -EMSGSIZE;
	}
	return put_u64(skb, KVMACCESS_A_VCPU_PAT, s->pat);
}

/* The state of the vCPU that @attr names, to be freed by kfree(). */
static struct kvmaccess_vcpu_state *capture(struct kvmaccess_vm *vm,
					    struct nlattr *attr,
					    struct kvm_vcpu **vcpu,
					    struct netlink_ext_ack *extack)
{
	struct kvmaccess_vcpu_state *state;
	int err;

	*vcpu = get_vcpu(vm, attr, extack);
	if (IS_ERR(*vcpu))
		return ERR_CAST(*vcpu);
	state = kmalloc(sizeof(*state), GFP_KERNEL);
	if (!state)
		return ERR_PTR(-ENOMEM);
	err = kvmaccess_vcpu_capture(vm, *vcpu, state, extack);
	if (err) {
		kfree(state);
		return ERR_PTR(err);
	}
	return state;
}

/* The same, of a vCPU through whose page tables memory is to be read. */
static struct kvmaccess_vcpu_state *capture_paging(struct kvmaccess_vm *vm,
						   struct nlattr *attr,
						   struct kvm_vcpu **vcpu,
						   struct netlink_ext_ack *extack)
{
	struct kvmaccess_vcpu_state *state = capture(vm, attr, vcpu, extack);

	if (!IS_ERR(state) && state->flags & KVMACCESS_VCPU_F_NESTED) {
		NL_SET_ERR_MSG(extack,
			       "the vCPU runs a nested guest, whose memory is not this VM's: try again");
		kfree(state);
		return ERR_PTR(-EAGAIN);
	}
	return state;
}

static int vcpu_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct kvmaccess_vcpu_state *state;
	struct kvm_vcpu *vcpu;
	struct kvmaccess_request r;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (!err)
		err = kvmaccess_request_begin(&r, info, info->attrs[KVMACCESS_A_VCPU_VM_ID], true,
					      KVMACCESS_REPLY_SIZE);
	if (err)
		return err;

	state = capture(r.vm, info->attrs[KVMACCESS_A_VCPU_ID], &vcpu, info->extack);
	if (IS_ERR(state))
		return kvmaccess_request_end(&r, PTR_ERR(state), 0);
	err = vcpu_fill(r.skb, r.vm, vcpu, state);
	kfree(state);
	return kvmaccess_request_end(&r, err, 0);
}

struct vcpu_cursor {
	u64 vm_id;
	unsigned long next;
};

static int vcpu_start(struct netlink_callback *cb)
{
	struct nlattr *attr = kvmaccess_compat_dump_attrs(cb)[KVMACCESS_A_VCPU_VM_ID];
	struct vcpu_cursor *cursor = (void *)cb->ctx;

	BUILD_BUG_ON(sizeof(*cursor) > sizeof(cb->ctx));

	/* No id is 0. An explanation can be given from the dump on only. */
	cursor->vm_id = attr ? nla_get_u64(attr) : 0;
	return kvmaccess_request_check(cb->skb, cb->extack);
}

static int vcpu_dumpit(struct sk_buff *skb, struct netlink_callback *cb)
{
	struct vcpu_cursor *cursor = (void *)cb->ctx;
	struct kvmaccess_vcpu_state *state;
	struct kvmaccess_vm *vm;
	int err = 0;
	u64 start;
	void *head;

	if (!cursor->vm_id)
		return kvmaccess_request_miss(cb->extack, "VM_ID is missing");
	vm = kvmaccess_vm_get(cursor->vm_id, cb->extack);
	if (IS_ERR(vm))
		return PTR_ERR(vm);
	state = kmalloc(sizeof(*state), GFP_KERNEL);
	if (!state)
		err = -ENOMEM;

	/* A vCPU that is hot-plugged meanwhile interrupts the dump. */
	cb->seq = atomic_read(&vm->kvm->online_vcpus) + 1;
	while (!err && cursor->next < atomic_read(&vm->kvm->online_vcpus)) {
		struct kvm_vcpu *vcpu = kvm_get_vcpu(vm->kvm, cursor->next);

		start = ktime_get_ns();
		err = kvmaccess_vcpu_capture(vm, vcpu, state, cb->extack);
		if (err)
			break;
		head = kvmaccess_request_put(skb, cb, KVMACCESS_CMD_VCPU_GET);
		if (!head) {
			err = -EMSGSIZE;
			break;
		}
		err = vcpu_fill(skb, vm, vcpu, state);
		if (err) {
			genlmsg_cancel(skb, head);
			break;
		}
		genlmsg_end(skb, head);
		cursor->next++;
		kvmaccess_account_op(&vm->account, KVMACCESS_CMD_VCPU_GET, start, 0, 0);
	}
	kfree(state);
	kvmaccess_vm_put(vm);

	/* What fits goes out first; an error comes with the next part. */
	return skb->len ?: err;
}

/* MEM_READ */

struct mem_job {
	struct sk_buff *skb;
	struct genl_info *info;
	struct kvmaccess_paging paging;
	bool is_virtual;
	unsigned int read;	/* ranges that could be read */
	u64 bytes;
	int first_err;
};

struct mem_range {
	u64 address;
	u32 length;
};

static int parse_range(const struct nlattr *attr, struct mem_range *range,
		       struct netlink_ext_ack *extack)
{
	struct nlattr *tb[KVMACCESS_A_RANGE_LENGTH + 1];
	int err;

	err = nla_parse_nested(tb, KVMACCESS_A_RANGE_LENGTH, attr, range_policy, extack);
	if (err)
		return err;
	if (!tb[KVMACCESS_A_RANGE_ADDRESS] || !tb[KVMACCESS_A_RANGE_LENGTH]) {
		NL_SET_ERR_MSG_ATTR(extack, attr, "a RANGE needs ADDRESS and LENGTH");
		return -EINVAL;
	}
	range->address = nla_get_u64(tb[KVMACCESS_A_RANGE_ADDRESS]);
	range->length = nla_get_u32(tb[KVMACCESS_A_RANGE_LENGTH]);
	return 0;
}

/* Everything about the ranges that can be known without the guest's tables. */
static int check_ranges(struct genl_info *info, unsigned int *count, u32 *bytes)
{
	struct netlink_ext_ack *extack = info->extack;
	const struct nlattr *attr;
	struct mem_range range;
	int rem, err;

	*count = 0;
	*bytes = 0;
	nlmsg_for_each_attr(attr, info->nlhdr, GENL_HDRLEN, rem) {
		if (nla_type(attr) != KVMACCESS_A_MEM_RANGE)
			continue;
		err = parse_range(attr, &range, extack);
		if (err)
			return err;
		if (!range.length) {
			NL_SET_ERR_MSG_ATTR(extack, attr, "the LENGTH of a RANGE is 0");
			return -EINVAL;
		}
		if (range.address + range.length - 1 < range.address) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "a RANGE goes beyond the end of the address space");
			return -EINVAL;
		}
		if (++*count > KVMACCESS_MAX_RANGES) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "more RANGEs than INFO's MAX_RANGES: split the request");
			return -E2BIG;
		}
		if (range.length > KVMACCESS_MAX_BYTES - *bytes) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "more bytes than INFO's MAX_BYTES: split the request");
			return -E2BIG;
		}
		*bytes += range.length;
	}
	return *count ? 0 : kvmaccess_request_miss(extack, "RANGE is missing");
}

static int mem_fill_range(struct kvmaccess_memory *memory, struct mem_job *job,
			  const struct mem_range *range)
{
	struct sk_buff *skb = job->skb;
	struct nlattr *nest, *data;
	int err;

	nest = nla_nest_start(skb, KVMACCESS_A_MEM_RANGE);
	if (!nest ||
	    put_u64(skb, KVMACCESS_A_RANGE_ADDRESS, range->address) ||
	    nla_put_u32(skb, KVMACCESS_A_RANGE_LENGTH, range->length))
		return -EMSGSIZE;
	data = nla_reserve(skb, KVMACCESS_A_RANGE_DATA, range->length);
	if (!data)
		return -EMSGSIZE;

	if (job->is_virtual)
		err = kvmaccess_memory_read_virtual(memory, &job->paging, range->address,
						    nla_data(data), range->length);
	else
		err = kvmaccess_memory_read(memory, range->address, nla_data(data),
					    range->length);
	if (err) {
		nlmsg_trim(skb, data);
		if (!job->first_err)
			job->first_err = err;
		if (nla_put_u32(skb, KVMACCESS_A_RANGE_ERROR, -err) ||
		    put_u64(skb, KVMACCESS_A_RANGE_FAULT, memory->fault))
			return -EMSGSIZE;
	} else {
		job->read++;
		job->bytes += range->length;
	}
	nla_nest_end(skb, nest);
	return 0;
}

static int mem_fill(struct kvmaccess_memory *memory, void *arg)
{
	struct mem_job *job = arg;
	const struct nlattr *attr;
	struct mem_range range;
	int rem, err;

	nlmsg_for_each_attr(attr, job->info->nlhdr, GENL_HDRLEN, rem) {
		if (nla_type(attr) != KVMACCESS_A_MEM_RANGE)
			continue;
		err = parse_range(attr, &range, NULL);
		if (!err)
			err = mem_fill_range(memory, job, &range);
		if (err)
			return err;
	}
	return 0;
}

static int mem_virtual(struct kvmaccess_vm *vm, struct genl_info *info,
		       struct kvmaccess_paging *paging, u32 *as_id)
{
	struct nlattr *root = info->attrs[KVMACCESS_A_MEM_ROOT];
	struct netlink_ext_ack *extack = info->extack;
	struct kvmaccess_vcpu_state *state;
	const struct nlattr *attr;
	struct mem_range range;
	struct kvm_vcpu *vcpu;
	int rem, err;

	state = capture_paging(vm, info->attrs[KVMACCESS_A_MEM_VCPU_ID], &vcpu, extack);
	if (IS_ERR(state))
		return PTR_ERR(state);
	kvmaccess_memory_paging(state, paging);
	*as_id = state->as_id;
	kfree(state);
	if (root)
		paging->root = nla_get_u64(root);

	nlmsg_for_each_attr(attr, info->nlhdr, GENL_HDRLEN, rem) {
		if (nla_type(attr) != KVMACCESS_A_MEM_RANGE)
			continue;
		err = parse_range(attr, &range, extack);
		if (err)
			return err;
		if (!kvmaccess_memory_is_canonical(paging, range.address, range.length)) {
			NL_SET_ERR_MSG_ATTR(extack, attr,
					    "an address is not canonical in the vCPU's paging mode");
			return -EINVAL;
		}
	}
	return 0;
}

static int mem_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct mem_job job = { .info = info };
	unsigned int count;
	struct kvmaccess_request r;
	u32 bytes, as_id = 0;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (!err)
		err = check_ranges(info, &count, &bytes);
	if (err)
		return err;
	job.is_virtual = info->attrs[KVMACCESS_A_MEM_VCPU_ID];
	if (info->attrs[KVMACCESS_A_MEM_ROOT] && !job.is_virtual)
		return kvmaccess_request_miss(info->extack,
					      "ROOT needs VCPU_ID, whose paging mode it is used in");

	/* At most 33 KiB, by constants only. */
	err = kvmaccess_request_begin(&r, info, info->attrs[KVMACCESS_A_MEM_VM_ID], true,
				      bytes + count * 64 + 256);
	if (err)
		return err;

	job.skb = r.skb;
	err = put_u64(r.skb, KVMACCESS_A_MEM_VM_ID, r.vm->id);
	if (!err && job.is_virtual)
		err = mem_virtual(r.vm, info, &job.paging, &as_id);
	if (!err) {
		err = kvmaccess_memory_run(r.vm, as_id, mem_fill, &job);
		if (!err && !job.read)
			err = job.first_err;
		if (err)
			kvmaccess_request_explain(info->extack, kvmaccess_memory_strerror(err));
	}
	return kvmaccess_request_end(&r, err, job.bytes);
}

/* TABLE_GET */

struct table_job {
	struct kvmaccess_paging paging;
	u64 address;
	u32 length;
	void *to;
};

static int table_read(struct kvmaccess_memory *memory, void *arg)
{
	struct table_job *job = arg;

	return kvmaccess_memory_read_virtual(memory, &job->paging, job->address,
					     job->to, job->length);
}

static int table_fill(struct sk_buff *skb, struct kvmaccess_vm *vm,
		      struct kvm_vcpu *vcpu, struct genl_info *info,
		      const struct kvmaccess_vcpu_state *state, u32 *bytes)
{
	u32 kind = nla_get_u32(info->attrs[KVMACCESS_A_TABLE_KIND]);
	struct nlattr *off = info->attrs[KVMACCESS_A_TABLE_OFFSET];
	struct nlattr *len = info->attrs[KVMACCESS_A_TABLE_LENGTH];
	const struct desc_ptr *d = kind == KVMACCESS_TABLE_GDT ? &state->gdt : &state->idt;
	u32 offset = off ? nla_get_u32(off) : 0;
	u32 wanted = len ? nla_get_u32(len) : KVMACCESS_MAX_BYTES;
	struct table_job job = { .address = d->address + offset };
	struct nlattr *data;
	int err;

	/* A table that is not set up has limit 0 or, at reset, 0xffff at 0. */
	if (offset > d->size) {
		NL_SET_ERR_MSG_ATTR(info->extack, off, "OFFSET is beyond the limit of the table");
		return -EINVAL;
	}
	job.length = min(wanted, d->size + 1 - offset);
	kvmaccess_memory_paging(state, &job.paging);
	if (!kvmaccess_memory_is_canonical(&job.paging, job.address, job.length)) {
		NL_SET_ERR_MSG(info->extack,
			       "the table register holds an address that is not canonical");
		return -EADDRNOTAVAIL;
	}

	if (put_u64(skb, KVMACCESS_A_TABLE_VM_ID, vm->id) ||
	    nla_put_u32(skb, KVMACCESS_A_TABLE_VCPU_ID, vcpu->vcpu_id) ||
	    nla_put_u32(skb, KVMACCESS_A_TABLE_KIND, kind) ||
	    nla_put_u32(skb, KVMACCESS_A_TABLE_OFFSET, offset) ||
	    nla_put_u32(skb, KVMACCESS_A_TABLE_LENGTH, job.length) ||
	    put_u64(skb, KVMACCESS_A_TABLE_BASE, d->address) ||
	    nla_put_u32(skb, KVMACCESS_A_TABLE_LIMIT, d->size) ||
	    nla_put_u32(skb, KVMACCESS_A_TABLE_CONDITION, state->condition))
		return -EMSGSIZE;
	data = nla_reserve(skb, KVMACCESS_A_TABLE_DATA, job.length);
	if (!data)
		return -EMSGSIZE;
	job.to = nla_data(data);

	err = kvmaccess_memory_run(vm, state->as_id, table_read, &job);
	if (err)
		kvmaccess_request_explain(info->extack, kvmaccess_memory_strerror(err));
	else
		*bytes = job.length;
	return err;
}

static int table_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct nlattr *kind = info->attrs[KVMACCESS_A_TABLE_KIND];
	struct nlattr *len = info->attrs[KVMACCESS_A_TABLE_LENGTH];
	struct kvmaccess_vcpu_state *state;
	struct kvm_vcpu *vcpu;
	struct kvmaccess_request r;
	u32 bytes = 0;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (err)
		return err;
	if (!kind)
		return kvmaccess_request_miss(info->extack, "KIND is missing");
	if (nla_get_u32(kind) != KVMACCESS_TABLE_GDT && nla_get_u32(kind) != KVMACCESS_TABLE_IDT) {
		NL_SET_ERR_MSG_ATTR(info->extack, kind, "KIND is neither GDT nor IDT");
		return -EINVAL;
	}
	if (len && !nla_get_u32(len)) {
		NL_SET_ERR_MSG_ATTR(info->extack, len, "LENGTH is 0");
		return -EINVAL;
	}
	if (len && nla_get_u32(len) > KVMACCESS_MAX_BYTES) {
		NL_SET_ERR_MSG_ATTR(info->extack, len,
				    "LENGTH is over INFO's MAX_BYTES: split the request");
		return -E2BIG;
	}

	err = kvmaccess_request_begin(&r, info, info->attrs[KVMACCESS_A_TABLE_VM_ID], true,
				      KVMACCESS_MAX_BYTES + 256);
	if (err)
		return err;
	state = capture_paging(r.vm, info->attrs[KVMACCESS_A_TABLE_VCPU_ID], &vcpu,
			       info->extack);
	if (IS_ERR(state))
		return kvmaccess_request_end(&r, PTR_ERR(state), 0);
	err = table_fill(r.skb, r.vm, vcpu, info, state, &bytes);
	kfree(state);
	return kvmaccess_request_end(&r, err, bytes);
}

/* STATS */

static int op_fill(struct sk_buff *skb, u32 cmd, struct kvmaccess_account_op *op)
{
	struct nlattr *nest = nla_nest_start(skb, KVMACCESS_A_STATS_OP);

	if (!nest ||
	    nla_put_u32(skb, KVMACCESS_A_OP_CMD, cmd) ||
	    put_u64(skb, KVMACCESS_A_OP_COUNT, atomic64_read(&op->count)) ||
	    put_u64(skb, KVMACCESS_A_OP_ERRORS, atomic64_read(&op->errors)) ||
	    put_u64(skb, KVMACCESS_A_OP_TIME, atomic64_read(&op->time)) ||
	    put_u64(skb, KVMACCESS_A_OP_BYTES, atomic64_read(&op->bytes)))
		return -EMSGSIZE;
	nla_nest_end(skb, nest);
	return 0;
}

/* @vm is NULL for the account of all. */
static int stats_fill(struct sk_buff *skb, struct kvmaccess_vm *vm)
{
	struct kvmaccess_account *a = vm ? &vm->account : &kvmaccess_account;
	unsigned int cmd;

	if ((vm && put_u64(skb, KVMACCESS_A_STATS_VM_ID, vm->id)) ||
	    put_u64(skb, KVMACCESS_A_STATS_WORKER,
		    vm ? atomic64_read(&a->worker) :
		    kvmaccess_memory_worker_time() + kvmaccess_tick_worker_time()) ||
	    put_u64(skb, KVMACCESS_A_STATS_INTERRUPT, atomic64_read(&a->interrupt)) ||
	    put_u64(skb, KVMACCESS_A_STATS_CAPTURES, atomic64_read(&a->captures)) ||
	    put_u64(skb, KVMACCESS_A_STATS_RETRIES, atomic64_read(&a->retries)) ||
	    put_u64(skb, KVMACCESS_A_STATS_INTERRUPTS, atomic64_read(&a->interrupts)) ||
	    put_u64(skb, KVMACCESS_A_STATS_EVENTS, atomic64_read(&a->events)))
		return -EMSGSIZE;

	for (cmd = KVMACCESS_CMD_INFO; cmd < ARRAY_SIZE(a->ops); cmd++) {
		if (cmd == KVMACCESS_CMD_VM_CREATED || cmd == KVMACCESS_CMD_VM_DESTROYED)
			continue;
		if (op_fill(skb, cmd, &a->ops[cmd]))
			return -EMSGSIZE;
	}
	return 0;
}

static int stats_doit(struct sk_buff *skb, struct genl_info *info)
{
	struct kvmaccess_request r;
	int err;

	err = kvmaccess_request_check(skb, info->extack);
	if (!err)
		err = kvmaccess_request_begin(&r, info, info->attrs[KVMACCESS_A_STATS_VM_ID], false,
					      KVMACCESS_REPLY_SIZE);
	if (err)
		return err;
	return kvmaccess_request_end(&r, stats_fill(r.skb, r.vm), 0);
}

static int stats_dumpit(struct sk_buff *skb, struct netlink_callback *cb)
{
	return dump_vms(skb, cb, KVMACCESS_CMD_STATS, stats_fill);
}

static const struct genl_ops ops[] = {
	{
		.cmd	 = KVMACCESS_CMD_INFO,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = info_doit,
		.policy	 = info_policy,
		.maxattr = ARRAY_SIZE(info_policy) - 1,
	}, {
		.cmd	 = KVMACCESS_CMD_VM_GET,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = vm_doit,
		.start	 = kvmaccess_request_dump,
		.dumpit	 = vm_dumpit,
		.policy	 = vm_policy,
		.maxattr = ARRAY_SIZE(vm_policy) - 1,
	}, {
		.cmd	 = KVMACCESS_CMD_MEMSLOT_GET,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = memslot_doit,
		.start	 = memslot_start,
		.dumpit	 = memslot_dumpit,
		.policy	 = memslot_policy,
		.maxattr = ARRAY_SIZE(memslot_policy) - 1,
	}, {
		.cmd	 = KVMACCESS_CMD_VCPU_GET,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = vcpu_doit,
		.start	 = vcpu_start,
		.dumpit	 = vcpu_dumpit,
		.policy	 = vcpu_policy,
		.maxattr = ARRAY_SIZE(vcpu_policy) - 1,
	}, {
		.cmd	 = KVMACCESS_CMD_TABLE_GET,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = table_doit,
		.policy	 = table_policy,
		.maxattr = ARRAY_SIZE(table_policy) - 1,
	}, {
		.cmd	 = KVMACCESS_CMD_MEM_READ,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = mem_doit,
		.policy	 = mem_policy,
		.maxattr = ARRAY_SIZE(mem_policy) - 1,
	}, {
		.cmd	 = KVMACCESS_CMD_STATS,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = stats_doit,
		.start	 = kvmaccess_request_dump,
		.dumpit	 = stats_dumpit,
		.policy	 = stats_policy,
		.maxattr = ARRAY_SIZE(stats_policy) - 1,
	}, {
		.cmd	 = KVMACCESS_CMD_WATCH_NEW,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = kvmaccess_netlink_watch_new,
		.policy	 = kvmaccess_netlink_watch_new_policy,
		.maxattr = KVMACCESS_A_WATCH_KEY,
	}, {
		.cmd	 = KVMACCESS_CMD_WATCH_ADD,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = kvmaccess_netlink_watch_add,
		.policy	 = kvmaccess_netlink_watch_add_policy,
		.maxattr = KVMACCESS_A_WATCH_ITEM,
	}, {
		.cmd	 = KVMACCESS_CMD_WATCH_DEL,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = kvmaccess_netlink_watch_del,
		.policy	 = kvmaccess_netlink_watch_del_policy,
		.maxattr = KVMACCESS_A_WATCH_COOKIE,
	}, {
		.cmd	 = KVMACCESS_CMD_WATCH_GET,
		.flags	 = GENL_ADMIN_PERM,
		.doit	 = kvmaccess_netlink_watch_get,
		.start	 = kvmaccess_request_dump,
		.dumpit	 = kvmaccess_netlink_watch_dump,
		.policy	 = kvmaccess_netlink_watch_get_policy,
		.maxattr = KVMACCESS_A_WATCH_ID,
	},
};

static const struct genl_multicast_group groups[] = {
	{ .name = KVMACCESS_MCGRP_VM, .flags = GENL_MCAST_CAP_SYS_ADMIN },
};

struct genl_family kvmaccess_netlink_family __ro_after_init = {
	.name		= KVMACCESS_GENL_NAME,
	.version	= KVMACCESS_GENL_VERSION,
	.module		= THIS_MODULE,
	.parallel_ops	= true,
	.ops		= ops,
	.n_ops		= ARRAY_SIZE(ops),
	.mcgrps		= groups,
	.n_mcgrps	= ARRAY_SIZE(groups),
	.resv_start_op	= __KVMACCESS_CMD_MAX,
};

int __init kvmaccess_netlink_init(void)
{
	int err = genl_register_family(&kvmaccess_netlink_family);

	if (err)
		pr_err("generic netlink refuses the family: error %d\n", err);
	return err;
}

void kvmaccess_netlink_exit(void)
{
	genl_unregister_family(&kvmaccess_netlink_family);
}
