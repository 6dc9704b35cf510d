// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/truth"
)

// liveVM is a VM as guest.Attach reads it.
type liveVM struct {
	*kvmaccess.Memory
	client *kvmaccess.Client
	id     kvmaccess.VMID
}

func (l liveVM) VCPUs(ctx context.Context) ([]kvmaccess.VCPU, error) {
	return l.client.VCPUs(ctx, l.id)
}

func live(t *testing.T, c *kvmaccess.Client, vm kvmaccess.VM) liveVM {
	t.Helper()
	l := liveVM{kvmaccess.NewMemory(c, vm), c, vm.ID}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// attached attaches to a guest whose vCPUs, at that moment, are all as wanted.
func attached(t *testing.T, src guest.Source, what string, wanted func(*kvmaccess.VCPU) bool) *guest.Kernel {
	t.Helper()
	ctx := testContext(t)
	for end := time.Now().Add(patience * time.Minute); ; {
		start := time.Now()
		k, err := guest.Attach(ctx, src, guest.AttachOptions{})
		if err != nil {
			t.Fatal(err)
		}
		took := time.Since(start)
		if !slices.ContainsFunc(k.CPUs, func(v kvmaccess.VCPU) bool { return !wanted(&v) }) {
			t.Logf("attached in %v to %s: %s; text +%#x, direct map %#x", took.Round(time.Millisecond), what, k.Fingerprint.Release, k.Bases.Text, k.Bases.DirectMap)
			return k
		}
		if time.Now().After(end) {
			t.Fatalf("no attachment met a guest whose vCPUs were all %s", what)
		}
	}
}

func anyway(*kvmaccess.VCPU) bool { return true }

func inUserMode(v *kvmaccess.VCPU) bool { return v.CPL == 3 }

// isHonest fails the test if there are doubts of an honest kernel.
func isHonest(t *testing.T, k *guest.Kernel) {
	t.Helper()
	if len(k.Doubts) > 0 {
		t.Errorf("doubts of an honest kernel: %+v", k.Doubts)
	}
	if k.Types == nil {
		t.Errorf("no types: %v", k.TypesErr)
	}
}

// sameSymbols holds all symbols against the guest's own list.
func sameSymbols(t *testing.T, g *fixture.Guest, k *guest.Kernel) {
	t.Helper()
	text, err := g.Symbols(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	c, err := truth.Symbols(text, k.Image.All())
	if err := errors.Join(err, c.Err()); err != nil {
		t.Errorf("symbols: %v", err)
		return
	}
	t.Logf("%d of %d symbols are equal", c.Equal, c.Truth)
}

// sameTypes holds the layout of each every-th struct against the guest's own BTF.
func sameTypes(t *testing.T, g *fixture.Guest, k *guest.Kernel, every int) {
	t.Helper()
	raw, err := g.Read(testContext(t), "/sys/kernel/btf/vmlinux")
	if err != nil {
		t.Fatal(err)
	}
	if k.Types == nil {
		t.Errorf("no types: %v", k.TypesErr)
		return
	}
	c, err := truth.Types(raw, k.Types, every)
	if err := errors.Join(err, c.Err()); err != nil {
		t.Errorf("offsets: %v", err)
		return
	}
	t.Logf("%d of %d offsets are equal", c.Equal, c.Truth)
}

// sameObjects holds tasks and modules, by each of the ways that the kernel has,
// against the guest's own /proc.
func sameObjects(t *testing.T, g *fixture.Guest, k *guest.Kernel) {
	t.Helper()
	ctx := testContext(t)
	for try := 1; ; try++ {
		before, err := g.Tasks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		tasks, err := k.Tasks(ctx)
		if err != nil {
			t.Error(err)
		}
		after, err := g.Tasks(ctx)
		if err != nil {
			t.Fatal(err)
		}
		c := truth.Tasks(before, after, tasks)
		// A task may come and go in between.
		if err := c.Err(); err != nil && try == 5 {
			t.Errorf("tasks: %v", err)
		} else if err != nil {
			continue
		}
		t.Logf("%d of %d tasks are equal", c.Equal, c.Truth)
		break
	}
	proc, err := g.Read(ctx, "/proc/modules")
	if err != nil {
		t.Fatal(err)
	}
	for name, list := range map[string]func(context.Context) ([]guest.Module, error){
		"list": k.Modules, "tree": k.ModuleTree, "kset": k.ModuleKset, "areas": k.ModuleAreas,
	} {
		modules, err := list(ctx)
		if err != nil {
			t.Errorf("modules by their %s: %v", name, err)
		}
		c, err := truth.Modules(proc, modules)
		if err := errors.Join(err, c.Err()); err != nil {
			t.Errorf("modules by their %s: %v", name, err)
		}
	}
	if err := g.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	tasks, err1 := k.Tasks(ctx)
	byPID, err2 := k.PIDTable(ctx)
	queued, err3 := k.RunQueues(ctx)
	if err := errors.Join(err1, err2, err3, g.Resume(ctx)); err != nil {
		t.Error(err)
	}
	pids := func(all []guest.Task) (n []int) {
		for _, task := range all {
			// The idle tasks are in no table of pids.
			if task.PID != 0 {
				n = append(n, task.PID)
			}
		}
		slices.Sort(n)
		return n
	}
	if a, b := pids(tasks), pids(byPID); !slices.Equal(a, b) {
		t.Errorf("pids by the list of tasks %v, by the table of pids %v", a, b)
	}
	for _, q := range queued {
		if q.PID != 0 && !slices.Contains(pids(tasks), q.PID) {
			t.Errorf("a run queue has %+v, which the list of tasks has not", q)
		}
	}
}

// What is found of a guest's kernel is what that kernel itself says.
func TestAttach(t *testing.T) {
	c, g := newClient(t), sharedGuest(t, "web1")
	k := attached(t, live(t, c, vmOf(t, c, g)), "running", anyway)
	isHonest(t, k)
	sameSymbols(t, g, k)
	sameTypes(t, g, k, 8)
	sameObjects(t, g, k)
	release, err := g.Read(testContext(t), "/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	line, err := g.Read(testContext(t), "/proc/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := k.Fingerprint.Release, strings.TrimSpace(string(release)); got != want {
		t.Errorf("release %q, want %q", got, want)
	}
	if got, want := k.Fingerprint.CommandLine, strings.TrimSpace(string(line)); got != want {
		t.Errorf("command line %q, want %q", got, want)
	}
}

// Whatever vCPUs do at that moment, the same is found: they run a program, with
// page tables of its own that have next to nothing of the kernel, or sleep, or
// stand still.
func TestAttachInAnyCondition(t *testing.T) {
	ctx := testContext(t)
	c := newClient(t)
	g := startGuest(t, fixture.Config{Name: "isolated", CPUs: 2, Append: "pti=on"})
	t.Cleanup(func() {
		if err := g.Kill(); err != nil {
			t.Error(err)
		}
	})
	src := live(t, c, vmOf(t, c, g))

	if err := g.Spin(ctx, 2); err != nil {
		t.Fatal(err)
	}
	k := attached(t, src, "in user mode", inUserMode)
	isHonest(t, k)
	for i := range k.CPUs {
		if cr3 := k.CPUs[i].CR3; cr3&0x1000 == 0 {
			t.Errorf("vCPU %d was in user mode with CR3 %#x: page tables are not isolated", i, cr3)
		}
	}
	sameSymbols(t, g, k)
	if err := g.Spin(ctx, 0); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what   string
		wanted func(*kvmaccess.VCPU) bool
		begin  func(context.Context) error
	}{
		{"halted", func(v *kvmaccess.VCPU) bool { return v.Condition == kvmaccess.ConditionHalted }, nil},
		{"stopped", func(v *kvmaccess.VCPU) bool { return v.Condition == kvmaccess.ConditionUser }, g.Pause},
	} {
		if tt.begin != nil {
			if err := tt.begin(ctx); err != nil {
				t.Fatal(err)
			}
		}
		again := attached(t, src, tt.what, tt.wanted)
		isHonest(t, again)
		if again.Bases != k.Bases || again.Fingerprint != k.Fingerprint || again.Space.Root != k.Space.Root {
			t.Errorf("%s: %+v %+v, in user mode %+v %+v", tt.what, again.Bases, again.Fingerprint, k.Bases, k.Fingerprint)
		}
		if a, b := again.Image.Symbols.Len(), k.Image.Symbols.Len(); a != b {
			t.Errorf("%s: %d symbols, in user mode %d", tt.what, a, b)
		}
	}
	if err := g.Resume(ctx); err != nil {
		t.Error(err)
	}
}

// booting attaches again and again until the guest has booted: all that there
// is before is ErrNotBooted.
func booting(t *testing.T, src guest.Source) *guest.Kernel {
	t.Helper()
	ctx := testContext(t)
	reasons := map[string]int{}
	for {
		k, err := guest.Attach(ctx, src, guest.AttachOptions{})
		if err == nil {
			if len(reasons) == 0 {
				t.Error("attached at once to a guest that had not booted")
			}
			for reason, n := range reasons {
				t.Logf("%d times: %s", n, reason)
			}
			return k
		}
		if !errors.Is(err, guest.ErrNotBooted) {
			t.Fatalf("after %v: %v", reasons, err)
		}
		reasons[err.Error()]++
		time.Sleep(20 * time.Millisecond)
	}
}

// A guest is not there yet until it is: from its first instruction on, after a
// reset, and when one kernel starts another. The daemon attaches by itself.
func TestAttachWhileBooting(t *testing.T) {
	// Three boots, and a kernel that goes into the guest byte by byte.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	t.Cleanup(cancel)
	c := newClient(t)
	g, err := fixture.Launch(ctx, fixture.Config{Name: "early", Memory: 384, Args: []string{"-S"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Kill(); err != nil {
			t.Error(err)
		}
	})
	src := live(t, c, vmOf(t, c, g))
	if _, err := guest.Attach(ctx, src, guest.AttachOptions{}); !errors.Is(err, guest.ErrNotBooted) {
		t.Errorf("before the first instruction: error %v, want %v", err, guest.ErrNotBooted)
	}
	d := startDaemon(t, t.TempDir(), "--period", "200ms")
	eventually(t, 10*time.Second, func() error {
		if s := statusOf(t, d, g.Name); s.State == daemon.StateWatching || s.Reason == "" {
			return fmt.Errorf("before the first instruction the daemon says %+v", s)
		}
		return nil
	})
	if err := g.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	k := booting(t, src)
	if err := g.Booted(ctx, 1); err != nil {
		t.Fatal(err)
	}
	// It has modules by now.
	k.Refresh(ctx)
	told := func(kind integrity.Kind) (n int) {
		for _, r := range findings(t, d, daemon.Query{}) {
			if r.Kind == kind {
				n++
			}
		}
		return n
	}
	restarts := 0
	for _, boot := range []struct {
		how   string
		again func() error
	}{
		{"first boot", nil},
		{"reset", func() error { return g.Reset(ctx) }},
		{"kexec", func() error { return g.Kexec(ctx, "again") }},
	} {
		if boot.again != nil {
			if err := boot.again(); err != nil {
				t.Fatalf("%s: %v", boot.how, err)
			}
			if boot.how == "reset" {
				booting(t, src)
			}
			restarts++
			if err := g.Booted(ctx, restarts+1); err != nil {
				t.Fatalf("%s: %v", boot.how, err)
			}
			cpus, err := src.VCPUs(ctx)
			if err != nil {
				t.Fatal(err)
			}
			before := k
			if k, err = guest.Attach(ctx, src, guest.AttachOptions{}); err != nil {
				t.Fatalf("%s: %v", boot.how, err)
			}
			if err := before.Runs(ctx, cpus); err == nil && before.Bases.Text != k.Bases.Text {
				t.Errorf("%s: the kernel moved from %#x to %#x, and is said to run as before", boot.how, before.Bases.Text, k.Bases.Text)
			}
		}
		watching(t, d, g.Name)
		isHonest(t, k)
		sameSymbols(t, g, k)
		eventually(t, time.Minute, func() error {
			if n := told(integrity.KindRestarted); n != restarts {
				return fmt.Errorf("%s: the daemon told of %d restarts, want %d", boot.how, n, restarts)
			}
			return nil
		})
	}
	if all := findings(t, d, daemon.Query{}); told(integrity.KindRestarted) != len(all) {
		t.Errorf("found on an honest guest: %+v", all)
	}
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// An infected guest attaches as well as a clean one.
func TestAttachInfected(t *testing.T) {
	ctx := testContext(t)
	c, g := newClient(t), sharedGuest(t, "web1")
	src := live(t, c, vmOf(t, c, g))
	for _, attack := range monitor.Attacks {
		t.Run(attack, func(t *testing.T) {
			if _, err := g.Attack(ctx, attack, ""); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := g.EndAttack(ctx, attack); err != nil {
					t.Error(err)
				}
			}()
			k := attached(t, src, attack, anyway)
			isHonest(t, k)
			sameSymbols(t, g, k)
			sameObjects(t, g, k)
		})
	}
}

// offsetsTable finds where a guest's kernel has its symbols' addresses in its
// read-only data, by the distances of some that follow one another: in entries
// of 4 bytes that are relative to a base, either way, or to the entry itself.
func offsetsTable(t *testing.T, k *guest.Kernel) (first uint64, entries []guest.Symbol) {
	t.Helper()
	data := make([]byte, k.Rodata.Size())
	if err := k.Space.Read(testContext(t), k.Rodata.Start, data); err != nil {
		t.Fatal(err)
	}
	for s := range k.Image.All() {
		if s.Module == "" && k.Text.Contains(s.Address) {
			entries = append(entries, s)
		}
	}
	const enough = 64
	if len(entries) < enough {
		t.Fatalf("only %d symbols in the kernel's text", len(entries))
	}
	for _, sign := range []int32{1, -1} {
		for _, own := range []int32{0, 4} {
		next:
			for at := 0; at+4*enough <= len(data); at += 4 {
				for i := range int32(enough) {
					want := sign*int32(entries[i].Address-entries[0].Address) - own*i
					got := int32(binary.LittleEndian.Uint32(data[at+4*int(i):])) - int32(binary.LittleEndian.Uint32(data[at:]))
					if got != want {
						continue next
					}
				}
				return k.Rodata.Start + uint64(at), entries
			}
		}
	}
	t.Fatal("the kernel's read-only data have no table of its symbols' addresses")
	return 0, nil
}

// A guest that overwrites what its kernel says of itself gets a finding, and no
// wrong answer that nobody is warned of; and what a vCPU's registers tell is
// watched all the same.
func TestAttachLiar(t *testing.T) {
	ctx := testContext(t)
	c, g := newClient(t), sharedGuest(t, "web1")
	src := live(t, c, vmOf(t, c, g))
	honest := attached(t, src, "honest", anyway)
	isHonest(t, honest)
	table, entries := offsetsTable(t, honest)
	btf, ok := honest.Image.Lookup("__start_BTF")
	if !ok {
		t.Fatal("no __start_BTF")
	}
	read := func(at uint64, n int) []byte {
		p := make([]byte, n)
		if err := honest.Space.Read(ctx, at, p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	// Each symbol of the text but the first, which say where it begins, gets
	// the address of the next one.
	shifted := func() []byte {
		p := read(table, 4*len(entries))
		kept := 4 * min(64, len(entries)/2)
		return slices.Concat(p[:kept], p[kept+4:], p[len(p)-4:])
	}
	for _, lie := range []struct {
		name   string
		at     uint64
		data   []byte
		object string
		none   bool // of the symbols are left
	}{
		{"symbols' addresses wiped", table, make([]byte, 4*len(entries)), guest.DoubtSymbols, true},
		{"symbols' addresses shifted", table, shifted(), guest.DoubtSymbols, false},
		{"BTF wiped", btf, make([]byte, 64<<10), guest.DoubtTypes, false},
		{"BTF's types without names", btf + 24, bytes.Repeat([]byte{0, 0, 0, 0, 0, 0, 0, 1, 8, 0, 0, 0, 64, 0, 0, 0}, 4<<10), guest.DoubtTypes, false},
	} {
		t.Run(lie.name, func(t *testing.T) {
			ctx := testContext(t)
			truth := read(lie.at, len(lie.data))
			if err := g.Poke(ctx, lie.at, lie.data); err != nil {
				t.Fatal(err)
			}
			restored := false
			restore := func() {
				if !restored {
					restored = true
					if err := g.Poke(ctx, lie.at, truth); err != nil {
						t.Error(err)
					}
				}
			}
			defer restore()
			if !bytes.Equal(read(lie.at, len(lie.data)), lie.data) {
				t.Fatal("the guest's memory is not what was written")
			}
			k, err := guest.Attach(ctx, src, guest.AttachOptions{})
			switch {
			case lie.none:
				if !errors.Is(err, guest.ErrNoTables) {
					t.Errorf("attached: %v, want %v", err, guest.ErrNoTables)
				}
			case err != nil:
				t.Errorf("not attached: %v", err)
			case !slices.ContainsFunc(k.Doubts, func(d guest.Doubt) bool { return d.Object == lie.object }):
				t.Errorf("no doubt of the %s among %+v", lie.object, k.Doubts)
			default:
				t.Log(k.Doubts)
			}
			d := startDaemon(t, t.TempDir(), "--period", "200ms")
			eventually(t, time.Minute, func() error {
				all := findings(t, d, daemon.Query{VM: g.Name})
				for _, r := range all {
					if r.Object == lie.object && r.Kind == integrity.KindInvariant {
						t.Log(r.Message)
						return nil
					}
				}
				return fmt.Errorf("no finding about the %s among %+v", lie.object, all)
			})
			restore()
			if err := d.Stop(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

// gates gives the first vCPU of a guest an interrupt table at an address where
// kernels have theirs, all of its gates to one handler, which lies in that page
// or the next. Flags are those of the two pages: EntryWrite or none.
func gates(t *testing.T, g *tinyvm.Guest, at, handler uint64, size int, flags uint64) {
	t.Helper()
	const table = tinyvm.DefaultMemory - 0x2000
	if err := g.Tables.Map(at, table, 0x2000, tinyvm.Page4K, flags); err != nil {
		t.Fatal(err)
	}
	page := make([]byte, 256*size)
	for i := range 256 {
		gate := page[i*size:]
		binary.LittleEndian.PutUint16(gate, uint16(handler))
		binary.LittleEndian.PutUint16(gate[2:], 8)
		binary.LittleEndian.PutUint16(gate[4:], 0x8e00)
		binary.LittleEndian.PutUint16(gate[6:], uint16(handler>>16))
		if size == 16 {
			binary.LittleEndian.PutUint32(gate[8:], uint32(handler>>32))
		}
	}
	if err := g.Write(table, page); err != nil {
		t.Fatal(err)
	}
	s, err := g.VCPUs[0].SRegs()
	if err != nil {
		t.Fatal(err)
	}
	s.IDT = tinyvm.Table{Base: at, Limit: uint16(len(page) - 1)}
	if err := g.VCPUs[0].SetSRegs(s); err != nil {
		t.Fatal(err)
	}
}

// What is no 64-bit Linux, or nothing yet, is told as what it is.
func TestAttachStrangers(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	for _, tt := range []struct {
		name    string
		mode    tinyvm.Mode
		at      uint64 // of the IDT; 0: the fixture's own
		handler uint64
		run     bool
		gone    bool // its memory
		want    error
	}{
		{name: "never ran", mode: tinyvm.Long, want: guest.ErrNotBooted},
		{name: "real mode", mode: tinyvm.Real, run: true, want: guest.ErrNotBooted},
		{name: "no paging", mode: tinyvm.Protected, run: true, want: guest.ErrNotBooted},
		{name: "64 bits, low interrupt table", mode: tinyvm.Long, run: true, want: guest.ErrNotBooted},
		{name: "another 64-bit kernel", mode: tinyvm.Long, at: 0xfffff80000000000, handler: 0xfffff80000001000, run: true, want: guest.ErrNotLinux},
		{name: "where Linux is, but nothing there", mode: tinyvm.Long, at: 0xffffffff82000000, handler: 0xffffffff82001000, run: true, want: guest.ErrNotLinux},
		{name: "32 bits", mode: tinyvm.PAE, at: 0xc1000000, handler: 0xc1001000, run: true, want: guest.Err32Bit},
		{name: "32 bits, no PAE", mode: tinyvm.Paged32, at: 0xc1000000, handler: 0xc1001000, run: true, want: guest.Err32Bit},
		{name: "no memory", mode: tinyvm.Long, at: 0xfffff80000000000, handler: 0xfffff80000001000, run: true, gone: true, want: guest.ErrNoMemory},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tt.mode, Code: tinyvm.Spin(tt.mode), IRQChip: true})
			if tt.at != 0 {
				size := 8
				if tt.mode == tinyvm.Long {
					size = 16
				}
				gates(t, g, tt.at, tt.handler, size, tinyvm.EntryWrite)
			}
			if tt.run {
				started(t, g)
				until(t, c, vm.ID, 0, "in the guest", inCondition(kvmaccess.ConditionGuest))
			}
			if tt.gone {
				stopped(t, g)
				for _, s := range g.Slots() {
					s.Size = 0
					setSlot(t, g, s)
				}
			}
			_, err := guest.Attach(testContext(t), live(t, c, vm), guest.AttachOptions{})
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
			t.Log(err)
		})
	}
}
