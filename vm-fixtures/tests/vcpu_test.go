// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// qemuRegisters is what QEMU's own monitor says of a vCPU, in the order of
// "info registers" (QEMU, target/i386/cpu-dump.c).
func qemuRegisters(t *testing.T, g *guest.Guest, vcpu uint32) kvmaccess.Registers {
	t.Helper()
	all, err := g.Monitor(testContext(t), "info registers -a")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(all, fmt.Sprintf("CPU#%d", vcpu))
	if !ok {
		t.Fatalf("QEMU knows no CPU %d:\n%s", vcpu, all)
	}
	text, _, _ = strings.Cut(text, "CPU#")
	number := func(name string) uint64 {
		m := regexp.MustCompile(`(?m)\b` + name + ` *= *([0-9a-f]+)`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no %s in:\n%s", name, text)
		}
		v, err := strconv.ParseUint(m[1], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	segment := func(name string) kvmaccess.Segment {
		m := regexp.MustCompile(`(?m)^` + name + ` *=([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no segment %s in:\n%s", name, text)
		}
		var v [4]uint64
		for i := range v {
			v[i], err = strconv.ParseUint(m[i+1], 16, 64)
			if err != nil {
				t.Fatal(err)
			}
		}
		return kvmaccess.Segment{Selector: uint16(v[0]), Base: v[1], Limit: uint32(v[2]), Attrs: uint32(v[3]>>8) & 0xf0ff}
	}
	table := func(name string) kvmaccess.TableRegister {
		m := regexp.MustCompile(`(?m)^` + name + ` *= *([0-9a-f]+) ([0-9a-f]+)`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no table %s in:\n%s", name, text)
		}
		base, err := strconv.ParseUint(m[1], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		limit, err := strconv.ParseUint(m[2], 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		return kvmaccess.TableRegister{Base: base, Limit: uint16(limit)}
	}
	return kvmaccess.Registers{
		RAX: number("RAX"), RBX: number("RBX"), RCX: number("RCX"), RDX: number("RDX"),
		RSI: number("RSI"), RDI: number("RDI"), RBP: number("RBP"), RSP: number("RSP"),
		R8: number("R8"), R9: number("R9"), R10: number("R10"), R11: number("R11"),
		R12: number("R12"), R13: number("R13"), R14: number("R14"), R15: number("R15"),
		RIP: number("RIP"), RFLAGS: number("RFL"),
		CR0: number("CR0"), CR2: number("CR2"), CR3: number("CR3"), CR4: number("CR4"),
		EFER: number("EFER"),
		CS:   segment("CS"), DS: segment("DS"), ES: segment("ES"), FS: segment("FS"),
		GS: segment("GS"), SS: segment("SS"), TR: segment("TR"), LDTR: segment("LDT"),
		GDTR: table("GDT"), IDTR: table("IDT"),
		DR0: number("DR0"), DR1: number("DR1"), DR2: number("DR2"), DR3: number("DR3"),
		DR6: number("DR6"), DR7: number("DR7"),
	}
}

// unusable is the bit of a segment's attributes that QEMU knows as "not present".
const unusable = 1 << 16

// likeQEMU leaves out what QEMU's monitor does not show.
func likeQEMU(r kvmaccess.Registers) kvmaccess.Registers {
	for _, s := range []*kvmaccess.Segment{&r.CS, &r.DS, &r.ES, &r.FS, &r.GS, &r.SS, &r.TR, &r.LDTR} {
		s.Attrs &^= unusable
	}
	r.CR8 = 0
	r.STAR, r.LSTAR, r.CSTAR, r.SFMASK = 0, 0, 0, 0
	r.SysenterCS, r.SysenterESP, r.SysenterEIP = 0, 0, 0
	r.KernelGSBase, r.PAT = 0, 0
	return r
}

func TestRegistersAgainstQEMU(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	for _, name := range []string{"web1", "db1"} {
		g := sharedGuest(t, name)
		vm := vmOf(t, c, g)
		for _, busy := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/busy=%t", name, busy), func(t *testing.T) {
				if busy {
					if err := g.Spin(ctx, vm.VCPUs); err != nil {
						t.Fatal(err)
					}
					// Registered first, so it comes after the guest goes on.
					t.Cleanup(func() {
						if err := g.Spin(ctx, 0); err != nil {
							t.Error(err)
						}
					})
					time.Sleep(100 * time.Millisecond)
				}
				paused(t, g)
				vcpus, err := c.VCPUs(ctx, vm.ID)
				if err != nil {
					t.Fatal(err)
				}
				if len(vcpus) != vm.VCPUs {
					t.Fatalf("%d vCPUs, want %d", len(vcpus), vm.VCPUs)
				}
				for _, v := range vcpus {
					want := qemuRegisters(t, g, v.ID)
					if diff := cmp.Diff(want, likeQEMU(v.Registers)); diff != "" {
						t.Errorf("vCPU %d: QEMU's (-) against ours (+):\n%s", v.ID, diff)
					}
					if v.Condition != kvmaccess.ConditionUser {
						t.Errorf("vCPU %d is paused, but its condition is %v", v.ID, v.Condition)
					}
					if v.CPL != int(v.CS.Selector&3) {
						t.Errorf("vCPU %d: CPL %d with CS %#x", v.ID, v.CPL, v.CS.Selector)
					}
					one, err := c.VCPU(ctx, vm.ID, v.ID)
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(v.Registers, one.Registers); diff != "" {
						t.Errorf("vCPU %d: in the list (-) against alone (+):\n%s", v.ID, diff)
					}
				}
			})
		}
	}
}

// What the guest's own kernel reads is what is read from outside, while it runs.
func TestRegistersAgainstGuest(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	for _, name := range []string{"web1", "db1"} {
		g := sharedGuest(t, name)
		vm := vmOf(t, c, g)
		cpus, err := g.CPUs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(cpus) != vm.VCPUs {
			t.Fatalf("%s: %d CPUs inside, %d outside", name, len(cpus), vm.VCPUs)
		}
		for i, in := range cpus {
			out, err := c.VCPU(ctx, vm.ID, uint32(i))
			if err != nil {
				t.Fatal(err)
			}
			type values struct {
				GDTR, IDTR                   kvmaccess.TableRegister
				CR0, EFER                    uint64
				STAR, LSTAR, CSTAR, SFMASK   uint64
				SysenterCS, SysenterESP      uint64
				SysenterEIP, PAT             uint64
				DR0, DR1, DR2, DR3, DR6, DR7 uint64
				TR, LDTR                     uint16
				SMEP, SMAP, UMIP, PAE, LA57  bool
			}
			// The guest's kernel toggles CR4.PCE and .TSD by process.
			bits := func(v values, cr4 uint64) values {
				v.SMEP, v.SMAP, v.UMIP = cr4>>20&1 == 1, cr4>>21&1 == 1, cr4>>11&1 == 1
				v.PAE, v.LA57 = cr4>>5&1 == 1, cr4>>12&1 == 1
				return v
			}
			want := bits(values{
				GDTR: kvmaccess.TableRegister{Base: in.GDTBase, Limit: in.GDTLimit},
				IDTR: kvmaccess.TableRegister{Base: in.IDTBase, Limit: in.IDTLimit},
				CR0:  in.CR0, EFER: in.EFER,
				STAR: in.STAR, LSTAR: in.LSTAR, CSTAR: in.CSTAR, SFMASK: in.SFMASK,
				SysenterCS: in.SysenterCS, SysenterESP: in.SysenterESP, SysenterEIP: in.SysenterEIP, PAT: in.PAT,
				DR0: in.DR0, DR1: in.DR1, DR2: in.DR2, DR3: in.DR3, DR6: in.DR6, DR7: in.DR7,
				TR: in.TR, LDTR: in.LDT,
			}, in.CR4)
			got := bits(values{
				GDTR: out.GDTR, IDTR: out.IDTR, CR0: out.CR0, EFER: out.EFER,
				STAR: out.STAR, LSTAR: out.LSTAR, CSTAR: out.CSTAR, SFMASK: out.SFMASK,
				SysenterCS: out.SysenterCS, SysenterESP: out.SysenterESP, SysenterEIP: out.SysenterEIP, PAT: out.PAT,
				DR0: out.DR0, DR1: out.DR1, DR2: out.DR2, DR3: out.DR3, DR6: out.DR6, DR7: out.DR7,
				TR: out.TR.Selector, LDTR: out.LDTR.Selector,
			}, out.CR4)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s CPU %d: inside (-) against outside (+):\n%s", name, i, diff)
			}
			if !want.SMEP || !want.SMAP {
				t.Errorf("%s CPU %d: CR4 %#x lacks SMEP or SMAP: an attack on them would show nothing", name, i, in.CR4)
			}
		}
	}
}

// The MSRs again, by the guest's stock driver.
func TestMSRs(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	for cpu := range vm.VCPUs {
		v, err := c.VCPU(ctx, vm.ID, uint32(cpu))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range []struct {
			name     string
			register uint32 // Intel SDM vol. 4, "Architectural MSRs"
			got      uint64
		}{
			{"SYSENTER_CS", 0x174, v.SysenterCS},
			{"SYSENTER_ESP", 0x175, v.SysenterESP},
			{"SYSENTER_EIP", 0x176, v.SysenterEIP},
			{"PAT", 0x277, v.PAT},
			{"EFER", 0xc0000080, v.EFER},
			{"STAR", 0xc0000081, v.STAR},
			{"LSTAR", 0xc0000082, v.LSTAR},
			{"CSTAR", 0xc0000083, v.CSTAR},
			{"SFMASK", 0xc0000084, v.SFMASK},
		} {
			want, err := g.MSR(ctx, cpu, m.register)
			if err != nil {
				t.Fatal(err)
			}
			if m.got != want {
				t.Errorf("CPU %d: %s is %#x inside, %#x outside", cpu, m.name, want, m.got)
			}
		}
	}
}

// A vCPU that never leaves the guest by itself is read exactly, again and again.
func TestRegistersOfRunningVCPU(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	const cpu = 1
	if err := g.Hold(ctx, cpu); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := g.Hold(ctx, -1); err != nil {
			t.Error(err)
		}
	}()
	time.Sleep(100 * time.Millisecond)
	seen := map[kvmaccess.Condition]int{}
	type sample struct{ held, torn int }
	at := map[uint64]sample{} // by RIP
	var want [8]uint64
	for i := range want {
		want[i] = uint64(8+i) * 0x1111111111111111
	}
	const rounds = 2000
	for range rounds {
		v, err := c.VCPU(ctx, vm.ID, cpu)
		if err != nil {
			t.Fatal(err)
		}
		seen[v.Condition]++
		got := [8]uint64{v.R8, v.R9, v.R10, v.R11, v.R12, v.R13, v.R14, v.R15}
		s := at[v.RIP]
		if got == want {
			s.held++
		} else {
			s.torn++
		}
		at[v.RIP] = s
		if v.CPU < 0 || v.TID == 0 {
			t.Fatalf("a running vCPU on CPU %d by thread %d", v.CPU, v.TID)
		}
	}
	// The loop is two instructions, dec (3 bytes) and jnz, where the vCPU is
	// found most. What else runs there, the timer's interrupts for instance,
	// takes more of its time the slower the host is.
	var top uint64
	for rip, s := range at {
		if s.held > at[top].held {
			top = rip
		}
	}
	var loop, torn int
	for _, rip := range []uint64{top - 3, top, top + 3} {
		loop += at[rip].held
		torn += at[rip].torn
	}
	t.Logf("%d of %d in the loop at %#x; conditions %v", loop, rounds, top, seen)
	if torn > 0 {
		t.Errorf("%d times in the loop without its registers", torn)
	}
	if loop < rounds/10 {
		t.Errorf("only %d of %d in the loop", loop, rounds)
	}
	if seen[kvmaccess.ConditionGuest] == 0 {
		t.Errorf("never seen in the guest: %v", seen)
	}
}

// An idle vCPU is seen as what it is, and reading it does not run it.
func TestHaltedVCPU(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "db1")
	vm := vmOf(t, c, g)
	for end := time.Now().Add(patience * 20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		v, err := c.VCPU(ctx, vm.ID, 0)
		if err != nil {
			t.Fatal(err)
		}
		if v.Condition == kvmaccess.ConditionHalted {
			if v.CPL != 0 || v.RFLAGS>>9&1 == 0 {
				t.Errorf("halted at CPL %d with RFLAGS %#x: it could never wake up", v.CPL, v.RFLAGS)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatalf("an idle guest's vCPU was never seen halted; last %v", v.Condition)
		}
	}
}
