// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
)

// Table names what makes a kernel change its own code.
type Table string

// Tables of a running kernel. A reference file has further ones of what the
// kernel does once, at boot; see Vmlinux.
const (
	TableFtrace     Table = "ftrace"      // call of a tracer at a function's entry
	TableFtraceCall Table = "ftrace call" // the call inside of ftrace_caller
	TableKprobe     Table = "kprobe"
	TableStaticKey  Table = "static key"
	TableStaticCall Table = "static call"
	TableDispatcher Table = "bpf dispatcher"
	TableBPF        Table = "bpf"
)

// Patch is a place in code that a kernel changes while it runs, and what must
// be there by the table that says so.
type Patch struct {
	Address uint64
	Table   Table
	Object  uint64   // of the table's entry
	Want    [][]byte // what may be there: mostly one instruction, of 1 to 5 bytes
	Cond    []uint64 // or a conditional jump of 6 bytes, whatever its condition, to one of these
	Detail  string   // what the entry is of: "nop", "call ftrace_caller", ...
}

// maxPatch is the longest instruction that a table's entry has.
const maxPatch = 6

// Opcodes that a kernel puts into its code (Intel SDM vol. 2; text_gen_insn()
// in arch/x86/include/asm/text-patching.h).
const (
	opcodeJmp32 = 0xe9
	opcodeJmp8  = 0xeb
	opcodeCall  = 0xe8
	opcodeRet   = 0xc3
	opcodeInt3  = 0xcc
)

// branch is an instruction of five bytes that goes to target, or nil if that
// is too far.
func branch(opcode byte, at, target uint64) []byte {
	distance := int64(target - (at + 5))
	if int64(int32(distance)) != distance {
		return nil
	}
	return binary.LittleEndian.AppendUint32([]byte{opcode}, uint32(distance))
}

// branch8 is a jump of two bytes to target, or nil if that is too far.
func branch8(at, target uint64) []byte {
	distance := int64(target - (at + 2))
	if int64(int8(distance)) != distance {
		return nil
	}
	return []byte{opcodeJmp8, byte(distance)}
}

// branchTarget is where the jump or call at the start of code goes, which
// lies at at: jmp and call of 5 bytes, jmp of 2, jcc of 6.
func branchTarget(at uint64, code []byte) (uint64, bool) {
	switch {
	case len(code) >= 5 && (code[0] == opcodeCall || code[0] == opcodeJmp32):
		return at + 5 + uint64(int64(int32(binary.LittleEndian.Uint32(code[1:])))), true
	case len(code) >= 2 && code[0] == opcodeJmp8:
		return at + 2 + uint64(int64(int8(code[1]))), true
	case conditional(code):
		return at + 6 + uint64(int64(int32(binary.LittleEndian.Uint32(code[2:])))), true
	}
	return 0, false
}

// nops are the instructions of five bytes that do nothing and that a 64-bit
// kernel has chosen from at one time (arch/x86/include/asm/nops.h): the
// architecture's own, and AMD's K8's, which kernels before 5.13 take on a
// processor that they do not know.
var nops5 = [][]byte{
	{0x0f, 0x1f, 0x44, 0x00, 0x00},
	{0x66, 0x66, 0x66, 0x66, 0x90},
	{0x66, 0x66, 0x90, 0x66, 0x90},
	{0x3e, 0x8d, 0x74, 0x26, 0x00},
}

var (
	nop5 = nops5[0]
	nop2 = []byte{0x66, 0x90}
)

// idealNop is which instruction of five bytes the kernel writes where nothing
// is to be done.
func (k *Kernel) idealNop(ctx context.Context) ([]byte, error) {
	at, ok := k.Image.Lookup("ideal_nops")
	if !ok { // since 5.13 there is no choice
		return nop5, nil
	}
	// ideal_nops points to a table of pointers by length, of which entry 9 is
	// for a jump's place (NOP_ATOMIC5).
	table, err := k.Space.Pointer(ctx, at)
	if err != nil {
		return nop5, &ObjectError{"ideal_nops", at, err}
	}
	nop, err := k.Space.Pointer(ctx, table+9*8)
	if err != nil {
		return nop5, &ObjectError{"ideal_nops", table, err}
	}
	p := make([]byte, 5)
	if err := k.Space.Read(ctx, nop, p); err != nil {
		return nop5, &ObjectError{"ideal_nops", nop, err}
	}
	if !slices.ContainsFunc(nops5, func(known []byte) bool { return bytes.Equal(p, known) }) {
		return nop5, &ObjectError{"ideal_nops", nop, fmt.Errorf("% x is no instruction that does nothing", p)}
	}
	return p, nil
}

// fits says whether code, which lies at the patch's address, is what must be
// there, and how many bytes of it that is.
func (p *Patch) fits(code []byte) (int, bool) {
	for _, want := range p.Want {
		if bytes.HasPrefix(code, want) {
			return len(want), true
		}
	}
	if len(p.Cond) > 0 && conditional(code) {
		if to, _ := branchTarget(p.Address, code); slices.Contains(p.Cond, to) {
			return 6, true
		}
	}
	return 0, false
}

// conditional says whether code begins with a conditional jump of 6 bytes.
func conditional(code []byte) bool {
	return len(code) >= 6 && code[0] == 0x0f && code[1]&0xf0 == 0x80
}

// mayChange says whether the kernel changes that byte of the instruction, and
// not only what is around it: the condition of a jump stays.
func (p *Patch) mayChange(code []byte, i uint64) bool {
	return len(p.Cond) == 0 || !conditional(code) || i >= 2
}

// longest is how many bytes the longest instruction has that may be there.
func (p *Patch) longest() int {
	n := 0
	if len(p.Cond) > 0 {
		n = 6
	}
	for _, want := range p.Want {
		n = max(n, len(want))
	}
	return n
}

// Violation is a place where code is not what its table says.
type Violation struct {
	Patch
	Have []byte // of the longest instruction that is wanted
}

// Error describes the violation.
func (v Violation) Error() string {
	return fmt.Sprintf("%s at %#x: % x is there, % x is to be (%s)", v.Table, v.Address, v.Have, bytes.Join(v.Want, []byte(" or ")), v.Detail)
}

// Violations reads the code at each patch's place and returns those where it
// is not what must be there. What cannot be read is an error, beside what
// could be.
func (k *Kernel) Violations(ctx context.Context, patches []Patch) ([]Violation, error) {
	var found []Violation
	code := codeReader{k: k}
	for i := range patches {
		p := &patches[i]
		have, err := code.at(ctx, p.Address, p.longest())
		if err != nil {
			return found, &ObjectError{string(p.Table) + " site", p.Address, err}
		}
		if _, ok := p.fits(have); !ok {
			found = append(found, Violation{*p, bytes.Clone(have)})
		}
	}
	return found, nil
}

// codeReader reads code that is asked for by about ascending address.
type codeReader struct {
	k     *Kernel
	start uint64
	data  []byte
}

// codeChunk is how much code is read at once.
const codeChunk = 64 << 10

// at returns n bytes of code, which are good until the next call.
func (r *codeReader) at(ctx context.Context, gva uint64, n int) ([]byte, error) {
	if gva >= r.start && gva-r.start < uint64(len(r.data)) && uint64(len(r.data))-(gva-r.start) >= uint64(n) {
		return r.data[gva-r.start:][:n], nil
	}
	start := gva &^ 4095
	if cap(r.data) < codeChunk {
		r.data = make([]byte, codeChunk)
	}
	size := uint64(codeChunk)
	r.start, r.data = start, r.data[:size]
	if err := r.k.Space.Read(ctx, start, r.data); err != nil {
		// Less than a chunk is left: no more than what is asked for.
		r.data = r.data[:gva-start+uint64(n)]
		if err := r.k.Space.Read(ctx, start, r.data); err != nil {
			r.data = r.data[:0]
			return nil, err
		}
	}
	return r.data[gva-start:][:n], nil
}
