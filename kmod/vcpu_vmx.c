// SPDX-License-Identifier: GPL-2.0-only
/*
 * A vCPU on Intel processors: most of its state is in the VMCS, which only
 * the processor that it is active on can read, and only while it is current.
 *
 * loaded_vmcs->cpu names that processor. KVM has it clear a VMCS, by an
 * interrupt to it, before the VMCS is activated elsewhere or freed, so as long
 * as an interrupt is handled there the VMCS stays active. If another one is
 * current, of another vCPU that is loaded here or was last, it is put back.
 *
 * KVM keeps copies of some fields in struct kvm_vcpu_arch, with one bitmap
 * that says which are valid and one which have been changed and not yet been
 * written to the VMCS. The interrupted thread may be filling them, so they are
 * read only where the VMCS is not the truth, and never filled.
 */
#include <linux/types.h>

/* Not on its own: without CONFIG_HYPERVISOR_GUEST it uses a type of the above. */
#include <asm/hypervisor.h>
#include <asm/vmx.h>
#include <linux/err.h>

#include "btf.h"
#include "compat.h"
#include "ksyms.h"
#include "vcpu.h"

static struct {
	u32 vcpu;	/* struct vcpu_vmx: vcpu */
	u32 loaded;	/* struct vcpu_vmx: loaded_vmcs */
	u32 rmode;	/* struct vcpu_vmx: rmode, and in it first: vm86_active */
	u32 active;	/* struct vcpu_vmx: guest_state_loaded */
	u32 host_gs;	/* struct vcpu_vmx: msr_host_kernel_gs_base */
	u32 guest_gs;	/* struct vcpu_vmx: msr_guest_kernel_gs_base */
	u32 vmcs;	/* struct loaded_vmcs: vmcs */
	u32 cpu;	/* struct loaded_vmcs: cpu */
} layout;

static const struct {
	const char *type;
	const char *member;
	u32 *offset;
} members[] = {
	{ "vcpu_vmx", "vcpu", &layout.vcpu },
	{ "vcpu_vmx", "loaded_vmcs", &layout.loaded },
	{ "vcpu_vmx", "rmode", &layout.rmode },
	{ "vcpu_vmx", "msr_guest_kernel_gs_base", &layout.guest_gs },
	{ "loaded_vmcs", "vmcs", &layout.vmcs },
	{ "loaded_vmcs", "cpu", &layout.cpu },
};

/* Fields of a segment register, by VCPU_SREG_*. */
static const struct {
	u16 selector;
	u16 base;
	u16 limit;
	u16 attrs;
} segments[] = {
#define SEGMENT(name)						\
	[VCPU_SREG_##name] = {					\
		.selector = GUEST_##name##_SELECTOR,		\
		.base = GUEST_##name##_BASE,			\
		.limit = GUEST_##name##_LIMIT,			\
		.attrs = GUEST_##name##_AR_BYTES,		\
	}
	SEGMENT(ES),
	SEGMENT(CS),
	SEGMENT(SS),
	SEGMENT(DS),
	SEGMENT(FS),
	SEGMENT(GS),
	SEGMENT(TR),
	SEGMENT(LDTR),
#undef SEGMENT
};

/* "KVM: VMX: Move common fields of struct vcpu_{vmx,tdx} to a struct", 6.16 */
static int find_common(struct kvmaccess_btf *btf)
{
	u32 vt;

	if (!kvmaccess_btf_member(btf, "vcpu_vmx", "guest_state_loaded", &layout.active))
		return kvmaccess_btf_member(btf, "vcpu_vmx", "msr_host_kernel_gs_base",
					    &layout.host_gs);
	if (kvmaccess_btf_member(btf, "vcpu_vmx", "vt", &vt) ||
	    kvmaccess_btf_member(btf, "vcpu_vt", "guest_state_loaded", &layout.active) ||
	    kvmaccess_btf_member(btf, "vcpu_vt", "msr_host_kernel_gs_base", &layout.host_gs))
		return -ENOENT;
	layout.active += vt;
	layout.host_gs += vt;
	return 0;
}

static int vmx_init(void)
{
	struct kvmaccess_btf *btf;
	unsigned int i;
	int err = 0;

	/* Enlightened VMCSs are memory with a format and a current one of their own. */
	if (hypervisor_is_type(X86_HYPER_MS_HYPERV)) {
		kvmaccess_ksyms_miss("VMCS: not supported under Hyper-V");
		return -EOPNOTSUPP;
	}

	btf = kvmaccess_btf_open("kvm_intel");
	if (IS_ERR(btf))
		btf = kvmaccess_btf_open(NULL);	/* kvm-intel built in */
	if (IS_ERR(btf)) {
		kvmaccess_ksyms_miss("type information (/sys/kernel/btf)");
		return PTR_ERR(btf);
	}
	for (i = 0; i < ARRAY_SIZE(members) && !err; i++)
		err = kvmaccess_btf_member(btf, members[i].type, members[i].member,
					   members[i].offset);
	if (!err)
		err = find_common(btf);
	kvmaccess_btf_close(btf);
	if (err)
		kvmaccess_ksyms_miss("layout of struct vcpu_vmx");
	return err;
}

static const void *loaded_vmcs(struct kvm_vcpu *vcpu)
{
	const void *vmx = (void *)vcpu - layout.vcpu;

	/* Nested guests have another one; switched with interrupts on. */
	return READ_ONCE(*(const void **)(vmx + layout.loaded));
}

static int vmx_home(struct kvm_vcpu *vcpu)
{
	/* A trust domain's vCPU is another structure altogether. */
	if (kvmaccess_compat_is_tdx(vcpu->kvm))
		return -EOPNOTSUPP;
	return READ_ONCE(*(const int *)(loaded_vmcs(vcpu) + layout.cpu));
}

/*
 * The instructions fault where VMX operation is off, which it is not while
 * there are VMs; should that ever be wrong, it is an error and not an oops.
 */
static bool vmptrst(u64 *pa)
{
	bool failed = true;

	asm volatile("1: vmptrst %1\n\t"
		     "movb $0, %0\n"
		     "2:\n\t"
		     _ASM_EXTABLE(1b, 2b)
		     : "+m"(failed), "=m"(*pa) : : "cc", "memory");
	return !failed;
}

static bool vmptrld(u64 pa)
{
	bool failed = true;

	asm volatile("1: vmptrld %1\n\t"
		     "setna %0\n"
		     "2:\n\t"
		     _ASM_EXTABLE(1b, 2b)
		     : "+m"(failed) : "m"(pa) : "cc", "memory");
	return !failed;
}

struct reader {
	bool failed;
};

static unsigned long vmread(struct reader *r, unsigned long field)
{
	unsigned long value = 0;
	bool failed = true;

	asm volatile("1: vmread %2, %1\n\t"
		     "setna %0\n"
		     "2:\n\t"
		     _ASM_EXTABLE(1b, 2b)
		     : "+m"(failed), "+r"(value) : "r"(field) : "cc");
	r->failed |= failed;
	return value;
}

static void read_segment(struct reader *r, struct kvm_segment *s, unsigned int i)
{
	u32 attrs = vmread(r, segments[i].attrs);

	s->selector = vmread(r, segments[i].selector);
	s->base = vmread(r, segments[i].base);
	s->limit = vmread(r, segments[i].limit);
	s->type = attrs & 15;
	s->s = attrs >> 4 & 1;
	s->dpl = attrs >> 5 & 3;
	s->unusable = attrs >> 16 & 1;
	/* As KVM tells the VMM. */
	s->present = !s->unusable;
	s->avl = attrs >> 12 & 1;
	s->l = attrs >> 13 & 1;
	s->db = attrs >> 14 & 1;
	s->g = attrs >> 15 & 1;
}

/*
 * The guest's KERNEL_GS_BASE is in the MSR while its state is loaded. KVM's own
 * way to read it also keeps what it finds; between the return of the host's
 * value to the MSR, with interrupts on, and the note that it is back that would
 * be the host's, for the guest to go on with.
 */
static int read_kernel_gs_base(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *s)
{
	const void *vmx = (void *)vcpu - layout.vcpu;
	u64 saved = READ_ONCE(*(const u64 *)(vmx + layout.guest_gs));
	u64 *value = &s->msr[KVMACCESS_MSR_KERNEL_GS_BASE];

	*value = saved;
	if (!READ_ONCE(*(const bool *)(vmx + layout.active)))
		return 0;
	*value = __rdmsr(MSR_KERNEL_GS_BASE);
	if (s->condition == KVMACCESS_CONDITION_GUEST || *value == saved ||
	    *value != READ_ONCE(*(const u64 *)(vmx + layout.host_gs)))
		return 0;
	/* The host's, already, or a guest's that happens to be the same. */
	return -EAGAIN;
}

static int read_current(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *s, u64 wanted)
{
	const struct kvm_vcpu_arch *arch = &vcpu->arch;
	struct reader r = {};
	unsigned int i;

	if (wanted == KVMACCESS_VCPU_ALL) {
		if (!kvmaccess_compat_is_dirty(vcpu, VCPU_REGS_RSP))
			s->gpr[VCPU_REGS_RSP] = vmread(&r, GUEST_RSP);
		if (!kvmaccess_compat_is_dirty(vcpu, KVMACCESS_COMPAT_REG_RIP))
			s->rip = vmread(&r, GUEST_RIP);
		s->rflags = vmread(&r, GUEST_RFLAGS);
	}

	s->cr0 = (vmread(&r, GUEST_CR0) & arch->cr0_guest_owned_bits) |
		 (arch->cr0 & ~arch->cr0_guest_owned_bits);
	s->cr4 = (vmread(&r, GUEST_CR4) & arch->cr4_guest_owned_bits) |
		 (arch->cr4 & ~arch->cr4_guest_owned_bits);
	s->cr3 = arch->cr3;
	if (!kvmaccess_compat_is_dirty(vcpu, KVMACCESS_COMPAT_REG_CR3) &&
	    !(vmread(&r, CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_CR3_LOAD_EXITING))
		s->cr3 = vmread(&r, GUEST_CR3);

	for (i = 0; i < ARRAY_SIZE(segments); i++) {
		if (kvmaccess_vcpu_wants_segment(wanted, i))
			read_segment(&r, &s->segment[i], i);
	}
	s->gdt.address = vmread(&r, GUEST_GDTR_BASE);
	s->gdt.size = vmread(&r, GUEST_GDTR_LIMIT);
	s->idt.address = vmread(&r, GUEST_IDTR_BASE);
	s->idt.size = vmread(&r, GUEST_IDTR_LIMIT);

	if (wanted != KVMACCESS_VCPU_ALL)
		;
	else if (!(s->cr0 & X86_CR0_PE))
		s->cpl = 0;
	else if (!(s->efer & EFER_LMA) && (s->rflags & X86_EFLAGS_VM))
		s->cpl = 3;
	else
		s->cpl = s->segment[VCPU_SREG_SS].dpl;

	if (r.failed)
		return -EAGAIN;
	kvmaccess_vcpu_read_msrs(vcpu, s, wanted, BIT(KVMACCESS_MSR_KERNEL_GS_BASE));
	return wanted == KVMACCESS_VCPU_ALL ? read_kernel_gs_base(vcpu, s) : 0;
}

static int vmx_read(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *s, u64 wanted)
{
	const void *loaded = loaded_vmcs(vcpu);
	u64 target = __pa(READ_ONCE(*(void **)(loaded + layout.vmcs)));
	const void *vmx = (void *)vcpu - layout.vcpu;
	struct kvm_vcpu *running;
	u64 current_vmcs;
	int err;

	/* Processors that cannot run real mode: KVM keeps the truth to itself. */
	if (READ_ONCE(*(const int *)(vmx + layout.rmode)))
		return -EOPNOTSUPP;

	if (!vmptrst(&current_vmcs))
		return -EAGAIN;
	if (current_vmcs == target)
		return read_current(vcpu, s, wanted);

	/*
	 * An NMI of perf asks KVM where the guest of the running vCPU is, and
	 * KVM would look into the wrong VMCS and keep what it finds.
	 */
	running = __this_cpu_read(*kvmaccess_ksyms.running);
	__this_cpu_write(*kvmaccess_ksyms.running, NULL);
	barrier();

	err = -EAGAIN;
	if (vmptrld(target))
		err = read_current(vcpu, s, wanted);
	/* All ones: none was current, and KVM does not rely on that. */
	if (current_vmcs != ~0ULL)
		vmptrld(current_vmcs);

	barrier();
	__this_cpu_write(*kvmaccess_ksyms.running, running);
	return err;
}

const struct kvmaccess_vcpu_vendor kvmaccess_vcpu_vmx = {
	.id = KVMACCESS_VENDOR_VMX,
	.module = "kvm_intel",
	.prefix = "vmx_",
	.init = vmx_init,
	.home = vmx_home,
	.read = vmx_read,
};
