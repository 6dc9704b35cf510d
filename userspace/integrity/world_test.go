// SPDX-License-Identifier: MIT

package integrity

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// world is a guest whose memory and registers a test changes.
type world struct {
	*guest.Machine
	t       testing.TB
	pages   guest.Pages
	symbols *guest.Symbols
	image   *guest.Image
	lines   []string // of the symbol file
	clock   time.Time
}

// debian is a recorded Debian 12 guest with page-table isolation and 5-level
// paging (see testdata/record).
func debian(t testing.TB) *world { return recorded(t, "debian12-pti") }

// recorded is a guest of testdata.
func recorded(t testing.TB, name string) *world {
	t.Helper()
	f, err := os.ReadFile("testdata/" + name + ".snapshot")
	if err != nil {
		t.Fatal(err)
	}
	s, err := guest.ReadSnapshot(bytes.NewReader(f))
	if err != nil {
		t.Fatal(err)
	}
	k, err := os.ReadFile("testdata/" + name + ".kallsyms.gz")
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(k))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := guest.ParseSymbols(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{lines: strings.Split(strings.TrimSpace(string(text)), "\n"), Machine: s.Machine(), t: t, pages: s.Pages, symbols: symbols, image: guest.NewImage(symbols, 0)}
	w.clock = time.Unix(1700000000, 0)
	return w
}

func (w *world) now() time.Time { return w.clock }

func (w *world) root() uint64 {
	mode := guest.ModeOf(&w.CPUs[0].Registers)
	root, err := guest.KernelRoot(context.Background(), w.pages, mode, w.CPUs[0].CR3, w.at("sys_call_table"))
	if err != nil {
		w.t.Fatal(err)
	}
	return root
}

func (w *world) at(symbol string) uint64 {
	at, ok := w.image.Lookup(symbol)
	if !ok {
		w.t.Fatalf("no symbol %s", symbol)
	}
	return at
}

// put writes a value of 8 or, of a 32-bit guest, 4 bytes and returns the one
// before.
func (w *world) put(gva, value uint64) uint64 {
	w.t.Helper()
	ctx := context.Background()
	mode := guest.ModeOf(&w.CPUs[0].Registers)
	tr, err := guest.Translate(ctx, w.pages, mode, w.root(), gva)
	if err != nil {
		w.t.Fatal(err)
	}
	p := make([]byte, 8)
	if !mode.Long() {
		p = p[:4]
	}
	if w.pages[tr.GPA&^4095] != nil {
		if err := w.pages.ReadPhysical(ctx, tr.GPA, p); err != nil {
			w.t.Fatal(err)
		}
	}
	old := pointer(p)
	w.pages.WritePhysical(tr.GPA, binary.LittleEndian.AppendUint64(nil, value)[:len(p)])
	return old
}

func (w *world) monitor(opts Options) *Monitor {
	w.t.Helper()
	return w.monitorOf(w, opts)
}

func (w *world) monitorOf(src Source, opts Options) *Monitor {
	w.t.Helper()
	opts.Now = w.now
	m, err := NewMonitor(src, VM{ID: w.VM.ID, Name: "web1", UUID: "6a7e36a5-4e0f-4b94-b6a4-2f3c2d5c0c11", PID: 42}, opts)
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

// tick lets time pass and returns what a Monitor finds.
func (w *world) tick(m *Monitor) []Finding {
	w.t.Helper()
	w.clock = w.clock.Add(100 * time.Millisecond)
	f, err := m.Tick(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

// quiet ticks a few times and fails on any finding.
func (w *world) quiet(m *Monitor) {
	w.t.Helper()
	for range 3 {
		for _, f := range w.tick(m) {
			w.t.Errorf("unexpected: %s %s", f.Kind, f.Message)
		}
	}
}

func (w *world) watching(m *Monitor) {
	w.t.Helper()
	if s := m.Status(); s.State != StateWatching {
		w.t.Fatalf("%+v", s)
	}
}

func texts(findings []Finding) []string {
	out := make([]string, len(findings))
	for i, f := range findings {
		out[i] = fmt.Sprintf("%s: %s", f.Kind, f.Message)
	}
	return out
}

// layout is where made has things, before the slide.
const (
	madeTop     = 0x1000
	madeData    = 0x600000 // of the image: guest-physical
	made64      = 0xffffffff81000000
	made32      = 0xc1000000
	madeEntry32 = 0xff800000 // CPU entry area of the 32-bit guest
)

// madeSymbols are those of the kernel that made makes.
type madeSymbols struct {
	text strings.Builder
	next uint64
	long bool
}

func (s *madeSymbols) add(name string, at uint64) uint64 {
	kind := "T"
	if strings.HasPrefix(name, "init_") || strings.Contains(name, "table") || strings.Contains(name, "_base") || strings.Contains(name, "bits") || strings.Contains(name, "state") {
		kind = "D"
	}
	fmt.Fprintf(&s.text, "%x %s %s\n", at, kind, name)
	return at
}

func (s *madeSymbols) function(name string) uint64 {
	s.next += 0x40
	return s.add(name, s.next)
}

// made makes an honest guest out of nothing: a kernel of 2 MiB of text and
// 2 MiB of data at slide from where its symbols say, 64-bit with 4 levels of
// tables, or 32-bit.
func made(t testing.TB, long bool, slide uint64, cpus int) *world {
	t.Helper()
	pages := guest.Pages{}
	put := func(gpa uint64, v ...uint64) {
		for i, v := range v {
			p := binary.LittleEndian.AppendUint64(nil, v)
			if !long {
				p = p[:4]
			}
			pages.WritePhysical(gpa+uint64(i*len(p)), p)
		}
	}
	sym := &madeSymbols{next: made64, long: long}
	if !long {
		sym.next = made32
	}
	base := sym.next
	text, data := base, base+0x200000
	sym.add("_text", text)
	sym.add("_stext", text)
	r := kvmaccess.Registers{CR0: guest.CR0PE | guest.CR0PG | guest.CR0WP, CR4: guest.CR4PAE | guest.CR4SMEP | guest.CR4SMAP, CR3: madeTop, EFER: guest.EFERNXE}
	pinned := uint64(guest.CR4SMEP | guest.CR4SMAP)

	var gates []uint64 // handlers
	if long {
		r.LSTAR = sym.function("entry_SYSCALL_64") + slide
		r.CSTAR = sym.function("entry_SYSCALL_compat") + slide
		r.SysenterEIP = sym.function("entry_SYSENTER_compat") + slide
		r.SysenterCS, r.STAR, r.SFMASK = 0x10, star64, 0x257fd5
	} else {
		r.SysenterEIP = (sym.function("entry_SYSENTER_32") + slide) & 0xffffffff
		r.SysenterCS = 0x60
	}
	irqs := sym.function("irq_entries_start")
	sym.next += 0x1000
	for vector := range 256 {
		names := guest.Handlers(vector)
		if vector < 0x20 && len(names) == 0 || vector > 0x80 && vector%2 == 0 {
			names = nil
		}
		handler := irqs + uint64(max(vector-0x20, 0))*8
		if names != nil {
			name := names[0]
			if !long && vector == 0x80 {
				name = "entry_INT80_32"
			}
			handler = sym.function(name)
		} else if vector < 0x20 {
			handler = 0 // not present
		}
		gates = append(gates, handler)
	}
	var calls []uint64
	for nr := range 335 {
		name := SyscallName(nr)
		if names := renamed[name]; names != nil {
			name = names[0]
		}
		prefix := "__x64_sys_"
		if !long {
			prefix, name = "__ia32_sys_", fmt.Sprintf("call%d", nr)
		}
		calls = append(calls, sym.function(prefix+name)+slide)
	}
	sym.function("__x64_sys_kill_other")
	sym.add("_etext", text+0x1f0000)
	table := sym.add("sys_call_table", data+0x10000)
	sym.add("sys_call_table_end", table+uint64(len(calls))*8)
	if !long {
		sym.text.WriteString(fmt.Sprintf("%x D after_table\n", table+uint64(len(calls))*4))
	}
	top := sym.add("init_top_pgt", data+0x20000)
	state := sym.add("system_state", data+0x30000)
	bits := sym.add("cr4_pinned_bits", data+0x30010)
	page := sym.add("page_offset_base", data+0x30020)
	sym.add("get_cpu_entry_area", text+0x1e0000)
	sym.add("_end", data+0x200000)

	// Physical: text at 4 MiB, data at 6 MiB, tables from 4 KiB on.
	gpa := func(gva uint64) uint64 { return gva - base + 0x400000 }
	const tables = 0x2000
	if long {
		r.EFER |= guest.EFERLMA | guest.EFERLME | guest.EFERSCE
		for _, root := range []uint64{madeTop, gpa(top)} {
			put(root+511*8, tables|3) // the kernel image
			put(root+508*8, 0x5000|3) // the CPU entry area
		}
		put(tables+510*8, 0x3000|3)
		pmd := (base + slide) >> 21 & 511
		put(0x3000+pmd*8, 0x400000|0x81, 0x600000|0x83|1<<63)
		put(0x5000, 0x6000|3)
		put(0x6000, 0x7000|3)
		put(0x7000, 0x10000|1|1<<63)
		for cpu := range uint64(cpus) {
			put(0x7000+(1+cpu*0x3b)*8, (0x20000+cpu*0x1000)|1|1<<63)
		}
	} else {
		r.CR4 = r.CR4&^guest.CR4PAE | guest.CR4PSE
		for _, root := range []uint64{madeTop, gpa(top)} {
			pde := (base + slide) & 0xffffffff >> 22
			// Text and data in one 4 MiB page, which must lie at a multiple.
			put(root+pde*4, 0x400000|0x83)
			put(root+madeEntry32>>22*4, 0x5000|3)
		}
		put(0x5000, 0x10000|1)
		for cpu := range uint64(cpus) {
			put(0x5000+(1+cpu)*4, (0x20000+cpu*0x1000)|1)
		}
	}
	for i, handler := range gates {
		dpl := uint64(0)
		if userVector(i) {
			dpl = 3
		}
		h := handler + slide
		raw := h&0xffff | 0x10<<16 | 0x8e00<<32 | dpl<<45 | h>>16&0xffff<<48
		if handler == 0 {
			raw = 0
		}
		p := binary.LittleEndian.AppendUint64(nil, raw)
		if long {
			if handler != 0 {
				p = binary.LittleEndian.AppendUint64(p, h>>32)
			} else {
				p = append(p, make([]byte, 8)...)
			}
		} else if handler != 0 {
			p[2] = 0x60
		}
		pages.WritePhysical(0x10000+uint64(i*len(p)), p)
	}
	put(gpa(table), calls...)
	put(gpa(state), 3)
	put(gpa(bits), pinned)
	put(gpa(page), 0xff11000000000000+slide)
	for text := gpa(text); text < gpa(sym.next); text += 4096 {
		pages.WritePhysical(text, bytes.Repeat([]byte{0x90}, 4096))
	}

	entry := uint64(entryArea)
	if !long {
		entry = madeEntry32
	}
	r.IDTR = kvmaccess.TableRegister{Base: entry, Limit: uint16(256*guest.GateSize(long) - 1)}
	w := &world{Machine: &guest.Machine{VM: kvmaccess.VM{ID: 7, PID: 42}, Memory: pages}, t: t, pages: pages, clock: time.Unix(1700000000, 0)}
	for cpu := range uint64(cpus) {
		v := kvmaccess.VCPU{VM: 7, ID: uint32(cpu), Condition: kvmaccess.ConditionGuest, Registers: r}
		table := make([]uint64, 16)
		if long {
			v.GDTR = kvmaccess.TableRegister{Base: entry + 0x1000 + cpu*0x3b000, Limit: 127}
			v.TR = kvmaccess.Segment{Selector: 0x40, Base: v.GDTR.Base + 0x2000}
			for i, raw := range flat64 {
				table[i] = raw
			}
			table[8] = 0x8b<<40 | v.TR.Base&0xffffff<<16 | v.TR.Base>>24&0xff<<56 | 0x4087
			table[9] = v.TR.Base >> 32
			table[15] = 0x0040f50000000000 | cpu
		} else {
			v.GDTR = kvmaccess.TableRegister{Base: entry + 0x1000 + cpu*0x1000, Limit: 255}
			v.TR = kvmaccess.Segment{Selector: 0x80, Base: v.GDTR.Base + 0x800}
			table = make([]uint64, 32)
			for i, raw := range flat32 {
				table[i] = raw
			}
			table[16] = 0x8b<<40 | v.TR.Base&0xffffff<<16 | v.TR.Base>>24&0xff<<56 | 0x206b
			table[27] = 0x00cf93<<40 | 0xffff
			table[31] = 0x89<<40 | 0x206b
		}
		for i, raw := range table {
			pages.WritePhysical(0x20000+cpu*0x1000+uint64(i)*8, binary.LittleEndian.AppendUint64(nil, raw))
		}
		w.CPUs = append(w.CPUs, v)
	}
	symbols, err := guest.ParseSymbols(strings.NewReader(sym.text.String()))
	if err != nil {
		t.Fatal(err)
	}
	w.symbols, w.image = symbols, guest.NewImage(symbols, slide)
	return w
}

// reboot makes w the same guest after another boot.
func (w *world) reboot(slide uint64) {
	w.t.Helper()
	next := made(w.t, guest.ModeOf(&w.CPUs[0].Registers).Long(), slide, len(w.CPUs))
	clear(w.pages)
	for gpa, page := range next.pages {
		w.pages[gpa] = page
	}
	copy(w.CPUs, next.CPUs)
	w.image = next.image
}

func keys(findings []Finding) []string {
	out := make([]string, len(findings))
	for i, f := range findings {
		out[i] = string(f.Kind) + " " + f.Key()
	}
	slices.Sort(out)
	return out
}

func sorted(s []string) []string {
	s = append([]string{}, s...)
	slices.Sort(s)
	return s
}
