// SPDX-License-Identifier: GPL-2.0-only
/*
 * The pages of a VMM, by the kernel's own mapping of them and without the
 * VMM's address space. Nothing of the host changes by that, not even the
 * accessed bits that say which pages are in use; a page that the host has, but
 * has mapped to nobody for the moment (to find out by a fault which node uses
 * it, or amid the splitting of a large one), is found all the same.
 */
#include <linux/mm.h>
#include <linux/pgtable.h>

#include "hostpage.h"

/* A page that is exchanged for another more often than this within a copy: EAGAIN. */
#define COPY_ATTEMPTS	4

/* Whether the kernel knows the pages at both ends. */
static noinline bool are_known(u64 pa, unsigned long size)
{
	return pfn_valid(PHYS_PFN(pa)) && pfn_valid(PHYS_PFN(pa + size - 1));
}

/*
 * Where the kernel has what is at the physical address @pa, for @size bytes from
 * there on; NULL if that is not where it maps memory.
 *
 * Of what is there it maps memory only: not the holes in it, where devices are,
 * nor what has been taken from the host since. Reading these faults, of which
 * nobody takes notice. There are two exceptions. What is below 1 MiB is mapped
 * whatever it is; the kernel gives it to nobody. Beyond all memory there are
 * the mappings of other things: up to high_memory, which grows with memory that
 * is added and never shrinks, there are none of those. Memory of a device may be
 * beyond, and is there if the kernel knows its pages.
 *
 * Memory that is being taken from the host loses its mapping last: for long no
 * page of a VMM has been there, nor a table of such. pfn_valid() of each address
 * would say no more, is true of whole sections that have holes, and takes ten
 * times as long.
 */
static __always_inline const void *map(u64 pa, unsigned long size)
{
	if (unlikely(!kvmaccess_hostpage_is_memory(pa, size) &&
		     (pa < ISA_END_ADDRESS || !are_known(pa, size))))
		return NULL;
	return __va(pa);
}

/* What the entry is in charge of: inverted where it is not for the processor. */
static __always_inline u64 address_in(u64 entry)
{
	return (entry ^ protnone_mask(entry)) & PTE_PFN_MASK;
}

/* The table that the entry leads to. */
static __always_inline const u64 *table_of(u64 entry)
{
	return entry & _PAGE_PRESENT ? map(address_in(entry), PAGE_SIZE) : NULL;
}

/* An entry of a table that entries lead to, or of none. */
static __always_inline u64 entry_in(const u64 *table, unsigned long index)
{
	return table ? kvmaccess_hostpage_entry(table + (index & (PTRS_PER_PTE - 1))) : 0;
}

/*
 * Find the table of pages, or the large page, that is in charge of @hva.
 *
 * The caller keeps the struct mm, so there is a top-level table. Nothing keeps
 * those below: x86 before 6.15 frees page tables after an interrupt to those
 * CPUs only that use the mm, of which this need not be one, so that lockless
 * lookups of get_user_pages_fast() are no model. A table may be anything else
 * by the time it is read, and its entries any number. Each is therefore taken
 * for what it is: the number of a page, which is bounded to where the kernel
 * maps memory, and then read so that a fault does no harm. So it does none
 * either that the way to a table is gone only once for all in it.
 *
 * Nor is the page itself kept: what is found there may be compared, and nothing
 * more. That other bytes than the VM's are just those that are expected, in the
 * moment in which it gives the page up, hides nothing that the next look would
 * not find.
 */
bool kvmaccess_hostpage_find(struct mm_struct *mm, unsigned long hva,
			     struct kvmaccess_hostpage_path *path)
{
	u64 pa, entry, within = PUD_SIZE - PMD_SIZE;

	lockdep_assert_irqs_disabled();

	path->region = ~0UL;
	if (path->wide != hva >> PUD_SHIFT) {
		path->wide = ~0UL;
		entry = READ_ONCE(pgd_offset(mm, hva)->pgd);
		if (pgtable_l5_enabled())
			entry = entry_in(table_of(entry), hva >> P4D_SHIFT);
		entry = entry_in(table_of(entry), hva >> PUD_SHIFT);
		path->entry = entry;
		path->table = NULL;
		if (!(entry & _PAGE_PSE)) {
			path->table = table_of(entry);
			if (!path->table)
				return false;
		}
		path->wide = hva >> PUD_SHIFT;
	}
	entry = path->entry;
	if (path->table) {
		entry = entry_in(path->table, hva >> PMD_SHIFT);
		within = 0;
	}
	/* It is there by this alone while it is being split. */
	path->large = entry & _PAGE_PSE;
	if (path->large) {
		pa = (address_in(entry) & PMD_MASK & ~within) | (hva & within);
		path->at = map(pa, PMD_SIZE);
	} else {
		path->at = table_of(entry);
	}
	if (path->at)
		path->region = hva >> PMD_SHIFT;
	return path->at;
}

/* What is at @hva by this table, which may not be one any more; see above. */
const void *kvmaccess_hostpage_in(const void *table, unsigned long hva)
{
	u64 entry = entry_in(table, hva >> PAGE_SHIFT);
	const void *at;

	if (!(entry & (_PAGE_PRESENT | _PAGE_PROTNONE)))
		return NULL;
	at = map(address_in(entry), PAGE_SIZE);
	return at ? at + offset_in_page(hva) : NULL;
}

/* The same of one page. */
const void *kvmaccess_hostpage_at(struct mm_struct *mm, unsigned long hva)
{
	struct kvmaccess_hostpage_path path = KVMACCESS_HOSTPAGE_PATH;
	const void *at;

	return kvmaccess_hostpage_by(mm, hva, &path, &at) ? at : NULL;
}

/*
 * The same, kept, in @from; an error where none is in place, or where it is
 * just being exchanged for another.
 */
static struct folio *keep(struct mm_struct *mm, unsigned long hva, const void **from)
{
	struct folio *folio, *stale = NULL;
	unsigned long flags;
	struct page *page;

	local_irq_save(flags);
	*from = kvmaccess_hostpage_at(mm, hva);
	/* Memory that is mapped need not have a struct page. */
	page = *from && virt_addr_valid(*from) ? virt_to_page(*from) : NULL;
	folio = page ? page_folio(page) : ERR_PTR(-ENODATA);
	if (page && !folio_try_get(folio)) {
		folio = ERR_PTR(-EAGAIN);
	} else if (page && (page_folio(page) != folio ||
			    kvmaccess_hostpage_at(mm, hva) != *from)) {
		/* What is kept is not, or not any more, what is there. */
		stale = folio;
		folio = ERR_PTR(-EAGAIN);
	}
	local_irq_restore(flags);
	if (stale)
		folio_put(stale);
	return folio;
}

static bool copy(void *to, const void *from, u32 len)
{
	u32 i = 0;

	for (; i + sizeof(u64) <= len; i += sizeof(u64)) {
		if (!kvmaccess_hostpage_get_word(to + i, from + i))
			return false;
	}
	for (; i < len; i++) {
		if (!kvmaccess_hostpage_get_byte(to + i, from + i))
			return false;
	}
	return true;
}

/*
 * Copy what the VMM has at @hva, of one page, which is kept meanwhile: nobody
 * else's bytes are copied. Returns -ENODATA where no page is in place, -EAGAIN
 * where that cannot be told at the moment, -ESHUTDOWN if the VMM is gone.
 */
int kvmaccess_hostpage_copy(struct mm_struct *mm, unsigned long hva, void *to, u32 len)
{
	unsigned int attempt = 0;
	struct folio *folio;
	const void *from;
	bool read;

	do {
		folio = keep(mm, hva, &from);
	} while (folio == ERR_PTR(-EAGAIN) && ++attempt < COPY_ATTEMPTS);
	if (IS_ERR(folio)) {
		/* Its pages go after it went, and have been looked for first. */
		smp_rmb();
		return atomic_read(&mm->mm_users) ? PTR_ERR(folio) : -ESHUTDOWN;
	}
	read = copy(to, from, len);
	folio_put(folio);
	return read ? 0 : -ENODATA;
}
