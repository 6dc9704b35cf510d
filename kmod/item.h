/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _KVMACCESS_ITEM_H
#define _KVMACCESS_ITEM_H

#include <linux/list.h>
#include <linux/mm.h>

#include "api.h"

/* How something was when it was looked at last, and what of that was told. */
struct kvmaccess_track {
	u64 seen;	/* which bytes, while they differ */
	u32 pending;	/* changes that have not been told */
	u16 state;	/* enum kvmaccess_state */
	bool absent;	/* it was not in place, which may have been for an instant */
};

struct kvmaccess_item_page {
	u64 expected;
	struct kvmaccess_track track;
};

struct kvmaccess_item_vcpu {
	u64 doubt;	/* 1 + exits of the vCPU when it differed, but could be torn */
	struct kvmaccess_track track;
};

/*
 * One thing to watch. Built by a requester, it belongs to the watch's worker
 * from kvmaccess_watch_add() on: nobody else looks at it.
 */
struct kvmaccess_item {
	struct list_head list;
	enum kvmaccess_kind kind;
	u32 length;		/* bytes of the guest's memory */
	u64 gpa;
	unsigned long hva;	/* of @gpa by the memslots of @generation; 0: none */
	u64 generation;
	struct kvmaccess_track track;
	u64 cookie;
	u64 allowed;		/* time from which the next event is within the rate */
	union {
		struct {
			u64 value;
			u64 mask;
			enum kvmaccess_register reg;
			u16 place;	/* in the state of a vCPU */
			s64 vcpu;	/* -1: all */
			struct kvmaccess_item_vcpu *vcpus;
			unsigned int nr_vcpus;
		};
		struct kvmaccess_item_page *pages;
		u8 *bytes;
	};
};

/* Bytes of memory that the item needs for what is expected. */
static inline u64 kvmaccess_item_memory(const struct kvmaccess_item *item)
{
	switch (item->kind) {
	case KVMACCESS_KIND_BYTES:
		return item->length;
	case KVMACCESS_KIND_DIGEST:
		return (u64)(item->length >> PAGE_SHIFT) * sizeof(*item->pages);
	default:
		return 0;
	}
}

/* The register, of 16 bits or 64, and what is behind it. */
static inline u64 kvmaccess_item_word(const struct kvmaccess_item *item,
				      const struct kvmaccess_vcpu_state *state)
{
	u64 word;

	memcpy(&word, (const void *)state + item->place, sizeof(word));
	return word;
}

/* Whether the register is as it should be. */
static inline bool kvmaccess_item_has_register(const struct kvmaccess_item *item,
					       const struct kvmaccess_vcpu_state *state)
{
	return (kvmaccess_item_word(item, state) & item->mask) == item->value;
}

struct kvmaccess_item * __must_check
kvmaccess_item_new(enum kvmaccess_kind kind, u32 length);
void kvmaccess_item_free(struct kvmaccess_item *item);
void kvmaccess_item_set_register(struct kvmaccess_item *item, enum kvmaccess_register reg);
u64 kvmaccess_item_register(const struct kvmaccess_item *item,
			    const struct kvmaccess_vcpu_state *state);
bool kvmaccess_item_is_whole(enum kvmaccess_register reg);

#endif /* _KVMACCESS_ITEM_H */
