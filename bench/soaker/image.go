// SPDX-License-Identifier: MIT

package soaker

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// LoopInstructions is the length of the counting loop, in instructions: one
// increment, the filling, one jump. QEMU's code generator translates up to 512
// instructions as one block (TCG_MAX_INSNS), and a block that jumps to itself
// within one page runs without leaving the generated code.
const LoopInstructions = 511

const (
	imageBase  = 0x400000
	pageSize   = 4096
	headerSize = 64 + 56 // ELF header, one program header
	loopOffset = pageSize
)

// counterFD is the descriptor that the program maps its counter from.
const counterFD = 3

// setup maps the page of the counter and leaves its address in RDI:
// mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED, 3, 0), exit(1) if refused.
var setup = []byte{
	0xb8, 9, 0, 0, 0, // mov eax, 9 (mmap)
	0x31, 0xff, // xor edi, edi
	0xbe, 0x00, 0x10, 0, 0, // mov esi, 4096
	0xba, 3, 0, 0, 0, // mov edx, 3 (PROT_READ | PROT_WRITE)
	0x41, 0xba, 1, 0, 0, 0, // mov r10d, 1 (MAP_SHARED)
	0x41, 0xb8, counterFD, 0, 0, 0, // mov r8d, 3
	0x45, 0x31, 0xc9, // xor r9d, r9d
	0x0f, 0x05, // syscall
	0x48, 0x89, 0xc7, // mov rdi, rax
	0x48, 0x85, 0xc0, // test rax, rax
	0x0f, 0x89, 0, 0, 0, 0, // jns loop; the distance is filled in by Image
	0xbf, 1, 0, 0, 0, // mov edi, 1
	0xb8, 60, 0, 0, 0, // mov eax, 60 (exit)
	0x0f, 0x05, // syscall
}

// jnsEnd is the offset in setup of the instruction after "jns loop".
const jnsEnd = 46

// Loop is the counting loop, which counts in the 8 bytes that RDI points to. It
// runs wherever it lies.
func Loop() []byte {
	loop := []byte{0x48, 0xff, 0x07} // inc qword [rdi]
	for range LoopInstructions - 2 {
		loop = append(loop, 0x90) // nop
	}
	loop = append(loop, 0xe9) // jmp to the start
	return binary.LittleEndian.AppendUint32(loop, uint32(-int32(len(loop)+4)))
}

// Image returns the program as a static ELF64 executable for x86-64 Linux: no
// C library, no runtime, no other thread, no system call once it counts. It
// expects the file to count in as descriptor 3.
func Image() []byte {
	image := append(make([]byte, loopOffset), Loop()...)
	code := image[headerSize:]
	copy(code, setup)
	binary.LittleEndian.PutUint32(code[jnsEnd-4:], uint32(loopOffset-headerSize-jnsEnd))

	header := new(bytes.Buffer)
	write := func(v any) {
		if err := binary.Write(header, binary.LittleEndian, v); err != nil {
			panic(fmt.Sprintf("soaker: %v", err)) // fixed-size values only
		}
	}
	// ELF64 header, System V gABI chapter 4.
	write([16]byte{0x7f, 'E', 'L', 'F', 2, 1, 1})
	write([]uint16{2, 62}) // ET_EXEC, EM_X86_64
	write(uint32(1))
	write([]uint64{imageBase + headerSize, 64, 0}) // entry, program headers, no sections
	write(uint32(0))
	write([]uint16{64, 56, 1, 0, 0, 0})
	// One PT_LOAD segment, readable and executable: the whole file.
	write([]uint32{1, 5})
	size := uint64(len(image))
	write([]uint64{0, imageBase, imageBase, size, size, pageSize})
	copy(image, header.Bytes())
	return image
}
