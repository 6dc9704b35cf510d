// SPDX-License-Identifier: MIT

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/dump"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

var update = flag.Bool("update", false, "write what the commands print to testdata/golden")

// recorded is a real guest, which userspace/integrity records.
const recorded = "../../integrity/testdata/debian12-pti"

// whole is another one, complete: userspace/guest has it.
const whole = "../../guest/testdata/whole/debian12.snapshot.xz"

// cost is what no two runs, or versions, have in common.
var cost = regexp.MustCompile(`(?m)^(read) +\d.*|("read": \{)[^}]*`)

// elsewhere are the reasons that package guest gives: why a recorded guest whose
// kernel was not recorded has no symbols.
var elsewhere = regexp.MustCompile(`(no symbols(?: in its memory)?): [^;\n]*`)

// addressIn is the address of a symbol of a guest in a dump.
func addressIn(t *testing.T, name, symbol string) uint64 {
	t.Helper()
	d, err := dump.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	k, err := guest.Attach(t.Context(), d, guest.AttachOptions{NoTypes: true})
	if err != nil {
		t.Fatal(err)
	}
	at, ok := k.Image.Lookup(symbol)
	if !ok {
		t.Fatalf("no symbol %s", symbol)
	}
	return at
}

// wholeGuest unpacks the complete guest.
func wholeGuest(t *testing.T) string {
	t.Helper()
	f, err := os.Open(whole)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := guest.ReadSnapshot(f)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "debian12"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Encode(out), out.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Name()
}

// fakeModule has the recorded guest as VM 1, and VMs 2 to 4 that cannot be
// looked into.
type fakeModule struct {
	*guest.Machine
	pages guest.Pages
	fail  error // of all that reads guests
}

func (m *fakeModule) Info(context.Context) (kvmaccess.Info, error) {
	return kvmaccess.Info{Version: "1.0", Vendor: kvmaccess.VendorSVM, Caps: kvmaccess.CapMemory | kvmaccess.CapVCPU,
		Missing: []string{"kvm_arch_destroy_vm"}, MaxRanges: kvmaccess.MaxRanges, MaxBytes: kvmaccess.MaxBytes}, nil
}

func (m *fakeModule) VMs(context.Context) ([]kvmaccess.VM, error) {
	if m.fail != nil {
		return nil, m.fail
	}
	one := m.VM
	one.PID, one.Memory, one.VCPUs, one.Memslots = 101, 256<<20, len(m.CPUs), 8
	return []kvmaccess.VM{one,
		{ID: 2, PID: 102, VCPUs: 1, Memslots: 3, Memory: 1536 << 20},
		{ID: 3, PID: 103, VCPUs: 4, Memslots: 3, Memory: 4 << 30, Flags: kvmaccess.VMProtected},
		{ID: 4, PID: 104, VCPUs: 0, Memslots: 0},
	}, nil
}

func (m *fakeModule) VCPUs(ctx context.Context, vm kvmaccess.VMID) ([]kvmaccess.VCPU, error) {
	switch vm {
	case 3:
		return nil, &kvmaccess.Error{Op: "vcpu_get", VM: vm, Errno: 13}
	case 4:
		return nil, nil
	}
	return m.Machine.VCPUs(ctx, vm)
}

func (m *fakeModule) Table(ctx context.Context, vm kvmaccess.VMID, vcpu uint32, kind kvmaccess.TableKind) (kvmaccess.Table, error) {
	c, err := m.VCPU(ctx, vm, vcpu)
	if err != nil {
		return kvmaccess.Table{}, err
	}
	r := c.GDTR
	if kind == kvmaccess.TableIDT {
		r = c.IDTR
	}
	t := kvmaccess.Table{VM: vm, VCPU: vcpu, Kind: kind, Base: r.Base, Limit: r.Limit, Condition: c.Condition}
	got, err := m.ReadVirtual(ctx, vm, vcpu, 0, kvmaccess.Range{Address: r.Base, Length: uint32(r.Limit) + 1})
	if err == nil {
		t.Data, err = got[0].Data, got[0].Err
	}
	return t, err
}

func (m *fakeModule) Stats(context.Context) (kvmaccess.Stats, error) {
	return kvmaccess.Stats{Worker: 1500 * time.Microsecond, Interrupt: 20 * time.Microsecond, Captures: 30, Retries: 1, Interrupts: 12, Events: 4,
		Ops: []kvmaccess.Op{{Command: "vcpu_get", Count: 20, Errors: 1, Time: 60 * time.Microsecond}, {Command: "mem_read", Count: 10, Time: time.Millisecond, Bytes: 70000}, {Command: "stats"}}}, nil
}

func (m *fakeModule) StatsPerVM(context.Context) ([]kvmaccess.Stats, error) {
	return []kvmaccess.Stats{{VM: m.VM.ID, Captures: 30, Worker: time.Millisecond}, {VM: 4, Ops: []kvmaccess.Op{}}}, nil
}

func (m *fakeModule) Watches(context.Context) ([]kvmaccess.WatchStats, error) {
	return []kvmaccess.WatchStats{
		{ID: 1, VM: m.VM.ID, Period: time.Second, Effective: time.Second, Items: 39, Bytes: 8056, Ticks: 100, Time: time.Millisecond, Events: 2},
		{ID: 2, VM: 4, Period: 100 * time.Millisecond, Effective: 200 * time.Millisecond, Budget: 240 << 10, Items: 12, Digested: 20 << 20, Passes: 3,
			Ticks: 400, Missed: 1, Late: 2, Time: time.Second, Lost: 1, Coalesced: 4, Different: 1, NotResident: 2},
	}, nil
}

func (m *fakeModule) Memory(kvmaccess.VM) guest.Memory { return m.Machine.Memory }
func (m *fakeModule) Close() error                     { return nil }

func newFakeModule(t *testing.T) *fakeModule {
	t.Helper()
	f, err := os.Open(recorded + ".snapshot")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := guest.ReadSnapshot(f)
	if err != nil {
		t.Fatal(err)
	}
	s.VM.ID = 1
	for i := range s.CPUs {
		s.CPUs[i].VM = 1
	}
	m := s.Machine()
	return &fakeModule{Machine: m, pages: s.Pages}
}

// symbolFile unpacks the recorded guest's symbols.
func symbolFile(t *testing.T) string {
	t.Helper()
	f, err := os.Open(recorded + ".kallsyms.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "kallsyms")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// registersFile has of the recorded guest, whose kernel can write its read-only
// memory, the registers.
func registersFile(t *testing.T) string {
	t.Helper()
	m := newFakeModule(t)
	for i := range m.CPUs {
		m.CPUs[i].CR0 &^= guest.CR0WP
	}
	path := filepath.Join(t.TempDir(), "registers.snapshot")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := guest.Snapshot{VM: m.VM, CPUs: m.CPUs, Pages: guest.Pages{}}
	if err := s.Write(f); err != nil {
		t.Fatal(err)
	}
	return path
}

// hook writes over an entry of a table at a symbol.
func (m *fakeModule) hook(t *testing.T, symbols, table string, entry int, value uint64) {
	t.Helper()
	f, err := os.Open(symbols)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := guest.ParseSymbols(f)
	if err != nil {
		t.Fatal(err)
	}
	sym, ok := s.Lookup(table)
	if !ok {
		t.Fatalf("no symbol %s", table)
	}
	ctx := t.Context()
	c := m.CPUs[0]
	mode := guest.ModeOf(&c.Registers)
	root, err := guest.KernelRoot(ctx, m.pages, mode, c.CR3, sym.Address)
	if err != nil {
		t.Fatal(err)
	}
	tr, err := guest.Translate(ctx, m.pages, mode, root, sym.Address+uint64(entry)*8)
	if err != nil {
		t.Fatal(err)
	}
	m.pages.WritePhysical(tr.GPA, binary.LittleEndian.AppendUint64(nil, value))
}

var names = map[int]kvmaccess.VMM{
	101: {Name: "web1", UUID: "1f0c7e52-6f0a-4b6e-9d25-3c1f5ad9a001", Comm: "qemu-system-x86"},
	102: {Name: "db", UUID: "1f0c7e52-6f0a-4b6e-9d25-3c1f5ad9a002", Comm: "qemu-system-x86"},
	103: {Name: "db", UUID: "9a0c7e52-6f0a-4b6e-9d25-3c1f5ad9a003", Comm: "qemu-system-x86"},
}

// shared by all tests: decoding a kernel's types takes its time.
var shared guest.Cache

func newTestApp(m *fakeModule) (*app, *bytes.Buffer, *bytes.Buffer) {
	var out, errs bytes.Buffer
	a := newApp(&out, &errs)
	a.cache = &shared
	a.open = func() (source, error) { return m, nil }
	a.identify = func(pid int) (kvmaccess.VMM, error) {
		v, ok := names[pid]
		if !ok {
			return v, fmt.Errorf("process %d: %w", pid, os.ErrNotExist)
		}
		return v, nil
	}
	return a, &out, &errs
}

// TestGolden compares what commands print about the recorded guest with
// testdata/golden; go test -update writes it.
func TestGolden(t *testing.T) {
	symbols, whole, registers := symbolFile(t), wholeGuest(t), registersFile(t)
	inTable := fmt.Sprintf("%#x", addressIn(t, whole, "sys_call_table")+16)
	for _, tt := range []struct {
		file string
		args string // $S is the symbol file, $W the whole guest, $R one whose memory is not there, $A an address in its system call table
		code int
	}{
		{"vms.txt", "vms", 0},
		{"vms.json", "vms -o json", 0},
		{"regs.txt", "regs web1 -s $S", 0},
		{"regs-one.json", "regs 1 --vcpu 0 -o json -s $S", 0},
		{"regs-plain.txt", "regs 1f0c7e52-6f0a-4b6e-9d25-3c1f5ad9a001", 0},
		{"gdt.txt", "gdt web1 -s $S", 0},
		{"gdt.json", "gdt web1 -o json --all", 0},
		{"idt.txt", "idt web1 -s $S", 0},
		{"idt.json", "idt #1 -o json -s $S", 0},
		{"syscalls.txt", "syscalls web1 -s $S", 0},
		{"syscalls-ia32.txt", "syscalls web1 --ia32 -s $S", 0},
		{"syscalls.json", "syscalls web1 -o json -s $S", 0},
		{"mem-symbol.txt", "mem web1 sys_call_table+8 40 -s $S", 0},
		{"mem-symbol.json", "mem web1 sys_call_table 16 -s $S -o json", 0},
		{"mem-hex.txt", "mem web1 sys_call_table 0x20 -s $S --hex", 0},
		{"check.txt", "check web1 -s $S", 0},
		{"check.json", "check web1 -s $S -o json", 0},
		{"check-plain.txt", "check web1", 0},
		{"check-all.txt", "check -s $S --wait 0s", 1},
		{"check-dump.txt", "check --dump " + recorded + ".snapshot -s $S", 0},
		{"check-dump.json", "check --dump " + recorded + ".snapshot -s $S -o json", 0},
		{"check-registers.txt", "check --dump $R", 1},
		{"error-dump-baseline.txt", "check --dump " + recorded + ".snapshot --baseline $S", 1},
		{"error-dump-vm.txt", "check web1 --dump " + recorded + ".snapshot", 1},
		{"error-baseline-all.txt", "check --baseline $S", 1},
		{"guest.txt", "guest --dump $W", 0},
		{"guest.json", "guest --dump $W -o json", 0},
		{"ps.txt", "ps --dump $W", 0},
		{"ps.json", "ps --dump $W -o json", 0},
		{"ps-threads.txt", "ps --threads --dump $W", 0},
		{"modules.txt", "modules --dump $W", 0},
		{"modules.json", "modules --dump $W -o json", 0},
		{"symbols-name.txt", "symbols --dump $W sys_call_table", 0},
		{"symbols-twice.txt", "symbols --dump $W cleanup_module", 0},
		{"symbols-address.json", "symbols --dump $W $A -o json", 0},
		{"symbols-none.txt", "symbols --dump $W nothing_has_this_name", 1},
		{"symbols-nowhere.txt", "symbols --dump $W 0x1000", 1},
		{"types.txt", "types --dump $W list_head", 0},
		{"types-field.txt", "types --dump $W task_struct.se.vruntime", 0},
		{"types-bits.json", "types --dump $W task_struct.in_execve -o json", 0},
		{"types-none.txt", "types --dump $W no_such_struct", 1},
		{"types-no-field.txt", "types --dump $W task_struct.nothing", 1},
		{"check-whole.txt", "check --dump $W", 0},
		{"stats.txt", "stats --socket /nonexistent/socket", 0},
		{"stats.json", "stats --socket /nonexistent/socket -o json", 0},
		{"error-unknown.txt", "regs nope", 1},
		{"error-ambiguous.txt", "gdt db", 1},
		{"error-prefix.txt", "gdt 1f0c7e", 1},
		{"error-vcpu.txt", "gdt web1 --vcpu 9", 1},
		{"error-no-vcpu.txt", "idt 4", 1},
		{"error-protected.txt", "regs 3", 1},
		{"error-hole.txt", "mem web1 0xfff0000000000000 16", 1},
		{"error-symbol.txt", "mem web1 no_such_symbol 16 -s $S", 1},
		{"error-address.txt", "mem web1 xyz 16", 1},
		{"error-end.txt", "mem web1 0xffffffffffffffff 2", 1},
		{"error-length.txt", "mem web1 0 0", 1},
		{"error-size.txt", "mem web1 0 99999999999G", 1},
		{"error-root.txt", "mem web1 0 1 --root 0", 1},
		{"error-both.txt", "mem web1 0 1 --raw --hex", 1},
		{"error-json-raw.txt", "mem web1 0 1 --raw -o json", 1},
		{"error-syscalls.txt", "syscalls web1", 1},
		{"error-symbols-missing.txt", "syscalls web1 -s /nonexistent/kallsyms", 1},
		{"error-daemon.txt", "watch --socket /nonexistent/socket", 1},
	} {
		t.Run(tt.file, func(t *testing.T) {
			a, out, errs := newTestApp(newFakeModule(t))
			code := a.run(t.Context(), strings.Fields(strings.NewReplacer("$S", symbols, "$W", whole, "$R", registers, "$A", inTable).Replace(tt.args)))
			if code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			got := out.String()
			if errs.Len() > 0 {
				got += "-- stderr --\n" + errs.String()
			}
			got = strings.ReplaceAll(got, symbols, "$S")
			got = strings.ReplaceAll(got, whole, "$W")
			got = strings.ReplaceAll(got, registers, "$R")
			got = elsewhere.ReplaceAllString(cost.ReplaceAllString(got, "${1}${2}"), "$1")
			if lines := strings.SplitAfter(got, "\n"); len(lines) > goldenLines {
				got = strings.Join(lines[:goldenLines], "") + fmt.Sprintf("... and %d lines more\n", len(lines)-1-goldenLines)
			}
			golden(t, tt.file, got)
			if strings.HasSuffix(tt.file, ".json") && !json.Valid(out.Bytes()) {
				t.Error("not JSON")
			}
		})
	}
}

// goldenLines is how much of long output is kept.
const goldenLines = 80

func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", "golden", file)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCheckFindings(t *testing.T) {
	symbols := symbolFile(t)
	m := newFakeModule(t)
	m.hook(t, symbols, "sys_call_table", 59, 0xffffffffc0de1000)
	a, out, _ := newTestApp(m)
	if code := a.run(t.Context(), []string{"check", "web1", "-s", symbols, "-o", "json"}); code != exitFindings {
		t.Errorf("exit code %d", code)
	}
	var results []struct {
		VM       integrity.VM
		Findings []integrity.Finding
	}
	if err := json.Unmarshal(out.Bytes(), &results); err != nil {
		t.Fatal(err)
	}
	if len(results) != 1 || len(results[0].Findings) != 1 {
		t.Fatalf("got %+v", results)
	}
	f := results[0].Findings[0]
	if f.VM.Name != "web1" || f.Object != "sys_call_table" || f.Entry == nil || *f.Entry != 59 || f.Name != "execve" || f.New == nil || f.New.Value != 0xffffffffc0de1000 {
		t.Errorf("got %+v", f)
	}
	a, out, _ = newTestApp(m)
	if code := a.run(t.Context(), []string{"check", "web1", "-s", symbols}); code != exitFindings || !strings.Contains(out.String(), "web1: 1 finding\n") || !strings.Contains(out.String(), "execve") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	a, out, _ = newTestApp(m)
	if code := a.run(t.Context(), []string{"syscalls", "web1", "-s", symbols}); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	for line := range strings.Lines(out.String()) {
		hooked := strings.HasPrefix(line, "59 ")
		if fields := strings.Fields(line); fields[0] != "NUMBER" && hooked == (fields[len(fields)-1] == "-") {
			t.Errorf("fault in %q", line)
		}
	}
}

// What changed between a baseline and a dump is found in the dump.
func TestCheckDump(t *testing.T) {
	symbols := symbolFile(t)
	m := newFakeModule(t)
	monitor, err := integrity.NewMonitor(m, integrity.VM{ID: 1, Name: "web1"}, integrity.Options{Memory: m.Machine.Memory, Settle: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := monitor.Attach(t.Context()); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(monitor.Baseline())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	baseline, file := filepath.Join(dir, "baseline"), filepath.Join(dir, "web1.snapshot")
	if err := os.WriteFile(baseline, text, 0o600); err != nil {
		t.Fatal(err)
	}
	m.CPUs[0].CR4 &^= guest.CR4SMEP
	m.hook(t, symbols, "sys_call_table", 59, 0xffffffffc0de1000)
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join((&guest.Snapshot{VM: m.VM, CPUs: m.CPUs, Pages: m.pages}).Write(f), f.Close()); err != nil {
		t.Fatal(err)
	}
	a, out, errs := newTestApp(m)
	a.open = func() (source, error) { return nil, errors.New("a dump needs no module") }
	if code := a.run(t.Context(), []string{"check", "--dump", file, "--baseline", baseline, "-s", symbols}); code != exitFindings ||
		!strings.Contains(out.String(), "CR4.SMEP") || !strings.Contains(out.String(), "execve") {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
}

func TestMemRaw(t *testing.T) {
	m := newFakeModule(t)
	for gpa, page := range m.pages {
		a, out, errs := newTestApp(m)
		if code := a.run(t.Context(), []string{"mem", "web1", fmt.Sprintf("%#x", gpa), "4K", "--raw"}); code != 0 {
			t.Fatalf("exit code %d: %s", code, errs)
		}
		if !bytes.Equal(out.Bytes(), page[:]) {
			t.Errorf("%#x: other bytes", gpa)
		}
		break
	}
}

// The page tables at --root need not be the vCPU's; with none there, nothing
// is mapped.
func TestMemRoot(t *testing.T) {
	m := newFakeModule(t)
	c := m.CPUs[0]
	read := func(args ...string) (string, int, string) {
		a, out, errs := newTestApp(m)
		code := a.run(t.Context(), append([]string{"mem", "web1", fmt.Sprintf("%#x", c.IDTR.Base), "16", "--hex"}, args...))
		return out.String(), code, errs.String()
	}
	want, code, errs := read("--virtual")
	if code != 0 {
		t.Fatal(errs)
	}
	if got, code, errs := read("--root", fmt.Sprintf("%#x", c.CR3)); code != 0 || got != want {
		t.Errorf("%q, want %q: %s", got, want, errs)
	}
	if got, code, errs := read("--root", fmt.Sprintf("%#x", c.CR3+1<<40)); code != 1 || got != "" || errs == "" {
		t.Errorf("other page tables: %q, exit code %d, %s", got, code, errs)
	}
}

func TestExplain(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{kvmaccess.ErrNoModule, "modprobe kvmaccess"},
		{&kvmaccess.VersionError{Client: 1, Module: 2}, "update this program"},
		{&kvmaccess.Error{Op: "vm_get", Errno: 1}, "run it as root"},
		{&kvmaccess.Error{Op: "vm_get", VM: 3, Errno: 2}, "ended meanwhile"},
		{kvmaccess.ErrReloaded, "reloaded"},
	} {
		a, _, errs := newTestApp(newFakeModule(t))
		a.open = func() (source, error) { return nil, tt.err }
		if code := a.run(t.Context(), []string{"vms"}); code != exitError || !strings.Contains(errs.String(), tt.want) {
			t.Errorf("exit code %d, %q has no %q", code, errs, tt.want)
		}
		if strings.Count(errs.String(), "kvmaccess: ") != 1 {
			t.Errorf("%q", errs)
		}
	}
}

func TestNames(t *testing.T) {
	vms := []vm{
		{VM: kvmaccess.VM{ID: 1}, Name: "2", UUID: "aaaa1111-0000-0000-0000-000000000000"},
		{VM: kvmaccess.VM{ID: 2}, Name: "b", UUID: "aaaa2222-0000-0000-0000-000000000000"},
		{VM: kvmaccess.VM{ID: 3}},
	}
	for arg, want := range map[string][]kvmaccess.VMID{
		"1": {1}, "2": {1, 2}, "#2": {2}, "b": {2}, "3": {3}, "#3": {3}, "": nil, "#": nil, "#b": nil, "B": nil,
		"aaaa": {1, 2}, "AAAA2": {2}, "aaa": nil, "aaaa1111-0000-0000-0000-000000000000": {1},
		"18446744073709551616": nil, "-1": nil,
	} {
		var got []kvmaccess.VMID
		for _, v := range matchVMs(vms, arg) {
			got = append(got, v.ID)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", arg, diff)
		}
	}
}

func TestCompletion(t *testing.T) {
	complete := func(a *app, out *bytes.Buffer, args ...string) string {
		t.Helper()
		if code := a.run(t.Context(), append([]string{"__complete"}, args...)); code != 0 {
			t.Errorf("exit code %d", code)
		}
		return out.String()
	}
	a, out, _ := newTestApp(newFakeModule(t))
	got := complete(a, out, "regs", "")
	want := "web1\tid 1, 2 vCPUs, 256 MiB\n2\tid 2, 1 vCPU, 1.5 GiB\n3\tid 3, 4 vCPUs, 4 GiB\n4\tid 4, 0 vCPUs, 0 B\n:4\n"
	if got != want {
		t.Errorf("VMs: %q, want %q", got, want)
	}
	a, out, _ = newTestApp(newFakeModule(t))
	if got := complete(a, out, "mem", "web1", ""); got != ":4\n" {
		t.Errorf("second argument: %q", got)
	}
	a, out, _ = newTestApp(newFakeModule(t))
	if got := complete(a, out, "vms", "-o", ""); got != "table\njson\n:4\n" {
		t.Errorf("-o: %q", got)
	}
	a, out, _ = newTestApp(newFakeModule(t))
	a.open = func() (source, error) { return nil, kvmaccess.ErrNoModule }
	if got := complete(a, out, "regs", ""); !strings.Contains(got, "_activeHelp_") || !strings.Contains(got, "modprobe") {
		t.Errorf("without a module: %q", got)
	}
}

// serveDaemon answers as kvmaccessd does, with the findings given.
func serveDaemon(t *testing.T, follow func(w http.ResponseWriter, r *http.Request)) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/findings", follow)
	mux.HandleFunc("/v1/stats", func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewEncoder(w).Encode(daemon.Stats{Uptime: time.Hour, CPU: time.Second, Account: daemon.Account{Ticks: 3600, Missed: 2}, Findings: 1})
	})
	s := &http.Server{Handler: mux}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return socket
}

func TestWatch(t *testing.T) {
	entry := 59
	record := daemon.Record{Seq: 7, Finding: integrity.Finding{Time: time.Unix(1700000000, 5e6).UTC(), VM: integrity.VM{ID: 1, Name: "web1"}, Check: "syscalls",
		Object: "sys_call_table", Entry: &entry, Kind: integrity.KindChanged, Message: "web1: sys_call_table[59] \x1b[31mchanged"}}
	var query []string
	socket := serveDaemon(t, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		query = append(query, fmt.Sprintf("vm=%s follow=%s since=%v", q.Get("vm"), q.Get("follow"), q.Get("since") != ""))
		e := json.NewEncoder(w)
		for range 2 {
			_ = e.Encode(record)
		}
		fmt.Fprintln(w)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()

	a, out, errs := newTestApp(newFakeModule(t))
	if code := a.run(ctx, []string{"watch", "--socket", socket, "-n", "2", "-o", "json"}); code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines: %q", len(lines), out)
	}
	var got daemon.Record
	if err := json.Unmarshal([]byte(lines[0]), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(record, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	a, out, errs = newTestApp(newFakeModule(t))
	if code := a.run(ctx, []string{"watch", "web1", "--socket", socket, "-n", "1", "--all"}); code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	if s := out.String(); !strings.Contains(s, "changed    web1: sys_call_table[59] ?[31mchanged\n") {
		t.Errorf("got %q", s)
	}
	if diff := cmp.Diff([]string{"vm= follow=1 since=true", "vm=web1 follow=1 since=false"}, query); diff != "" {
		t.Errorf("queries (-want +got):\n%s", diff)
	}

	// An interrupt ends it without an error.
	short, stop := context.WithTimeout(ctx, 200*time.Millisecond)
	defer stop()
	a, _, errs = newTestApp(newFakeModule(t))
	if code := a.run(short, []string{"watch", "--socket", socket}); code != 0 {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

func TestStatsDaemon(t *testing.T) {
	socket := serveDaemon(t, http.NotFound)
	a, out, errs := newTestApp(newFakeModule(t))
	if code := a.run(t.Context(), []string{"stats", "--socket", socket}); code != 0 {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	if want := "daemon: up 1h0m0s, CPU 1s (user 0s, system 0s), 3600 ticks, 2 missed, 0 failed, 1 finding\n"; !strings.Contains(out.String(), want) {
		t.Errorf("no %q in:\n%s", want, out)
	}
}

func TestBrokenPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	a, _, errs := newTestApp(newFakeModule(t))
	a.out = w
	if code := a.run(t.Context(), []string{"vms"}); code != 0 || errs.Len() > 0 {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 28672: "28 KiB", 256 << 20: "256 MiB", 1536 << 20: "1.5 GiB", 1<<64 - 1: "15.9 EiB",
	} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

func TestParseNumbers(t *testing.T) {
	for s, want := range map[string]uint64{"1": 1, "0x10": 16, "0XfF": 255, "4k": 4096, "2M": 2 << 20, "1G": 1 << 30, "0x1K": 1024, "010": 10} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "0", "K", "x", "0x", "-1", "1T", "1.5", "1_0", "0x10000000000000000", "18446744073709551615K"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
}
