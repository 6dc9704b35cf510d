// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/arch/x86/x86asm"
)

// Dispatchers reads which handler the functions pick that dispatch system calls
// by code: x64_sys_call, ia32_sys_call and x32_sys_call. The code is followed
// for each number, as the processor would. Kernels that go by tables have none.
// The error is an *ObjectError, or several; what could be read is returned all
// the same.
func (k *Kernel) Dispatchers(ctx context.Context) ([]SyscallTable, error) {
	var all []SyscallTable
	var errs []error
	for _, name := range []string{"x64_sys_call", "ia32_sys_call", "x32_sys_call"} {
		at, ok := k.Image.Lookup(name)
		if !ok {
			continue
		}
		d, err := k.dispatcher(ctx, at)
		if err != nil {
			errs = append(errs, &ObjectError{name, at, err})
			continue
		}
		t := SyscallTable{Name: name, Address: at, Code: true}
		for nr := range maxSyscalls {
			handler, err := d.run(uint64(nr))
			if err != nil {
				errs = bounded(errs, &ObjectError{fmt.Sprintf("%s for system call %d", name, nr), at, err})
				continue
			}
			t.Calls = append(t.Calls, Syscall{nr, handler, k.Image.Name(handler)})
		}
		// Numbers that there are not all have the same handler.
		for n := len(t.Calls); n > 1 && t.Calls[n-1].Handler == t.Calls[n-2].Handler; n-- {
			t.Calls = t.Calls[:n-1]
		}
		all = append(all, t)
	}
	return all, errors.Join(errs...)
}

// dispatcher runs one function that compares its second argument with numbers
// and jumps to a handler.
type dispatcher struct {
	start uint64
	code  []byte
	insts map[uint64]x86asm.Inst
}

// Bounds of a dispatcher's code.
const (
	maxDispatcher = 64 << 10
	maxSteps      = 256 // for one number; a comparison halves those that are left
)

func (k *Kernel) dispatcher(ctx context.Context, at uint64) (*dispatcher, error) {
	length := uint64(maxDispatcher)
	if next, ok := k.Image.Next(at); ok {
		length = min(length, next-at)
	}
	d := &dispatcher{start: at, code: make([]byte, length), insts: map[uint64]x86asm.Inst{}}
	return d, k.Space.Read(ctx, at, d.code)
}

func (d *dispatcher) inst(at uint64) (x86asm.Inst, error) {
	if in, ok := d.insts[at]; ok {
		return in, nil
	}
	rest := d.code[at-d.start:]
	if len(rest) >= 4 && [4]byte(rest) == [4]byte{0xf3, 0x0f, 0x1e, 0xfa} { // ENDBR64, which the decoder does not know
		return x86asm.Inst{Op: x86asm.NOP, Len: 4}, nil
	}
	in, err := x86asm.Decode(rest, 64)
	if err != nil {
		return in, fmt.Errorf("no instruction at %#x: %w", at, err)
	}
	d.insts[at] = in
	return in, nil
}

// run follows the code for a number up to where it leaves the function, or
// calls another one.
func (d *dispatcher) run(nr uint64) (uint64, error) {
	m := machine{known: map[x86asm.Reg]bool{x86asm.RSI: true}, regs: map[x86asm.Reg]uint64{x86asm.RSI: nr}}
	at := d.start
	for range maxSteps {
		if at < d.start || at-d.start >= uint64(len(d.code)) {
			return at, nil // a jump to the handler
		}
		in, err := d.inst(at)
		if err != nil {
			return 0, err
		}
		next := at + uint64(in.Len)
		switch in.Op {
		case x86asm.NOP, x86asm.PUSH, x86asm.POP:
		case x86asm.CALL:
			target, ok := relative(in, next)
			if !ok {
				return 0, fmt.Errorf("an indirect call at %#x", at)
			}
			if at-d.start > 4 {
				return target, nil
			}
			// The function itself is traced.
		case x86asm.JMP:
			target, ok := relative(in, next)
			if !ok {
				return 0, fmt.Errorf("an indirect jump at %#x", at)
			}
			next = target
		case x86asm.RET:
			return 0, nil
		default:
			taken, isJump, err := m.step(in)
			if err != nil {
				return 0, fmt.Errorf("%v at %#x: %w", in, at, err)
			}
			if isJump && taken {
				target, ok := relative(in, next)
				if !ok {
					return 0, fmt.Errorf("an indirect jump at %#x", at)
				}
				next = target
			}
		}
		at = next
	}
	return 0, ErrTooLong
}

func relative(in x86asm.Inst, next uint64) (uint64, bool) {
	rel, ok := in.Args[0].(x86asm.Rel)
	return next + uint64(int64(rel)), ok
}

// machine is as much of a processor as compilers use to tell numbers apart.
type machine struct {
	regs  map[x86asm.Reg]uint64 // by their 64-bit name
	known map[x86asm.Reg]bool
	// The last comparison, of size bits.
	a, b    uint64
	bits    uint
	compare bool
}

var errUnknown = errors.New("it depends on more than the system call's number")

// step runs an instruction, or says whether a conditional jump is taken.
func (m *machine) step(in x86asm.Inst) (taken, isJump bool, err error) {
	if f, ok := conditions[in.Op]; ok {
		if !m.compare {
			return false, true, errUnknown
		}
		return f(m), true, nil
	}
	switch in.Op {
	case x86asm.CMP, x86asm.TEST:
		a, bits, ok1 := m.value(in.Args[0])
		b, _, ok2 := m.value(in.Args[1])
		if !ok1 || !ok2 {
			m.compare = false
			return false, false, nil
		}
		m.a, m.b, m.bits, m.compare = a, b&mask(bits), bits, true
		if in.Op == x86asm.TEST {
			m.a, m.b = a&b, 0
		}
	case x86asm.MOV, x86asm.LEA, x86asm.SUB, x86asm.ADD, x86asm.AND, x86asm.XOR, x86asm.MOVZX, x86asm.MOVSXD:
		return false, false, m.assign(in)
	default:
		return false, false, errUnknown
	}
	return false, false, nil
}

func (m *machine) assign(in x86asm.Inst) error {
	reg, bits, ok := wide(in.Args[0])
	if !ok { // to memory: a spilled register
		return nil
	}
	old, ok0 := m.regs[reg], m.known[reg]
	var v uint64
	ok = false
	switch in.Op {
	case x86asm.MOV, x86asm.MOVZX:
		v, _, ok = m.value(in.Args[1])
	case x86asm.MOVSXD:
		v, _, ok = m.value(in.Args[1])
		v = uint64(int64(int32(v)))
	case x86asm.LEA:
		if mem, is := in.Args[1].(x86asm.Mem); is && mem.Index == 0 && mem.Base != 0 && mem.Base != x86asm.RIP {
			v, _, ok = m.value(mem.Base)
			v += uint64(mem.Disp)
		}
	default:
		var b uint64
		b, _, ok = m.value(in.Args[1])
		a := old & mask(bits)
		b &= mask(bits)
		switch in.Op {
		case x86asm.SUB:
			v = a - b
			m.a, m.b, m.bits = a, b, bits
		case x86asm.ADD:
			v = a + b
			m.compare = false
		case x86asm.AND:
			v = a & b
			m.a, m.b, m.bits = v, 0, bits
		case x86asm.XOR:
			v = a ^ b
			m.a, m.b, m.bits = v, 0, bits
			if in.Args[0] == in.Args[1] { // zero, whatever it was
				v, m.a, ok, ok0 = 0, 0, true, true
			}
		}
		ok = ok && ok0
		if in.Op != x86asm.ADD {
			m.compare = ok
		}
	}
	if bits < 32 {
		ok = false // the rest of the register stays: not what a compiler does here
	}
	m.regs[reg], m.known[reg] = v&mask(bits), ok
	return nil
}

// value of a register or constant, and its width in bits.
func (m *machine) value(arg x86asm.Arg) (v uint64, bits uint, ok bool) {
	switch a := arg.(type) {
	case x86asm.Imm:
		return uint64(a), 64, true
	case x86asm.Reg:
		reg, bits, ok := wide(a)
		return m.regs[reg] & mask(bits), bits, ok && m.known[reg]
	}
	return 0, 0, false
}

func mask(bits uint) uint64 {
	if bits >= 64 {
		return ^uint64(0)
	}
	return 1<<bits - 1
}

// wide gives the 64-bit name of a general register.
func wide(arg x86asm.Arg) (x86asm.Reg, uint, bool) {
	r, ok := arg.(x86asm.Reg)
	switch {
	case !ok:
	case r >= x86asm.RAX && r <= x86asm.R15:
		return r, 64, true
	case r >= x86asm.EAX && r <= x86asm.R15L:
		return r - x86asm.EAX + x86asm.RAX, 32, true
	case r >= x86asm.AX && r <= x86asm.R15W:
		return r - x86asm.AX + x86asm.RAX, 16, true
	}
	return 0, 0, false
}

func (m *machine) signed() (a, b int64) {
	shift := 64 - m.bits
	return int64(m.a<<shift) >> shift, int64(m.b<<shift) >> shift
}

var conditions = map[x86asm.Op]func(*machine) bool{
	x86asm.JE:  func(m *machine) bool { return m.a == m.b },
	x86asm.JNE: func(m *machine) bool { return m.a != m.b },
	x86asm.JA:  func(m *machine) bool { return m.a > m.b },
	x86asm.JAE: func(m *machine) bool { return m.a >= m.b },
	x86asm.JB:  func(m *machine) bool { return m.a < m.b },
	x86asm.JBE: func(m *machine) bool { return m.a <= m.b },
	x86asm.JG:  func(m *machine) bool { a, b := m.signed(); return a > b },
	x86asm.JGE: func(m *machine) bool { a, b := m.signed(); return a >= b },
	x86asm.JL:  func(m *machine) bool { a, b := m.signed(); return a < b },
	x86asm.JLE: func(m *machine) bool { a, b := m.signed(); return a <= b },
	x86asm.JS:  func(m *machine) bool { a, b := m.signed(); return a-b < 0 },
	x86asm.JNS: func(m *machine) bool { a, b := m.signed(); return a-b >= 0 },
}
