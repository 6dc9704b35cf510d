// SPDX-License-Identifier: GPL-2.0-only
#include <linux/kprobes.h>

#include "ksyms.h"

struct kvmaccess_ksyms kvmaccess_ksyms;

static const char *missing[KVMACCESS_KSYMS_MISSING_MAX];
static DEFINE_SPINLOCK(missing_lock);

/*
 * kallsyms_lookup_name() is not exported; a kprobe on it says where it is. It
 * is never armed: no code is patched for it, and unregistering it needs no
 * memory, for want of which the kernel would warn.
 */
static const void * __init find_lookup(void)
{
	struct kprobe probe = {
		.symbol_name = "kallsyms_lookup_name",
		.flags = KPROBE_FLAG_DISABLED,
	};
	const void *lookup;
	int err;

	err = register_kprobe(&probe);
	if (err) {
		pr_err("kallsyms_lookup_name() cannot be probed: error %d\n", err);
		return NULL;
	}
	lookup = probe.addr;
	unregister_kprobe(&probe);
	return lookup;
}

/* @name is "module:symbol"; where KVM is built in there is no module. */
static unsigned long __init find(const void *lookup, const char *name)
{
	unsigned long addr = kvmaccess_ksyms_call(lookup, name);

	if (!addr)
		addr = kvmaccess_ksyms_call(lookup, strchr(name, ':') + 1);
	if (!addr)
		kvmaccess_ksyms_miss(name);
	return addr;
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
	const void *lookup = find_lookup();

	if (!lookup)
		return -EOPNOTSUPP;

	k->lock = (typeof(k->lock))find(lookup, "kvm:kvm_lock");
	k->vms = (typeof(k->vms))find(lookup, "kvm:vm_list");
	k->ops = (typeof(k->ops))find(lookup, "kvm:kvm_x86_ops");
	k->running = (__force typeof(k->running))find(lookup, "kvm:kvm_running_vcpu");
	k->get_cr8 = (const void *)find(lookup, "kvm:kvm_get_cr8");
	k->vcpu_load = (const void *)find(lookup, "kvm:vcpu_load");
	k->vcpu_put = (const void *)find(lookup, "kvm:vcpu_put");
	k->destroy_vm = find(lookup, "kvm:kvm_arch_destroy_vm");

	return k->lock && k->vms ? 0 : -EOPNOTSUPP;
}
