// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func testSpec(t testing.TB) spec {
	t.Helper()
	s, err := readSpec(mustRead(t, specPath))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestAttributeTypes gives each parser a message that the spec generates, and
// then the same with one thing wrong. It fails if a parser takes an attribute
// for another type than the spec does, or takes what it must refuse.
func TestAttributeTypes(t *testing.T) {
	s := testSpec(t)
	for _, w := range wires {
		t.Run(w.set, func(t *testing.T) {
			valid := specMessage(t, s, w.set)
			if _, err := w.parse(valid); err != nil {
				t.Fatalf("valid message: %v", err)
			}
			refuse := func(what string, b []byte) {
				t.Helper()
				if v, err := w.parse(b); err == nil {
					t.Errorf("%s: taken for %+v", what, v)
				} else if !strings.Contains(err.Error(), "malformed message from the module") {
					t.Errorf("%s: %v", what, err)
				}
			}
			attrsOf := func() []specAttr {
				for _, set := range s.Sets {
					if set.Name == w.set {
						return set.Attrs
					}
				}
				return nil
			}()
			parts := split(t, valid)
			change := func(i int, with []byte) []byte {
				c := slices.Clone(parts)
				c[i] = with
				return join(c...)
			}
			for i, p := range parts {
				a := attrsOf[attrType(p)-1]
				n := int(binary.NativeEndian.Uint16(p))
				data := p[attrHeader:n]
				used := !slices.Contains([]string{"mem vm-id", "mem vcpu-id", "mem root"}, w.set+" "+a.Name)

				if used {
					refuse(a.Name+" short", change(i, attr(attrType(p), data[:len(data)-1])))
					refuse(a.Name+" empty", change(i, attr(attrType(p), nil)))
					refuse(a.Name+" long", change(i, attr(attrType(p), append(slices.Clone(data), 1))))
				}
				if used && !a.Multi {
					refuse(a.Name+" twice", change(i, join(p, p)))
				}
				if a.Multi && w.set == "mem" {
					refuse(a.Name+" too often", change(i, join(p, p)))
				}
				switch missing := change(i, nil); {
				case !slices.Contains(w.optional, a.Name):
					refuse(a.Name+" missing", missing)
				default:
					if _, err := w.parse(missing); err != nil {
						t.Errorf("%s missing: %v", a.Name, err)
					}
				}
				cut := change(i, nil)
				refuse(a.Name+" beyond the end", join(cut, binary.NativeEndian.AppendUint16(nil, uint16(n+1)), p[2:n]))
				refuse(a.Name+" shorter than its header", join(cut, []byte{3, 0}, p[2:]))
				if a.Type == "nest" {
					refuse(a.Name+" cut off inside", change(i, nest(attrType(p), data[:len(data)-4])))
					refuse(a.Name+" with stray bytes", change(i, nest(attrType(p), data, []byte{1, 2})))
				}
			}
			refuse("stray bytes", join(valid, []byte{0, 0, 0}))
			// Newer modules may tell more.
			more := join(valid, u32(127, 1), u32(500, 1), text(499, "new"))
			if _, err := w.parse(more); err != nil {
				t.Errorf("unknown attributes: %v", err)
			}
			// The last attribute's padding may be left out.
			if _, err := w.parse(bytes.Clone(valid)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestParseVCPU checks that each register ends in the field of its name: the
// message has the attribute's number in each value.
func TestParseVCPU(t *testing.T) {
	v, err := parseVCPU(specMessage(t, testSpec(t), "vcpu"))
	if err != nil {
		t.Fatal(err)
	}
	num := func(typ uint64) uint64 { return typ<<32 | typ }
	if v.VM != VMID(num(aVCPUVMID)) || v.ID != aVCPUID || v.TID != aVCPUTID || v.Condition != aVCPUCondition ||
		v.Method != aVCPUMethod || v.CPU != aVCPUCPU || v.Time != time.Duration(num(aVCPUTime)) ||
		v.Duration != time.Duration(num(aVCPUDuration)) || v.Handler != time.Duration(num(aVCPUHandler)) ||
		v.Retries != aVCPURetries || v.Flags != aVCPUFlags || v.CPL != 3 {
		t.Errorf("got %+v", v)
	}
	// The fields of Registers are in the order of the attributes but for
	// CR2 and so on being grouped alike: compare by name.
	names := map[string]uint64{}
	for _, k := range mustHeader(t).Enums {
		for _, e := range k.Entries {
			if k.Prefix == "A_VCPU_" {
				names[strings.ReplaceAll(strings.TrimPrefix(e.Name, "A_VCPU_"), "_", "")] = uint64(e.Value)
			}
		}
	}
	seg := Segment{Selector: aSegmentSelector, Base: num(aSegmentBase), Limit: aSegmentLimit, Attrs: aSegmentAttrs}
	regs := reflect.ValueOf(v.Registers)
	if n := regs.NumField(); n != aVCPUPAT-aVCPURAX+1 {
		t.Errorf("Registers has %d fields, the contract %d", n, aVCPUPAT-aVCPURAX+1)
	}
	for i := range regs.NumField() {
		name := regs.Type().Field(i).Name
		typ, ok := names[strings.ToUpper(name)]
		if !ok {
			t.Errorf("no attribute for %s", name)
		}
		switch got := regs.Field(i).Interface().(type) {
		case uint64:
			if got != num(typ) {
				t.Errorf("%s = %#x, want that of attribute %d", name, got, typ)
			}
		case Segment:
			if got != seg {
				t.Errorf("%s = %+v, want %+v", name, got, seg)
			}
		case TableRegister:
			if got.Base != seg.Base || got.Limit != uint16(seg.Limit) {
				t.Errorf("%s = %+v", name, got)
			}
		}
	}

	t.Run("table register with base and limit only", func(t *testing.T) {
		m := specMessage(t, testSpec(t), "vcpu")
		parts := split(t, m)
		for i, p := range parts {
			if attrType(p) == aVCPUGDTR {
				parts[i] = nest(aVCPUGDTR, u64(aSegmentBase, 0xfffffe0000001000), u32(aSegmentLimit, 0x7f))
			}
		}
		v, err := parseVCPU(join(parts...))
		if err != nil {
			t.Fatal(err)
		}
		if want := (TableRegister{Base: 0xfffffe0000001000, Limit: 0x7f}); v.GDTR != want {
			t.Errorf("GDTR = %+v, want %+v", v.GDTR, want)
		}
		parts[len(parts)-1] = u64(aVCPUPAT, 1)
		for i, p := range parts {
			if attrType(p) == aVCPUGDTR {
				parts[i] = nest(aVCPUGDTR, u64(aSegmentBase, 1))
			}
		}
		if _, err := parseVCPU(join(parts...)); err == nil {
			t.Error("GDTR without a limit was taken")
		}
	})
	t.Run("no CPU", func(t *testing.T) {
		parts := split(t, specMessage(t, testSpec(t), "vcpu"))
		parts = slices.DeleteFunc(parts, func(p []byte) bool { return attrType(p) == aVCPUCPU })
		if v, err := parseVCPU(join(parts...)); err != nil || v.CPU != -1 {
			t.Errorf("CPU = %d, %v; want -1", v.CPU, err)
		}
	})
}

func TestParseValues(t *testing.T) {
	for _, tt := range []struct {
		name  string
		b     []byte
		parse func([]byte) (any, error)
		want  any
		err   string
	}{
		{
			name: "info",
			b: join(text(aInfoVersion, "1.2"), u32(aInfoVendor, 1), u32(aInfoCaps, 7), text(aInfoMissing, "kvm:a"),
				text(aInfoMissing, "kvm:b"), u32(aInfoMaxRanges, 64), u32(aInfoMaxBytes, 28672)),
			parse: func(b []byte) (any, error) { return parseInfo(b) },
			want: Info{Version: "1.2", Vendor: VendorSVM, Caps: CapMemory | CapVCPU | CapEvents,
				Missing: []string{"kvm:a", "kvm:b"}, MaxRanges: 64, MaxBytes: 28672},
		},
		{
			name:  "string without an end",
			b:     attr(aInfoVersion, []byte("1.2")),
			parse: func(b []byte) (any, error) { return parseInfo(b) },
			err:   "not a terminated string",
		},
		{
			name: "vm",
			b: join(u64(aVMID, 3), u32(aVMPID, 99), u32(aVMVCPUs, 2), u32(aVMMemslots, 5), u64(aVMMemory, 1<<28),
				u64(aVMSeen, 1e9), u32(aVMFlags, 1)),
			parse: func(b []byte) (any, error) { return parseVM(b) },
			want:  VM{ID: 3, PID: 99, VCPUs: 2, Memslots: 5, Memory: 1 << 28, Seen: time.Second, Flags: VMProtected},
		},
		{
			name: "pid beyond int",
			b: join(u64(aVMID, 3), u32(aVMPID, 1<<31), u32(aVMVCPUs, 2), u32(aVMMemslots, 5), u64(aVMMemory, 1<<28),
				u64(aVMSeen, 1e9), u32(aVMFlags, 1)),
			parse: func(b []byte) (any, error) { return parseVM(b) },
			err:   "more than",
		},
		{
			name:  "time beyond int64",
			b:     u64(aVMSeen, 1<<63),
			parse: func(b []byte) (any, error) { return parseVM(b) },
			err:   "292 years",
		},
		{
			name: "memslot with padding attributes",
			b: join(attr(aMemslotPad, nil), u64(aMemslotVMID, 3), u32(aMemslotASID, 1), u32(aMemslotSlot, 509),
				attr(aMemslotPad, nil), u64(aMemslotGPA, 0x1000), u64(aMemslotSize, 0x2000), u64(aMemslotHVA, 0x7f0000000000), u32(aMemslotFlags, 3)),
			parse: func(b []byte) (any, error) { return parseMemslot(b) },
			want:  Memslot{VM: 3, AS: 1, Slot: 509, GPA: 0x1000, Size: 0x2000, HVA: 0x7f0000000000, Flags: 3},
		},
		{
			name: "table from another byte",
			b: join(u64(aTableVMID, 3), u32(aTableVCPUID, 0), u32(aTableKind, 1), u32(aTableOffset, 8), u64(aTableBase, 1), u32(aTableLimit, 127),
				attr(aTableData, make([]byte, 8)), u32(aTableCondition, 1)),
			parse: func(b []byte) (any, error) { return parseTable(b, 0) },
			err:   "from byte 8, asked for byte 0",
		},
		{
			name: "table beyond its limit",
			b: join(u64(aTableVMID, 3), u32(aTableVCPUID, 0), u32(aTableKind, 1), u64(aTableBase, 1), u32(aTableLimit, 6),
				attr(aTableData, make([]byte, 8)), u32(aTableCondition, 1)),
			parse: func(b []byte) (any, error) { return parseTable(b, 0) },
			err:   "exceed the limit",
		},
		{
			name: "cpl 4",
			b:    u32(aVCPUCPL, 4), parse: func(b []byte) (any, error) { return parseVCPU(b) },
			err: "4, more than 3",
		},
		{
			name: "stats",
			b: join(u64(aStatsWorker, 1), u64(aStatsInterrupt, 2), u64(aStatsCaptures, 3), u64(aStatsRetries, 4), u64(aStatsInterrupts, 5), u64(aStatsEvents, 6),
				nest(aStatsOp, u32(aOpCmd, cmdVCPUGet), u64(aOpCount, 1), u64(aOpErrors, 2), u64(aOpTime, 3), u64(aOpBytes, 4)),
				nest(aStatsOp, u32(aOpCmd, 77), u64(aOpCount, 1), u64(aOpErrors, 0), u64(aOpTime, 3), u64(aOpBytes, 0))),
			parse: func(b []byte) (any, error) { return parseStats(b) },
			want: Stats{Worker: 1, Interrupt: 2, Captures: 3, Retries: 4, Interrupts: 5, Events: 6,
				Ops: []Op{{Command: "vcpu_get", Count: 1, Errors: 2, Time: 3, Bytes: 4}, {Command: "77", Count: 1, Time: 3}}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.parse(tt.b)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseRanges(t *testing.T) {
	ok := nest(aMemRange, u64(aRangeAddress, 0x1000), u32(aRangeLength, 8), attr(aRangeData, []byte("12345678")))
	bad := nest(aMemRange, u64(aRangeAddress, 0x1000), u32(aRangeLength, 8), u32(aRangeError, uint32(unix.ENODATA)), u64(aRangeFault, 0x1004))
	for _, tt := range []struct {
		name string
		b    []byte
		err  string
	}{
		{"none", nil, "0 ranges, asked for 2"},
		{"one", ok, "1 ranges, asked for 2"},
		{"three", join(ok, bad, ok), "more than the 2"},
		{"another address", join(ok, nest(aMemRange, u64(aRangeAddress, 0x1001), u32(aRangeLength, 8), attr(aRangeData, []byte("12345678")))), "address 0x1001, asked for 0x1000"},
		{"another length", join(ok, nest(aMemRange, u32(aRangeLength, 7), attr(aRangeData, []byte("1234567")))), "length 7, asked for 8"},
		{"short data", join(ok, nest(aMemRange, attr(aRangeData, []byte("1234567")))), "7 bytes of data"},
		{"data and error", join(ok, nest(aMemRange, attr(aRangeData, []byte("12345678")), u32(aRangeError, 61), u64(aRangeFault, 1))), "both data and an error"},
		{"neither", join(ok, nest(aMemRange, u64(aRangeAddress, 0x1000))), "neither data nor an error"},
		{"error without fault", join(ok, nest(aMemRange, u32(aRangeError, 61))), "is missing"},
		{"error 0", join(ok, nest(aMemRange, u32(aRangeError, 0), u64(aRangeFault, 1))), "no errno"},
		{"error beyond errnos", join(ok, nest(aMemRange, u32(aRangeError, 4096), u64(aRangeFault, 1))), "no errno"},
		{"negative error", join(ok, nest(aMemRange, u32(aRangeError, 0xfffffff2), u64(aRangeFault, 1))), "no errno"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := parseRanges(tt.b, 7, wantedRanges()); err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want one with %q", err, tt.err)
			}
		})
	}
	got := wantedRanges()
	if err := parseRanges(join(ok, bad), 7, got); err != nil {
		t.Fatal(err)
	}
	if string(got[0].Data) != "12345678" || got[0].Err != nil {
		t.Errorf("first range: %+v", got[0])
	}
	want := &Error{Op: "mem_read", VM: 7, Errno: unix.ENODATA, Address: 0x1004}
	if diff := cmp.Diff(error(want), got[1].Err); diff != "" || got[1].Data != nil || !errors.Is(got[1].Err, ErrNotResident) {
		t.Errorf("second range: %+v\n%s", got[1], diff)
	}
}

func TestAttrsNestedFlag(t *testing.T) {
	a := attrs{set: "test", b: join(attr(5|netlink.Nested, nil), attr(6|netlink.NetByteOrder, nil))}
	var got []uint16
	for a.next() {
		got = append(got, a.typ)
	}
	if !slices.Equal(got, []uint16{5, 6}) || a.err != nil {
		t.Errorf("types %v, %v", got, a.err)
	}
}

// FuzzParse gives any bytes to each parser: none may panic, or take more from
// a message than it has.
func FuzzParse(f *testing.F) {
	s := testSpec(f)
	for i, w := range wires {
		m := specMessage(f, s, w.set)
		f.Add(byte(i), m)
		f.Add(byte(i), m[:len(m)-4])
		parts := split(f, m)
		slices.Reverse(parts)
		f.Add(byte(i), join(parts...))
	}
	f.Add(byte(6), nest(aMemRange, u32(aRangeError, 61), u64(aRangeFault, 1)))
	f.Fuzz(func(t *testing.T, which byte, b []byte) {
		w := wires[int(which)%len(wires)]
		before := bytes.Clone(b)
		v, err := w.parse(b)
		if !bytes.Equal(before, b) {
			t.Fatal("the message was written to")
		}
		again, err2 := w.parse(b)
		if (err == nil) != (err2 == nil) || err == nil && !reflect.DeepEqual(v, again) {
			t.Fatalf("first %+v, %v, then %+v, %v", v, err, again, err2)
		}
		if err != nil {
			return
		}
		switch v := v.(type) {
		case []RangeData:
			for _, r := range v {
				if (r.Err == nil) != (len(r.Data) == int(r.Length)) {
					t.Errorf("range %+v", r)
				}
			}
		case Table:
			if len(v.Data) == 0 || len(v.Data) > int(v.Limit)+1 {
				t.Errorf("table %+v", v)
			}
		case VCPU:
			if v.CPL < 0 || v.CPL > 3 || v.CPU < -1 || v.Time < 0 {
				t.Errorf("vcpu %+v", v)
			}
		}
	})
}

// FuzzReply gives any bytes to the parser of netlink headers and errors.
func FuzzReply(f *testing.F) {
	f.Add(reply(21, cmdVCPUGet, 1, u32(1, 2)))
	f.Add(refusal(1, unix.ENXIO, "the VM has no vCPU with this id", 0))
	f.Add(refusal(1, unix.ENXIO, "", netlink.Capped))
	f.Fuzz(func(t *testing.T, b []byte) {
		q := &conn{family: 21, op: cmdVCPUGet, seq: 1}
		got, err := q.reply(b)
		if err == nil && len(got) > len(b)-nlHeader-genlHeader {
			t.Errorf("%d bytes out of %d", len(got), len(b))
		}
		var e *Error
		if errors.As(err, &e) && e.Errno == 0 {
			t.Errorf("error without an errno: %v", err)
		}
	})
}

// FuzzCmdline gives any command line to the parser of QEMU's options.
func FuzzCmdline(f *testing.F) {
	f.Add([]byte("qemu-system-x86_64\x00-name\x00guest=web,debug-threads=on\x00-uuid\x00A\x00"))
	f.Add([]byte("qemu\x00-name\x00a,,b"))
	f.Add([]byte("\x00-name\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		v := parseCmdline(b)
		if len(v.Name) > len(b) || strings.Contains(v.Name, "\x00") {
			t.Errorf("%q has name %q", b, v.Name)
		}
	})
}
