// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

// hookGuests are the guests of testdata/hooks: each had function tracers,
// kprobes and eBPF programs on. The one named k8 ran on a processor for which
// Linux 5.10 takes another instruction that does nothing.
var hookGuests = []string{"debian11", "debian11-k8", "debian12", "debian13", "sid"}

// hookGuest is a guest of testdata/hooks.
type hookGuest struct {
	*Kernel
	Notes  map[string]string
	Before Pages // the code that changed, as it was
	pages  Pages
}

func hookSnapshot(t testing.TB, name string) *Snapshot {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "hooks", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := ReadSnapshot(f)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// loadHookGuest reads a guest, once; nobody is to write to its pages.
func loadHookGuest(t testing.TB, name string) *hookGuest {
	t.Helper()
	if g, ok := loadedHookGuests.Load(name); ok {
		return g.(*hookGuest)
	}
	g := readHookGuest(t, name)
	loadedHookGuests.Store(name, g)
	return g
}

var loadedHookGuests sync.Map

func readHookGuest(t testing.TB, name string) *hookGuest {
	t.Helper()
	s := hookSnapshot(t, name+".snapshot")
	types, err := ParseTypes(unpack(t, "../hooks/"+name+".btf.gz"), nil)
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := ParseSymbols(bytes.NewReader(unpack(t, "../hooks/"+name+".kallsyms.gz")))
	if err != nil {
		t.Fatal(err)
	}
	root, err := strconv.ParseUint(s.Notes["root"], 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	image := NewImage(symbols, 0)
	k := &Kernel{
		Space:  &Space{Memory: s.Pages, Mode: ModeOf(&s.CPUs[0].Registers), Root: root},
		Image:  image,
		Types:  types,
		Text:   image.between("_stext", "_etext"),
		Rodata: image.between("__start_rodata", "__end_rodata"),
	}
	if err := json.Unmarshal([]byte(s.Notes["bases"]), &k.Bases); err != nil {
		t.Fatal(err)
	}
	return &hookGuest{k, s.Notes, hookSnapshot(t, name+"-before.snapshot").Pages, s.Pages}
}

// eachHookGuest runs a test for each guest.
func eachHookGuest(t *testing.T, f func(t *testing.T, g *hookGuest)) {
	for _, name := range hookGuests {
		t.Run(name, func(t *testing.T) { f(t, loadHookGuest(t, name)) })
	}
}

// names are those of the symbols that an address is in.
func (g *hookGuest) names(addr uint64) []string {
	all, _ := g.Image.At(addr)
	var names []string
	for _, sym := range all {
		names = append(names, sym.Name)
	}
	return names
}

var directLine = regexp.MustCompile(`^\tdirect(\(jmp\))?-->`)

var enabledLine = regexp.MustCompile(`^(\S+) \((\d+)\)([ RIDOM]*)(.*)$`)

func TestFtraceEqualsTracefs(t *testing.T) {
	eachHookGuest(t, func(t *testing.T, g *hookGuest) {
		f, err := g.Ftrace(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(f.Sites) < 30000 {
			t.Errorf("%d sites, a kernel has tens of thousands", len(f.Sites))
		}
		var enabled []FtraceSite
		for _, s := range f.Sites {
			if f.Enabled(s) {
				enabled = append(enabled, s)
			}
		}
		lines := strings.Split(strings.TrimSpace(g.Notes["tracing_enabled_functions"]), "\n")
		n := 0
		for i, line := range lines {
			m := enabledLine.FindStringSubmatch(line)
			if m == nil {
				if !directLine.MatchString(line) {
					t.Fatalf("enabled_functions has a line of another kind: %q", line)
				}
				continue
			}
			if n == len(enabled) {
				t.Fatalf("enabled_functions has %q, of %d sites none is left", line, n)
			}
			// Both are by records, of which the kernel's are by address.
			s := enabled[n]
			n++
			if !slices.Contains(g.names(s.IP), m[1]) {
				t.Errorf("site at %#x is in %v, enabled_functions says %q", s.IP, g.names(s.IP), line)
			}
			if users, _ := strconv.Atoi(m[2]); users != f.Users(s) || users != len(f.OpsOf(s)) {
				t.Errorf("%s: %d users by the site, %d by the hashes; enabled_functions says %q", m[1], f.Users(s), len(f.OpsOf(s)), line)
			}
			target, jump, ok := f.Target(s)
			direct := i+1 < len(lines) && directLine.MatchString(lines[i+1])
			var want uint64
			switch tramp := regexp.MustCompile(`tramp: (\S+)`).FindStringSubmatch(m[4]); {
			case direct && m[2] == "1":
				want = f.Direct.Direct[s.IP] &^ 1
				if !strings.Contains(g.codeName(t, want), "bpf_trampoline_") {
					t.Errorf("%s: what is called, %#x, is %q, not the trampoline of %q", m[1], want, g.codeName(t, want), lines[i+1])
				}
			case tramp != nil && strings.HasPrefix(tramp[1], "0x"):
				want, _ = strconv.ParseUint(tramp[1], 0, 64)
			case strings.Contains(m[3], "R"):
				want, _ = g.Image.Lookup("ftrace_regs_caller")
			default:
				want, _ = g.Image.Lookup("ftrace_caller")
			}
			if target != want || !ok || jump != (direct && m[2] == "1" && strings.Contains(lines[i+1], "(jmp)")) {
				t.Errorf("%s: goes to %#x (jump %v, ok %v), want %#x by %q", m[1], target, jump, ok, want, line)
			}
		}
		if n != len(enabled) || n < 5 {
			t.Errorf("%d sites are enabled, enabled_functions has %d", len(enabled), n)
		}
	})
}

// codeName is the symbol of generated code.
func (g *hookGuest) codeName(t *testing.T, addr uint64) string {
	for line := range strings.Lines(g.Notes["generated"]) {
		f := strings.Fields(line)
		if at, _ := strconv.ParseUint(f[0], 16, 64); at == addr {
			return f[2]
		}
	}
	return ""
}

func TestKprobesEqualDebugfs(t *testing.T) {
	eachHookGuest(t, func(t *testing.T, g *hookGuest) {
		probes, err := g.Kprobes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got, want []string
		optimized, ftrace, plain, aggregates := 0, 0, 0, 0
		for _, p := range probes {
			all := []Kprobe{p}
			if p.Aggregate {
				all = p.Probes
				aggregates++
			}
			for _, one := range all {
				line := fmt.Sprintf("%016x k", one.Address)
				if one.Return {
					line = fmt.Sprintf("%016x r", one.Address)
				}
				for _, f := range []struct {
					is   bool
					name string
				}{
					{one.Flags&KprobeGone != 0, " [GONE]"},
					{one.Flags&(KprobeDisabled|KprobeGone) == KprobeDisabled, "[DISABLED]"},
					{p.Optimized, "[OPTIMIZED]"},
					{p.Flags&KprobeFtrace != 0, "[FTRACE]"},
				} {
					if f.is {
						line += f.name
					}
				}
				got = append(got, line)
			}
			switch {
			case p.Flags&KprobeFtrace != 0:
				ftrace++
			case p.Optimized:
				optimized++
			default:
				plain++
			}
		}
		for line := range strings.Lines(g.Notes["kprobes_list"]) {
			f := strings.Fields(line)
			want = append(want, strings.Join(append([]string{f[0], f[1]}, strings.Join(f[3:], "")), " "))
		}
		for i := range got {
			address, rest, _ := strings.Cut(got[i], " ")
			kind := rest[:1]
			got[i] = address + " " + kind + " " + rest[1:]
		}
		slices.Sort(got)
		slices.Sort(want)
		if d := gocmp.Diff(want, got); d != "" {
			t.Errorf("kprobes (-debugfs +memory):\n%s", d)
		}
		if optimized == 0 || ftrace == 0 || plain == 0 || aggregates == 0 {
			t.Errorf("of %d probes %d are optimized, %d of ftrace, %d plain, %d aggregates: each kind is to be there", len(probes), optimized, ftrace, plain, aggregates)
		}
		for _, p := range probes {
			if p.Optimized && (p.DetourSize < 5 || !slices.ContainsFunc(g.generated(t), func(c GeneratedCode) bool { return c.Contains(p.Detour) })) {
				t.Errorf("kprobe at %#x: its detour at %#x of %d bytes is not in a page of kprobes", p.Address, p.Detour, p.DetourSize)
			}
		}
	})
}

func (g *hookGuest) generated(t *testing.T) []GeneratedCode {
	t.Helper()
	code, err := g.GeneratedCode(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return code
}

func TestGeneratedCodeEqualsKallsyms(t *testing.T) {
	eachHookGuest(t, func(t *testing.T, g *hookGuest) {
		var got, want []string
		for _, c := range g.generated(t) {
			module := map[Table]string{TableFtrace: "[__builtin__ftrace]", TableKprobe: "[__builtin__kprobes]", TableBPF: "[bpf]"}[c.Kind]
			got = append(got, fmt.Sprintf("%016x %s %s", c.Start, c.Name, module))
		}
		for line := range strings.Lines(g.Notes["generated"]) {
			f := strings.Fields(line)
			want = append(want, strings.Join([]string{f[0], f[2], f[3]}, " "))
		}
		slices.Sort(got)
		slices.Sort(want)
		if d := gocmp.Diff(want, got); d != "" {
			t.Errorf("generated code (-/proc/kallsyms +memory):\n%s", d)
		}
		if len(want) < 20 {
			t.Errorf("/proc/kallsyms has %d symbols of generated code", len(want))
		}
	})
}

func TestBPFEqualsSyscall(t *testing.T) {
	field := regexp.MustCompile(`(\w+)=(\[[^]]*\]|\S*)`)
	eachHookGuest(t, func(t *testing.T, g *hookGuest) {
		b, err := g.BPF(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		programs := map[string]BPFProgram{}
		for _, p := range b.Programs {
			programs[strconv.FormatUint(p.ID, 10)] = p
		}
		n := 0
		for line := range strings.Lines(g.Notes["bpf_progs"]) {
			f := map[string]string{}
			for _, m := range field.FindAllStringSubmatch(line, -1) {
				f[m[1]] = m[2]
			}
			p, ok := programs[f["id"]]
			if !ok {
				t.Errorf("program is missing: %s", line)
				continue
			}
			n++
			xlated, _ := strconv.ParseUint(f["xlated"], 10, 64)
			tag, _, _ := strings.Cut(f["tag"], "...")
			if p.Name != f["name"] || p.Tag != tag || p.Length*8 != xlated {
				t.Errorf("program %+v, want %s", p, line)
			}
			if kind := strings.ReplaceAll(p.Type.String(), "_", ""); !strings.EqualFold(kind, f["type"]) && f["type"] != "CGroupSKB" {
				t.Errorf("program %d is a %s, want %s", p.ID, p.Type, f["type"])
			}
			addrs := strings.Fields(strings.Trim(f["addrs"], "[]"))
			if got := fmt.Sprintf("%x", p.Func); p.Jited && len(addrs) == 1 && got != addrs[0] {
				t.Errorf("program %d is at %s, want %s", p.ID, got, addrs[0])
			}
			if size, _ := strconv.ParseUint(f["jited"], 10, 64); p.Code.Size() != size {
				t.Errorf("program %d has %d bytes of code, want %s", p.ID, p.Code.Size(), f["jited"])
			}
		}
		if n != len(b.Programs) || n < 10 {
			t.Errorf("%d programs, the guest has %d", len(b.Programs), n)
		}
		for _, tr := range b.Trampolines {
			for _, at := range tr.Programs {
				if !slices.ContainsFunc(b.Programs, func(p BPFProgram) bool { return p.Object == at }) {
					t.Errorf("trampoline of %v has a program at %#x that is not loaded", g.names(tr.Function), at)
				}
			}
			if len(tr.Programs) > 0 && !tr.Ftrace {
				t.Errorf("trampoline %+v of a function is not managed by ftrace", tr)
			}
		}
	})
}

func TestTextMappings(t *testing.T) {
	eachHookGuest(t, func(t *testing.T, g *hookGuest) {
		found, err := g.TextMappings(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		type row struct {
			Section              Section
			Area                 Area
			Writable, Executable bool
			Own                  bool
		}
		var got []row
		for _, m := range found {
			got = append(got, row{m.Section, m.Area, m.Writable, m.Executable, m.Own()})
		}
		want := []row{
			{SectionText, AreaDirectMap, false, false, false},
			{SectionRodata, AreaDirectMap, false, false, false},
			{SectionText, AreaImage, false, true, true},
			{SectionRodata, AreaImage, false, false, true},
		}
		if d := gocmp.Diff(want, got); d != "" {
			t.Errorf("mappings (-want +got):\n%s", d)
		}

		// A page of text that gets a second, writable mapping.
		w := g.overlay()
		text, err := Translate(t.Context(), g.pages, g.Space.Mode, g.Space.Root, g.Text.Start)
		if err != nil {
			t.Fatal(err)
		}
		evil := g.mapPage(t, w, text.GPA)
		k := *g.Kernel
		k.Space = &Space{Memory: w, Mode: g.Space.Mode, Root: g.Space.Root}
		found, err = k.TextMappings(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(found, func(m TextMapping) bool { return m.Writable })
		if i < 0 || found[i].GVA != evil || found[i].Image != g.Text.Start || found[i].Size != 4096 || found[i].Own() {
			t.Errorf("the writable mapping at %#x is not found: %v", evil, found)
		}
	})
}

// overlay is memory that can be written without the guest's being changed.
func (g *hookGuest) overlay() overlay { return overlay{g.pages, Pages{}} }

type overlay struct{ below, above Pages }

func (o overlay) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	for len(p) > 0 {
		from := o.below
		if o.above[gpa&^4095] != nil {
			from = o.above
		}
		n := min(len(p), int(4096-gpa&4095))
		if err := from.ReadPhysical(ctx, gpa, p[:n]); err != nil {
			return err
		}
		p, gpa = p[n:], gpa+uint64(n)
	}
	return nil
}

func (o overlay) write(gpa uint64, p []byte) {
	for len(p) > 0 {
		frame := gpa &^ 4095
		if o.above[frame] == nil {
			page := new([4096]byte)
			if o.below[frame] != nil {
				*page = *o.below[frame]
			}
			o.above[frame] = page
		}
		n := copy(o.above[frame][gpa&4095:], p)
		p, gpa = p[n:], gpa+uint64(n)
	}
}

// mapPage maps a page at an address of the kernel's half that has no mapping,
// to be written.
func (g *hookGuest) mapPage(t *testing.T, w overlay, gpa uint64) uint64 {
	t.Helper()
	// Behind a mapping of vmalloc's there is always a hole.
	var at uint64
	err := g.Space.Mappings(t.Context(), g.Bases.Vmalloc, g.Bases.Vmemmap, func(m Mapping) error {
		if m.Size == 4096 {
			if _, err := Translate(t.Context(), g.pages, g.Space.Mode, g.Space.Root, m.GVA+4096); errors.Is(err, ErrNotPresent) {
				at = m.GVA + 4096
				return ErrStop
			}
		}
		return nil
	})
	if !errors.Is(err, ErrStop) {
		t.Fatalf("no hole in vmalloc: %v", err)
	}
	var walk *WalkError
	if _, err := Translate(t.Context(), g.pages, g.Space.Mode, g.Space.Root, at); !errors.As(err, &walk) || walk.Level != 1 {
		t.Fatalf("no table for %#x: %v", at, err)
	}
	w.write(walk.EntryGPA, binary.LittleEndian.AppendUint64(nil, gpa|entryPresent|entryWrite|entryNX))
	return at
}

// text copies the code that is at hand, the rest is zero; before says of when.
func (g *hookGuest) text(t *testing.T, mem Memory, before bool) *TextCopy {
	t.Helper()
	c := &TextCopy{Address: g.Text.Start, Data: make([]byte, g.Text.Size())}
	n := 0
	err := g.Space.Mappings(t.Context(), g.Text.Start, g.Text.End, func(m Mapping) error {
		for off := uint64(0); off < m.Size; off += 4096 {
			at, page := m.GVA+off, g.Before[m.GPA+off]
			if page == nil || at+4096 <= g.Text.Start || at >= g.Text.End {
				continue
			}
			if !before {
				page = new([4096]byte)
				if err := mem.ReadPhysical(t.Context(), m.GPA+off, page[:]); err != nil {
					return err
				}
			}
			n++
			copy(c.Data[at-c.Address:], page[:])
		}
		return nil
	})
	if err != nil || n != len(g.Before) {
		t.Fatalf("%d of %d pages of text: %v", n, len(g.Before), err)
	}
	return c
}

// codeAtHand are the pages of text that are at hand.
func (g *hookGuest) codeAtHand(t *testing.T) map[uint64]bool {
	t.Helper()
	pages := map[uint64]bool{}
	err := g.Space.Mappings(t.Context(), g.Text.Start, g.Text.End, func(m Mapping) error {
		for off := uint64(0); off < m.Size; off += 4096 {
			if g.pages[m.GPA+off] != nil {
				pages[m.GVA+off] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return pages
}

func TestPatches(t *testing.T) {
	eachHookGuest(t, func(t *testing.T, g *hookGuest) {
		ctx := t.Context()
		set, err := g.Patches(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var at []Patch
		tables := map[Table]int{}
		pages := g.codeAtHand(t)
		for _, p := range set.All() {
			if pages[p.Address&^4095] && pages[(p.Address+5)&^4095] {
				at = append(at, p)
				tables[p.Table]++
			}
		}
		for _, table := range []Table{TableFtrace, TableFtraceCall, TableKprobe, TableStaticKey, TableStaticCall} {
			if tables[table] == 0 {
				t.Errorf("no code of the table %s is at hand", table)
			}
		}
		t.Logf("of %d places, code of %v is at hand", len(set.All()), tables)
		broken, err := violations(ctx, g.Kernel, at)
		if err != nil {
			t.Error(err)
		}
		for _, v := range broken {
			t.Error(v)
		}

		// Each of its bytes that is changed is told.
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			p := at[rnd.IntN(len(at))]
			if len(p.Cond) > 0 {
				continue
			}
			tr, err := Translate(ctx, g.pages, g.Space.Mode, g.Space.Root, p.Address)
			if err != nil {
				t.Fatal(err)
			}
			now := make([]byte, 8)
			if err := g.pages.ReadPhysical(ctx, tr.GPA, now); err != nil {
				t.Fatal(err)
			}
			n, ok := p.fits(now)
			if !ok {
				t.Fatalf("%+v is not there", p)
			}
			i := rnd.IntN(n)
			w := g.overlay()
			w.write(tr.GPA+uint64(i), []byte{now[i] ^ byte(1+rnd.IntN(255))})
			k := *g.Kernel
			k.Space = &Space{Memory: w, Mode: g.Space.Mode, Root: g.Space.Root}
			broken, err := violations(ctx, &k, []Patch{p})
			if err != nil || len(broken) != 1 {
				t.Errorf("%s at %#x: byte %d of % x changed, and %d violations: %v", p.Table, p.Address, i, now[:n], len(broken), err)
			}
		}
	})
}

// violations looks at each patch for itself: not all code is at hand.
func violations(ctx context.Context, k *Kernel, patches []Patch) ([]Violation, error) {
	var all []Violation
	for i := range patches {
		v, err := k.Violations(ctx, patches[i:i+1])
		if err != nil {
			return all, err
		}
		all = append(all, v...)
	}
	return all, nil
}

func TestChangesAreExplained(t *testing.T) {
	eachHookGuest(t, func(t *testing.T, g *hookGuest) {
		set, err := g.Patches(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		before, now := g.text(t, g.pages, true), g.text(t, g.pages, false)
		changes, err := set.Changes(before, now)
		if err != nil {
			t.Fatal(err)
		}
		tables := map[Table]int{}
		for _, c := range changes {
			if c.Why == nil {
				t.Errorf("%v (%v)", c, g.names(c.Address))
				continue
			}
			tables[c.Why.Table]++
		}
		for _, table := range []Table{TableFtrace, TableFtraceCall, TableKprobe, TableStaticKey, TableStaticCall} {
			if tables[table] == 0 {
				t.Errorf("no change by the table %s: %v", table, tables)
			}
		}
		t.Log(tables)

		// A byte that is changed beside is not explained, wherever it is, even
		// where the place of a table begins right behind it.
		rnd := rand.New(rand.NewPCG(3, 4))
		for range 100 {
			c := changes[rnd.IntN(len(changes))]
			i := c.Address - now.Address - uint64(rnd.IntN(16))
			was := now.Data[i]
			now.Data[i] ^= byte(1 + rnd.IntN(255))
			if now.Data[i] == before.Data[i] {
				now.Data[i] = was
				continue // taken back
			}
			found, err := set.Changes(before, now)
			if err != nil {
				t.Fatal(err)
			}
			ok := slices.ContainsFunc(found, func(f TextChange) bool {
				return f.Why == nil && f.Address <= now.Address+i && now.Address+i < f.Address+uint64(len(f.New))
			})
			if !ok && !another(set, now.Address+i, now) {
				t.Errorf("%#x: %#x became %#x, which is explained", now.Address+i, was, now.Data[i])
			}
			now.Data[i] = was
		}
	})
}

// another says whether the byte now is what another table allows.
func another(set *PatchSet, addr uint64, now *TextCopy) bool {
	p := set.Explain(now, addr)
	return p != nil && len(p.Want) > 1
}

func TestChangesOfOtherCode(t *testing.T) {
	a, b := &TextCopy{0x1000, make([]byte, 8)}, &TextCopy{0x1000, make([]byte, 9)}
	if _, err := NewPatchSet(nil).Changes(a, b); err == nil {
		t.Error("code of different lengths was compared")
	}
	if _, err := NewPatchSet(nil).Changes(a, &TextCopy{0x2000, a.Data}); err == nil {
		t.Error("code of different places was compared")
	}
}

func TestPatchFits(t *testing.T) {
	jump := Patch{Address: 0x1000, Want: [][]byte{branch(opcodeJmp32, 0x1000, 0x2000)}, Cond: []uint64{0x2000}}
	tests := []struct {
		name string
		p    Patch
		code []byte
		n    int
		ok   bool
	}{
		{"jump", jump, branch(opcodeJmp32, 0x1000, 0x2000), 5, true},
		{"jump elsewhere", jump, branch(opcodeJmp32, 0x1000, 0x2001), 0, false},
		{"call", jump, branch(opcodeCall, 0x1000, 0x2000), 0, false},
		{"conditional jump", jump, append([]byte{0x0f}, branch(0x84, 0x1001, 0x2000)...), 6, true},
		{"conditional jump elsewhere", jump, append([]byte{0x0f}, branch(0x84, 0x1001, 0x2004)...), 0, false},
		{"cut off", jump, branch(opcodeJmp32, 0x1000, 0x2000)[:4], 0, false},
		{"nothing allowed", Patch{Address: 0x1000}, nop5, 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if n, ok := tt.p.fits(tt.code); n != tt.n || ok != tt.ok {
				t.Errorf("fits(% x) = %d, %v, want %d, %v", tt.code, n, ok, tt.n, tt.ok)
			}
		})
	}
	if !jump.mayChange(branch(opcodeJmp32, 0x1000, 0x2000), 0) {
		t.Error("a jump's first byte stays")
	}
	if jump.mayChange(append([]byte{0x0f}, branch(0x84, 0x1001, 0x2000)...), 1) {
		t.Error("a jump's condition may change")
	}
}

func TestBranch(t *testing.T) {
	for _, tt := range []struct {
		at, to uint64
		want   []byte
	}{
		{0xffffffff81000000, 0xffffffff81000005, []byte{0xe8, 0, 0, 0, 0}},
		{0xffffffff81000000, 0xffffffff81000000, []byte{0xe8, 0xfb, 0xff, 0xff, 0xff}},
		{0xffff888000000000, 0xffff888000000005 + 0x7fffffff, []byte{0xe8, 0xff, 0xff, 0xff, 0x7f}},
		{0xffff888000000000, 0xffff888000000005 + 0x80000000, nil},
		{0xffffffff81000000, 0xffff888000000000, nil},
	} {
		got := branch(opcodeCall, tt.at, tt.to)
		if !bytes.Equal(got, tt.want) {
			t.Errorf("branch(%#x, %#x) = % x, want % x", tt.at, tt.to, got, tt.want)
		}
		if got == nil {
			continue
		}
		if to, ok := branchTarget(tt.at, got); to != tt.to || !ok {
			t.Errorf("branchTarget(% x) = %#x, %v, want %#x", got, to, ok, tt.to)
		}
	}
	for _, code := range [][]byte{nil, {0xe8, 0, 0, 0}, {0xeb}, {0x90, 0, 0, 0, 0, 0}, {0x0f, 0x84, 0, 0, 0}} {
		if to, ok := branchTarget(0x1000, code); ok {
			t.Errorf("branchTarget(% x) = %#x", code, to)
		}
	}
}

// named says whether each of an error's parts says what object it is of.
func named(err error) error {
	if join, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range join.Unwrap() {
			if err := named(e); err != nil {
				return err
			}
		}
		return nil
	}
	var object *ObjectError
	var walk *WalkError
	more := err != nil && (strings.HasPrefix(err.Error(), "and ") || strings.HasPrefix(err.Error(), "mappings of the kernel's text"))
	if err == nil || more || errors.As(err, &object) && object.Object != "" || errors.As(err, &walk) {
		return nil
	}
	return err
}

// fuzzHooks changes words of a guest's memory that a walk reads, and lets it go
// on: it is to end, in an error that names its object if in any. The input is
// any number of edits: the number of a page, a place in it, and what to write
// there: a number, or the address of what is in another of the pages.
func fuzzHooks(f *testing.F, walk func(ctx context.Context, k *Kernel) error) {
	type target struct {
		*hookGuest
		frames []uint64
	}
	var targets []target
	for _, name := range hookGuests {
		g := loadHookGuest(f, name)
		r := NewRecorder(g.pages)
		k := *g.Kernel
		k.Space = &Space{Memory: r, Mode: g.Space.Mode, Root: g.Space.Root}
		if err := walk(f.Context(), &k); err != nil {
			f.Fatal(err)
		}
		targets = append(targets, target{g, slices.Sorted(maps.Keys(r.Pages))})
	}
	edit := func(page, offset uint16, kind byte, value uint64) []byte {
		p := binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, page), offset)
		return binary.LittleEndian.AppendUint64(append(p, kind), value)
	}
	for i := range targets {
		f.Add(byte(i), []byte(nil))
		for page := range uint16(8) {
			f.Add(byte(i), slices.Concat(edit(page*7, 0, 0, 0), edit(page*5, 8, 1, uint64(page)), edit(page, 16, 0, ^uint64(0))))
		}
	}
	f.Fuzz(func(t *testing.T, which byte, edits []byte) {
		g := targets[int(which)%len(targets)]
		w := g.overlay()
		const size, most = 13, 64
		for n := 0; len(edits) >= size && n < most; n++ {
			page := int(binary.LittleEndian.Uint16(edits)) % len(g.frames)
			offset := binary.LittleEndian.Uint16(edits[2:]) % 4096 &^ 7
			value := binary.LittleEndian.Uint64(edits[5:])
			if edits[4]&1 == 1 { // a pointer that is a good one, of something else
				value = g.Bases.DirectMap + g.frames[value%uint64(len(g.frames))] + value>>32%4096
			}
			w.write(g.frames[page]+uint64(offset), binary.LittleEndian.AppendUint64(nil, value))
			edits = edits[size:]
		}
		k := *g.Kernel
		k.Space = &Space{Memory: w, Mode: g.Space.Mode, Root: g.Space.Root}
		if err := named(walk(t.Context(), &k)); err != nil {
			t.Errorf("an error does not name its object: %v", err)
		}
	})
}

func FuzzFtrace(f *testing.F) {
	fuzzHooks(f, func(ctx context.Context, k *Kernel) error {
		t, err := k.Ftrace(ctx)
		if t != nil {
			t.Patches()
		}
		_, err2 := k.ftraceCalls(ctx)
		return errors.Join(err, err2)
	})
}

func FuzzKprobes(f *testing.F) {
	fuzzHooks(f, func(ctx context.Context, k *Kernel) error {
		probes, err := k.Kprobes(ctx)
		_, err2 := k.KprobePatches(ctx, probes)
		return errors.Join(err, err2)
	})
}

func FuzzJumpSites(f *testing.F) {
	fuzzHooks(f, func(ctx context.Context, k *Kernel) error {
		sites, err := k.JumpSites(ctx)
		_, err2 := k.JumpPatches(ctx, sites)
		return errors.Join(err, err2)
	})
}

func FuzzStaticCalls(f *testing.F) {
	fuzzHooks(f, func(ctx context.Context, k *Kernel) error {
		sites, err := k.StaticCalls(ctx)
		trampolines, err2 := k.StaticTrampolines(ctx)
		_, err3 := k.StaticCallPatches(ctx, sites, trampolines)
		return errors.Join(err, err2, err3)
	})
}

func FuzzBPF(f *testing.F) {
	fuzzHooks(f, func(ctx context.Context, k *Kernel) error {
		b, err := k.BPF(ctx)
		_, err2 := k.DispatcherPatches(ctx, b.Dispatchers)
		return errors.Join(err, err2)
	})
}

func FuzzGeneratedCode(f *testing.F) {
	fuzzHooks(f, func(ctx context.Context, k *Kernel) error {
		_, err := k.GeneratedCode(ctx)
		return err
	})
}

func FuzzTextMappings(f *testing.F) {
	fuzzHooks(f, func(ctx context.Context, k *Kernel) error {
		_, err := k.TextMappings(ctx)
		return err
	})
}

// FuzzChanges compares any code by patches of any places.
func FuzzChanges(f *testing.F) {
	f.Add([]byte{0, 0xe8, 1, 2, 3, 4, 0x90, 0xcc}, []byte{0, 0x0f, 0x1f, 0x44, 0, 0, 0x90, 0x90}, uint64(0x1001), uint64(0x2000))
	f.Add([]byte{0x0f, 0x84, 0, 0, 0, 0}, []byte{0x0f, 0x84, 1, 0, 0, 0}, uint64(0x1000), uint64(0x1007))
	f.Fuzz(func(t *testing.T, before, now []byte, at, to uint64) {
		n := min(len(before), len(now))
		a, b := &TextCopy{0x1000, before[:n]}, &TextCopy{0x1000, now[:n]}
		set := NewPatchSet([]Patch{
			{Address: at, Table: TableFtrace, Want: [][]byte{nop5, branch(opcodeCall, at, to)}},
			{Address: at + 1, Table: TableKprobe, Want: [][]byte{{opcodeInt3}}},
			{Address: at, Table: TableStaticCall, Cond: []uint64{to}},
		})
		changes, err := set.Changes(a, b)
		if err != nil {
			t.Fatal(err)
		}
		var got, want []uint64
		for _, c := range changes {
			for i := range c.New {
				got = append(got, c.Address+uint64(i))
			}
		}
		for i := range n {
			if before[i] != now[i] {
				want = append(want, 0x1000+uint64(i))
			}
		}
		if !slices.IsSortedFunc(changes, func(a, b TextChange) int { return cmp.Compare(a.Address, b.Address) }) || !slices.Equal(got, want) {
			t.Errorf("changes of %#x, want %#x", got, want)
		}
	})
}
