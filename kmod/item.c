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

/* Words that are compared before the loop goes round. */
#define GROUP	16

/*
 * Whether the first @length bytes of @have, of which there are one or more times
 * @words words, can be read and are like those of @want. Three instructions for
 * 8 bytes, and two more for each time.
 */
static __always_inline bool are_equal(const void *have, const void *want, u32 length,
				      const int words)
{
	long i = -(long)length;
	u64 word;

	asm volatile("1:\n\t"
		     ".set .Lat, 0\n\t"
		     ".rept %c[words]\n\t"
		     "2: movq .Lat(%[have],%[i]), %[word]\n\t"
		     "cmpq .Lat(%[want],%[i]), %[word]\n\t"
		     "jne 3f\n\t"
		     KVMACCESS_HOSTPAGE_FIXUP(2b, 3f)
		     ".set .Lat, .Lat + 8\n\t"
		     ".endr\n\t"
		     "addq %[bytes], %[i]\n\t"
		     "jnz 1b\n\t"
		     "3:\n\t"
		     : [i] "+r"(i), [word] "=&r"(word)
		     : [have] "r"(have + length), [want] "r"(want + length),
		       [words] "i"(words), [bytes] "i"(8 * words)
		     : "cc", "memory");
	return !i;
}

/* Whether what is at @at, where a page of the host is, is as expected. */
bool kvmaccess_item_is_equal(const void *at, const void *expected, u32 length)
{
	u32 n = round_down(length, 8 * GROUP);
	u8 byte;

	if (n && !are_equal(at, expected, n, GROUP))
		return false;
	at += n;
	expected += n;
	length -= n;
	n = round_down(length, 8);
	if (n && !are_equal(at, expected, n, 1))
		return false;
	for (; n < length; n++) {
		if (!kvmaccess_hostpage_get_byte(&byte, at + n) ||
		    byte != ((const u8 *)expected)[n])
			return false;
	}
	return true;
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
