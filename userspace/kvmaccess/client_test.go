// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/genetlink/genltest"
	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nltest"
	"golang.org/x/sys/unix"
)

var testFamily = genetlink.Family{ID: 21, Version: genlVersion, Name: genlName}

// newClient is a client of a module that fn plays.
func newClient(t testing.TB, fn genltest.Func) *Client {
	t.Helper()
	return newClientOf(t, func() (*genetlink.Conn, error) {
		return genltest.Dial(genltest.ServeFamily(testFamily, fn)), nil
	})
}

func newClientOf(t testing.TB, dial func() (*genetlink.Conn, error)) *Client {
	t.Helper()
	c, err := initClient(dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func message(cmd uint8, attrs []byte) genetlink.Message {
	return genetlink.Message{Header: genetlink.Header{Command: cmd, Version: genlVersion}, Data: attrs}
}

func TestNewWithoutModule(t *testing.T) {
	_, err := initClient(func() (*genetlink.Conn, error) {
		return genltest.Dial(func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			return nil, genltest.Error(int(unix.ENOENT))
		}), nil
	})
	if !errors.Is(err, ErrNoModule) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "modprobe kvmaccess") {
		t.Errorf("error %v", err)
	}
}

func TestNewOtherVersion(t *testing.T) {
	for module, update := range map[uint8]string{0: "update the module", 2: "update this program"} {
		family := testFamily
		family.Version = module
		_, err := initClient(func() (*genetlink.Conn, error) {
			return genltest.Dial(genltest.ServeFamily(family, nil)), nil
		})
		var e *VersionError
		if !errors.As(err, &e) || e.Module != module || e.Client != genlVersion || !strings.Contains(err.Error(), update) {
			t.Errorf("version %d: %v", module, err)
		}
	}
}

// TestRequests checks what each method asks for, and that it returns what the
// module says.
func TestRequests(t *testing.T) {
	s := testSpec(t)
	const do, dump = netlink.Request, netlink.Request | netlink.Dump
	tableReply := specMessage(t, s, "table")
	for _, tt := range []struct {
		name  string
		call  func(context.Context, *Client) (any, error)
		cmd   uint8
		flags netlink.HeaderFlags
		req   []byte
		set   string
		wrap  func(any) any // what a call makes of what the parser makes
	}{
		{"Info", func(ctx context.Context, c *Client) (any, error) { return c.Info(ctx) }, cmdInfo, do, nil, "info", nil},
		{"VMs", func(ctx context.Context, c *Client) (any, error) { return c.VMs(ctx) }, cmdVMGet, dump, nil, "vm",
			func(v any) any { return []VM{v.(VM), v.(VM)} }},
		{"VM", func(ctx context.Context, c *Client) (any, error) { return c.VM(ctx, 3) }, cmdVMGet, do, u64(aVMID, 3), "vm", nil},
		{"Memslots", func(ctx context.Context, c *Client) (any, error) { return c.Memslots(ctx, 3) }, cmdMemslotGet, dump, u64(aMemslotVMID, 3), "memslot",
			func(v any) any { return []Memslot{v.(Memslot), v.(Memslot)} }},
		{"Memslot", func(ctx context.Context, c *Client) (any, error) { return c.Memslot(ctx, 3, 1, 509) }, cmdMemslotGet, do,
			join(u64(aMemslotVMID, 3), u32(aMemslotASID, 1), u32(aMemslotSlot, 509)), "memslot", nil},
		{"VCPUs", func(ctx context.Context, c *Client) (any, error) { return c.VCPUs(ctx, 3) }, cmdVCPUGet, dump, u64(aVCPUVMID, 3), "vcpu",
			func(v any) any { return []VCPU{v.(VCPU), v.(VCPU)} }},
		{"VCPU", func(ctx context.Context, c *Client) (any, error) { return c.VCPU(ctx, 3, 1) }, cmdVCPUGet, do, join(u64(aVCPUVMID, 3), u32(aVCPUID, 1)), "vcpu", nil},
		{"Table", func(ctx context.Context, c *Client) (any, error) { return c.Table(ctx, 3, 1, TableIDT) }, cmdTableGet, do,
			join(u64(aTableVMID, 3), u32(aTableVCPUID, 1), u32(aTableKind, 2)), "table", nil},
		{"Stats", func(ctx context.Context, c *Client) (any, error) { return c.Stats(ctx) }, cmdStats, do, nil, "stats", nil},
		{"VMStats", func(ctx context.Context, c *Client) (any, error) { return c.VMStats(ctx, 3) }, cmdStats, do, u64(aStatsVMID, 3), "stats", nil},
		{"StatsPerVM", func(ctx context.Context, c *Client) (any, error) { return c.StatsPerVM(ctx) }, cmdStats, dump, nil, "stats",
			func(v any) any { return []Stats{v.(Stats), v.(Stats)} }},
		{"ReadPhysical", func(ctx context.Context, c *Client) (any, error) {
			return c.ReadPhysical(ctx, 7, Range{0x1000, 8}, Range{0x1000, 8})
		}, cmdMemRead, do, join(u64(aMemVMID, 7), appendRange(nil, aMemRange, Range{0x1000, 8}), appendRange(nil, aMemRange, Range{0x1000, 8})), "mem", nil},
		{"ReadVirtual", func(ctx context.Context, c *Client) (any, error) {
			return c.ReadVirtual(ctx, 7, 1, 0, Range{0x1000, 8}, Range{0x1000, 8})
		}, cmdMemRead, do, join(u64(aMemVMID, 7), u32(aMemVCPUID, 1), appendRange(nil, aMemRange, Range{0x1000, 8}), appendRange(nil, aMemRange, Range{0x1000, 8})), "mem", nil},
		{"ReadVirtual by root", func(ctx context.Context, c *Client) (any, error) {
			return c.ReadVirtual(ctx, 7, 1, 0x2a000, Range{0x1000, 8}, Range{0x1000, 8})
		}, cmdMemRead, do, join(u64(aMemVMID, 7), u32(aMemVCPUID, 1), u64(aMemRoot, 0x2a000), appendRange(nil, aMemRange, Range{0x1000, 8}), appendRange(nil, aMemRange, Range{0x1000, 8})), "mem", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := wires[slices.IndexFunc(wires, func(w wire) bool { return w.set == tt.set })]
			attrs := specMessage(t, s, tt.set)
			if tt.set == "table" {
				attrs = tableReply
			}
			want, err := w.parse(attrs)
			if err != nil {
				t.Fatal(err)
			}
			if tt.wrap != nil {
				want = tt.wrap(want)
			}
			var got []byte
			c := newClient(t, genltest.CheckRequest(testFamily.ID, tt.cmd, tt.flags, func(g genetlink.Message, n netlink.Message) ([]genetlink.Message, error) {
				got = bytes.Clone(g.Data)
				if g.Header.Version != genlVersion {
					t.Errorf("version %d", g.Header.Version)
				}
				replies := []genetlink.Message{message(tt.cmd, attrs)}
				if tt.flags == dump {
					replies = append(replies, replies[0])
				}
				return replies, nil
			}))
			v, err := tt.call(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, tt.req) {
				t.Errorf("asked % x, want % x", got, tt.req)
			}
			if diff := cmp.Diff(want, v); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	for _, want := range reasons {
		errno := want.(*reason).errno
		c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
			return nil, genltest.Error(int(errno))
		})
		_, err := c.VCPU(t.Context(), 3, 1)
		var e *Error
		if !errors.As(err, &e) || !errors.Is(err, want) || !errors.Is(err, errno) {
			t.Fatalf("%v: got %v", want, err)
		}
		if e.Op != "vcpu_get" || e.VM != 3 {
			t.Errorf("%v: got %+v", want, e)
		}
		for _, other := range reasons {
			if other != want && errors.Is(err, other) {
				t.Errorf("%v is also %v", err, other)
			}
		}
		if text := strings.TrimPrefix(want.Error(), "kvmaccess: "); !strings.Contains(err.Error(), text) {
			t.Errorf("%q does not say %q", err, text)
		}
	}
	if !errors.Is(ErrPermission, fs.ErrPermission) || !errors.Is(error(&Error{Errno: unix.EPERM}), fs.ErrPermission) {
		t.Error("EPERM is no fs.ErrPermission")
	}
}

func TestMalformedReplies(t *testing.T) {
	s := testSpec(t)
	vm := specMessage(t, s, "vm")
	for _, tt := range []struct {
		name    string
		replies []genetlink.Message
		err     string
	}{
		{"none", nil, "0 replies"},
		{"two", []genetlink.Message{message(cmdVMGet, vm), message(cmdVMGet, vm)}, "2 replies"},
		{"another command", []genetlink.Message{message(cmdInfo, vm)}, "reply of command 1"},
		{"truncated", []genetlink.Message{message(cmdVMGet, vm[:len(vm)-8])}, "is missing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
				if tt.replies == nil {
					return nil, io.EOF
				}
				return tt.replies, nil
			})
			if _, err := c.VM(t.Context(), 3); err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want one with %q", err, tt.err)
			}
		})
	}
	c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return []genetlink.Message{message(cmdVMGet, vm), message(cmdInfo, vm)}, nil
	})
	if _, err := c.VMs(t.Context()); err == nil || !strings.Contains(err.Error(), "message of command 1 in the dump of vm_get") {
		t.Errorf("dump: %v", err)
	}
}

// dumpServer serves the family, and dumps whose message i carries flags(n, i)
// in the n-th dump.
func dumpServer(t *testing.T, attrs []byte, flags func(n, i int) netlink.HeaderFlags) func() (*genetlink.Conn, error) {
	t.Helper()
	var dumps atomic.Int32
	return func() (*genetlink.Conn, error) {
		return genetlink.NewConn(nltest.Dial(func(reqs []netlink.Message) ([]netlink.Message, error) {
			req := reqs[0]
			if req.Header.Type == unix.GENL_ID_CTRL {
				b := join([]byte{unix.CTRL_CMD_NEWFAMILY, 1, 0, 0}, attr(unix.CTRL_ATTR_FAMILY_ID, []byte{byte(testFamily.ID), 0}),
					u32(unix.CTRL_ATTR_VERSION, genlVersion), text(unix.CTRL_ATTR_FAMILY_NAME, genlName))
				return []netlink.Message{{Header: netlink.Header{Sequence: req.Header.Sequence, PID: req.Header.PID}, Data: b}}, nil
			}
			n := int(dumps.Add(1)) - 1
			var msgs []netlink.Message
			for i := range 3 {
				msgs = append(msgs, netlink.Message{
					Header: netlink.Header{Type: netlink.HeaderType(testFamily.ID), Flags: netlink.Multi | flags(n, i), Sequence: req.Header.Sequence, PID: req.Header.PID},
					Data:   join([]byte{cmdVMGet, genlVersion, 0, 0}, attrs),
				})
			}
			return append(msgs, netlink.Message{Header: netlink.Header{Type: netlink.Done, Flags: netlink.Multi, Sequence: req.Header.Sequence, PID: req.Header.PID}, Data: make([]byte, 4)}), nil
		})), nil
	}
}

func TestDumpInterrupted(t *testing.T) {
	vm := specMessage(t, testSpec(t), "vm")
	t.Run("twice", func(t *testing.T) {
		dumps := 0
		c := newClientOf(t, dumpServer(t, vm, func(n, i int) netlink.HeaderFlags {
			dumps = n + 1
			if n < 2 && i == 1+n {
				return netlink.DumpInterrupted
			}
			return 0
		}))
		vms, err := c.VMs(t.Context())
		if err != nil || len(vms) != 3 || dumps != 3 {
			t.Errorf("%d VMs after %d dumps, %v; want 3 after 3", len(vms), dumps, err)
		}
	})
	t.Run("always", func(t *testing.T) {
		dumps := 0
		c := newClientOf(t, dumpServer(t, vm, func(n, i int) netlink.HeaderFlags {
			dumps = n + 1
			return netlink.DumpInterrupted
		}))
		_, err := c.VMs(t.Context())
		if !errors.Is(err, ErrUnsettled) || dumps != maxDumps {
			t.Errorf("%v after %d dumps", err, dumps)
		}
	})
}

func TestNoVMs(t *testing.T) {
	c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) { return nil, io.EOF })
	if vms, err := c.VMs(t.Context()); err != nil || vms == nil || len(vms) != 0 {
		t.Errorf("%#v, %v; want none", vms, err)
	}
}

// A dump of a VM that is gone is refused in place of its first message.
func TestDumpRefused(t *testing.T) {
	serve := genltest.ServeFamily(testFamily, nil)
	c := newClientOf(t, func() (*genetlink.Conn, error) {
		return genetlink.NewConn(nltest.Dial(func(reqs []netlink.Message) ([]netlink.Message, error) {
			req := reqs[0]
			if req.Header.Type == unix.GENL_ID_CTRL {
				msgs, err := serve(genetlink.Message{Header: genetlink.Header{Command: unix.CTRL_CMD_GETFAMILY}, Data: req.Data[genlHeader:]}, req)
				if err != nil {
					return nil, err
				}
				b, err := msgs[0].MarshalBinary()
				return []netlink.Message{{Header: netlink.Header{Sequence: req.Header.Sequence, PID: req.Header.PID}, Data: b}}, err
			}
			m := refusal(req.Header.Sequence, unix.ENOENT, "no VM has this id", 0)
			return []netlink.Message{{
				Header: netlink.Header{Type: netlink.Error, Flags: netlink.AcknowledgeTLVs, Sequence: req.Header.Sequence, PID: req.Header.PID},
				Data:   m[nlHeader:],
			}}, nil
		})), nil
	})
	_, err := c.Memslots(t.Context(), 3)
	var e *Error
	if !errors.As(err, &e) || !errors.Is(err, ErrNoVM) || e.Message != "no VM has this id" || e.VM != 3 {
		t.Errorf("error %v", err)
	}
}

func TestCanceledContext(t *testing.T) {
	c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		t.Error("asked")
		return nil, genltest.Error(int(unix.EIO))
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Info(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Info: %v", err)
	}
	if _, err := c.VMs(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("VMs: %v", err)
	}
	if _, err := Subscribe(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Subscribe: %v", err)
	}
}

func TestClosedClient(t *testing.T) {
	c := newClient(t, nil)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Info(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("error %v", err)
	}
}

// TestModuleGone: ENOENT without an explanation comes from generic netlink,
// when the family's number is nobody's (any more).
func TestModuleGone(t *testing.T) {
	for _, tt := range []struct {
		name  string
		later func() genltest.Func
		want  error
	}{
		{"unloaded", func() genltest.Func {
			return func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
				return nil, genltest.Error(int(unix.ENOENT))
			}
		}, ErrNoModule},
		{"reloaded", func() genltest.Func {
			f := testFamily
			f.ID++
			return genltest.ServeFamily(f, nil)
		}, ErrReloaded},
		{"neither", func() genltest.Func { return genltest.ServeFamily(testFamily, nil) }, ErrNoVM},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dials := 0
			c := newClientOf(t, func() (*genetlink.Conn, error) {
				if dials++; dials > 1 {
					return genltest.Dial(tt.later()), nil
				}
				return genltest.Dial(genltest.ServeFamily(testFamily, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
					return nil, genltest.Error(int(unix.ENOENT))
				})), nil
			})
			if _, err := c.VM(t.Context(), 3); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

func TestModuleGoing(t *testing.T) {
	c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		return nil, genltest.Error(int(unix.EPROTONOSUPPORT))
	})
	if _, err := c.VM(t.Context(), 3); !errors.Is(err, ErrNoModule) {
		t.Errorf("error %v, want %v", err, ErrNoModule)
	}
}

func TestConcurrentUse(t *testing.T) {
	s := testSpec(t)
	vcpu, vm := specMessage(t, s, "vcpu"), specMessage(t, s, "vm")
	c := newClient(t, func(g genetlink.Message, _ netlink.Message) ([]genetlink.Message, error) {
		if g.Header.Command == cmdVMGet {
			return []genetlink.Message{message(cmdVMGet, vm), message(cmdVMGet, vm)}, nil
		}
		return []genetlink.Message{message(cmdVCPUGet, vcpu)}, nil
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				if v, err := c.VCPU(t.Context(), 1, 0); err != nil || v.PAT == 0 {
					t.Error(v.PAT, err)
				}
				if vms, err := c.VMs(t.Context()); err != nil || len(vms) != 2 {
					t.Error(vms, err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(c.idle); n == 0 || n > maxIdle {
		t.Errorf("%d sockets are kept", n)
	}
}

// guestMemory plays MEM_READ: byte i of guest memory is pattern(i), and holes
// cannot be read.
type guestMemory struct {
	t        testing.TB
	holes    map[uint64]unix.Errno // by page
	requests int
	ranges   int
}

func pattern(gpa uint64) byte { return byte(gpa ^ gpa>>8 ^ gpa>>16) }

func (m *guestMemory) read(address uint64, n uint32) (data []byte, errno unix.Errno, fault uint64) {
	for i := range uint64(n) {
		a := address + i
		if errno := m.holes[a>>12]; errno != 0 {
			return nil, errno, a
		}
		data = append(data, pattern(a))
	}
	return data, 0, 0
}

func (m *guestMemory) serve(g genetlink.Message, _ netlink.Message) ([]genetlink.Message, error) {
	m.requests++
	var out []byte
	total, count, failed, first := 0, 0, 0, unix.Errno(0)
	for a := (attrs{set: "request", b: g.Data}); a.next(); {
		if a.typ != aMemRange {
			continue
		}
		n := a.nest("range")
		n.next()
		address := n.u64()
		n.next()
		length := n.u32()
		if err := n.finish(aRangeAddress, aRangeLength); err != nil {
			m.t.Error(err)
		}
		count++
		total += int(length)
		data, errno, fault := m.read(address, length)
		if errno != 0 {
			if failed++; first == 0 {
				first = errno
			}
			out = append(out, nest(aMemRange, u64(aRangeAddress, address), u32(aRangeLength, length), u32(aRangeError, uint32(errno)), u64(aRangeFault, fault))...)
			continue
		}
		out = append(out, nest(aMemRange, u64(aRangeAddress, address), u32(aRangeLength, length), attr(aRangeData, data))...)
	}
	m.ranges += count
	if count > MaxRanges || total > MaxBytes {
		return nil, genltest.Error(int(unix.E2BIG))
	}
	if failed == count {
		return nil, genltest.Error(int(first))
	}
	return []genetlink.Message{message(cmdMemRead, out)}, nil
}

func checkData(t *testing.T, d RangeData) {
	t.Helper()
	if d.Err != nil || len(d.Data) != int(d.Length) {
		t.Errorf("%#x: %d bytes of %d, %v", d.Address, len(d.Data), d.Length, d.Err)
		return
	}
	for i, b := range d.Data {
		if b != pattern(d.Address+uint64(i)) {
			t.Errorf("%#x: wrong byte at +%#x", d.Address, i)
			return
		}
	}
}

func TestReadSplits(t *testing.T) {
	for _, tt := range []struct {
		name     string
		ranges   []Range
		requests int
	}{
		{"one byte", []Range{{5, 1}}, 1},
		{"the most of one request", []Range{{0x1000, MaxBytes}}, 1},
		{"a byte more", []Range{{0x1000, MaxBytes + 1}}, 2},
		{"many bytes", []Range{{0x1003, 10*MaxBytes - 7}, {0x10, 8}}, 11},
		{"64 ranges", slices.Repeat([]Range{{0x1000, 16}}, 64), 1},
		{"65 ranges", slices.Repeat([]Range{{0x1000, 16}}, 65), 2},
		{"ranges across requests", slices.Repeat([]Range{{0x2001, 20000}}, 7), 5},
		{"last byte of the address space", []Range{{1<<64 - 16, 16}}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &guestMemory{t: t}
			c := newClient(t, m.serve)
			got, err := c.ReadPhysical(t.Context(), 1, tt.ranges...)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(tt.ranges) {
				t.Fatalf("%d results of %d", len(got), len(tt.ranges))
			}
			for i, d := range got {
				if d.Range != tt.ranges[i] {
					t.Errorf("result %d is of %+v", i, d.Range)
				}
				checkData(t, d)
			}
			if m.requests != tt.requests {
				t.Errorf("%d requests, want %d", m.requests, tt.requests)
			}
			// Again, into the same buffers.
			if err := c.ReadVirtualInto(t.Context(), 1, 0, 0, got); err != nil {
				t.Fatal(err)
			}
			for _, d := range got {
				checkData(t, d)
			}
		})
	}
}

func TestReadFailures(t *testing.T) {
	holes := map[uint64]unix.Errno{0x10: unix.EFAULT, 0x20: unix.ENODATA, 0x30: unix.EADDRNOTAVAIL}
	type outcome struct {
		Errno   unix.Errno
		Address uint64
	}
	for _, tt := range []struct {
		name   string
		ranges []Range
		want   []outcome
		err    error
	}{
		{"one of two", []Range{{0x1000, 8}, {0x0fff8, 16}}, []outcome{{}, {unix.EFAULT, 0x10000}}, nil},
		{"the only one", []Range{{0x20000, 8}}, []outcome{{unix.ENODATA, 0x20000}}, ErrNotResident},
		{"all, each with its own reason", []Range{{0x30000, 8}, {0x20000, 8}, {0x10000, 8}},
			[]outcome{{unix.EADDRNOTAVAIL, 0x30000}, {unix.ENODATA, 0x20000}, {unix.EFAULT, 0x10000}}, ErrNotMapped},
		{"part of a large one", []Range{{0x10, 3 * MaxBytes}, {0x2000, 8}}, []outcome{{unix.EFAULT, 0x10 + 2*MaxBytes}, {}}, nil},
		{"nothing left of a large one", []Range{{0x10000, MaxBytes + 1}}, []outcome{{unix.EFAULT, 0x10000}}, ErrNoMemslot},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := &guestMemory{t: t, holes: holes}
			c := newClient(t, m.serve)
			got, err := c.ReadPhysical(t.Context(), 1, tt.ranges...)
			if !errors.Is(err, tt.err) {
				t.Errorf("error %v, want %v", err, tt.err)
			}
			var have []outcome
			for _, d := range got {
				var e *Error
				if errors.As(d.Err, &e) {
					if len(d.Data) != 0 {
						t.Errorf("%#x: both data and %v", d.Address, d.Err)
					}
					have = append(have, outcome{e.Errno, e.Address})
					continue
				}
				checkData(t, d)
				have = append(have, outcome{})
			}
			if diff := cmp.Diff(tt.want, have); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestReadInvalid(t *testing.T) {
	c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		t.Error("asked")
		return nil, genltest.Error(int(unix.EIO))
	})
	for name, ranges := range map[string][]Range{
		"no ranges":                    nil,
		"length 0":                     {{0x1000, 8}, {0x2000, 0}},
		"end of the address space":     {{1<<64 - 16, 17}},
		"far end of the address space": {{1 << 63, 8}, {1<<64 - 1, 1 << 31}},
	} {
		if got, err := c.ReadPhysical(t.Context(), 1, ranges...); !errors.Is(err, ErrInvalid) || got != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// A request that fails for another reason than its ranges fails whole.
func TestReadRefused(t *testing.T) {
	n := 0
	c := newClient(t, func(genetlink.Message, netlink.Message) ([]genetlink.Message, error) {
		n++
		return nil, genltest.Error(int(unix.ESHUTDOWN))
	})
	if got, err := c.ReadPhysical(t.Context(), 1, Range{1, 1}, Range{2, 1}); !errors.Is(err, ErrDying) || got != nil || n != 1 {
		t.Errorf("%v, %v after %d requests", got, err, n)
	}
}

func TestTableInParts(t *testing.T) {
	table := make([]byte, 0x10000)
	for i := range table {
		table[i] = pattern(uint64(i))
	}
	for _, tt := range []struct {
		name  string
		limit int
		moves int  // how often the base changes while it is read
		short bool // and with it the limit, to less than what has been read
		err   error
	}{
		{"gdt", 127, 0, false, nil},
		{"64 KiB", 0xffff, 0, false, nil},
		{"moved once", 0xffff, 1, false, nil},
		{"moved again and again", 0xffff, 1000, false, ErrUnsettled},
		{"shortened once", 0xffff, 1, true, nil},
		{"shortened again and again", 0xffff, 1000, true, ErrUnsettled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base := uint64(0xfffffe0000000000)
			moves := 0
			c := newClient(t, func(g genetlink.Message, _ netlink.Message) ([]genetlink.Message, error) {
				offset := uint32(0)
				for a := (attrs{b: g.Data}); a.next(); {
					if a.typ == aTableOffset {
						offset = a.u32()
					}
				}
				if offset > 0 && moves < tt.moves {
					moves++
					base += 0x1000
					if tt.short {
						return nil, genltest.Error(int(unix.EINVAL))
					}
				}
				data := table[offset:min(tt.limit+1, int(offset)+MaxBytes)]
				return []genetlink.Message{message(cmdTableGet, join(u64(aTableVMID, 1), u32(aTableVCPUID, 0), u32(aTableKind, 1),
					u32(aTableOffset, offset), u32(aTableLength, uint32(len(data))), u64(aTableBase, base), u32(aTableLimit, uint32(tt.limit)),
					attr(aTableData, data), u32(aTableCondition, 4)))}, nil
			})
			got, err := c.Table(t.Context(), 1, 0, TableGDT)
			if tt.err != nil {
				if !errors.Is(err, tt.err) {
					t.Errorf("error %v, want %v", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := Table{VM: 1, Kind: TableGDT, Base: base, Limit: uint16(tt.limit), Data: table[:tt.limit+1], Condition: ConditionHalted}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// memRaw answers each write with a copy of reply, as the kernel would: at once.
type memRaw struct {
	syscall.RawConn
	fds   [2]int
	reply []byte
}

// newLoop returns a client whose one socket answers every request with attrs.
// It is as near to the kernel's work as a test comes without a module: two
// system calls a request.
func newLoop(t testing.TB, op uint8, attrs []byte) *Client {
	t.Helper()
	q := newFakeKernel(t, nil)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
	q.raw = &memRaw{fds: fds, reply: reply(testFamily.ID, op, 0, attrs)}
	return &Client{family: testFamily, idle: []*conn{q}}
}

func (r *memRaw) Write(f func(uintptr) bool) error {
	var req [4096]byte
	f(uintptr(r.fds[0]))
	n, err := unix.Read(r.fds[1], req[:])
	if err != nil {
		return err
	}
	if n < nlHeader {
		return fmt.Errorf("request of %d bytes", n)
	}
	binary.NativeEndian.PutUint32(r.reply[8:], binary.NativeEndian.Uint32(req[8:]))
	_, err = unix.Write(r.fds[1], r.reply)
	return err
}

func (r *memRaw) Read(f func(uintptr) bool) error {
	if !f(uintptr(r.fds[0])) {
		return errors.New("would block")
	}
	return nil
}

// periodic is what the monitor asks for each period.
func periodic(t testing.TB) (vcpu *Client, read *Client, ranges []RangeData) {
	s := testSpec(t)
	ranges = []RangeData{{Range: Range{0xfffffe0000001000, 128}}, {Range: Range{0xfffffe0000000000, 4096}}, {Range: Range{0xffffffff82000000, 3624}}}
	var b []byte
	for _, r := range ranges {
		b = append(b, nest(aMemRange, u64(aRangeAddress, r.Address), u32(aRangeLength, r.Length), attr(aRangeData, make([]byte, r.Length)))...)
	}
	return newLoop(t, cmdVCPUGet, specMessage(t, s, "vcpu")), newLoop(t, cmdMemRead, b), ranges
}

// TestAllocations keeps the requests of each period from producing garbage.
func TestAllocations(t *testing.T) {
	vcpu, read, ranges := periodic(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	check := func(name string, limit float64, f func()) {
		if n := testing.AllocsPerRun(100, f); n > limit {
			t.Errorf("%s: %v allocations, want at most %v", name, n, limit)
		}
	}
	check("VCPU", 8, func() {
		if _, err := vcpu.VCPU(ctx, 1, 0); err != nil {
			t.Fatal(err)
		}
	})
	check("ReadVirtualInto", 8, func() {
		if err := read.ReadVirtualInto(ctx, 1, 0, 0, ranges); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkVCPU(b *testing.B) {
	c, _, _ := periodic(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.VCPU(b.Context(), 1, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadVirtual(b *testing.B) {
	_, c, ranges := periodic(b)
	list := make([]Range, len(ranges))
	for i, r := range ranges {
		list[i] = r.Range
	}
	b.Run("new", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.ReadVirtual(b.Context(), 1, 0, 0, list...); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("into", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := c.ReadVirtualInto(b.Context(), 1, 0, 0, ranges); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkParseVCPU(b *testing.B) {
	m := specMessage(b, testSpec(b), "vcpu")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseVCPU(m); err != nil {
			b.Fatal(err)
		}
	}
}
