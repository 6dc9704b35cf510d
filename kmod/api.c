// SPDX-License-Identifier: GPL-2.0-only
/*
 * The functions of api.h, for other modules, that ask; notify.c has those that
 * tell. Nothing is held for a caller between two calls, so none can delay a VM's
 * destruction but by a call that is under way.
 */
#include <linux/export.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>

#include "account.h"
#include "api.h"
#include "memory.h"
#include "vcpu.h"
#include "vm.h"

int kvmaccess_walk_vms(int (*fn)(const struct kvmaccess_vm_info *vm, void *arg),
		       void *arg)
{
	struct kvmaccess_vm_info info = {};
	u64 last = kvmaccess_vm_last();
	struct kvmaccess_vm *vm;
	int err = 0;

	while (!err) {
		u64 start = ktime_get_ns();

		vm = kvmaccess_vm_get_next(info.id, last);
		if (IS_ERR_OR_NULL(vm))
			return PTR_ERR_OR_ZERO(vm);
		kvmaccess_vm_info(vm, &info);
		kvmaccess_account_op(&vm->account, KVMACCESS_CMD_VM_GET, start, 0, 0);
		/* However long @fn takes, no VM waits for it. */
		kvmaccess_vm_put(vm);
		err = fn(&info, arg);
	}
	return err;
}
EXPORT_SYMBOL_GPL(kvmaccess_walk_vms);

static int capture(struct kvmaccess_vm *vm, u32 id, struct kvmaccess_vcpu_state *state)
{
	struct kvm_vcpu *vcpu = kvmaccess_vm_vcpu(vm, id);

	return vcpu ? kvmaccess_vcpu_capture(vm, vcpu, state, NULL) : -ENXIO;
}

int kvmaccess_read_vcpu(u64 id, u32 vcpu, struct kvmaccess_vcpu_state *state)
{
	u64 start = ktime_get_ns();
	struct kvmaccess_vm *vm = kvmaccess_vm_get(id, NULL);
	int err;

	if (IS_ERR(vm)) {
		kvmaccess_account_op(NULL, KVMACCESS_CMD_VCPU_GET, start, PTR_ERR(vm), 0);
		return PTR_ERR(vm);
	}
	err = capture(vm, vcpu, state);
	kvmaccess_account_op(&vm->account, KVMACCESS_CMD_VCPU_GET, start, err, 0);
	kvmaccess_vm_put(vm);
	return err;
}
EXPORT_SYMBOL_GPL(kvmaccess_read_vcpu);

struct read {
	const struct kvmaccess_paging *paging;	/* NULL: guest-physical */
	u64 address;
	u32 len;
	void *to;
};

static int read_part(struct kvmaccess_memory *memory, void *arg)
{
	const struct read *r = arg;

	return r->paging ?
	       kvmaccess_memory_read_virtual(memory, r->paging, r->address, r->to, r->len) :
	       kvmaccess_memory_read(memory, r->address, r->to, r->len);
}

/* In parts: no caller keeps the one worker from the others for long. */
static int read(struct kvmaccess_vm *vm, u32 as_id,
		const struct kvmaccess_paging *paging, u64 address, void *to, u32 len)
{
	struct read r = { .paging = paging, .address = address, .to = to };
	int err;

	for (; len; len -= r.len, r.address += r.len, r.to += r.len) {
		r.len = min_t(u32, len, KVMACCESS_MAX_BYTES);
		err = kvmaccess_memory_run(vm, as_id, read_part, &r);
		if (err)
			return err;
	}
	return 0;
}

static int read_virtual(struct kvmaccess_vm *vm, u32 vcpu, u64 root, u64 gva,
			void *to, u32 len)
{
	struct kvmaccess_vcpu_state *state;
	struct kvmaccess_paging paging;
	u32 as_id;
	int err;

	state = kmalloc(sizeof(*state), GFP_KERNEL);
	if (!state)
		return -ENOMEM;
	err = capture(vm, vcpu, state);
	/* The page tables of a nested guest lead to addresses of its own. */
	if (!err && state->flags & KVMACCESS_VCPU_F_NESTED)
		err = -EAGAIN;
	if (!err) {
		kvmaccess_memory_paging(state, &paging);
		as_id = state->as_id;
	}
	kfree(state);
	if (err)
		return err;

	if (root != KVMACCESS_ROOT_OF_VCPU)
		paging.root = root;
	if (!kvmaccess_memory_is_canonical(&paging, gva, len))
		return -EINVAL;
	return read(vm, as_id, &paging, gva, to, len);
}

/* @vcpu is NULL for a guest-physical address. */
static int read_guest(u64 id, const u32 *vcpu, u64 root, u64 address, void *to, u32 len)
{
	u64 start = ktime_get_ns();
	struct kvmaccess_vm *vm;
	int err;

	if (!len || address + len - 1 < address)
		return -EINVAL;
	vm = kvmaccess_vm_get(id, NULL);
	if (IS_ERR(vm)) {
		kvmaccess_account_op(NULL, KVMACCESS_CMD_MEM_READ, start, PTR_ERR(vm), 0);
		return PTR_ERR(vm);
	}
	err = vcpu ? read_virtual(vm, *vcpu, root, address, to, len) :
		     read(vm, 0, NULL, address, to, len);
	kvmaccess_account_op(&vm->account, KVMACCESS_CMD_MEM_READ, start, err, err ? 0 : len);
	kvmaccess_vm_put(vm);
	return err;
}

int kvmaccess_read_physical(u64 id, u64 gpa, void *to, u32 len)
{
	return read_guest(id, NULL, 0, gpa, to, len);
}
EXPORT_SYMBOL_GPL(kvmaccess_read_physical);

int kvmaccess_read_virtual(u64 id, u32 vcpu, u64 root, u64 gva, void *to, u32 len)
{
	return read_guest(id, &vcpu, root, gva, to, len);
}
EXPORT_SYMBOL_GPL(kvmaccess_read_virtual);
