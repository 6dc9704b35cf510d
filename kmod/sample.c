// SPDX-License-Identifier: GPL-2.0-only
/*
 * A module that uses the functions of api.h: /proc/kvmaccess_sample shows of
 * each VM its vCPUs, and how many VMs came and went, and changes were found by
 * watches, since it was loaded. Built by "make kmod SAMPLE=m".
 */
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

#include "api.h"

static atomic_t created, destroyed, changed;

static int on_event(struct notifier_block *nb, unsigned long cmd, void *data)
{
	const struct kvmaccess_watch_change *change = data;

	if (cmd == KVMACCESS_CMD_VM_CREATED)
		atomic_inc(&created);
	else if (cmd == KVMACCESS_CMD_VM_DESTROYED)
		atomic_inc(&destroyed);
	else if (cmd == KVMACCESS_CMD_WATCH_EVENT && change->state == KVMACCESS_STATE_DIFFERENT)
		atomic_inc(&changed);
	return NOTIFY_OK;
}

static struct notifier_block notifier = { .notifier_call = on_event };

static void show_vcpu(struct seq_file *m, u64 vm, u32 id,
		      struct kvmaccess_vcpu_state *s)
{
	int err = kvmaccess_read_vcpu(vm, id, s);
	u64 gate;

	if (err) {
		seq_printf(m, "vcpu %u error %d\n", id, err);
		return;
	}
	seq_printf(m, "vcpu %u condition %d rip %#lx cr3 %#lx lstar %#llx idt %#lx",
		   id, s->condition, s->rip, s->cr3, s->msr[KVMACCESS_MSR_LSTAR], s->idt.address);
	err = kvmaccess_read_virtual(vm, id, KVMACCESS_ROOT_OF_VCPU, s->idt.address,
				     &gate, sizeof(gate));
	if (err)
		seq_printf(m, " gate error %d\n", err);
	else
		seq_printf(m, " gate %#llx\n", gate);
}

static int show_vm(const struct kvmaccess_vm_info *vm, void *arg)
{
	struct kvmaccess_vcpu_state *state = kmalloc(sizeof(*state), GFP_KERNEL);
	struct seq_file *m = arg;
	u32 id;

	if (!state)
		return -ENOMEM;
	seq_printf(m, "vm %llu pid %d vcpus %u memory %llu\n",
		   vm->id, vm->pid, vm->vcpus, vm->memory);
	/* The VMM numbers them as it likes; from 0 on is what all do. */
	for (id = 0; id < vm->vcpus; id++)
		show_vcpu(m, vm->id, id, state);
	kfree(state);
	return 0;
}

static int show(struct seq_file *m, void *unused)
{
	int err = kvmaccess_walk_vms(show_vm, m);

	seq_printf(m, "created %d destroyed %d changed %d\n", atomic_read(&created),
		   atomic_read(&destroyed), atomic_read(&changed));
	return err;
}

static int __init sample_init(void)
{
	int err = kvmaccess_register_notifier(&notifier);

	if (!err && !proc_create_single("kvmaccess_sample", 0400, NULL, show)) {
		kvmaccess_unregister_notifier(&notifier);
		err = -ENOMEM;
	}
	return err;
}

static void __exit sample_exit(void)
{
	remove_proc_entry("kvmaccess_sample", NULL);
	kvmaccess_unregister_notifier(&notifier);
}

module_init(sample_init);
module_exit(sample_exit);

MODULE_AUTHOR("KvmAccess authors");
MODULE_DESCRIPTION("Sample user of kvmaccess.ko");
MODULE_LICENSE("GPL");
