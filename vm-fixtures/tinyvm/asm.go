// SPDX-License-Identifier: MIT

package tinyvm

import "encoding/binary"

// Register is a general register of 64-bit mode, by the number that
// instructions have for it.
type Register uint8

// Values of Register.
const (
	RAX Register = iota
	RCX
	RDX
	RBX
	RSP
	RBP
	RSI
	RDI
	R8
	R9
	R10
	R11
	R12
	R13
	R14
	R15
)

// Assembler puts a program together that begins at the address Base. Its
// methods append one instruction each and, unless they say otherwise, are for
// 64-bit mode. Encodings: Intel SDM vol. 2.
type Assembler struct {
	Base uint64
	Code []byte
}

// PC is the address of the next instruction.
func (a *Assembler) PC() uint64 { return a.Base + uint64(len(a.Code)) }

// Bytes appends an instruction by its machine code.
func (a *Assembler) Bytes(code ...byte) { a.Code = append(a.Code, code...) }

// rexW is the prefix of a 64-bit operation with a register in the low bits of
// its ModRM byte or opcode.
func rexW(r Register) byte { return 0x48 | byte(r>>3) }

// Inc is inc r64. It changes the arithmetic flags but for CF.
func (a *Assembler) Inc(r Register) { a.Bytes(rexW(r), 0xff, 0xc0|byte(r&7)) }

// Mov is mov r64, imm64.
func (a *Assembler) Mov(r Register, value uint64) {
	a.Bytes(rexW(r), 0xb8|byte(r&7))
	a.Code = binary.LittleEndian.AppendUint64(a.Code, value)
}

// Copy is mov r64, r64.
func (a *Assembler) Copy(to, from Register) {
	a.Bytes(rexW(to)|byte(from>>3)<<2, 0x89, 0xc0|byte(from&7)<<3|byte(to&7))
}

// Copy32 is mov r32, r32, which clears the upper half.
func (a *Assembler) Copy32(to, from Register) {
	a.Bytes(0x40|byte(to>>3)|byte(from>>3)<<2, 0x89, 0xc0|byte(from&7)<<3|byte(to&7))
}

// Jmp is jmp rel32, of 5 bytes; in 32-bit mode too.
func (a *Assembler) Jmp(to uint64) {
	a.Bytes(0xe9)
	a.Code = binary.LittleEndian.AppendUint32(a.Code, uint32(to-(a.PC()+4)))
}

// Instructions without operands.
func (a *Assembler) CPUID()  { a.Bytes(0x0f, 0xa2) }       // CPUID, of leaf EAX, ECX
func (a *Assembler) HLT()    { a.Bytes(0xf4) }             // HLT waits for an interrupt
func (a *Assembler) STI()    { a.Bytes(0xfb) }             // STI sets IF after the next instruction
func (a *Assembler) CLI()    { a.Bytes(0xfa) }             // CLI clears IF
func (a *Assembler) WRMSR()  { a.Bytes(0x0f, 0x30) }       // WRMSR sets MSR ECX to EDX:EAX
func (a *Assembler) SwapGS() { a.Bytes(0x0f, 0x01, 0xf8) } // SwapGS exchanges GS.base and MSR KERNEL_GS_BASE
func (a *Assembler) IRET()   { a.Bytes(0x48, 0xcf) }       // IRET is iretq
