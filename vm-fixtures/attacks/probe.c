// SPDX-License-Identifier: GPL-2.0-only
/*
 * Not an attack: says what this guest's own kernel sees of its processors,
 * so that what the host sees can be held against it. User space could not
 * tell: UMIP makes its SGDT and SIDT return dummies.
 *
 * /sys/kernel/debug/probe/cpus    one JSON object a line and online CPU
 * /sys/kernel/debug/probe/memory  JSON: where a page of known bytes lies
 * /sys/kernel/debug/probe/hold    write a CPU's number: a kernel thread there
 *                                 spins with known registers; -1 ends it
 * /sys/kernel/debug/probe/poke    write an address, 8 bytes, and what is to be
 *                                 there, even where it is read-only
 */
#include "attack.h"
#include <linux/debugfs.h>
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/init.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <asm/desc.h>
#include <asm/msr.h>

struct probe {
	struct desc_ptr gdt, idt;
	unsigned long cr0, cr2, cr3, cr4, cr8;
	unsigned long dr0, dr1, dr2, dr3, dr6, dr7;
	u16 cs, ds, es, fs, gs, ss, tr, ldt;
	u64 efer, star, lstar, cstar, sfmask;
	u64 sysenter_cs, sysenter_esp, sysenter_eip;
	u64 fs_base, gs_base, kernel_gs_base, pat;
	u8 gdt_bytes[256];
	u8 idt_bytes[4096];
};

static void probe_take(void *arg)
{
	struct probe *p = arg;

	native_store_gdt(&p->gdt);
	store_idt(&p->idt);
	p->cr0 = native_read_cr0();
	p->cr2 = native_read_cr2();
	p->cr3 = __native_read_cr3();
	p->cr4 = native_read_cr4();
	asm volatile("mov %%cr8, %0" : "=r"(p->cr8));
	get_debugreg(p->dr0, 0);
	get_debugreg(p->dr1, 1);
	get_debugreg(p->dr2, 2);
	get_debugreg(p->dr3, 3);
	get_debugreg(p->dr6, 6);
	get_debugreg(p->dr7, 7);
	savesegment(cs, p->cs);
	savesegment(ds, p->ds);
	savesegment(es, p->es);
	savesegment(fs, p->fs);
	savesegment(gs, p->gs);
	savesegment(ss, p->ss);
	p->tr = native_store_tr();
	asm volatile("sldt %0" : "=m"(p->ldt));
	p->efer = native_read_msr(MSR_EFER);
	p->star = native_read_msr(MSR_STAR);
	p->lstar = native_read_msr(MSR_LSTAR);
	p->cstar = native_read_msr(MSR_CSTAR);
	p->sfmask = native_read_msr(MSR_SYSCALL_MASK);
	p->sysenter_cs = native_read_msr(MSR_IA32_SYSENTER_CS);
	p->sysenter_esp = native_read_msr(MSR_IA32_SYSENTER_ESP);
	p->sysenter_eip = native_read_msr(MSR_IA32_SYSENTER_EIP);
	p->fs_base = native_read_msr(MSR_FS_BASE);
	p->gs_base = native_read_msr(MSR_GS_BASE);
	p->kernel_gs_base = native_read_msr(MSR_KERNEL_GS_BASE);
	p->pat = native_read_msr(MSR_IA32_CR_PAT);
	memcpy(p->gdt_bytes, (void *)p->gdt.address,
	       min_t(size_t, p->gdt.size + 1, sizeof(p->gdt_bytes)));
	memcpy(p->idt_bytes, (void *)p->idt.address,
	       min_t(size_t, p->idt.size + 1, sizeof(p->idt_bytes)));
}

static void show_bytes(struct seq_file *m, const char *name, const u8 *bytes, size_t size)
{
	seq_printf(m, ",\"%s\":\"", name);
	while (size--)
		seq_printf(m, "%02x", *bytes++);
	seq_putc(m, '"');
}

static int cpus_show(struct seq_file *m, void *unused)
{
	struct probe *p = kmalloc(sizeof(*p), GFP_KERNEL);
	int cpu;

	if (!p)
		return -ENOMEM;
#define SHOW(field) seq_printf(m, ",\"" #field "\":%llu", (u64)p->field)
	for_each_online_cpu(cpu) {
		smp_call_function_single(cpu, probe_take, p, true);
		seq_printf(m, "{\"cpu\":%d", cpu);
		seq_printf(m, ",\"gdt_base\":%lu,\"gdt_limit\":%u", p->gdt.address, p->gdt.size);
		seq_printf(m, ",\"idt_base\":%lu,\"idt_limit\":%u", p->idt.address, p->idt.size);
		SHOW(cr0); SHOW(cr2); SHOW(cr3); SHOW(cr4); SHOW(cr8);
		SHOW(dr0); SHOW(dr1); SHOW(dr2); SHOW(dr3); SHOW(dr6); SHOW(dr7);
		SHOW(cs); SHOW(ds); SHOW(es); SHOW(fs); SHOW(gs); SHOW(ss); SHOW(tr); SHOW(ldt);
		SHOW(efer); SHOW(star); SHOW(lstar); SHOW(cstar); SHOW(sfmask);
		SHOW(sysenter_cs); SHOW(sysenter_esp); SHOW(sysenter_eip);
		SHOW(fs_base); SHOW(gs_base); SHOW(kernel_gs_base); SHOW(pat);
		show_bytes(m, "gdt", p->gdt_bytes,
			   min_t(size_t, p->gdt.size + 1, sizeof(p->gdt_bytes)));
		show_bytes(m, "idt", p->idt_bytes,
			   min_t(size_t, p->idt.size + 1, sizeof(p->idt_bytes)));
		seq_puts(m, "}\n");
	}
#undef SHOW
	kfree(p);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(cpus);

/* Two pages side by side in physical memory; byte i is i * 167 + 13. */
#define PATTERN_ORDER 1
static u8 *pattern;
/* A page that nothing maps any more: its address is a hole. */
static void *hole;

static int memory_show(struct seq_file *m, void *unused)
{
	seq_printf(m, "{\"gva\":%lu,\"gpa\":%llu,\"size\":%lu,\"hole\":%lu}\n",
		   (unsigned long)pattern, (u64)virt_to_phys(pattern),
		   PAGE_SIZE << PATTERN_ORDER, (unsigned long)hole);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(memory);

static struct task_struct *holder;

/* Registers 8 to 15 hold 0x1111111111111111 times their number's low digit. */
static int hold(void *unused)
{
	while (!kthread_should_stop()) {
		unsigned long turns = 1 << 22;

		asm volatile("movabs $0x8888888888888888, %%r8\n\t"
			     "movabs $0x9999999999999999, %%r9\n\t"
			     "movabs $0xaaaaaaaaaaaaaaaa, %%r10\n\t"
			     "movabs $0xbbbbbbbbbbbbbbbb, %%r11\n\t"
			     "movabs $0xcccccccccccccccc, %%r12\n\t"
			     "movabs $0xdddddddddddddddd, %%r13\n\t"
			     "movabs $0xeeeeeeeeeeeeeeee, %%r14\n\t"
			     "movabs $0xffffffffffffffff, %%r15\n"
			     "1:	dec %0\n\t"
			     "jnz 1b"
			     : "+c"(turns) : :
			     "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc");
		cond_resched();
	}
	return 0;
}

static void hold_stop(void)
{
	if (holder)
		kthread_stop(holder);
	holder = NULL;
}

static ssize_t hold_write(struct file *file, const char __user *buf, size_t size, loff_t *pos)
{
	struct task_struct *t;
	int cpu, err;

	err = kstrtoint_from_user(buf, size, 0, &cpu);
	if (err)
		return err;
	hold_stop();
	if (cpu < 0)
		return size;
	if (cpu >= nr_cpu_ids || !cpu_online(cpu))
		return -ENODEV;
	t = kthread_create(hold, NULL, "hold");
	if (IS_ERR(t))
		return PTR_ERR(t);
	kthread_bind(t, cpu);
	holder = t;
	wake_up_process(t);
	return size;
}

static const struct file_operations hold_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = hold_write,
	.llseek = noop_llseek,
};

static ssize_t poke_write(struct file *file, const char __user *buf, size_t size, loff_t *pos)
{
	unsigned long to;
	size_t done;
	u8 *page;

	if (size <= sizeof(to) || copy_from_user(&to, buf, sizeof(to)))
		return -EINVAL;
	page = (u8 *)__get_free_page(GFP_KERNEL);
	if (!page)
		return -ENOMEM;
	for (done = sizeof(to); done < size;) {
		size_t n = min_t(size_t, size - done, PAGE_SIZE);

		if (copy_from_user(page, buf + done, n))
			break;
		write_protected((void *)to, page, n);
		to += n;
		done += n;
	}
	free_page((unsigned long)page);
	return done == size ? size : -EFAULT;
}

static const struct file_operations poke_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = poke_write,
	.llseek = noop_llseek,
};

static struct dentry *dir;

static int __init probe_init(void)
{
	size_t i;

	pattern = (u8 *)__get_free_pages(GFP_KERNEL, PATTERN_ORDER);
	if (!pattern)
		return -ENOMEM;
	for (i = 0; i < PAGE_SIZE << PATTERN_ORDER; i++)
		pattern[i] = i * 167 + 13;
	hole = vmalloc(PAGE_SIZE);
	vfree(hole);
	vm_unmap_aliases();

	dir = debugfs_create_dir("probe", NULL);
	debugfs_create_file("cpus", 0400, dir, NULL, &cpus_fops);
	debugfs_create_file("memory", 0400, dir, NULL, &memory_fops);
	debugfs_create_file("hold", 0200, dir, NULL, &hold_fops);
	debugfs_create_file("poke", 0200, dir, NULL, &poke_fops);
	return 0;
}

static void __exit probe_exit(void)
{
	debugfs_remove(dir);
	hold_stop();
	free_pages((unsigned long)pattern, PATTERN_ORDER);
}

module_init(probe_init);
module_exit(probe_exit);
MODULE_DESCRIPTION("What a guest's kernel sees of its own processors");
MODULE_LICENSE("GPL v2");
