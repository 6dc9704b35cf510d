// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Numbers of kmod/uapi/kvmaccess.h: these tests speak to the module past the
// client, which refuses some of this by itself.
const (
	cmdVMGet, cmdVCPUGet, cmdTableGet, cmdMemRead = 2, 4, 5, 6
	cmdWatchNew, cmdWatchAdd                      = 10, 11
	cmdWatchDel, cmdWatchGet, cmdWatchEvent       = 12, 13, 14

	aVMID                                     = 2
	aVCPUVMID, aVCPUID                        = 2, 3
	aTableVMID, aTableVCPUID, aTableKind      = 2, 3, 4
	aTableOffset, aTableLength                = 5, 6
	aMemVMID, aMemVCPUID, aMemRoot, aMemRange = 2, 3, 4, 5
	aRangeAddress, aRangeLength               = 2, 3
	aWatchID, aWatchVMID, aWatchPeriod        = 2, 3, 4
	aWatchItem                                = 7
	aItemCookie, aItemKind, aItemGPA          = 2, 3, 4
	aItemValue, kindEntry                     = 6, 2
	aEventLost, aEventCookie                  = 8, 9
	unknownAttribute                          = 200
)

// module is a connection without a client's care.
type module struct {
	*genetlink.Conn
	family genetlink.Family
}

func dialModule(t *testing.T) module {
	t.Helper()
	conn, err := genetlink.Dial(&netlink.Config{Strict: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	family, err := conn.GetFamily("kvmaccess")
	if err != nil {
		t.Fatal(err)
	}
	return module{conn, family}
}

func (m module) request(t *testing.T, command uint8, fill func(*netlink.AttributeEncoder)) genetlink.Message {
	t.Helper()
	e := netlink.NewAttributeEncoder()
	fill(e)
	data, err := e.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return genetlink.Message{Header: genetlink.Header{Command: command, Version: m.family.Version}, Data: data}
}

// ask sends one request and returns what came of it.
func (m module) ask(t *testing.T, command uint8, flags netlink.HeaderFlags, fill func(*netlink.AttributeEncoder)) error {
	t.Helper()
	_, err := m.Execute(m.request(t, command, fill), m.family.ID, netlink.Request|flags)
	return err
}

// answer sends one request and returns the answer, and the events before it.
func (m module) answer(t *testing.T, command uint8, fill func(*netlink.AttributeEncoder)) (genetlink.Message, []genetlink.Message) {
	t.Helper()
	sent, err := m.Send(m.request(t, command, fill), m.family.ID, netlink.Request)
	if err != nil {
		t.Fatal(err)
	}
	var events []genetlink.Message
	for {
		got, headers, err := m.Receive()
		if err != nil {
			t.Fatal(err)
		}
		for i, g := range got {
			if headers[i].Header.Sequence == sent.Header.Sequence {
				return g, events
			}
			events = append(events, g)
		}
	}
}

func ranges(n int, address uint64, length uint32) func(*netlink.AttributeEncoder) {
	return func(e *netlink.AttributeEncoder) {
		for range n {
			e.Nested(aMemRange, func(e *netlink.AttributeEncoder) error {
				e.Uint64(aRangeAddress, address)
				e.Uint32(aRangeLength, length)
				return nil
			})
		}
	}
}

func TestBadRequests(t *testing.T) {
	c := newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	p, err := g.Pages(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	id := uint64(vm.ID)
	type encoder = *netlink.AttributeEncoder
	memory := func(vm uint64, vcpu int, rest func(encoder)) func(encoder) {
		return func(e encoder) {
			e.Uint64(aMemVMID, vm)
			if vcpu >= 0 {
				e.Uint32(aMemVCPUID, uint32(vcpu))
			}
			rest(e)
		}
	}
	table := func(kind uint32, rest func(encoder)) func(encoder) {
		return func(e encoder) {
			e.Uint64(aTableVMID, id)
			e.Uint32(aTableVCPUID, 0)
			e.Uint32(aTableKind, kind)
			rest(e)
		}
	}
	nothing := func(encoder) {}
	m := dialModule(t)
	for _, tt := range []struct {
		name    string
		command uint8
		flags   netlink.HeaderFlags
		fill    func(encoder)
		want    unix.Errno
	}{
		{"no VM id", cmdVMGet, 0, nothing, unix.EINVAL},
		{"unknown VM", cmdVMGet, 0, func(e encoder) { e.Uint64(aVMID, 1<<40) }, unix.ENOENT},
		{"VM id of 4 bytes", cmdVMGet, 0, func(e encoder) { e.Uint32(aVMID, 1) }, unix.EINVAL},
		{"unknown attribute", cmdVMGet, 0, func(e encoder) { e.Uint64(aVMID, id); e.Uint32(unknownAttribute, 1) }, unix.EINVAL},
		{"vCPU of an unknown VM", cmdVCPUGet, 0, func(e encoder) { e.Uint64(aVCPUVMID, 1<<40); e.Uint32(aVCPUID, 0) }, unix.ENOENT},
		{"unknown vCPU", cmdVCPUGet, 0, func(e encoder) { e.Uint64(aVCPUVMID, id); e.Uint32(aVCPUID, 99) }, unix.ENXIO},
		{"no vCPU", cmdVCPUGet, 0, func(e encoder) { e.Uint64(aVCPUVMID, id) }, unix.EINVAL},
		{"vCPUs of an unknown VM", cmdVCPUGet, netlink.Dump, func(e encoder) { e.Uint64(aVCPUVMID, 1<<40) }, unix.ENOENT},
		{"no kind of table", cmdTableGet, 0, func(e encoder) { e.Uint64(aTableVMID, id); e.Uint32(aTableVCPUID, 0) }, unix.EINVAL},
		{"unknown kind of table", cmdTableGet, 0, table(7, nothing), unix.EINVAL},
		{"beyond the table", cmdTableGet, 0, table(2, func(e encoder) { e.Uint32(aTableOffset, 4096) }), unix.EINVAL},
		{"no bytes of a table", cmdTableGet, 0, table(2, func(e encoder) { e.Uint32(aTableLength, 0) }), unix.EINVAL},
		{"memory of an unknown VM", cmdMemRead, 0, memory(1<<40, -1, ranges(1, p.GPA, 8)), unix.ENOENT},
		{"no range", cmdMemRead, 0, memory(id, -1, nothing), unix.EINVAL},
		{"length 0", cmdMemRead, 0, memory(id, -1, ranges(1, p.GPA, 0)), unix.EINVAL},
		{"too many bytes", cmdMemRead, 0, memory(id, -1, ranges(1, p.GPA, kvmaccess.MaxBytes+1)), unix.E2BIG},
		{"too many bytes together", cmdMemRead, 0, memory(id, -1, ranges(3, p.GPA, kvmaccess.MaxBytes/2)), unix.E2BIG},
		{"too many ranges", cmdMemRead, 0, memory(id, -1, ranges(kvmaccess.MaxRanges+1, p.GPA, 8)), unix.E2BIG},
		{"in no memslot", cmdMemRead, 0, memory(id, -1, ranges(1, 1<<40, 8)), unix.EFAULT},
		{"beyond the address space", cmdMemRead, 0, memory(id, -1, ranges(1, 1<<63, 8)), unix.EFAULT},
		{"around the end of the address space", cmdMemRead, 0, memory(id, -1, ranges(1, 1<<64-4, 8)), unix.EINVAL},
		{"not canonical", cmdMemRead, 0, memory(id, 0, ranges(1, 1<<62, 8)), unix.EINVAL},
		{"not mapped", cmdMemRead, 0, memory(id, 0, ranges(1, p.Hole, 8)), unix.EADDRNOTAVAIL},
		{"by an unknown vCPU", cmdMemRead, 0, memory(id, 99, ranges(1, p.GVA, 8)), unix.ENXIO},
		{"root without a vCPU", cmdMemRead, 0, memory(id, -1, func(e encoder) {
			e.Uint64(aMemRoot, 0x1000)
			ranges(1, p.GVA, 8)(e)
		}), unix.EINVAL},
		{"root in no memslot", cmdMemRead, 0, memory(id, 0, func(e encoder) {
			e.Uint64(aMemRoot, 1<<40)
			ranges(1, p.GVA, 8)(e)
		}), unix.EFAULT},
		{"range without an address", cmdMemRead, 0, memory(id, -1, func(e encoder) {
			e.Nested(aMemRange, func(e encoder) error { e.Uint32(aRangeLength, 8); return nil })
		}), unix.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := m.ask(t, tt.command, tt.flags, tt.fill)
			var op *netlink.OpError
			if !errors.As(err, &op) {
				t.Fatalf("%v, want %v", err, tt.want)
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			if op.Message == "" {
				t.Errorf("%v comes without an explanation", err)
			}
			t.Logf("%v: %s", op.Err, op.Message)
		})
	}
	// After all that the module still serves.
	if err := m.ask(t, cmdVMGet, 0, func(e encoder) { e.Uint64(aVMID, id) }); err != nil {
		t.Error(err)
	}
}

// The client says the same in its own words.
func TestClientErrors(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	g := sharedGuest(t, "web1")
	vm := vmOf(t, c, g)
	p, err := g.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	physical := func(address uint64, length uint32) func() error {
		return func() error {
			r, err := c.ReadPhysical(ctx, vm.ID, kvmaccess.Range{Address: address, Length: length})
			if err == nil {
				err = r[0].Err
			}
			return err
		}
	}
	virtual := func(address uint64, length uint32) func() error {
		return func() error {
			r, err := c.ReadVirtual(ctx, vm.ID, 0, 0, kvmaccess.Range{Address: address, Length: length})
			if err == nil {
				err = r[0].Err
			}
			return err
		}
	}
	for _, tt := range []struct {
		name string
		do   func() error
		want error
	}{
		{"unknown VM", func() error { _, err := c.VM(ctx, 1<<40); return err }, kvmaccess.ErrNoVM},
		{"memslots of an unknown VM", func() error { _, err := c.Memslots(ctx, 1<<40); return err }, kvmaccess.ErrNoVM},
		{"unknown memslot", func() error { _, err := c.Memslot(ctx, vm.ID, 0, 12345); return err }, kvmaccess.ErrNoVCPU},
		{"unknown vCPU", func() error { _, err := c.VCPU(ctx, vm.ID, 77); return err }, kvmaccess.ErrNoVCPU},
		{"table of an unknown vCPU", func() error { _, err := c.Table(ctx, vm.ID, 77, kvmaccess.TableIDT); return err }, kvmaccess.ErrNoVCPU},
		{"statistics of an unknown VM", func() error { _, err := c.VMStats(ctx, 1<<40); return err }, kvmaccess.ErrNoVM},
		{"length 0", physical(p.GPA, 0), kvmaccess.ErrInvalid},
		{"in no memslot", physical(1<<40, 8), kvmaccess.ErrNoMemslot},
		{"not canonical", virtual(1<<62, 8), kvmaccess.ErrInvalid},
		{"not mapped", virtual(p.Hole, 8), kvmaccess.ErrNotMapped},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.do()
			if !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			t.Log(err)
		})
	}
}

// Without the module, the error says what to do; with it again, all is well.
func TestModuleAbsent(t *testing.T) {
	if err := unloadModule(0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := loadModule(); err != nil {
			t.Fatal(err)
		}
		if _, err := newClient(t).VMs(testContext(t)); err != nil {
			t.Error(err)
		}
	}()
	_, err := kvmaccess.New()
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "modprobe") {
		t.Errorf("%v, want an error that names modprobe", err)
	}
	if _, err := kvmaccess.Subscribe(testContext(t)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("subscribe: %v, want %v", err, os.ErrNotExist)
	}
}
