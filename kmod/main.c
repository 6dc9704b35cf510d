// SPDX-License-Identifier: GPL-2.0-only
#include <linux/module.h>
#include <net/genetlink.h>

#include "ksyms.h"
#include "memory.h"
#include "netlink.h"
#include "notify.h"
#include "vcpu.h"
#include "version.h"
#include "vm.h"
#include "watch.h"

static int __init kvmaccess_init(void)
{
	const struct kvmaccess_vcpu_vendor *vendor;
	int err;

	err = kvmaccess_ksyms_init();
	if (err)
		return err;

	err = kvmaccess_memory_init();
	if (err)
		return err;

	err = kvmaccess_watch_init();
	if (err)
		goto err_memory;

	err = kvmaccess_vm_init();
	if (err)
		goto err_watch;

	err = kvmaccess_netlink_init();
	if (err)
		goto err_vm;

	kvmaccess_vm_start();
	vendor = kvmaccess_vcpu_vendor();
	pr_info("version " KVMACCESS_VERSION ", registers %s\n",
		vendor ? vendor->module : "not yet: no KVM of a known kind is loaded");
	return 0;

err_vm:
	kvmaccess_vm_stop();
	kvmaccess_vm_exit();
err_watch:
	kvmaccess_watch_stop();
	kvmaccess_watch_exit();
err_memory:
	kvmaccess_memory_exit();
	return err;
}

static void __exit kvmaccess_exit(void)
{
	/*
	 * In this order: no watch finds a VM, then no new request does, then
	 * there are no requests.
	 */
	kvmaccess_watch_stop();
	kvmaccess_vm_stop();
	kvmaccess_netlink_exit();
	kvmaccess_watch_exit();
	kvmaccess_notify_exit();
	kvmaccess_vm_exit();
	kvmaccess_memory_exit();
}

module_init(kvmaccess_init);
module_exit(kvmaccess_exit);

MODULE_AUTHOR("KvmAccess authors");
MODULE_DESCRIPTION("State of running KVM guests over generic netlink");
MODULE_LICENSE("GPL");
MODULE_VERSION(KVMACCESS_VERSION);
MODULE_ALIAS_GENL_FAMILY(KVMACCESS_GENL_NAME);
