// SPDX-License-Identifier: GPL-2.0-only
/*
 * The state of a vCPU at one instant, without waiting for it.
 *
 * A vCPU's registers belong to the thread that has it loaded, and that thread
 * holds vcpu->mutex for as long as the guest runs: waiting for it is no way
 * to look at a running guest. But a vCPU is loaded on at most one CPU, and an
 * interrupt there either finds it loaded, and then it has stopped it, or finds
 * it not loaded, and then it cannot be loaded there before the interrupt ends.
 * Which CPU that is, is written before the vCPU can be loaded on another. So
 * whatever is read in an interrupt on the CPU that was the vCPU's home before
 * *and* after the reading was its state at that instant.
 *
 * Out of guest mode KVM may be in the middle of carrying out an instruction
 * for the guest, whose effects it writes one by one: an instant then, but not
 * one that the guest ever had. Nothing in a vCPU says so, so wherever that can
 * be the state is marked as unsettled. On a CPU it passes within microseconds,
 * and the vCPU is looked at again, a few times.
 */
#include <linux/cpu.h>
#include <linux/kallsyms.h>
#include <linux/mutex.h>
#include <linux/netlink.h>
#include <linux/smp.h>
#include <linux/timekeeping.h>

#include "account.h"
#include "btf.h"
#include "compat.h"
#include "ksyms.h"
#include "vcpu.h"
#include "vm.h"

/* A vCPU that changes its CPU more often than this within a capture: EAGAIN. */
#define CAPTURE_ATTEMPTS 32

/* A vCPU that is met in the host part of KVM_RUN more often is given so. */
#define SETTLE_ATTEMPTS 8

struct capture {
	struct kvm_vcpu *vcpu;
	struct kvmaccess_vcpu_state *state;
	const struct kvmaccess_vcpu_vendor *vendor;
	struct task_struct *requester;
	u64 wanted;
	bool loaded;
	u32 interrupts;
	u64 interrupt;
	int err;
};

static const struct kvmaccess_vcpu_vendor *vendors[] = {
	&kvmaccess_vcpu_svm,
	&kvmaccess_vcpu_vmx,
};

static const u32 msrs[KVMACCESS_MSR_NUM] = {
	[KVMACCESS_MSR_STAR]		= MSR_STAR,
	[KVMACCESS_MSR_LSTAR]		= MSR_LSTAR,
	[KVMACCESS_MSR_CSTAR]		= MSR_CSTAR,
	[KVMACCESS_MSR_SFMASK]		= MSR_SYSCALL_MASK,
	[KVMACCESS_MSR_SYSENTER_CS]	= MSR_IA32_SYSENTER_CS,
	[KVMACCESS_MSR_SYSENTER_ESP]	= MSR_IA32_SYSENTER_ESP,
	[KVMACCESS_MSR_SYSENTER_EIP]	= MSR_IA32_SYSENTER_EIP,
	[KVMACCESS_MSR_KERNEL_GS_BASE]	= MSR_KERNEL_GS_BASE,
};

static DEFINE_MUTEX(vendor_mutex);
static const struct kvmaccess_vcpu_vendor *vendor;

/* The emulator's own copy of the general registers. */
static struct {
	bool known;
	u32 regs;	/* struct x86_emulate_ctxt: _regs, unsigned long each */
	u32 dirty;	/* struct x86_emulate_ctxt: regs_dirty, their bitmap */
} emulator;

static void emulator_init(void)
{
	struct kvmaccess_btf *btf = kvmaccess_btf_open("kvm");

	if (IS_ERR(btf))
		btf = kvmaccess_btf_open(NULL);	/* KVM built in */
	if (!IS_ERR(btf)) {
		emulator.known =
			!kvmaccess_btf_member(btf, "x86_emulate_ctxt", "_regs", &emulator.regs) &&
			!kvmaccess_btf_member(btf, "x86_emulate_ctxt", "regs_dirty",
					      &emulator.dirty);
		kvmaccess_btf_close(btf);
	}
	if (!emulator.known)
		kvmaccess_ksyms_miss("layout of struct x86_emulate_ctxt");
}

/*
 * kvm-amd and kvm-intel may come later than this module, so this is tried
 * until it succeeds. Their layouts are those of the running kernel and stay
 * the same when the module is loaded again; both at once cannot be loaded.
 */
const struct kvmaccess_vcpu_vendor *kvmaccess_vcpu_vendor(void)
{
	/* Pairs with the release below: with a vendor, what it found is seen. */
	const struct kvmaccess_vcpu_vendor *v = smp_load_acquire(&vendor);
	char symbol[KSYM_SYMBOL_LEN];
	unsigned long get_msr;
	unsigned int i;

	if (v || !kvmaccess_ksyms.ops || !kvmaccess_ksyms.running)
		return v;

	mutex_lock(&vendor_mutex);
	get_msr = (unsigned long)READ_ONCE(kvmaccess_ksyms.ops->get_msr);
	if (!vendor && get_msr) {
		sprint_symbol_no_offset(symbol, get_msr);
		for (i = 0; i < ARRAY_SIZE(vendors); i++) {
			v = vendors[i];
			if (!strstr(symbol, v->module) && !strstarts(symbol, v->prefix))
				continue;
			if (!v->init()) {
				emulator_init();
				/* All that the two found, before anybody sees it. */
				smp_store_release(&vendor, v);
			}
			break;
		}
	}
	v = vendor;
	mutex_unlock(&vendor_mutex);
	return v;
}

static enum kvmaccess_condition condition_of(struct kvm_vcpu *vcpu, bool loaded)
{
	if (loaded) {
		/* Set by KVM between the exit that an interrupt caused and its end. */
		if (READ_ONCE(vcpu->arch.handling_intr_from_guest))
			return KVMACCESS_CONDITION_GUEST;
		/* Polling for a wake-up before it blocks. */
		if (READ_ONCE(vcpu->arch.mp_state) == KVM_MP_STATE_HALTED)
			return KVMACCESS_CONDITION_HALTED;
		return KVMACCESS_CONDITION_HOST;
	}
	if (READ_ONCE(vcpu->arch.last_vmentry_cpu) == -1)
		return KVMACCESS_CONDITION_NEW;
	if (READ_ONCE(vcpu->preempted))
		return KVMACCESS_CONDITION_PREEMPTED;
	if (READ_ONCE(vcpu->stat.generic.blocking))
		return KVMACCESS_CONDITION_HALTED;
	/* Asleep in KVM_RUN for a page or a lock, else not in KVM_RUN. */
	return mutex_is_locked(&vcpu->mutex) ? KVMACCESS_CONDITION_HOST :
					       KVMACCESS_CONDITION_USER;
}

/*
 * Input or output of an instruction is being done by the VMM. What the
 * emulator changed so far is in its copy, which nobody touches until the vCPU
 * is loaded again; see __get_regs() of KVM.
 */
static void read_emulated(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *s)
{
	const void *ctxt = READ_ONCE(vcpu->arch.emulate_ctxt);
	const unsigned long *regs = ctxt + emulator.regs;
	unsigned int i;
	u16 dirty;

	if (!emulator.known || !ctxt)
		return;
	dirty = READ_ONCE(*(const u16 *)(ctxt + emulator.dirty));
	for (i = 0; i < ARRAY_SIZE(s->gpr); i++) {
		if (dirty & BIT(i))
			s->gpr[i] = regs[i];
	}
}

/* What no watch wants. */
static void read_others(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *s)
{
	unsigned int i;

	BUILD_BUG_ON(VCPU_REGS_R15 + 1 != ARRAY_SIZE(s->gpr));

	for (i = 0; i < ARRAY_SIZE(s->gpr); i++)
		s->gpr[i] = vcpu->arch.regs[i];
	s->rip = kvmaccess_compat_rip(vcpu);
	s->cr2 = vcpu->arch.cr2;
	s->cr8 = kvmaccess_ksyms.get_cr8 ?
		 kvmaccess_ksyms_call(kvmaccess_ksyms.get_cr8, vcpu) : 0;
	s->dr6 = vcpu->arch.dr6;
}

static int read_state(struct capture *c, bool loaded)
{
	struct kvmaccess_vcpu_state *s = c->state;
	struct kvm_vcpu *vcpu = c->vcpu;
	unsigned int i;
	int err;

	BUILD_BUG_ON(VCPU_SREG_LDTR + 1 != ARRAY_SIZE(s->segment));

	c->loaded = loaded;
	s->condition = condition_of(vcpu, loaded);
	s->flags = 0;
	/*
	 * An exit amid the delivery of an exception, for the page of a stack or
	 * of the IDT, is noted before interrupts are on again. CR2 or DR6 is that
	 * of the exception by then, RIP that of the instruction before it.
	 */
	if (s->condition == KVMACCESS_CONDITION_HOST ||
	    s->condition == KVMACCESS_CONDITION_PREEMPTED ||
	    READ_ONCE(vcpu->arch.exception.injected))
		s->flags |= KVMACCESS_VCPU_F_UNSETTLED;
	if (vcpu->arch.hflags & HF_GUEST_MASK)
		s->flags |= KVMACCESS_VCPU_F_NESTED;
	s->as_id = kvm_arch_vcpu_memslots_id(vcpu);
	if (s->as_id)
		s->flags |= KVMACCESS_VCPU_F_SMM;
	if (vcpu->arch.emulate_regs_need_sync_to_vcpu)
		s->flags |= KVMACCESS_VCPU_F_EMULATING;

	s->efer = vcpu->arch.efer;
	for (i = 0; i < ARRAY_SIZE(s->db); i++)
		s->db[i] = vcpu->arch.db[i];
	s->dr7 = vcpu->arch.dr7;
	s->pat = vcpu->arch.pat;
	if (c->wanted == KVMACCESS_VCPU_ALL)
		read_others(vcpu, s);

	err = c->vendor->read(vcpu, s, c->wanted);
	if (err || c->wanted != KVMACCESS_VCPU_ALL)
		return err;
	if (!loaded && s->flags & KVMACCESS_VCPU_F_EMULATING)
		read_emulated(vcpu, s);
	s->time = ktime_get_ns();
	return 0;
}

/*
 * For the vendors: MSRs that KVM gives without side effects on @vcpu's home,
 * those that are wanted but for the set @except of KVMACCESS_MSR_* bits.
 */
void kvmaccess_vcpu_read_msrs(struct kvm_vcpu *vcpu, struct kvmaccess_vcpu_state *s,
			      u64 wanted, unsigned long except)
{
	unsigned int i;

	BUILD_BUG_ON(KVMACCESS_REGISTER_STAR + KVMACCESS_MSR_SYSENTER_EIP !=
		     KVMACCESS_REGISTER_SYSENTER_EIP);

	if (wanted != KVMACCESS_VCPU_ALL)
		/* No watch wants this, and what it has there is another one. */
		except |= BIT(KVMACCESS_MSR_KERNEL_GS_BASE);
	for (i = 0; i < ARRAY_SIZE(msrs); i++) {
		struct msr_data msr = { .index = msrs[i], .host_initiated = true };

		if (except & BIT(i) || !(wanted & BIT_ULL(KVMACCESS_REGISTER_STAR + i)))
			continue;
		s->msr[i] = kvmaccess_ksyms.ops->get_msr(vcpu, &msr) ? 0 : msr.data;
	}
}

/* With interrupts off on @cpu, this one; -EAGAIN if it is not the vCPU's home. */
static int capture_on(struct capture *c, int cpu)
{
	struct kvm_vcpu *vcpu = c->vcpu;
	int err;

	if (c->vendor->home(vcpu) != cpu)
		return -EAGAIN;
	/* Nothing of the state may be read before the CPU's number ... */
	smp_rmb();
	err = read_state(c, __this_cpu_read(*kvmaccess_ksyms.running) == vcpu);
	/* ... or after it is read again. */
	smp_rmb();
	return c->vendor->home(vcpu) == cpu ? err : -EAGAIN;
}

/* In an interrupt, or with interrupts off on the requester's own CPU. */
static void capture_here(void *info)
{
	struct capture *c = info;
	u64 start = ktime_get_ns();

	c->state->cpu = smp_processor_id();
	c->state->method = c->requester == current ?
			   KVMACCESS_METHOD_LOCAL : KVMACCESS_METHOD_INTERRUPT;
	c->err = capture_on(c, c->state->cpu);

	c->state->handler = ktime_get_ns() - start;
	if (c->requester != current) {
		c->interrupts++;
		c->interrupt += c->state->handler;
	}
}

/*
 * The CPU that the vCPU ran on last is offline, or it has had none yet: it is
 * not loaded. It can be loaded on a CPU that is online, whose number it then
 * writes before anything else. The CPU named here cannot come back meanwhile.
 */
static int capture_in_memory(struct capture *c)
{
	struct kvm_vcpu *vcpu = c->vcpu;
	int cpu, err;

	/* Waiting for a CPU to come or go could take long. */
	if (!cpus_read_trylock())
		return -EAGAIN;

	cpu = c->vendor->home(vcpu);
	if (cpu >= 0 && cpu_online(cpu)) {
		cpus_read_unlock();
		return -EAGAIN;
	}

	/* As in capture_on(). */
	smp_rmb();
	err = read_state(c, false);
	c->state->cpu = cpu;
	c->state->method = KVMACCESS_METHOD_MEMORY;
	c->state->handler = 0;
	/* Likewise. */
	smp_rmb();
	if (c->vendor->home(vcpu) != cpu)
		err = -EAGAIN;

	cpus_read_unlock();
	return err;
}

/*
 * The state is on no CPU: it is being moved to one, or the last one went
 * offline and took it out. In the latter case no ioctl is under way; load the
 * vCPU here then, as an ioctl would. Its thread, should it come back right
 * now, waits for these few microseconds.
 */
static int capture_by_loading(struct capture *c)
{
	struct kvm_vcpu *vcpu = c->vcpu;

	if (!kvmaccess_ksyms.vcpu_load || !kvmaccess_ksyms.vcpu_put)
		return -EAGAIN;
	if (!mutex_trylock(&vcpu->mutex))
		return -EAGAIN;

	kvmaccess_ksyms_call(kvmaccess_ksyms.vcpu_load, vcpu);
	local_irq_disable();
	capture_here(c);
	/* It is loaded only for this: what it was before is what counts. */
	c->state->condition = READ_ONCE(vcpu->arch.last_vmentry_cpu) == -1 ?
			      KVMACCESS_CONDITION_NEW : KVMACCESS_CONDITION_USER;
	c->state->method = KVMACCESS_METHOD_LOADED;
	if (!vcpu->arch.exception.injected)
		c->state->flags &= ~KVMACCESS_VCPU_F_UNSETTLED;
	c->loaded = false;
	if (!c->err && c->state->flags & KVMACCESS_VCPU_F_EMULATING)
		read_emulated(vcpu, c->state);
	local_irq_enable();
	kvmaccess_ksyms_call(kvmaccess_ksyms.vcpu_put, vcpu);
	mutex_unlock(&vcpu->mutex);
	return c->err;
}

static int capture_once(struct capture *c)
{
	int cpu = c->vendor->home(c->vcpu);
	int err = -ENXIO;

	if (cpu < -1)
		return cpu;
	if (cpu >= 0) {
		/* Interrupts are off for some thousand instructions there at most. */
		err = smp_call_function_single(cpu, capture_here, c, true);
		if (!err)
			err = c->err;
	}
	if (err != -ENXIO)
		return err;
	return c->vendor->in_memory ? capture_in_memory(c) : capture_by_loading(c);
}

static pid_t tid_of(struct pid *pid, void *unused)
{
	return pid_nr(pid);
}

/*
 * Take the state of @vcpu of @vm, which the caller holds. Bounded: no attempt
 * waits for anything but an interrupt to another CPU.
 */
int kvmaccess_vcpu_capture(struct kvmaccess_vm *vm, struct kvm_vcpu *vcpu,
			   struct kvmaccess_vcpu_state *state,
			   struct netlink_ext_ack *extack)
{
	struct capture c = {
		.vcpu = vcpu,
		.state = state,
		.vendor = kvmaccess_vcpu_vendor(),
		.requester = current,
		.wanted = KVMACCESS_VCPU_ALL,
	};
	u64 start = ktime_get_ns();
	unsigned int host = 0;
	bool again;
	int err;

	if (!c.vendor) {
		NL_SET_ERR_MSG(extack,
			       "registers cannot be read on this host: see what INFO says is missing");
		return -EOPNOTSUPP;
	}
	if (vcpu->arch.guest_state_protected) {
		NL_SET_ERR_MSG(extack, "the registers of this guest are encrypted");
		return -EACCES;
	}

	state->retries = 0;
	do {
		err = capture_once(&c);
		again = err == -EAGAIN;
		if (!err && c.loaded && state->flags & KVMACCESS_VCPU_F_UNSETTLED)
			again = ++host < SETTLE_ATTEMPTS;
	} while (again && ++state->retries < CAPTURE_ATTEMPTS);

	kvmaccess_account_capture(&vm->account, state->retries, c.interrupts,
				  c.interrupt);
	if (err) {
		NL_SET_ERR_MSG(extack, "the vCPU changed its CPU during each attempt: try again");
		return err;
	}

	state->tid = kvmaccess_compat_vcpu_pid(vcpu, tid_of, NULL);
	state->duration = ktime_get_ns() - start;
	return 0;
}

/*
 * The same, once, in an interrupt, of the registers that are wanted: nothing
 * else of @state is set but flags, condition and address space. If only an
 * interrupt of another CPU would keep the vCPU from changing, the result is 1 +
 * the number of that.
 */
int kvmaccess_vcpu_capture_here(struct kvmaccess_vm *vm, struct kvm_vcpu *vcpu, u64 wanted,
				struct kvmaccess_vcpu_state *state)
{
	/* Pairs with the release in kvmaccess_vcpu_vendor(), which may sleep. */
	const struct kvmaccess_vcpu_vendor *v = smp_load_acquire(&vendor);
	struct capture c = {
		.vcpu = vcpu,
		.state = state,
		.vendor = v,
		.wanted = wanted,
	};
	int cpu, err;

	if (!v || vcpu->arch.guest_state_protected)
		return -EOPNOTSUPP;
	err = capture_on(&c, smp_processor_id());
	if (err == -EAGAIN) {
		cpu = v->home(vcpu);
		return cpu >= 0 && cpu != smp_processor_id() ? cpu + 1 : -EAGAIN;
	}
	kvmaccess_account_capture(&vm->account, 0, 0, 0);
	return err;
}
