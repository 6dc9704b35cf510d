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

/* An entry of what may not be a page table any more. */
static bool read_entry(unsigned long pfn, unsigned long index, u64 *entry)
{
	return pfn_valid(pfn) &&
	       kvmaccess_hostpage_get_word(entry, (const u64 *)pfn_to_kaddr(pfn) + index);
}

/* Find the table of pages, or the large page, that is in charge of @hva. */
static bool find_table(struct mm_struct *mm, unsigned long hva,
		       struct kvmaccess_hostpage_path *path)
{
	static const unsigned int shifts[] = { P4D_SHIFT, PUD_SHIFT, PMD_SHIFT };
	u64 entry = READ_ONCE(pgd_offset(mm, hva)->pgd);
	unsigned int i;

	path->region = ~0UL;
	path->shift = PAGE_SHIFT;
	for (i = pgtable_l5_enabled() ? 0 : 1; i < ARRAY_SIZE(shifts); i++) {
		if (!(entry & _PAGE_PRESENT) ||
		    !read_entry((entry & PTE_PFN_MASK) >> PAGE_SHIFT,
				(hva >> shifts[i]) & (PTRS_PER_PTE - 1), &entry))
			return false;
		if (entry & _PAGE_PSE && shifts[i] <= PUD_SHIFT) {
			path->shift = shifts[i];
			break;
		}
	}
	path->entry = entry;
	path->region = hva >> PMD_SHIFT;
	return true;
}

/*
 * Where the kernel has what the VMM has at @hva; NULL if no page is in place
 * there. With interrupts off, since @path began as KVMACCESS_HOSTPAGE_PATH. What
 * is there is to be read as above only.
 *
 * The caller keeps the struct mm, so there is a top-level table. Nothing keeps
 * those below: x86 before 6.15 frees page tables after an interrupt to those
 * CPUs only that use the mm, of which this need not be one, so that lockless
 * lookups of get_user_pages_fast() are no model. A table may be anything else
 * by the time it is read, and its entries any number. Each is therefore taken
 * for what it is: the number of a page, which is checked to be memory and then
 * read so that a fault does no harm. So it does none either that the way to a
 * table is gone only once for all pages in it.
 *
 * Nor is the page itself kept: what is found there may be compared, and nothing
 * more. That other bytes than the VM's are just those that are expected, in the
 * moment in which it gives the page up, hides nothing that the next look would
 * not find.
 */
const void *kvmaccess_hostpage_by(struct mm_struct *mm, unsigned long hva,
				  struct kvmaccess_hostpage_path *path)
{
	u64 entry, present = _PAGE_PRESENT | _PAGE_PROTNONE;
	unsigned long size, pfn;

	lockdep_assert_irqs_disabled();

	if (path->region != hva >> PMD_SHIFT && !find_table(mm, hva, path))
		return NULL;
	entry = path->entry;
	if (path->shift != PAGE_SHIFT)
		/* By this alone while it is being split. */
		present |= _PAGE_PSE;
	else if (!(entry & _PAGE_PRESENT) ||
		 !read_entry((entry & PTE_PFN_MASK) >> PAGE_SHIFT,
			     (hva >> PAGE_SHIFT) & (PTRS_PER_PTE - 1), &entry))
		return NULL;
	if (!(entry & present))
		return NULL;
	/* Inverted where it is not for the processor. */
	pfn = pte_pfn(__pte(entry));
	size = 1UL << (path->shift - PAGE_SHIFT);
	pfn = (pfn & ~(size - 1)) | ((hva >> PAGE_SHIFT) & (size - 1));
	return pfn_valid(pfn) ? pfn_to_kaddr(pfn) + offset_in_page(hva) : NULL;
}

/* The same of one page. */
const void *kvmaccess_hostpage_at(struct mm_struct *mm, unsigned long hva)
{
	struct kvmaccess_hostpage_path path = KVMACCESS_HOSTPAGE_PATH;

	return kvmaccess_hostpage_by(mm, hva, &path);
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
	page = *from ? virt_to_page(*from) : NULL;
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
