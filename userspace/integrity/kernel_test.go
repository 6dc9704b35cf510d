// SPDX-License-Identifier: MIT

package integrity

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/internal/symboltable"
)

// Where a made guest has what speaks for itself, from the start of its data on.
const (
	madeFrom    = 0x200000
	madeBanner  = madeFrom + 0x40000
	madeFillers = madeFrom + 0x50000
	madeTables  = madeFrom + 0x100000
	madeDirect  = 0xffff888000000000
)

// speaking gives a made guest its symbol table, banner and direct map.
func speaking(w *world) *world {
	w.t.Helper()
	start := made64 + w.image.Slide
	var all []symboltable.Symbol
	for sym := range w.image.All() {
		all = append(all, symboltable.Symbol{Address: sym.Address, Type: sym.Type, Name: sym.Name})
	}
	all = append(all, symboltable.Symbol{Address: start + madeBanner, Type: 'D', Name: "linux_banner"})
	for i := range uint64(1000) {
		all = append(all, symboltable.Symbol{Address: start + madeFillers + 8*i, Type: 'd', Name: fmt.Sprintf("filler%d", i)})
	}
	slices.SortStableFunc(all, func(a, b symboltable.Symbol) int { return cmp.Compare(a.Address, b.Address) })
	gpa := func(offset uint64) uint64 { return 0x400000 + offset }
	w.pages.WritePhysical(gpa(madeTables), symboltable.Encode(start+madeTables, start, all, symboltable.Layouts["6.15"]))
	w.pages.WritePhysical(gpa(madeBanner), []byte("Linux version 6.15.0-made (test) #1 SMP Debian 6.15.0-1\n\x00"))
	w.put(w.at("page_offset_base"), madeDirect)
	const tables = 0x8000
	large := binary.LittleEndian.AppendUint64(nil, 0x83|1<<63)
	for _, root := range []uint64{madeTop, gpa(w.at("init_top_pgt") - start)} {
		w.pages.WritePhysical(root+(madeDirect>>39&511)*8, binary.LittleEndian.AppendUint64(nil, tables|3))
	}
	w.pages.WritePhysical(tables+(madeDirect>>30&511)*8, large)
	// What is in the image and was not written to is zero.
	for at := gpa(0); at < gpa(0x400000); at += 4096 {
		if w.pages[at] == nil {
			w.pages[at] = new([4096]byte)
		}
	}
	return w
}

// TestWithoutFile attaches to guests by what is in their memory.
func TestWithoutFile(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 2))
	cache := &guest.Cache{}
	m := w.monitor(Options{Settle: -1, Cache: cache})
	w.quiet(m)
	w.watching(m)
	s := m.Status()
	if s.Symbols != w.symbols.Len()+1001 || s.Slide != 0x1000000 || s.Kernel == nil || s.Kernel.Release != "6.15.0-made" || s.Kernel.Distribution != "Debian 6.15.0-1" {
		t.Errorf("%+v, kernel %+v", s, s.Kernel)
	}
	if !m.rootFixed {
		t.Error("the kernel's own page tables are not used")
	}
	// A handler has its name.
	table := w.at("sys_call_table")
	old := w.put(table+8*59, w.at("__x64_sys_kill_other"))
	found := w.tick(m)
	if len(found) != 1 || !strings.Contains(found[0].Message, "__x64_sys_kill_other") {
		t.Errorf("hooked: %q", texts(found))
	}
	// So it has at first sight.
	other := w.monitor(Options{Settle: -1, Cache: cache})
	found = w.tick(other)
	if len(found) != 1 || found[0].Kind != KindInvariant || found[0].Check != checkSyscalls {
		t.Errorf("hooked before: %q", texts(found))
	}
	w.put(table+8*59, old)
	w.tick(m)
	w.quiet(m)
}

// TestAllGatesHookedWithoutFile attaches to a guest of which no gate is its kernel's.
func TestAllGatesHookedWithoutFile(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 1))
	idt := w.CPUs[0].IDTR.Base
	for vector := range uint64(256) {
		w.put(idt+16*vector, 0xc0108e0000101000+vector*8)
	}
	m := w.monitor(Options{Settle: -1})
	found := w.tick(m)
	w.watching(m)
	if s := m.Status(); s.Kernel == nil || s.Symbols == 0 {
		t.Fatalf("%+v", s)
	}
	if len(found) < 200 || slices.ContainsFunc(found, func(f Finding) bool { return f.Check != checkIDT }) {
		t.Errorf("%d findings: %q", len(found), texts(found)[:min(len(found), 3)])
	}
}

// TestOverwritten has the guest overwrite its symbol table: found at the latest
// when each piece of it was looked at, and when it is put right.
func TestOverwritten(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 1))
	m := w.monitor(Options{Settle: -1})
	w.quiet(m)
	at := made64 + w.image.Slide + madeTables + 0x1000
	round := func() (found []Finding) {
		for end := w.clock.Add(m.opts.Verify + time.Second); w.clock.Before(end); w.clock = w.clock.Add(time.Second) {
			found = append(found, w.tick(m)...)
		}
		return found
	}
	if found := round(); len(found) != 0 {
		t.Fatalf("nothing was changed: %q", texts(found))
	}
	old := w.put(at, 0x4141414141414141)
	found := round()
	if diff := keys(found); len(diff) != 1 || diff[0] != "changed kernel/symbol table" || !strings.Contains(found[0].Message, "overwritten") {
		t.Fatalf("overwritten: %q", texts(found))
	}
	if found := round(); len(found) != 0 {
		t.Errorf("the same again: %q", texts(found))
	}
	w.put(at, old)
	if found := keys(round()); len(found) != 1 || found[0] != "cleared kernel/symbol table" {
		t.Errorf("put right: %q", found)
	}
	w.quiet(m)
}

// TestSymbolTableGone attaches to a guest that has destroyed its symbol table: that
// is a finding, and what needs no symbols goes on.
func TestSymbolTableGone(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 1))
	w.pages.WritePhysical(0x400000+madeTables, make([]byte, 0x20000))
	m := w.monitor(Options{Settle: -1})
	found := w.tick(m)
	if got := keys(found); len(got) != 1 || got[0] != "invariant kernel/symbol table" {
		t.Errorf("%q", texts(found))
	}
	s := m.Status()
	if s.State != StateWatching || s.Symbols != 0 || s.Kernel != nil {
		t.Errorf("%+v", s)
	}
	w.CPUs[0].LSTAR += 0x40
	if got := keys(w.tick(m)); len(got) != 1 || got[0] != "changed msr/lstar@0/LSTAR" {
		t.Errorf("%q", got)
	}
	// It is looked for again for a while, since the guest may be restarting.
	m = w.monitor(Options{})
	w.quiet(m)
	if s := m.Status(); s.State != StateWaiting || !strings.Contains(s.Reason, "symbol table") {
		t.Errorf("%+v", s)
	}
	w.clock = w.clock.Add(settleTables)
	if got := keys(w.tick(m)); len(got) != 1 || got[0] != "invariant kernel/symbol table" {
		t.Errorf("after a while: %q", got)
	}
	// A symbol file helps.
	m = w.monitor(Options{Settle: -1, Symbols: w.symbols})
	w.tick(m)
	if s := m.Status(); s.Symbols == 0 {
		t.Errorf("%+v", s)
	}
}

// TestSpeakingBoots: a kernel that still boots is waited for, without much ado.
func TestSpeakingBoots(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 1))
	w.put(w.at("system_state"), 0)
	m := w.monitor(Options{})
	for range 3 {
		w.quiet(m)
		if s := m.Status(); s.State != StateWaiting || s.Reason != "the guest's kernel still boots" {
			t.Errorf("%+v", s)
		}
	}
	first := m.kernel
	w.put(w.at("system_state"), 3)
	w.quiet(m)
	w.watching(m)
	if m.kernel != first {
		t.Error("the kernel was found twice")
	}
}

// TestEarlyTables: a kernel that was found on page tables which it gave up since
// is read through its own.
func TestEarlyTables(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 1))
	own := w.at("init_top_pgt") - made64 - w.image.Slide + 0x400000
	w.put(w.at("system_state"), 0)
	top := *w.pages[own]
	*w.pages[own] = [4096]byte{}
	m := w.monitor(Options{})
	w.quiet(m)
	if s := m.Status(); s.Reason != "the guest's kernel still boots" || m.kernel == nil || m.kernel.Space.Root != madeTop {
		t.Fatalf("%+v", s)
	}
	w.put(w.at("system_state"), 3)
	*w.pages[own] = top
	w.CPUs[0].CR3 = own
	*w.pages[madeTop] = [4096]byte{}
	w.quiet(m)
	w.watching(m)
	if m.root != own || !m.rootFixed || m.Status().Open != 0 {
		t.Errorf("root %#x, fixed %t, %+v", m.root, m.rootFixed, m.Status())
	}
}

// TestSpeakingRestarts: the kernel is found anew after another boot, where it
// lies then, and another kernel, too.
func TestSpeakingRestarts(t *testing.T) {
	w := speaking(made(t, true, 0x1000000, 2))
	cache := &guest.Cache{}
	m := w.monitor(Options{Settle: -1, Cache: cache})
	w.quiet(m)
	w.reboot(0x2400000)
	speaking(w)
	var found []Finding
	for range 3 {
		w.clock = w.clock.Add(time.Second)
		found = append(found, w.tick(m)...)
	}
	if got := keys(found); len(got) != 1 || got[0] != "restarted guest/kernel" {
		t.Errorf("%q", texts(found))
	}
	w.watching(m)
	if s := m.Status(); s.Slide != 0x2400000 || s.Open != 0 || s.Kernel == nil {
		t.Errorf("%+v", s)
	}
	// Where the same kernel runs that ran before, elsewhere no symbol was
	// decoded again.
	if a := m.kernel.Image.Symbols; a == nil || a != m.g.Image.Symbols {
		t.Error("not the kernel's symbols are used")
	}
}

// A handler in a module has its name, whether that was loaded before or not; and
// while another module may be where one was, none.
func TestModuleNamed(t *testing.T) {
	f, err := os.Open("../guest/testdata/whole/debian12.snapshot.xz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := guest.ReadSnapshot(f)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Machine: s.Machine(), t: t, pages: s.Pages, clock: time.Unix(1700000000, 0)}
	m := w.monitor(Options{Settle: -1})
	w.quiet(m)
	w.watching(m)
	k := m.g.Kernel
	w.image = k.Image
	var modules []guest.Symbol
	for sym := range k.Image.All() {
		if sym.Module != "" && sym.Type == 't' && !slices.ContainsFunc(modules, func(o guest.Symbol) bool { return o.Module == sym.Module }) {
			modules = append(modules, sym)
		}
	}
	if len(modules) < 2 {
		t.Fatalf("%d modules", len(modules))
	}
	table := w.at("sys_call_table")
	hook := func(nr, at uint64, want guest.Symbol) {
		t.Helper()
		w.put(table+8*nr, at)
		found := w.tick(m)
		if len(found) != 1 || found[0].New == nil || found[0].New.Symbol != want.Name || found[0].New.Module != want.Module {
			t.Errorf("%+v, want %s [%s]", found, want.Name, want.Module)
		}
	}
	image := k.Image
	hook(59, modules[0].Address, modules[0])
	w.clock = w.clock.Add(time.Hour)
	hook(60, modules[1].Address, modules[1])
	if k.Image != image {
		t.Error("all modules were read anew, though none was loaded")
	}
	// One that was not there yet.
	k.Image = image.WithoutModules()
	hook(61, modules[0].Address, modules[0])
	if m.g.Image == image {
		t.Error("the module was not looked for")
	}
	// Another one is the newest, and it is too soon to read all.
	head := w.at("modules")
	first := w.put(head, 0)
	w.put(head, head)
	hook(62, modules[1].Address, guest.Symbol{})
	w.put(head, first)
	w.quiet(m)
}
