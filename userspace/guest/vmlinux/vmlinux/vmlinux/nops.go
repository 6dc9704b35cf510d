// SPDX-License-Identifier: MIT

package vmlinux

import "bytes"

// nops are the instructions that do nothing which the kernel fills code with
// (arch/x86/include/asm/nops.h), the longest first: the architecture's own, and
// AMD's K8's.
var nops = [][]byte{
	{0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0},
	{0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0},
	{0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0},
	{0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0},
	{0x0f, 0x1f, 0x80, 0, 0, 0, 0},
	{0x66, 0x0f, 0x1f, 0x44, 0, 0},
	{0x0f, 0x1f, 0x44, 0, 0},
	{0x66, 0x66, 0x66, 0x66, 0x90},
	{0x66, 0x66, 0x66, 0x90},
	{0x0f, 0x1f, 0x40, 0},
	{0x66, 0x66, 0x90},
	{0x0f, 0x1f, 0},
	{0x66, 0x90},
	{0x90},
}

// nop is the length of the instruction that does nothing at the start of code;
// 0: it does something.
func nop(code []byte) int {
	for _, n := range nops {
		if bytes.HasPrefix(code, n) {
			return len(n)
		}
	}
	return 0
}

// idle says whether code does nothing from its start to its end: instructions
// that do nothing, jumps to further ones or to the end over breakpoints.
func idle(code []byte) bool {
	for len(code) > 0 {
		n := nop(code)
		if n == 0 {
			n = skipping(code)
		}
		if n == 0 {
			return false
		}
		code = code[n:]
	}
	return true
}

// skipping is how far a jump at the start of code goes, if over breakpoints
// only and no further than to the end; 0: there is no such jump.
func skipping(code []byte) int {
	var from, to int
	switch {
	case len(code) >= 2 && code[0] == 0xeb && int8(code[1]) >= 0:
		from, to = 2, 2+int(code[1])
	case len(code) >= 5 && code[0] == 0xe9 && code[2] == 0 && code[3] == 0 && code[4] == 0:
		from, to = 5, 5+int(code[1])
	default:
		return 0
	}
	if to > len(code) {
		return 0
	}
	for _, c := range code[from:to] {
		if c != 0xcc {
			return 0
		}
	}
	return to
}
