// SPDX-License-Identifier: GPL-2.0-only
#include <linux/kprobes.h>

#include "ksyms.h"

struct kvmaccess_ksyms kvmaccess_ksyms;

static const char *missing[KVMACCESS_KSYMS_MISSING_MAX];
static DEFINE_SPINLOCK(missing_lock);

typedef unsigned long (*lookup_fn)(const char *name);

/*
 * kallsyms_lookup_name() is not exported; a kprobe on it, never armed for
 * longer than it takes to read its address, says where it is.
 */
static lookup_fn __init find_lookup(void)
{
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name" };
	lookup_fn lookup;
	int err;

	err = register_kprobe(&probe);
	if (err) {
		pr_err("kallsyms_lookup_name() cannot be probed: error %d\n", err);
		return NULL;
	}
	lookup = (lookup_fn)probe.addr;
	unregister_kprobe(&probe);
	return lookup;
}

static void * __init find(lookup_fn lookup, const char *name)
{
	unsigned long addr = lookup(name);

	if (!addr)
		kvmaccess_ksyms_miss(name);
	return (void *)addr;
}

/* Record what this host lacks, once; @what must live as long as the module. */
void kvmaccess_ksyms_miss(const char *what)
{
	unsigned int i;

	spin_lock(&missing_lock);
	for (i = 0; i < ARRAY_SIZE(missing); i++) {
		if (!missing[i]) {
			WRITE_ONCE(missing[i], what);
			pr_warn("not found on this kernel: %s\n", what);
			break;
		}
		if (!strcmp(missing[i], what))
			break;
	}
	spin_unlock(&missing_lock);
}

/* The @i'th missing name, NULL behind the last. Entries are only ever added. */
const char *kvmaccess_ksyms_missing(unsigned int i)
{
	return i < ARRAY_SIZE(missing) ? READ_ONCE(missing[i]) : NULL;
}

/* Without vm_list and its lock nothing works; all else is a capability. */
int __init kvmaccess_ksyms_init(void)
{
	struct kvmaccess_ksyms *k = &kvmaccess_ksyms;
	lookup_fn lookup = find_lookup();

	if (!lookup)
		return -EOPNOTSUPP;

	k->lock = find(lookup, "kvm:kvm_lock");
	k->vms = find(lookup, "kvm:vm_list");
	k->ops = find(lookup, "kvm:kvm_x86_ops");
	k->running = (void __percpu *)find(lookup, "kvm:kvm_running_vcpu");
	k->get_cr8 = find(lookup, "kvm:kvm_get_cr8");

	return k->lock && k->vms ? 0 : -EOPNOTSUPP;
}
