// SPDX-License-Identifier: GPL-2.0-only
/*
 * Offsets of members of structures that no header declares, out of the
 * kernel's type information under /sys/kernel/btf.
 *
 * The files come from the kernel itself, but nothing is gained by trusting
 * them: each length and offset is checked before its use.
 */
#include <linux/btf.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <uapi/linux/btf.h>

#include "btf.h"

#define BTF_SIZE_MAX	(32 << 20)
#define NAME_MAX_BYTES	64
/* The header's part that all versions have; it has grown since. */
#define HEADER_SIZE	offsetofend(struct btf_header, str_len)

struct kvmaccess_btf {
	struct file *base;		/* vmlinux, NULL where it is the file itself */
	loff_t base_strings;
	u32 base_strings_len;
	u32 size;
	const struct btf_header *header;
	const void *types;
	const char *strings;
	u8 data[];
};

/* sysfs gives a page at most for each read. */
static int read_at(struct file *file, void *buf, size_t len, loff_t pos)
{
	while (len) {
		ssize_t n = kernel_read(file, buf, len, &pos);

		if (n <= 0)
			return n ? n : -ENODATA;
		buf += n;
		len -= n;
	}
	return 0;
}

static int check_header(const struct btf_header *h, u64 size)
{
	if (h->magic != BTF_MAGIC || h->hdr_len < HEADER_SIZE || !h->str_len ||
	    (u64)h->hdr_len + h->type_off + h->type_len > size ||
	    (u64)h->hdr_len + h->str_off + h->str_len > size ||
	    !IS_ALIGNED(h->hdr_len + h->type_off, 4))
		return -EINVAL;
	return 0;
}

static int open_base(struct kvmaccess_btf *btf)
{
	struct btf_header h = {};
	struct file *file;
	int err;

	file = filp_open("/sys/kernel/btf/vmlinux", O_RDONLY, 0);
	if (IS_ERR(file))
		return PTR_ERR(file);
	btf->base = file;

	err = read_at(file, &h, HEADER_SIZE, 0);
	if (!err)
		err = check_header(&h, i_size_read(file_inode(file)));
	if (err)
		return err;
	btf->base_strings = (loff_t)h.hdr_len + h.str_off;
	btf->base_strings_len = h.str_len;
	return 0;
}

/*
 * Open the type information of @module, or the kernel's own where @module is
 * NULL. Returns an ERR_PTR() on failure.
 */
struct kvmaccess_btf *kvmaccess_btf_open(const char *module)
{
	char path[64];
	struct kvmaccess_btf *btf;
	struct file *file;
	loff_t size;
	int err;

	snprintf(path, sizeof(path), "/sys/kernel/btf/%s", module ?: "vmlinux");
	file = filp_open(path, O_RDONLY, 0);
	if (IS_ERR(file))
		return ERR_CAST(file);

	size = i_size_read(file_inode(file));
	if (size < HEADER_SIZE || size > BTF_SIZE_MAX) {
		btf = ERR_PTR(-EFBIG);
		goto out_file;
	}
	btf = kvzalloc(struct_size(btf, data, size), GFP_KERNEL);
	if (!btf) {
		btf = ERR_PTR(-ENOMEM);
		goto out_file;
	}
	btf->size = size;
	btf->header = (void *)btf->data;

	err = read_at(file, btf->data, size, 0);
	if (!err)
		err = check_header(btf->header, size);
	if (!err && module)
		err = open_base(btf);
	if (err) {
		kvmaccess_btf_close(btf);
		btf = ERR_PTR(err);
		goto out_file;
	}
	btf->types = btf->data + btf->header->hdr_len + btf->header->type_off;
	btf->strings = btf->data + btf->header->hdr_len + btf->header->str_off;
out_file:
	filp_close(file, NULL);
	return btf;
}

void kvmaccess_btf_close(struct kvmaccess_btf *btf)
{
	if (btf->base)
		filp_close(btf->base, NULL);
	kvfree(btf);
}

/*
 * A module's strings continue those of vmlinux, and names that vmlinux has
 * as well ("vcpu", "cpu") are found there only.
 */
static bool is_name(struct kvmaccess_btf *btf, u32 offset, const char *name)
{
	size_t len = strlen(name) + 1;
	char buf[NAME_MAX_BYTES];

	if (len > sizeof(buf))
		return false;

	if (offset >= btf->base_strings_len) {
		offset -= btf->base_strings_len;
		return offset < btf->header->str_len &&
		       len <= btf->header->str_len - offset &&
		       !memcmp(btf->strings + offset, name, len);
	}
	if (len > btf->base_strings_len - offset ||
	    read_at(btf->base, buf, len, btf->base_strings + offset))
		return false;
	return !memcmp(buf, name, len);
}

/* Bytes that follow the struct btf_type of @t, or an error. */
static int payload(const struct btf_type *t)
{
	u32 vlen = BTF_INFO_VLEN(t->info);

	switch (BTF_INFO_KIND(t->info)) {
	case BTF_KIND_PTR:
	case BTF_KIND_FWD:
	case BTF_KIND_TYPEDEF:
	case BTF_KIND_VOLATILE:
	case BTF_KIND_CONST:
	case BTF_KIND_RESTRICT:
	case BTF_KIND_FUNC:
	case BTF_KIND_FLOAT:
	case BTF_KIND_TYPE_TAG:
		return 0;
	case BTF_KIND_INT:
		return sizeof(u32);
	case BTF_KIND_ARRAY:
		return sizeof(struct btf_array);
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		return vlen * sizeof(struct btf_member);
	case BTF_KIND_ENUM:
		return vlen * sizeof(struct btf_enum);
	case BTF_KIND_FUNC_PROTO:
		return vlen * sizeof(struct btf_param);
	case BTF_KIND_VAR:
		return sizeof(struct btf_var);
	case BTF_KIND_DATASEC:
		return vlen * sizeof(struct btf_var_secinfo);
	case BTF_KIND_DECL_TAG:
		return sizeof(struct btf_decl_tag);
	case BTF_KIND_ENUM64:
		return vlen * sizeof(struct btf_enum64);
	default:
		return -EINVAL;
	}
}

/* The byte offset of @member in struct @type. */
int kvmaccess_btf_member(struct kvmaccess_btf *btf, const char *type,
			 const char *member, u32 *offset)
{
	const void *end = btf->types + btf->header->type_len;
	const void *at = btf->types;

	while (end - at >= sizeof(struct btf_type)) {
		const struct btf_type *t = at;
		const struct btf_member *m = (const void *)(t + 1);
		u32 i, vlen = BTF_INFO_VLEN(t->info);
		int len = payload(t);

		if (len < 0 || len > end - (const void *)m)
			return -EINVAL;
		at = (const void *)m + len;

		if (BTF_INFO_KIND(t->info) != BTF_KIND_STRUCT ||
		    !is_name(btf, t->name_off, type))
			continue;

		for (i = 0; i < vlen; i++) {
			u32 bits = m[i].offset;

			if (BTF_INFO_KFLAG(t->info)) {
				if (BTF_MEMBER_BITFIELD_SIZE(bits))
					continue;
				bits = BTF_MEMBER_BIT_OFFSET(bits);
			}
			if (!is_name(btf, m[i].name_off, member))
				continue;
			if (bits % 8 || bits / 8 >= t->size)
				return -EINVAL;
			*offset = bits / 8;
			return 0;
		}
	}
	return -ENOENT;
}
