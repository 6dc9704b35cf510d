// SPDX-License-Identifier: MIT

package guest

// handlers are the symbols that Linux puts into the gates of these vectors,
// newest name first (arch/x86/kernel/idt.c, arch/x86/include/asm/idtentry.h;
// before 5.8 arch/x86/entry/entry_{64,32}.S and entry_arch.h).
var handlers = map[int][]string{
	0:  {"asm_exc_divide_error", "divide_error"},
	1:  {"asm_exc_debug", "debug"},
	2:  {"asm_exc_nmi", "nmi"},
	3:  {"asm_exc_int3", "int3"},
	4:  {"asm_exc_overflow", "overflow"},
	5:  {"asm_exc_bounds", "bounds"},
	6:  {"asm_exc_invalid_op", "invalid_op"},
	7:  {"asm_exc_device_not_available", "device_not_available"},
	8:  {"asm_exc_double_fault", "double_fault"},
	9:  {"asm_exc_coproc_segment_overrun", "coprocessor_segment_overrun"},
	10: {"asm_exc_invalid_tss", "invalid_TSS"},
	11: {"asm_exc_segment_not_present", "segment_not_present"},
	12: {"asm_exc_stack_segment", "stack_segment"},
	13: {"asm_exc_general_protection", "general_protection"},
	14: {"asm_exc_page_fault", "page_fault", "async_page_fault"},
	15: {"asm_exc_spurious_interrupt_bug", "spurious_interrupt_bug"},
	16: {"asm_exc_coprocessor_error", "coprocessor_error"},
	17: {"asm_exc_alignment_check", "alignment_check"},
	18: {"asm_exc_machine_check", "machine_check"},
	19: {"asm_exc_simd_coprocessor_error", "simd_coprocessor_error"},
	20: {"asm_exc_virtualization_exception"},
	21: {"asm_exc_control_protection"},
	29: {"asm_exc_vmm_communication"},

	0x80: {"asm_int80_emulation", "entry_INT80_compat", "entry_INT80_32"},

	0xec: {"asm_sysvec_apic_timer_interrupt", "hv_stimer0_callback_vector"},
	0xed: {"asm_sysvec_hyperv_stimer0", "hv_stimer0_callback_vector"},
	0xee: {"asm_sysvec_hyperv_reenlightenment", "hyperv_reenlightenment_vector"},
	0xef: {"apic_timer_interrupt"},
	0xf0: {"asm_sysvec_kvm_posted_intr_nested_ipi", "kvm_posted_intr_nested_ipi"},
	0xf1: {"asm_sysvec_kvm_posted_intr_wakeup_ipi", "kvm_posted_intr_wakeup_ipi"},
	0xf2: {"asm_sysvec_kvm_posted_intr_ipi", "kvm_posted_intr_ipi"},
	0xf3: {"asm_sysvec_kvm_asyncpf_interrupt", "asm_sysvec_hyperv_callback", "asm_sysvec_xen_hvm_callback", "asm_sysvec_acrn_hv_callback", "hyperv_callback_vector", "xen_hvm_callback_vector", "acrn_hv_callback_vector"},
	0xf4: {"asm_sysvec_deferred_error", "deferred_error_interrupt"},
	0xf6: {"asm_sysvec_irq_work", "irq_work_interrupt"},
	0xf7: {"asm_sysvec_x86_platform_ipi", "x86_platform_ipi"},
	0xf8: {"asm_sysvec_reboot", "reboot_interrupt"},
	0xf9: {"asm_sysvec_threshold", "threshold_interrupt"},
	0xfa: {"asm_sysvec_thermal", "thermal_interrupt"},
	0xfb: {"asm_sysvec_call_function_single", "call_function_single_interrupt"},
	0xfc: {"asm_sysvec_call_function", "call_function_interrupt"},
	0xfd: {"asm_sysvec_reschedule_ipi", "reschedule_interrupt"},
	0xfe: {"asm_sysvec_error_interrupt", "error_interrupt"},
	0xff: {"asm_sysvec_spurious_apic_interrupt", "spurious_interrupt"},
}

// Handlers returns the names of the symbols that an honest Linux kernel's gate
// of the vector may point to, the start of a row of stubs aside; none if no
// name is known.
func Handlers(vector int) []string { return handlers[vector] }
