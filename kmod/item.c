// SPDX-License-Identifier: GPL-2.0-only
#include <linux/math.h>
#include <linux/slab.h>

#include "hostpage.h"
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

/* Go to 9 if the word at .Lat differs or cannot be read, or on to the next. */
#define COMPARE_WORD	"8: movq .Lat(%[have],%[i]), %[word]\n\t"	\
			"cmpq .Lat(%[want],%[i]), %[word]\n\t"		\
			"jne 9f\n\t"					\
			KVMACCESS_HOSTPAGE_FIXUP(8b, 9f)		\
			".set .Lat, .Lat + 8\n\t"

/*
 * Whether what is at @at, where a page of the host is, is as expected. Three
 * instructions for 8 bytes, and two more each time that a loop goes round: of
 * 256 bytes, of 32, and of 8.
 */
bool kvmaccess_item_is_equal(const void *at, const void *expected, u32 length)
{
	u32 words = round_down(length, 8);
	/* What is left, subtracted from what a turn takes; above 0 there is no turn. */
	long i = 256 - (long)words;
	u64 word;
	u8 byte;

	asm volatile("testq %[i], %[i]\n\t"
		     "jg 2f\n\t"
		     "1:\n\t"
		     ".set .Lat, -256\n\t"
		     ".rept 32\n\t"
		     COMPARE_WORD
		     ".endr\n\t"
		     "addq $256, %[i]\n\t"
		     "jle 1b\n\t"
		     "2: subq $(256 - 32), %[i]\n\t"
		     "jg 4f\n\t"
		     "3:\n\t"
		     ".set .Lat, -32\n\t"
		     ".rept 4\n\t"
		     COMPARE_WORD
		     ".endr\n\t"
		     "addq $32, %[i]\n\t"
		     "jle 3b\n\t"
		     "4: subq $(32 - 8), %[i]\n\t"
		     "jg 9f\n\t"
		     "5:\n\t"
		     ".set .Lat, -8\n\t"
		     COMPARE_WORD
		     "addq $8, %[i]\n\t"
		     "jle 5b\n\t"
		     "9:\n\t"
		     : [i] "+r"(i), [word] "=&r"(word)
		     : [have] "r"(at + words), [want] "r"(expected + words)
		     : "cc", "memory");
	/* Amid a turn. */
	if (i <= 0)
		return false;
	for (; words < length; words++) {
		if (!kvmaccess_hostpage_get_byte(&byte, at + words) ||
		    byte != ((const u8 *)expected)[words])
			return false;
	}
	return true;
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

u64 kvmaccess_item_register(const struct kvmaccess_vcpu_state *s,
			    enum kvmaccess_register reg)
{
	const void *at = (const void *)s + places[reg];
	u64 value;

	if (BIT_ULL(reg) & LIMITS_AND_SELECTORS)
		return *(const u16 *)at;
	/* The base of a table is where its limit ends. */
	memcpy(&value, at, sizeof(value));
	return value;
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
