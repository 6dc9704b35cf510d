// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

func openKVM(t *testing.T) *tinyvm.KVM {
	t.Helper()
	k, err := tinyvm.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

var selfPID = os.Getpid()

// tinyGuest makes a guest and finds it among the host's VMs.
func tinyGuest(t *testing.T, k *tinyvm.KVM, c *kvmaccess.Client, config tinyvm.Config) (*tinyvm.Guest, kvmaccess.VM) {
	t.Helper()
	g, err := k.NewGuest(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g, newestVM(t, c, selfPID)
}

// newestVM is the VM that a process created last.
func newestVM(t *testing.T, c *kvmaccess.Client, pid int) kvmaccess.VM {
	t.Helper()
	vms, err := c.VMs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	vms = slices.DeleteFunc(vms, func(vm kvmaccess.VM) bool { return vm.PID != pid })
	if len(vms) == 0 {
		t.Fatalf("process %d has no VM", pid)
	}
	return slices.MaxFunc(vms, func(a, b kvmaccess.VM) int { return int(a.ID) - int(b.ID) })
}

// stopped stops a guest in the middle of a test.
func stopped(t *testing.T, g *tinyvm.Guest) {
	t.Helper()
	if err := g.Stop(); err != nil {
		t.Fatal(err)
	}
}

// started starts a guest whose exits are ignored, on the host CPUs given.
func started(t *testing.T, g *tinyvm.Guest, cpus ...int) {
	t.Helper()
	if err := g.Start(tinyvm.Ignore, cpus...); err != nil {
		t.Fatal(err)
	}
}

// capture takes a vCPU's state; a vCPU that did not come to rest is asked again.
func capture(t *testing.T, c *kvmaccess.Client, vm kvmaccess.VMID, vcpu uint32) kvmaccess.VCPU {
	t.Helper()
	for tries := 0; ; tries++ {
		s, err := c.VCPU(t.Context(), vm, vcpu)
		if err == nil {
			return s
		}
		if !errors.Is(err, kvmaccess.ErrUnsettled) || tries == 100 {
			t.Fatal(err)
		}
	}
}

// until captures a vCPU again and again, until one satisfies ok. The time limit
// is far beyond what the slowest host needs.
func until(t *testing.T, c *kvmaccess.Client, vm kvmaccess.VMID, vcpu uint32, what string, ok func(kvmaccess.VCPU) bool) kvmaccess.VCPU {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		s := capture(t, c, vm, vcpu)
		if ok(s) {
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("vCPU %d was not seen %s; last: %+v", vcpu, what, s)
		}
	}
}

// inCondition is for until.
func inCondition(want kvmaccess.Condition) func(kvmaccess.VCPU) bool {
	return func(s kvmaccess.VCPU) bool { return s.Condition == want }
}

// segmentOf puts KVM's description of a segment into the format of a VMCS.
func segmentOf(s tinyvm.Segment) kvmaccess.Segment {
	return kvmaccess.Segment{
		Selector: s.Selector, Base: s.Base, Limit: s.Limit,
		Attrs: uint32(s.Type) | uint32(s.S)<<4 | uint32(s.DPL)<<5 | uint32(s.Present)<<7 |
			uint32(s.AVL)<<12 | uint32(s.L)<<13 | uint32(s.DB)<<14 | uint32(s.G)<<15 | uint32(s.Unusable)<<16,
	}
}

// registersOf is what KVM says of a stopped vCPU: all that a capture has.
func registersOf(t *testing.T, v *tinyvm.VCPU) kvmaccess.Registers {
	t.Helper()
	r, err := v.Regs()
	if err != nil {
		t.Fatal(err)
	}
	s, err := v.SRegs()
	if err != nil {
		t.Fatal(err)
	}
	d, err := v.DebugRegs()
	if err != nil {
		t.Fatal(err)
	}
	m, err := v.MSRs(tinyvm.MSRSTAR, tinyvm.MSRLSTAR, tinyvm.MSRCSTAR, tinyvm.MSRSFMASK,
		tinyvm.MSRSysenterCS, tinyvm.MSRSysenterESP, tinyvm.MSRSysenterEIP,
		tinyvm.MSRKernelGSBase, tinyvm.MSRPAT)
	if err != nil {
		t.Fatal(err)
	}
	return kvmaccess.Registers{
		RAX: r.RAX, RBX: r.RBX, RCX: r.RCX, RDX: r.RDX, RSI: r.RSI, RDI: r.RDI, RBP: r.RBP, RSP: r.RSP,
		R8: r.R8, R9: r.R9, R10: r.R10, R11: r.R11, R12: r.R12, R13: r.R13, R14: r.R14, R15: r.R15,
		RIP: r.RIP, RFLAGS: r.RFLAGS,
		CR0: s.CR0, CR2: s.CR2, CR3: s.CR3, CR4: s.CR4, CR8: s.CR8, EFER: s.EFER,
		CS: segmentOf(s.CS), DS: segmentOf(s.DS), ES: segmentOf(s.ES), FS: segmentOf(s.FS),
		GS: segmentOf(s.GS), SS: segmentOf(s.SS), TR: segmentOf(s.TR), LDTR: segmentOf(s.LDT),
		GDTR: kvmaccess.TableRegister{Base: s.GDT.Base, Limit: s.GDT.Limit},
		IDTR: kvmaccess.TableRegister{Base: s.IDT.Base, Limit: s.IDT.Limit},
		DR0:  d.DB[0], DR1: d.DB[1], DR2: d.DB[2], DR3: d.DB[3], DR6: d.DR6, DR7: d.DR7,
		STAR: m[0], LSTAR: m[1], CSTAR: m[2], SFMASK: m[3],
		SysenterCS: m[4], SysenterESP: m[5], SysenterEIP: m[6], KernelGSBase: m[7], PAT: m[8],
	}
}

// needCPUs fails a test on a host with too few CPUs.
func needCPUs(t *testing.T, n int) {
	t.Helper()
	text, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		t.Fatal(err)
	}
	var first, last int
	if _, err := fmt.Sscanf(string(text), "%d-%d", &first, &last); err != nil || last-first+1 < n {
		t.Fatalf("the host's CPUs are %q: this needs %d of them, as 'vmfixture run --smp %d' gives it", text, n, n)
	}
}
