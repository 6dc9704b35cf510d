// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"math/bits"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// model is a program of a guest together with what each of its instructions
// does to the registers. The program is one loop, each round of which counts
// in registers; so every state that a vCPU can have between two instructions
// follows from the number of the round and the place in it.
type model struct {
	*tinyvm.Assembler // the piece that is being written
	pieces            []*tinyvm.Assembler
	steps             []step
	repeats           bool // interrupts may come more than once a round

	base     kvmaccess.Registers // before the first round
	counting []tinyvm.Register
	byRIP    map[uint64][]int // steps that begin at an address
}

// newModel is an empty program at base.
func newModel(base uint64) *model {
	a := &tinyvm.Assembler{Base: base}
	return &model{Assembler: a, pieces: []*tinyvm.Assembler{a}, byRIP: map[uint64][]int{}}
}

// elsewhere adds what is executed next at another address, such as the handler
// of an interrupt.
func (m *model) elsewhere(base uint64, add func()) {
	back := m.Assembler
	m.Assembler = &tinyvm.Assembler{Base: base}
	m.pieces = append(m.pieces, m.Assembler)
	add()
	m.Assembler = back
}

// step is an instruction.
type step struct {
	at     uint64 // its address
	effect func(r *kvmaccess.Registers, round uint64)
}

// position counts instructions from the beginning of the first round.
type position struct {
	round uint64
	step  int
}

func (p position) before(q position) bool {
	return p.round < q.round || p.round == q.round && p.step < q.step
}

// do adds the instruction that emit appends.
func (m *model) do(emit func(), effect func(r *kvmaccess.Registers, round uint64)) {
	m.steps = append(m.steps, step{m.PC(), effect})
	emit()
}

// bytes adds an instruction by its machine code.
func (m *model) bytes(effect func(r *kvmaccess.Registers, round uint64), code ...byte) {
	m.do(func() { m.Bytes(code...) }, effect)
}

// register is the field of a register.
func register(r *kvmaccess.Registers, which tinyvm.Register) *uint64 {
	return [...]*uint64{
		&r.RAX, &r.RCX, &r.RDX, &r.RBX, &r.RSP, &r.RBP, &r.RSI, &r.RDI,
		&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15,
	}[which]
}

// Bits of RFLAGS.
const (
	flagCF = 1 << 0
	flagPF = 1 << 2
	flagAF = 1 << 4
	flagZF = 1 << 6
	flagSF = 1 << 7
	flagIF = 1 << 9
	flagOF = 1 << 11
	flagRF = 1 << 16
)

// inc adds an increment.
func (m *model) inc(which tinyvm.Register) {
	m.do(func() { m.Inc(which) }, func(r *kvmaccess.Registers, _ uint64) {
		v := register(r, which)
		*v++
		r.RFLAGS &^= flagPF | flagAF | flagZF | flagSF | flagOF
		if bits.OnesCount8(uint8(*v))%2 == 0 {
			r.RFLAGS |= flagPF
		}
		if *v&15 == 0 {
			r.RFLAGS |= flagAF
		}
		if *v == 0 {
			r.RFLAGS |= flagZF
		}
		if *v>>63 == 1 {
			r.RFLAGS |= flagSF
		}
		if *v == 1<<63 {
			r.RFLAGS |= flagOF
		}
	})
}

// set adds the loading of a register with a constant.
func (m *model) set(which tinyvm.Register, value uint64) {
	m.do(func() { m.Mov(which, value) }, func(r *kvmaccess.Registers, _ uint64) { *register(r, which) = value })
}

// copy adds the copying of a register.
func (m *model) copy(to, from tinyvm.Register) {
	m.do(func() { m.Copy(to, from) }, func(r *kvmaccess.Registers, _ uint64) { *register(r, to) = *register(r, from) })
}

// wrmsr adds the writing of an MSR with EDX from a constant and EAX from a
// register; effect gets the value. It changes RAX, RCX and RDX.
func (m *model) wrmsr(msr uint32, high uint32, low tinyvm.Register, effect func(r *kvmaccess.Registers, value uint64)) {
	m.set(tinyvm.RCX, uint64(msr))
	m.set(tinyvm.RDX, uint64(high))
	m.do(func() { m.Copy32(tinyvm.RAX, low) }, func(r *kvmaccess.Registers, _ uint64) { r.RAX = *register(r, low) & 0xffffffff })
	m.do(m.WRMSR, func(r *kvmaccess.Registers, _ uint64) {
		if effect != nil {
			effect(r, r.RDX<<32|r.RAX)
		}
	})
}

// again adds the jump that ends the round.
func (m *model) again() {
	m.do(func() { m.Jmp(m.Base) }, func(*kvmaccess.Registers, uint64) {})
}

// counterBits is how many bits of a register count; the ones above tell one
// register from another.
const counterBits = 56

// counters gives each general register but RSP and the ones that the program
// uses otherwise a start of its own.
func counters(v *tinyvm.VCPU) error {
	r, err := v.Regs()
	if err != nil {
		return err
	}
	for i, p := range []*uint64{
		&r.RAX, &r.RBX, &r.RCX, &r.RDX, &r.RSI, &r.RDI, &r.RBP,
		&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15,
	} {
		*p = uint64(0x11*(i+1)) << counterBits
	}
	return v.SetRegs(r)
}

var generalRegisters = []tinyvm.Register{
	tinyvm.RAX, tinyvm.RBX, tinyvm.RCX, tinyvm.RDX, tinyvm.RSI, tinyvm.RDI, tinyvm.RBP, tinyvm.RSP,
	tinyvm.R8, tinyvm.R9, tinyvm.R10, tinyvm.R11, tinyvm.R12, tinyvm.R13, tinyvm.R14, tinyvm.R15,
}

// load puts the program where the vCPU finds it and notes the state that the
// first round begins with.
func (m *model) load(t *testing.T, g *tinyvm.Guest, v *tinyvm.VCPU) {
	t.Helper()
	for _, a := range m.pieces {
		if err := g.Write(a.Base, a.Code); err != nil {
			t.Fatal(err)
		}
	}
	m.base = registersOf(t, v)
	one := m.base
	for _, s := range m.steps {
		s.effect(&one, 0)
	}
	two := one
	for _, s := range m.steps {
		s.effect(&two, 1)
	}
	for _, which := range generalRegisters {
		if n := *register(&m.base, which); *register(&one, which) == n+1 && *register(&two, which) == n+2 {
			m.counting = append(m.counting, which)
		}
	}
	for i, s := range m.steps {
		m.byRIP[s.at] = append(m.byRIP[s.at], i)
	}
}

// expect is the state at a position. R15 counts rounds, and so do all other
// registers that count.
func (m *model) expect(p position) kvmaccess.Registers {
	r := m.base
	if p.round > 0 {
		// What the round before left, in all that does not count.
		for _, which := range m.counting {
			*register(&r, which) += p.round - 1
		}
		for _, s := range m.steps {
			s.effect(&r, p.round-1)
		}
	}
	for _, s := range m.steps[:p.step] {
		s.effect(&r, p.round)
	}
	r.RIP = m.steps[p.step].at
	return r
}

// find returns where a captured state is in the program, not before a position
// that was seen earlier. If it is nowhere, the state that it comes nearest to
// is returned with ok false.
func (m *model) find(got kvmaccess.Registers, after position) (p position, want kvmaccess.Registers, ok bool) {
	// Set between two iterations or after a fault until the next instruction
	// has been executed: not for certain on every processor.
	got.RFLAGS &^= flagRF
	n := (got.R15 - m.base.R15) & (1<<counterBits - 1)
	for _, round := range []uint64{n - 1, n} {
		if round == 1<<64-1 {
			continue
		}
		for _, i := range m.byRIP[got.RIP] {
			p = position{round, i}
			if want = m.expect(p); want != got {
				continue
			}
			if round < after.round || !m.repeats && p.before(after) {
				continue
			}
			return p, want, true
		}
	}
	return p, want, false
}
