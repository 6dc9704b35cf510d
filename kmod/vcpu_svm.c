// SPDX-License-Identifier: GPL-2.0-only
/*
 * A vCPU on AMD processors: most of its state is in the VMCB, which is memory
 * that the processor updates on each exit. By the time an interrupt is taken
 * in a thread whose guest was running, svm_vcpu_run() has copied RAX, RSP, RIP
 * and CR2 to struct kvm_vcpu_arch, with GIF clear, and has saved by VMSAVE
 * what VMRUN does not. CR0 and CR3 follow only in svm_handle_exit(), with
 * interrupts on. The getters of kvm-amd that are called here read the VMCB
 * and fill no cache.
 */
#include <linux/err.h>

#include "btf.h"
#include "compat.h"
#include "ksyms.h"
#include "vcpu.h"

static struct {
	u32 vcpu;	/* struct vcpu_svm: vcpu */
	u32 vmcb;	/* struct vcpu_svm: vmcb */
} layout;

static int svm_init(void)
{
	struct kvmaccess_btf *btf;
	int err;

	btf = kvmaccess_btf_open("kvm_amd");
	if (IS_ERR(btf))
		btf = kvmaccess_btf_open(NULL);	/* kvm-amd built in */
	if (IS_ERR(btf)) {
		kvmaccess_ksyms_miss("type information (/sys/kernel/btf)");
		return PTR_ERR(btf);
	}

	err = kvmaccess_btf_member(btf, "vcpu_svm", "vcpu", &layout.vcpu);
	if (!err)
		err = kvmaccess_btf_member(btf, "vcpu_svm", "vmcb", &layout.vmcb);
	kvmaccess_btf_close(btf);
	if (err)
		kvmaccess_ksyms_miss("layout of struct vcpu_svm");
	return err;
}

/* Written before anything else when the vCPU is loaded on another CPU. */
static int svm_home(struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->cpu);
}

static int svm_read(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *s, u64 wanted)
{
	void *svm = (void *)vcpu - layout.vcpu;
	const struct vmcb *vmcb = READ_ONCE(*(struct vmcb **)(svm + layout.vmcb));
	const struct kvm_x86_ops *ops = kvmaccess_ksyms.ops;
	unsigned int i;

	/* KVM's copy is newer than the VMCB's only if the guest cannot write CR0. */
	s->cr0 = test_bit(INTERCEPT_CR0_WRITE,
			  (const unsigned long *)vmcb->control.intercepts) ?
		 vcpu->arch.cr0 : vmcb->save.cr0;
	/* ... and that of CR3 if there are shadow page tables or it was set. */
	s->cr3 = !kvmaccess_compat_has_npt(vmcb) ||
		 kvmaccess_compat_is_dirty(vcpu, KVMACCESS_COMPAT_REG_CR3) ?
		 vcpu->arch.cr3 : vmcb->save.cr3;
	s->cr4 = vcpu->arch.cr4;
	if (wanted == KVMACCESS_VCPU_ALL) {
		s->rflags = ops->get_rflags(vcpu);
		s->cpl = ops->get_cpl(vcpu);
	}

	for (i = 0; i < ARRAY_SIZE(s->segment); i++) {
		if (kvmaccess_vcpu_wants_segment(wanted, i))
			ops->get_segment(vcpu, &s->segment[i], i);
	}
	ops->get_gdt(vcpu, &s->gdt);
	ops->get_idt(vcpu, &s->idt);
	kvmaccess_vcpu_read_msrs(vcpu, s, wanted, 0);
	return 0;
}

const struct kvmaccess_vcpu_vendor kvmaccess_vcpu_svm = {
	.id = KVMACCESS_VENDOR_SVM,
	.module = "kvm_amd",
	.prefix = "svm_",
	.init = svm_init,
	.home = svm_home,
	.read = svm_read,
	.in_memory = true,
};
