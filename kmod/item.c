// SPDX-License-Identifier: GPL-2.0-only
#include <linux/slab.h>

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

/* Where registers are in the state of a vCPU. */
static const u16 places[] = {
#define PLACE(member)	offsetof(struct kvmaccess_vcpu_state, member)
	[KVMACCESS_REGISTER_CR0] = PLACE(cr0),
	[KVMACCESS_REGISTER_CR3] = PLACE(cr3),
	[KVMACCESS_REGISTER_CR4] = PLACE(cr4),
	[KVMACCESS_REGISTER_EFER] = PLACE(efer),
	[KVMACCESS_REGISTER_GDTR_BASE] = PLACE(gdt.address),
	[KVMACCESS_REGISTER_GDTR_LIMIT] = PLACE(gdt.size),
	[KVMACCESS_REGISTER_IDTR_BASE] = PLACE(idt.address),
	[KVMACCESS_REGISTER_IDTR_LIMIT] = PLACE(idt.size),
	[KVMACCESS_REGISTER_TR_BASE] = PLACE(segment[VCPU_SREG_TR].base),
	[KVMACCESS_REGISTER_TR_SELECTOR] = PLACE(segment[VCPU_SREG_TR].selector),
	[KVMACCESS_REGISTER_LDTR_SELECTOR] = PLACE(segment[VCPU_SREG_LDTR].selector),
	[KVMACCESS_REGISTER_DR0] = PLACE(db[0]),
	[KVMACCESS_REGISTER_DR1] = PLACE(db[1]),
	[KVMACCESS_REGISTER_DR2] = PLACE(db[2]),
	[KVMACCESS_REGISTER_DR3] = PLACE(db[3]),
	[KVMACCESS_REGISTER_DR7] = PLACE(dr7),
	[KVMACCESS_REGISTER_STAR] = PLACE(msr[KVMACCESS_MSR_STAR]),
	[KVMACCESS_REGISTER_LSTAR] = PLACE(msr[KVMACCESS_MSR_LSTAR]),
	[KVMACCESS_REGISTER_CSTAR] = PLACE(msr[KVMACCESS_MSR_CSTAR]),
	[KVMACCESS_REGISTER_SFMASK] = PLACE(msr[KVMACCESS_MSR_SFMASK]),
	[KVMACCESS_REGISTER_SYSENTER_CS] = PLACE(msr[KVMACCESS_MSR_SYSENTER_CS]),
	[KVMACCESS_REGISTER_SYSENTER_ESP] = PLACE(msr[KVMACCESS_MSR_SYSENTER_ESP]),
	[KVMACCESS_REGISTER_SYSENTER_EIP] = PLACE(msr[KVMACCESS_MSR_SYSENTER_EIP]),
	[KVMACCESS_REGISTER_PAT] = PLACE(pat),
#undef PLACE
};

/* Those of 16 bits; all others have 64 there. */
#define LIMITS_AND_SELECTORS	(BIT_ULL(KVMACCESS_REGISTER_GDTR_LIMIT) |	\
				 BIT_ULL(KVMACCESS_REGISTER_IDTR_LIMIT) |	\
				 BIT_ULL(KVMACCESS_REGISTER_TR_SELECTOR) |	\
				 BIT_ULL(KVMACCESS_REGISTER_LDTR_SELECTOR))

static bool is_short(enum kvmaccess_register reg)
{
	return BIT_ULL(reg) & LIMITS_AND_SELECTORS;
}

/* What is to be of the register, for an item with VALUE and MASK. */
void kvmaccess_item_set_register(struct kvmaccess_item *item, enum kvmaccess_register reg)
{
	item->reg = reg;
	item->place = places[reg];
	/* The base of a table is where its limit ends. */
	if (is_short(reg))
		item->mask &= U16_MAX;
}

u64 kvmaccess_item_register(const struct kvmaccess_item *item,
			    const struct kvmaccess_vcpu_state *s)
{
	u64 value = kvmaccess_item_word(item, s);

	return is_short(item->reg) ? (u16)value : value;
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
