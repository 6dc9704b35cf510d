// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

func TestTables(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	for _, name := range []string{"web1", "db1"} {
		g := sharedGuest(t, name)
		vm := vmOf(t, c, g)
		cpus, err := g.CPUs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for i, in := range cpus {
			gdt, err := c.Table(ctx, vm.ID, uint32(i), kvmaccess.TableGDT)
			if err != nil {
				t.Fatal(err)
			}
			idt, err := c.Table(ctx, vm.ID, uint32(i), kvmaccess.TableIDT)
			if err != nil {
				t.Fatal(err)
			}
			if gdt.Base != in.GDTBase || gdt.Limit != in.GDTLimit {
				t.Errorf("%s CPU %d: GDT at %#x limit %#x, want %#x %#x", name, i, gdt.Base, gdt.Limit, in.GDTBase, in.GDTLimit)
			}
			if idt.Base != in.IDTBase || idt.Limit != in.IDTLimit {
				t.Errorf("%s CPU %d: IDT at %#x limit %#x, want %#x %#x", name, i, idt.Base, idt.Limit, in.IDTBase, in.IDTLimit)
			}
			if !bytes.Equal(idt.Data, in.IDT) {
				t.Errorf("%s CPU %d: IDT of %d bytes differs from the guest's own of %d", name, i, len(idt.Data), len(in.IDT))
			}
			// Entries 12 to 14 are the running thread's TLS.
			const tls, end = 12 * 8, 15 * 8
			if len(gdt.Data) != len(in.GDT) || !bytes.Equal(gdt.Data[:tls], in.GDT[:tls]) || !bytes.Equal(gdt.Data[end:], in.GDT[end:]) {
				t.Errorf("%s CPU %d: GDT\n%x\ndiffers from the guest's own\n%x", name, i, gdt.Data, in.GDT)
			}
		}
	}
}

func TestMemory(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	p, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	content := p.Content()
	for _, r := range []struct{ offset, length uint64 }{
		{0, 1}, {0, p.Size}, {7, 1}, {4095, 2}, {4090, 100}, {1, p.Size - 1}, {4096, 4096},
	} {
		want := content[r.offset : r.offset+r.length]
		physical, err := c.ReadPhysical(ctx, vm.ID, kvmaccess.Range{Address: p.GPA + r.offset, Length: uint32(r.length)})
		if err != nil {
			t.Fatal(err)
		}
		if physical[0].Err != nil || !bytes.Equal(physical[0].Data, want) {
			t.Errorf("gpa + %d, %d bytes: %v, %d bytes that differ", r.offset, r.length, physical[0].Err, len(physical[0].Data))
		}
		for vcpu := range uint32(vm.VCPUs) {
			virtual, err := c.ReadVirtual(ctx, vm.ID, vcpu, 0, kvmaccess.Range{Address: p.GVA + r.offset, Length: uint32(r.length)})
			if err != nil {
				t.Fatal(err)
			}
			if virtual[0].Err != nil || !bytes.Equal(virtual[0].Data, want) {
				t.Errorf("vCPU %d gva + %d, %d bytes: %v, %d bytes that differ", vcpu, r.offset, r.length, virtual[0].Err, len(virtual[0].Data))
			}
		}
	}
}

// A request of several ranges says of each what became of it.
func TestRangesPartlyBad(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	p, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.ReadVirtual(ctx, vm.ID, 0, 0,
		kvmaccess.Range{Address: p.GVA, Length: 16},
		kvmaccess.Range{Address: p.Hole, Length: 16},
		kvmaccess.Range{Address: p.GVA + 16, Length: 16},
	)
	if err != nil {
		t.Fatal(err)
	}
	content := p.Content()
	if !bytes.Equal(got[0].Data, content[:16]) || !bytes.Equal(got[2].Data, content[16:32]) {
		t.Errorf("good ranges beside a bad one: %+v", got)
	}
	if !errors.Is(got[1].Err, kvmaccess.ErrNotMapped) || len(got[1].Data) != 0 {
		t.Errorf("hole: %v, data %x; want %v and none", got[1].Err, got[1].Data, kvmaccess.ErrNotMapped)
	}
}

// More than one request's worth comes in one call.
func TestMemoryBeyondLimits(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	p, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	content := p.Content()
	var ranges []kvmaccess.Range
	for i := range 3 * kvmaccess.MaxRanges {
		ranges = append(ranges, kvmaccess.Range{Address: p.GPA + uint64(i), Length: 1000})
	}
	got, err := c.ReadPhysical(ctx, vm.ID, ranges...)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range got {
		if r.Err != nil || !bytes.Equal(r.Data, content[i:i+1000]) {
			t.Fatalf("range %d: %v, %d bytes that differ", i, r.Err, len(r.Data))
		}
	}
	// A megabyte in one range, against the VMM's own memory.
	memory := kvmaccess.NewMemory(c, vm)
	big := make([]byte, 1<<20)
	if err := memory.ReadPhysical(ctx, p.GPA&^(1<<20-1), big); err != nil {
		t.Fatal(err)
	}
	offset := p.GPA & (1<<20 - 1)
	if !bytes.Equal(big[offset:offset+p.Size], content) {
		t.Error("a megabyte read at once differs from the guest's pages in it")
	}
}

// symbol finds an address in the guest's own symbol list.
func symbol(t *testing.T, g *guest.Guest, name string) uint64 {
	t.Helper()
	text, err := g.Symbols(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		var address uint64
		var kind, n string
		if _, err := fmt.Sscanf(s.Text(), "%x %s %s", &address, &kind, &n); err != nil {
			t.Fatal(err)
		}
		if n == name {
			return address
		}
	}
	t.Fatalf("the guest has no symbol %s", name)
	return 0
}

func TestKernelByItsSymbols(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "db1")
	vm := vmOf(t, c, g)
	version, err := g.Ask(ctx, agent.Request{Op: agent.OpRead, Path: "/proc/version"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.ReadVirtual(ctx, vm.ID, 0, 0, kvmaccess.Range{Address: symbol(t, g, "linux_banner"), Length: uint32(len(version.Data))})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(version.Data), "Linux version ") || !bytes.Equal(got[0].Data, version.Data) {
		t.Errorf("linux_banner is %q, want %q", got[0].Data, version.Data)
	}
	v, err := c.VCPU(ctx, vm.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	if want := symbol(t, g, "entry_SYSCALL_64"); v.LSTAR != want {
		t.Errorf("LSTAR is %#x, entry_SYSCALL_64 %#x", v.LSTAR, want)
	}
}
