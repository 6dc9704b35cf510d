// SPDX-License-Identifier: MIT

package tinyvm

import (
	"testing"

	"golang.org/x/arch/x86/x86asm"
)

// What a disassembler makes of the code.
func TestAssembler(t *testing.T) {
	a := Assembler{Base: 0x8000}
	for _, tt := range []struct {
		put  func()
		want string
	}{
		{func() { a.Inc(RAX) }, "inc rax"},
		{func() { a.Inc(R15) }, "inc r15"},
		{func() { a.Mov(RDI, 0x1122334455667788) }, "mov rdi, 0x1122334455667788"},
		{func() { a.Mov(R9, 1) }, "mov r9, 0x1"},
		{func() { a.Copy(RAX, R12) }, "mov rax, r12"},
		{func() { a.Copy(R12, RAX) }, "mov r12, rax"},
		{func() { a.Copy32(RDX, R8) }, "mov edx, r8d"},
		{func() { a.Copy32(R8, RSI) }, "mov r8d, esi"},
		{func() { a.Jmp(a.Base) }, "jmp .-0x2b"},
		{func() { a.CPUID() }, "cpuid"},
		{func() { a.HLT() }, "hlt"},
		{func() { a.STI() }, "sti"},
		{func() { a.CLI() }, "cli"},
		{func() { a.WRMSR() }, "wrmsr"},
		{func() { a.SwapGS() }, "swapgs"},
		{func() { a.IRET() }, "iretq"},
	} {
		start := len(a.Code)
		tt.put()
		inst, err := x86asm.Decode(a.Code[start:], 64)
		if err != nil {
			t.Errorf("%s: %v", tt.want, err)
			continue
		}
		if got := x86asm.IntelSyntax(inst, 0, nil); got != tt.want || inst.Len != len(a.Code)-start {
			t.Errorf("%x is %q of %d bytes, want %q", a.Code[start:], got, inst.Len, tt.want)
		}
	}
	if want := a.Base + uint64(len(a.Code)); a.PC() != want {
		t.Errorf("the next instruction is at %#x, want %#x", a.PC(), want)
	}
}
