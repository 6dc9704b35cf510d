// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// program is a guest whose every state is known.
type program struct {
	name   string
	config tinyvm.Config
	// build makes the models of the vCPUs, one each, after the vCPUs are in
	// long mode and their counters set.
	build func(t *testing.T, g *tinyvm.Guest) []*model
	// exits answers the vCPUs' exits; nil: there are none.
	exits func(vcpu int) tinyvm.Handler
}

const (
	handlerAt = 0xa000     // of interrupts and system calls
	secondAt  = 0xc000     // program of vCPU 1
	dataAt    = 0xe000     // what programs read
	mmioAt    = 0x40000000 // guest-virtual, mapped to no memslot
	mmioGPA   = 0xd0000000
	apicAt    = 0x40001000 // guest-virtual, mapped to the APIC
	apicGPA   = 0xfee00000
	port      = 0x510 // nobody's
	vector    = 0x41
)

// most are the registers that count in most programs, R15 the last.
var most = []tinyvm.Register{
	tinyvm.RBX, tinyvm.RSI, tinyvm.RDI, tinyvm.RBP, tinyvm.R8, tinyvm.R9, tinyvm.R10,
	tinyvm.R11, tinyvm.R12, tinyvm.R13, tinyvm.R14, tinyvm.R15,
}

// between is a program whose own part lies in the middle of the counting.
func between(which []tinyvm.Register, own func(*model)) *model {
	m := newModel(tinyvm.Code)
	half := len(which) / 2
	for _, r := range which[:half] {
		m.inc(r)
	}
	own(m)
	for _, r := range which[half:] {
		m.inc(r)
	}
	m.again()
	return m
}

// simple is a program of one vCPU in long mode with interrupts on, of which
// none comes.
func simple(name string, which []tinyvm.Register, own func(*model)) program {
	return program{
		name:   name,
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(*testing.T, *tinyvm.Guest) []*model {
			return []*model{between(which, own)}
		},
	}
}

// answer is what the VMM gives at the n-th read, from 0, of a size in bytes.
func answer(n uint64, size int) uint64 {
	v := (n + 1) * 0x9e3779b97f4a7c15
	if size < 8 {
		v &= 1<<(8*size) - 1
	}
	return v
}

// answering is a handler that gives answers to reads.
func answering(int) tinyvm.Handler {
	var n uint64
	return func(e *tinyvm.Exit) (bool, error) {
		if e.Reason != tinyvm.ExitIO && e.Reason != tinyvm.ExitMMIO {
			return false, fmt.Errorf("the guest ended: %v", e)
		}
		if !e.Write {
			var b [8]byte
			binary.LittleEndian.PutUint64(b[:], answer(n, 8))
			copy(e.Data, b[:])
			n++
		}
		return true, nil
	}
}

func nothing(*kvmaccess.Registers, uint64) {}

// flatSegment is a segment of the GDT of tinyvm once it is loaded.
func flatSegment(selector uint16) kvmaccess.Segment {
	s := kvmaccess.Segment{Selector: selector, Limit: 0xffffffff, Attrs: 0xc093}
	switch selector {
	case tinyvm.Code64, tinyvm.Code64User:
		s.Attrs = 0xa09b
	}
	s.Attrs |= uint32(selector&3) << 5
	return s
}

// deliver is what an interrupt or an exception does at CPL 0 in long mode.
func deliver(r *kvmaccess.Registers, frame uint64) {
	r.RSP = r.RSP&^15 - frame
	r.RFLAGS &^= flagIF | flagRF
}

// programs are all of them; each is there for the exits that it causes.
var programs = []program{
	{
		name:   "registers only",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(*testing.T, *tinyvm.Guest) []*model {
			m := newModel(tinyvm.Code)
			for _, r := range generalRegisters {
				m.inc(r)
			}
			m.again()
			return []*model{m}
		},
	},
	simple("stack", most, func(m *model) {
		m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RSP -= 8 }, 0x53) // push rbx
		next := m.PC() + 5
		m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RSP -= 8 }, 0xe8, 0, 0, 0, 0)            // call next
		m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RSP += 8; r.RAX = next }, 0x58)          // pop rax
		m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RSP += 8; r.RCX = r.RBX }, 0x59)         // pop rcx
		m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RAX, r.RCX = r.RCX, r.RAX }, 0x48, 0x91) // xchg rax, rcx
	}),
	{
		name:   "CPUID",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			// The processor's name is of no consequence.
			leaves := openKVM(t).CPUID()
			var known []tinyvm.CPUID
			for i := range leaves {
				if l := &leaves[i]; l.Function == 0x80000002 || l.Function == 0x80000003 {
					l.EAX, l.EBX = 0xa1a1a1a1^l.Function, 0xb1b1b1b1^l.Function<<1
					l.ECX, l.EDX = 0xc1c1c1c1^l.Function<<2, 0xd1d1d1d1^l.Function<<3
					known = append(known, *l)
				}
			}
			if len(known) != 2 {
				t.Fatalf("KVM has %d of 2 leaves with the processor's name", len(known))
			}
			if err := g.VCPUs[0].SetCPUID(leaves); err != nil {
				t.Fatal(err)
			}
			return []*model{between(most[1:], func(m *model) {
				for _, l := range known {
					m.set(tinyvm.RAX, uint64(l.Function))
					m.set(tinyvm.RCX, 0)
					m.do(m.CPUID, func(r *kvmaccess.Registers, _ uint64) {
						r.RAX, r.RBX, r.RCX, r.RDX = uint64(l.EAX), uint64(l.EBX), uint64(l.ECX), uint64(l.EDX)
					})
				}
			})}
		},
	},
	{
		name:   "port in the kernel",
		config: tinyvm.Config{Mode: tinyvm.Long, IRQChip: true},
		build: func(*testing.T, *tinyvm.Guest) []*model {
			return []*model{between(most, func(m *model) {
				const mask = 0x21 // interrupt mask of the first 8259A
				m.copy(tinyvm.RAX, tinyvm.R8)
				m.bytes(nothing, 0xe6, mask) // out 0x21, al
				m.set(tinyvm.RAX, 0x1122334455667700)
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RAX |= r.R8 & 0xff }, 0xe4, mask) // in al, 0x21
			})}
		},
	},
	{
		name:   "port in user space",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(*testing.T, *tinyvm.Guest) []*model {
			return []*model{between(most, func(m *model) {
				m.set(tinyvm.RDX, port)
				m.bytes(nothing, 0xef)                                                         // out dx, eax
				m.bytes(func(r *kvmaccess.Registers, n uint64) { r.RAX = answer(n, 4) }, 0xed) // in eax, dx
			})}
		},
		exits: answering,
	},
	{
		name:   "strings to a port",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(*testing.T, *tinyvm.Guest) []*model {
			return []*model{between(most[4:], func(m *model) {
				m.set(tinyvm.RDX, port)
				for _, code := range [][]byte{{0xf3, 0x6e}, {0xf3, 0x6c}} { // rep outsb, rep insb
					m.set(tinyvm.RSI, dataAt)
					m.set(tinyvm.RDI, dataAt+0x100)
					const count = 6
					m.set(tinyvm.RCX, count)
					out := code[1] == 0x6e
					m.bytes(nothing, code...)
					last := m.steps[len(m.steps)-1]
					m.steps = m.steps[:len(m.steps)-1]
					for range count {
						m.steps = append(m.steps, step{last.at, func(r *kvmaccess.Registers, _ uint64) {
							r.RCX--
							if out {
								r.RSI++
							} else {
								r.RDI++
							}
						}})
					}
					// KVM finds that there is nothing left to do only when it
					// begins the instruction again.
					m.steps = append(m.steps, last)
				}
			})}
		},
		exits: answering,
	},
	{
		name:   "MMIO in user space",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			mapDevice(t, g, mmioAt, mmioGPA)
			return []*model{between(most[1:], func(m *model) {
				m.set(tinyvm.RBX, mmioAt)
				m.copy(tinyvm.RCX, tinyvm.R8)
				m.bytes(nothing, 0x48, 0x89, 0x0b)                                                             // mov [rbx], rcx
				m.bytes(func(r *kvmaccess.Registers, n uint64) { r.RAX = answer(2*n, 8) }, 0x48, 0x8b, 0x03)   // mov rax, [rbx]
				m.bytes(func(r *kvmaccess.Registers, n uint64) { r.RCX = answer(2*n+1, 8) }, 0x48, 0x87, 0x0b) // xchg [rbx], rcx
				m.copy(tinyvm.RDX, tinyvm.RCX)
			})}
		},
		exits: answering,
	},
	{
		name:   "MMIO in the kernel",
		config: tinyvm.Config{Mode: tinyvm.Long, IRQChip: true},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			mapDevice(t, g, apicAt, apicGPA)
			return []*model{between(most[1:], func(m *model) {
				const tpr = apicAt + 0x80 // task priority, of which CR8 is bits 7:4
				m.set(tinyvm.RBX, tpr)
				for _, v := range []uint64{0x30, 0x50} {
					m.set(tinyvm.RAX, v)
					m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR8 = v >> 4 }, 0x89, 0x03) // mov [rbx], eax
					m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RCX = v }, 0x8b, 0x0b)      // mov ecx, [rbx]
				}
			})}
		},
	},
	{
		name:   "HLT and timer",
		config: tinyvm.Config{Mode: tinyvm.Long, IRQChip: true},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			useX2APIC(t, g)
			v := g.VCPUs[0]
			// One shot, counted in nanoseconds of KVM's APIC bus.
			if err := v.SetMSRs(tinyvm.MSR{Index: tinyvm.MSRX2APICTimer, Value: vector},
				tinyvm.MSR{Index: tinyvm.MSRX2APICDivide, Value: 0xb}); err != nil {
				t.Fatal(err)
			}
			return []*model{between(most[:len(most)-1], func(m *model) {
				m.set(tinyvm.R14, 20_000)
				m.wrmsr(tinyvm.MSRX2APICInitialCount, 0, tinyvm.R14, nil)
				waitForInterrupt(m)
				m.inc(tinyvm.R15)
			})}
		},
	},
	{
		name:   "HLT and IPI",
		config: tinyvm.Config{Mode: tinyvm.Long, IRQChip: true, VCPUs: 2},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			useX2APIC(t, g)
			receiver := between(most, waitForInterrupt)
			receiver.repeats = true
			sender := newModel(secondAt)
			for _, r := range most[:4] {
				sender.inc(r)
			}
			sender.set(tinyvm.R14, vector) // fixed, physical, edge; to APIC 0
			sender.wrmsr(tinyvm.MSRX2APICICR, 0, tinyvm.R14, nil)
			sender.inc(tinyvm.R15)
			sender.again()
			r, err := g.VCPUs[1].Regs()
			if err != nil {
				t.Fatal(err)
			}
			r.RIP = secondAt
			if err := g.VCPUs[1].SetRegs(r); err != nil {
				t.Fatal(err)
			}
			return []*model{receiver, sender}
		},
	},
	simple("MSRs", most, func(m *model) {
		for _, w := range []struct {
			msr, high uint32
			low       tinyvm.Register
			field     func(*kvmaccess.Registers) *uint64
		}{
			{tinyvm.MSRLSTAR, 0x7f01, tinyvm.R8, func(r *kvmaccess.Registers) *uint64 { return &r.LSTAR }},
			{tinyvm.MSRKernelGSBase, 0x7f02, tinyvm.R8, func(r *kvmaccess.Registers) *uint64 { return &r.KernelGSBase }},
			{tinyvm.MSRSTAR, 0x7f03, tinyvm.R9, func(r *kvmaccess.Registers) *uint64 { return &r.STAR }},
			{tinyvm.MSRCSTAR, 0x7f04, tinyvm.R9, func(r *kvmaccess.Registers) *uint64 { return &r.CSTAR }},
			{tinyvm.MSRSFMASK, 0, tinyvm.R9, func(r *kvmaccess.Registers) *uint64 { return &r.SFMASK }},
			{tinyvm.MSRSysenterESP, 0x7f05, tinyvm.R10, func(r *kvmaccess.Registers) *uint64 { return &r.SysenterESP }},
			// On AMD processors it has 32 bits, and KVM gives no more of it.
			{tinyvm.MSRSysenterEIP, 0, tinyvm.R10, func(r *kvmaccess.Registers) *uint64 { return &r.SysenterEIP }},
			{tinyvm.MSRSysenterCS, 0, tinyvm.R10, func(r *kvmaccess.Registers) *uint64 { return &r.SysenterCS }},
			{tinyvm.MSRFSBase, 0x7f07, tinyvm.R11, func(r *kvmaccess.Registers) *uint64 { return &r.FS.Base }},
		} {
			m.wrmsr(w.msr, w.high, w.low, func(r *kvmaccess.Registers, v uint64) { *w.field(r) = v })
		}
		for _, pat := range []uint32{0x00070406, 0x01050406} {
			m.set(tinyvm.RSI, uint64(pat))
			m.wrmsr(tinyvm.MSRPAT, 0x00070406, tinyvm.RSI, func(r *kvmaccess.Registers, v uint64) { r.PAT = v })
		}
		for _, sce := range []uint64{0, tinyvm.EFERSCE} {
			m.set(tinyvm.RSI, tinyvm.EFERLME|tinyvm.EFERLMA|sce)
			m.wrmsr(tinyvm.MSREFER, 0, tinyvm.RSI, func(r *kvmaccess.Registers, v uint64) { r.EFER = v })
		}
		m.set(tinyvm.RSI, 0)
	}),
	{
		name:   "CR3",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			other, err := g.NewTables(tinyvm.Mode(tinyvm.Long).Paging(), &g.Next)
			if err != nil {
				t.Fatal(err)
			}
			if err := other.Map(0, 0, tinyvm.DefaultMemory, tinyvm.Page2M, tinyvm.EntryWrite); err != nil {
				t.Fatal(err)
			}
			return []*model{between(most, func(m *model) {
				for _, root := range []uint64{other.Root, g.Tables.Root} {
					m.set(tinyvm.RAX, root)
					m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR3 = root }, 0x0f, 0x22, 0xd8) // mov cr3, rax
				}
			})}
		},
	},
	{
		name:   "control registers",
		config: tinyvm.Config{Mode: tinyvm.Long, IRQChip: true},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			s, err := g.VCPUs[0].SRegs()
			if err != nil {
				t.Fatal(err)
			}
			return []*model{between(most, func(m *model) {
				m.set(tinyvm.RAX, s.CR0|tinyvm.CR0TS|tinyvm.CR0MP)
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR0 = r.RAX }, 0x0f, 0x22, 0xc0)    // mov cr0, rax
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR0 &^= tinyvm.CR0TS }, 0x0f, 0x06) // clts
				m.set(tinyvm.RAX, s.CR0&^tinyvm.CR0WP)
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR0 = r.RAX }, 0x0f, 0x22, 0xc0)
				m.set(tinyvm.RAX, s.CR0)
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR0 = r.RAX }, 0x0f, 0x22, 0xc0)
				for _, cr4 := range []uint64{s.CR4 | tinyvm.CR4TSD, s.CR4 | tinyvm.CR4PGE, s.CR4} {
					m.set(tinyvm.RAX, cr4)
					m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR4 = cr4 }, 0x0f, 0x22, 0xe0) // mov cr4, rax
				}
				for _, cr8 := range []uint64{7, 3} {
					m.set(tinyvm.RAX, cr8)
					m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR8 = cr8 }, 0x44, 0x0f, 0x22, 0xc0) // mov cr8, rax
				}
				m.copy(tinyvm.RAX, tinyvm.R8)
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.CR2 = r.RAX }, 0x0f, 0x22, 0xd0) // mov cr2, rax
			})}
		},
	},
	{
		name:   "table registers",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			tables := []kvmaccess.TableRegister{
				{Base: 0xffff800012345000, Limit: 0x1ff}, {Base: tinyvm.GDT, Limit: 0x4f},
			}
			for i, r := range tables {
				b := binary.LittleEndian.AppendUint16(nil, r.Limit)
				if err := g.Write(dataAt+uint64(i)*16, binary.LittleEndian.AppendUint64(b, r.Base)); err != nil {
					t.Fatal(err)
				}
			}
			return []*model{between(most[1:], func(m *model) {
				for i, table := range tables {
					m.set(tinyvm.RBX, dataAt+uint64(i)*16)
					m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.GDTR = table }, 0x0f, 0x01, 0x13) // lgdt [rbx]
					m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.IDTR = table }, 0x0f, 0x01, 0x1b) // lidt [rbx]
				}
			})}
		},
	},
	simple("segments", most, func(m *model) {
		for _, selector := range []uint16{tinyvm.UserData, tinyvm.Data} {
			m.set(tinyvm.RAX, uint64(selector))
			m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.ES = flatSegment(selector) }, 0x8e, 0xc0) // mov es, ax
			m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.FS = flatSegment(selector) }, 0x8e, 0xe0) // mov fs, ax
			m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.GS = flatSegment(selector) }, 0x8e, 0xe8) // mov gs, ax
		}
		m.wrmsr(tinyvm.MSRGSBase, 0x7f01, tinyvm.R8, func(r *kvmaccess.Registers, v uint64) { r.GS.Base = v })
		m.wrmsr(tinyvm.MSRKernelGSBase, 0x7f02, tinyvm.R9, func(r *kvmaccess.Registers, v uint64) { r.KernelGSBase = v })
		for range 3 {
			m.do(m.SwapGS, func(r *kvmaccess.Registers, _ uint64) { r.GS.Base, r.KernelGSBase = r.KernelGSBase, r.GS.Base })
		}
	}),
	simple("debug registers", most, func(m *model) {
		for i, field := range []func(*kvmaccess.Registers) *uint64{
			func(r *kvmaccess.Registers) *uint64 { return &r.DR0 }, func(r *kvmaccess.Registers) *uint64 { return &r.DR1 },
			func(r *kvmaccess.Registers) *uint64 { return &r.DR2 }, func(r *kvmaccess.Registers) *uint64 { return &r.DR3 },
		} {
			m.do(func() { m.Copy32(tinyvm.RAX, tinyvm.R8+tinyvm.Register(i)) },
				func(r *kvmaccess.Registers, _ uint64) {
					r.RAX = *register(r, tinyvm.R8+tinyvm.Register(i)) & 0xffffffff
				})
			m.bytes(func(r *kvmaccess.Registers, _ uint64) { *field(r) = r.RAX }, 0x0f, 0x23, 0xc0|byte(i)<<3) // mov drI, rax
		}
		for _, dr7 := range []uint64{0x700, 0x400} {
			m.set(tinyvm.RAX, dr7)
			m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.DR7 = dr7 }, 0x0f, 0x23, 0xf8) // mov dr7, rax
		}
	}),
	{
		name:   "page faults",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			if err := g.SetGate(14, handlerAt); err != nil {
				t.Fatal(err)
			}
			// All pages of the handler are the same: it goes on behind the
			// instruction that faulted, which has three bytes.
			handler := func(m *model, fault uint64) {
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RDX, r.RSP = 0, r.RSP+8 }, 0x5a)     // pop rdx: error code
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RCX, r.RSP = fault, r.RSP+8 }, 0x59) // pop rcx: RIP
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RCX += 3 }, 0x48, 0x8d, 0x49, 0x03)  // lea rcx, [rcx+3]
				m.bytes(func(r *kvmaccess.Registers, _ uint64) { r.RSP -= 8 }, 0x51)                    // push rcx
				m.do(m.IRET, func(r *kvmaccess.Registers, _ uint64) { r.RSP, r.RFLAGS = r.RSP+40, r.RFLAGS|flagIF })
			}
			return []*model{between(most[1:], func(m *model) {
				for _, address := range []uint64{0x7f0000001000, 0x600000002008} {
					m.set(tinyvm.RBX, address)
					fault := m.PC()
					m.bytes(func(r *kvmaccess.Registers, _ uint64) {
						r.CR2 = address
						deliver(r, 48)
					}, 0x48, 0x8b, 0x03) // mov rax, [rbx]
					m.elsewhere(handlerAt, func() { handler(m, fault) })
				}
			})}
		},
	},
	{
		name:   "system calls",
		config: tinyvm.Config{Mode: tinyvm.Long},
		build: func(t *testing.T, g *tinyvm.Guest) []*model {
			v := g.VCPUs[0]
			user, err := g.NewTables(tinyvm.Mode(tinyvm.Long).Paging(), &g.Next)
			if err != nil {
				t.Fatal(err)
			}
			if err := user.Map(0, 0, tinyvm.DefaultMemory, tinyvm.Page2M, tinyvm.EntryWrite|tinyvm.EntryUser); err != nil {
				t.Fatal(err)
			}
			if err := v.EnterUser(); err != nil {
				t.Fatal(err)
			}
			s, err := v.SRegs()
			if err != nil {
				t.Fatal(err)
			}
			s.CR3 = user.Root
			if err := v.SetSRegs(s); err != nil {
				t.Fatal(err)
			}
			// The arithmetic flags too, which QEMU's SYSCALL clears in any case.
			const mask = flagIF | flagCF | flagPF | flagAF | flagZF | flagSF | flagOF
			if err := v.SetMSRs(
				tinyvm.MSR{Index: tinyvm.MSRSTAR, Value: uint64(tinyvm.UserData-8)<<48 | uint64(tinyvm.Code64)<<32},
				tinyvm.MSR{Index: tinyvm.MSRLSTAR, Value: handlerAt},
				tinyvm.MSR{Index: tinyvm.MSRSFMASK, Value: mask},
			); err != nil {
				t.Fatal(err)
			}
			which := []tinyvm.Register{tinyvm.R8, tinyvm.R9, tinyvm.R10, tinyvm.R12, tinyvm.R13, tinyvm.R14, tinyvm.R15}
			return []*model{between(which, func(m *model) {
				m.bytes(func(r *kvmaccess.Registers, _ uint64) {
					r.RCX, r.R11 = r.RIP, r.RFLAGS
					r.RFLAGS &^= mask
					r.CS, r.SS = flatSegment(tinyvm.Code64), flatSegment(tinyvm.Data)
				}, 0x0f, 0x05) // syscall
				next := m.PC()
				last := &m.steps[len(m.steps)-1]
				enter := last.effect
				last.effect = func(r *kvmaccess.Registers, n uint64) { r.RIP = next; enter(r, n) }
				m.elsewhere(handlerAt, func() {
					m.inc(tinyvm.RBX)
					m.do(m.SwapGS, func(r *kvmaccess.Registers, _ uint64) { r.GS.Base, r.KernelGSBase = r.KernelGSBase, r.GS.Base })
					m.inc(tinyvm.RBP)
					m.do(m.SwapGS, func(r *kvmaccess.Registers, _ uint64) { r.GS.Base, r.KernelGSBase = r.KernelGSBase, r.GS.Base })
					m.bytes(func(r *kvmaccess.Registers, _ uint64) {
						r.RFLAGS = r.R11
						r.CS, r.SS = flatSegment(tinyvm.Code64User), flatSegment(tinyvm.UserData)
					}, 0x48, 0x0f, 0x07) // sysretq
				})
			})}
		},
	},
}

// mapDevice maps a page of guest-virtual addresses to a device.
func mapDevice(t *testing.T, g *tinyvm.Guest, gva, gpa uint64) {
	t.Helper()
	if err := g.Tables.Map(gva, gpa, tinyvm.Page4K, tinyvm.Page4K, tinyvm.EntryWrite); err != nil {
		t.Fatal(err)
	}
}

// useX2APIC lets interrupts of vector wake HLT; they are off elsewhere.
func useX2APIC(t *testing.T, g *tinyvm.Guest) {
	t.Helper()
	for _, v := range g.VCPUs {
		if err := v.EnableX2APIC(); err != nil {
			t.Fatal(err)
		}
		r, err := v.Regs()
		if err != nil {
			t.Fatal(err)
		}
		r.RFLAGS &^= flagIF
		if err := v.SetRegs(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.SetGate(vector, handlerAt); err != nil {
		t.Fatal(err)
	}
}

// waitForInterrupt adds a HLT with the interrupt that ends it.
func waitForInterrupt(m *model) {
	m.do(m.STI, func(r *kvmaccess.Registers, _ uint64) { r.RFLAGS |= flagIF })
	m.do(m.HLT, nothing)
	first := len(m.steps)
	// Between HLT and the interrupt.
	m.steps = append(m.steps, step{m.PC(), func(r *kvmaccess.Registers, _ uint64) { deliver(r, 40) }})
	m.elsewhere(handlerAt, func() {
		m.set(tinyvm.RSI, 0)
		m.wrmsr(tinyvm.MSRX2APICEOI, 0, tinyvm.RSI, nil)
		m.do(m.IRET, func(r *kvmaccess.Registers, _ uint64) { r.RSP, r.RFLAGS = r.RSP+40, r.RFLAGS|flagIF })
	})
	// Another one may come before the guest has refused more. It finds RSI as
	// the handler left it.
	m.steps = append(m.steps, m.steps[first:]...)
	m.do(m.CLI, func(r *kvmaccess.Registers, _ uint64) { r.RFLAGS &^= flagIF })
}
