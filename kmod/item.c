// SPDX-License-Identifier: GPL-2.0-only
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "item.h"

/* To be freed by kvmaccess_item_free(); @length is in bytes of the guest's memory. */
struct kvmaccess_item *kvmaccess_item_new(enum kvmaccess_kind kind, u32 length)
{
	struct kvmaccess_item *item;

	item = kzalloc(sizeof(*item), GFP_KERNEL_ACCOUNT);
	if (!item)
		return ERR_PTR(-ENOMEM);
	item->kind = kind;
	item->length = length;
	/* Of no memslots: they are looked up first. */
	item->generation = ~0ULL;

	if (kind == KVMACCESS_KIND_BYTES)
		item->bytes = kmalloc(length, GFP_KERNEL_ACCOUNT);
	else if (kind == KVMACCESS_KIND_DIGEST)
		item->pages = kvcalloc(length >> PAGE_SHIFT, sizeof(*item->pages),
				       GFP_KERNEL_ACCOUNT);
	else
		return item;
	if (!item->bytes) {
		kfree(item);
		return ERR_PTR(-ENOMEM);
	}
	return item;
}

void kvmaccess_item_free(struct kvmaccess_item *item)
{
	switch (item->kind) {
	case KVMACCESS_KIND_BYTES:
		kfree(item->bytes);
		break;
	case KVMACCESS_KIND_DIGEST:
		kvfree(item->pages);
		break;
	case KVMACCESS_KIND_REGISTER:
		kvfree(item->vcpus);
		break;
	default:
		break;
	}
	kfree(item);
}

/*
 * Compare memory of the adopted address space in place, with page faults
 * disabled. Returns 0 if it is as expected; 1 if not, with the offset of a part
 * of up to 8 bytes that differs, and what was there; -ENODATA where the host
 * has no page in place.
 */
int kvmaccess_item_compare(const void __user *at, const void *expected, u32 length,
			   u32 *offset, u64 *found)
{
	const u64 *want = expected;
	const u64 __user *have = at;
	u32 i, words = length / sizeof(u64);
	u64 word;
	u8 byte;

	if (!user_access_begin(at, length))
		return -ENODATA;

#define COMPARE(n)						\
	do {							\
		unsafe_get_user(word, have + (n), absent);	\
		if (unlikely(word != want[n])) {		\
			have += (n);				\
			goto differs;				\
		}						\
	} while (0)

	for (i = words / 8; i; i--) {
		COMPARE(0);
		COMPARE(1);
		COMPARE(2);
		COMPARE(3);
		COMPARE(4);
		COMPARE(5);
		COMPARE(6);
		COMPARE(7);
		have += 8;
		want += 8;
	}
	for (i = words % 8; i; i--) {
		COMPARE(0);
		have++;
		want++;
	}
#undef COMPARE

	for (i = words * sizeof(u64); i < length; i++) {
		unsafe_get_user(byte, (const u8 __user *)at + i, absent);
		if (unlikely(byte != ((const u8 *)expected)[i])) {
			user_access_end();
			*offset = i;
			*found = byte;
			return 1;
		}
	}
	user_access_end();
	return 0;

differs:
	user_access_end();
	*offset = (const char __user *)have - (const char __user *)at;
	*found = word;
	return 1;

absent:
	user_access_end();
	return -ENODATA;
}

u64 kvmaccess_item_register(const struct kvmaccess_vcpu_state *s,
			    enum kvmaccess_register reg)
{
	switch (reg) {
	case KVMACCESS_REGISTER_CR0:
		return s->cr0;
	case KVMACCESS_REGISTER_CR3:
		return s->cr3;
	case KVMACCESS_REGISTER_CR4:
		return s->cr4;
	case KVMACCESS_REGISTER_EFER:
		return s->efer;
	case KVMACCESS_REGISTER_GDTR_BASE:
		return s->gdt.address;
	case KVMACCESS_REGISTER_GDTR_LIMIT:
		return s->gdt.size;
	case KVMACCESS_REGISTER_IDTR_BASE:
		return s->idt.address;
	case KVMACCESS_REGISTER_IDTR_LIMIT:
		return s->idt.size;
	case KVMACCESS_REGISTER_TR_BASE:
		return s->segment[VCPU_SREG_TR].base;
	case KVMACCESS_REGISTER_TR_SELECTOR:
		return s->segment[VCPU_SREG_TR].selector;
	case KVMACCESS_REGISTER_LDTR_SELECTOR:
		return s->segment[VCPU_SREG_LDTR].selector;
	case KVMACCESS_REGISTER_DR0 ... KVMACCESS_REGISTER_DR3:
		return s->db[reg - KVMACCESS_REGISTER_DR0];
	case KVMACCESS_REGISTER_DR7:
		return s->dr7;
	case KVMACCESS_REGISTER_STAR ... KVMACCESS_REGISTER_SYSENTER_EIP:
		return s->msr[reg - KVMACCESS_REGISTER_STAR];
	case KVMACCESS_REGISTER_PAT:
		return s->pat;
	default:
		return 0;
	}
}

/*
 * Whether KVM changes the register in one step, to a value that the guest gave
 * it, so that it is never found in between. It does so to the MSRs of system
 * calls and to PAT. The others it also saves, resets and restores one after
 * another as it enters or leaves system management mode, and it keeps CR0, CR4
 * and a table's base and limit in parts.
 */
bool kvmaccess_item_is_whole(enum kvmaccess_register reg)
{
	return reg >= KVMACCESS_REGISTER_STAR;
}
