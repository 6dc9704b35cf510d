// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
)

// moduleKernel is a guest of testdata/modules: with modules, BPF programs and
// trampolines, tracing and kprobes.
func moduleKernel(tb testing.TB, name string) (*Kernel, *Snapshot) {
	tb.Helper()
	open := func(ending string) []byte {
		p, err := os.ReadFile("testdata/modules/" + name + ending)
		if err != nil {
			tb.Fatal(err)
		}
		return p
	}
	unzip := func(p []byte) []byte {
		z, err := gzip.NewReader(bytes.NewReader(p))
		if err != nil {
			tb.Fatal(err)
		}
		if p, err = io.ReadAll(z); err != nil {
			tb.Fatal(err)
		}
		return p
	}
	s, err := ReadSnapshot(bytes.NewReader(open(".snapshot")))
	if err != nil {
		tb.Fatal(err)
	}
	root, err := strconv.ParseUint(s.Notes["root"], 0, 64)
	if err != nil {
		tb.Fatal(err)
	}
	symbols, err := ParseSymbols(bytes.NewReader(unzip(open(".kallsyms.gz"))))
	if err != nil {
		tb.Fatal(err)
	}
	types, err := ParseTypes(unzip(open(".btf.gz")), nil)
	if err != nil {
		tb.Fatal(err)
	}
	k := &Kernel{Space: &Space{Memory: s, Mode: ModeOf(&s.CPUs[0].Registers), Root: root}, Image: NewImage(symbols, 0), Types: types}
	return k, s
}

// moduleSymbols are those that ReadModules brought.
func moduleSymbols(k *Kernel) []Symbol {
	var all []Symbol
	for sym := range k.Image.All() {
		if sym.Module != "" {
			all = append(all, sym)
		}
	}
	return all
}

func TestReadModules(t *testing.T) {
	ctx := context.Background()
	for _, name := range attachable {
		k, s := moduleKernel(t, name)
		if err := k.ReadModules(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var lines []string
		kinds := map[string]int{}
		for _, sym := range moduleSymbols(k) {
			lines = append(lines, fmt.Sprintf("%016x %c %s [%s]", sym.Address, sym.Type, sym.Name, sym.Module))
			kinds[sym.Module]++
		}
		slices.Sort(lines)
		sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
		if strconv.Itoa(len(lines)) != s.Notes["symbols"] || hex.EncodeToString(sum[:]) != s.Notes["digest"] {
			t.Errorf("%s: %d symbols, the guest has %s, or other ones", name, len(lines), s.Notes["symbols"])
		}
		for _, module := range []string{"nf_tables", "bpf", "__builtin__ftrace", "__builtin__kprobes"} {
			if kinds[module] == 0 {
				t.Errorf("%s: no symbols of %s", name, module)
			}
		}
		// An address within a module is named, one beside it is not.
		last := slices.MaxFunc(k.Image.extents, func(a, b moduleExtent) int { return int(int64(a.End - b.End)) })
		if got := k.Image.Name(last.End); strings.Contains(got, "["+last.module+"]") {
			t.Errorf("%s: behind the last module is %s", name, got)
		}
		for _, sym := range moduleSymbols(k) {
			if sym.Type != 't' || sym.Module == "bpf" {
				continue
			}
			if got := k.Image.Name(sym.Address + 1); !strings.HasSuffix(got, "+0x1 ["+sym.Module+"]") {
				t.Errorf("%s: %s of %s at %#x: %q", name, sym.Name, sym.Module, sym.Address, got)
				break
			}
		}
	}
}

// TestSameModules: a module that was loaded where another one was is told from
// it, and names can be left out.
func TestSameModules(t *testing.T) {
	ctx := t.Context()
	for _, name := range attachable {
		k, s := moduleKernel(t, name)
		if err := k.ReadModules(ctx); err != nil {
			t.Fatal(err)
		}
		if !k.SameModules(ctx) {
			t.Errorf("%s: the modules are said to be others", name)
		}
		if all := moduleSymbols(&Kernel{Image: k.Image.WithoutModules()}); len(all) > 0 || len(moduleSymbols(k)) == 0 {
			t.Errorf("%s: %d of %d modules' symbols are left", name, len(all), len(moduleSymbols(k)))
		}
		head, err := k.symbol("modules")
		if err != nil {
			t.Fatal(err)
		}
		list, err1 := k.offset("module", "list")
		field, err2 := k.offset("module", "name")
		first, err3 := k.Space.Pointer(ctx, head)
		tr, err4 := Translate(ctx, s, k.Space.Mode, k.Space.Root, first-list+field)
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			t.Fatal(err)
		}
		s.write(t, tr.GPA, []byte("other\x00"))
		if k.SameModules(ctx) {
			t.Errorf("%s: another module is said to be the same", name)
		}
	}
}

func TestBootTime(t *testing.T) {
	for _, name := range attachable {
		k, s := moduleKernel(t, name)
		k.readBootTime(context.Background())
		want, err := strconv.ParseInt(s.Notes["btime"], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if got := k.Fingerprint.BootTime; got.Unix() != want {
			t.Errorf("%s: booted at %v, the guest says %v", name, got, time.Unix(want, 0).UTC())
		}
	}
}

// moduleField is where a field of the module lies, and the module.
func moduleField(tb testing.TB, k *Kernel, module, path string) uint64 {
	tb.Helper()
	at := uint64(0)
	head, _ := k.Image.Lookup("modules")
	list, err := k.offset("module", "list")
	if err != nil {
		tb.Fatal(err)
	}
	if err := k.List(context.Background(), "modules", head, 1000, func(node uint64) error {
		o, err := k.Object(context.Background(), "module", node-list)
		if err != nil {
			return err
		}
		if name, err := o.String("name"); err != nil || name != module {
			return err
		}
		at, err = o.Addr(path)
		return err
	}); err != nil || at == 0 {
		tb.Fatalf("module %s: %v", module, err)
	}
	return at
}

// TestDamagedModuleSymbols: what cannot be read of one module is an error that
// names it; the others are there.
func TestDamagedModuleSymbols(t *testing.T) {
	ctx := context.Background()
	for _, name := range attachable {
		k, s := moduleKernel(t, name)
		table, err := k.Space.Pointer(ctx, moduleField(t, k, "nf_tables", "kallsyms"))
		if err != nil {
			t.Fatal(err)
		}
		field := func(path string) uint64 {
			o, err := k.Object(ctx, "mod_kallsyms", table)
			if err != nil {
				t.Fatal(err)
			}
			at, err := o.Addr(path)
			if err != nil {
				t.Fatal(err)
			}
			return at
		}
		for _, tt := range []struct {
			name  string
			at    uint64
			value uint64
		}{
			{"table nowhere", moduleField(t, k, "nf_tables", "kallsyms"), 0xffffffffdead0000},
			{"table of the user's", moduleField(t, k, "nf_tables", "kallsyms"), 0x400000},
			{"symbols nowhere", field("symtab"), 0xffffffffdead0000},
			{"very many", field("num_symtab"), 1<<32 - 1},
			{"more than there are", field("num_symtab"), 1 << 19},
			{"names nowhere", field("strtab"), 0xffffffffdead0000},
			{"types nowhere", field("typetab"), 0xffffffffdead0000},
			{"very many exports", moduleField(t, k, "nf_tables", "num_syms"), 1<<32 - 1},
		} {
			pages := maps.Clone(s.Pages)
			tr, err := Translate(ctx, s, k.Space.Mode, k.Space.Root, tt.at)
			if err != nil {
				t.Fatal(err)
			}
			page := *pages[tr.GPA&^4095]
			if strings.Contains(tt.name, "many") || strings.Contains(tt.name, "more") {
				binary.LittleEndian.PutUint32(page[tr.GPA&4095:], uint32(tt.value))
			} else {
				binary.LittleEndian.PutUint64(page[tr.GPA&4095:], tt.value)
			}
			pages[tr.GPA&^4095] = &page
			broken := *k
			space := *k.Space
			space.Memory, broken.Space = pages, &space
			err = broken.ReadModules(ctx)
			var object *ObjectError
			if !errors.As(err, &object) || !strings.Contains(err.Error(), "nf_tables") {
				t.Errorf("%s, %s: %v", name, tt.name, err)
			}
			got := moduleSymbols(&broken)
			has := func(module string) bool {
				return slices.ContainsFunc(got, func(s Symbol) bool { return s.Module == module })
			}
			if !has("dm_mod") || !has("bpf") || has("nf_tables") != strings.Contains(tt.name, "exports") {
				t.Errorf("%s, %s: nf_tables %t, dm_mod %t, bpf %t", name, tt.name, has("nf_tables"), has("dm_mod"), has("bpf"))
			}
		}
	}
}

func TestNoModuleTypes(t *testing.T) {
	k, _ := moduleKernel(t, "sid")
	k.Types, k.TypesErr = nil, ErrNoTypes
	if err := k.ReadModules(context.Background()); !errors.Is(err, ErrNoTypes) {
		t.Errorf("without types: %v", err)
	}
}

// TestExports has a table of exports with offsets.
func TestExports(t *testing.T) {
	s := &btf.Struct{Name: "kernel_symbol", Size: 12}
	for i, name := range []string{"value_offset", "name_offset", "namespace_offset"} {
		s.Members = append(s.Members, btf.Member{Name: name, Type: integer("int", 4), Offset: btf.Bits(32 * i)})
	}
	types, err := ParseTypes(buildTypes(t, s), nil)
	if err != nil {
		t.Fatal(err)
	}
	memory := make([]byte, 0x3000)
	copy(memory[0x1800:], "first\x00second\x00")
	put := func(at int, v uint64) { binary.LittleEndian.PutUint32(memory[at:], uint32(v-uint64(at))) }
	put(0x100, 0x2000)
	put(0x104, 0x1800)
	put(0x10c, 0x2040)
	put(0x110, 0x1806)
	k := flat(t, memory)
	k.Types = types
	got := map[string]uint64{}
	const start = flatBase
	err = k.exports(context.Background(), start+0x100, 2, func(name []byte, at uint64) { got[string(name)] = at - start })
	if err != nil || len(got) != 2 || got["first"] != 0x2000 || got["second"] != 0x2040 {
		t.Errorf("%#x, %v", got, err)
	}
	put(0x110, 0x80000)
	k = flat(t, memory)
	k.Types = types
	if err := k.exports(context.Background(), start+0x100, 2, func([]byte, uint64) {}); err == nil {
		t.Error("a name in no memory")
	}
}

// FuzzReadModules overwrites memory of a real guest's modules.
func FuzzReadModules(f *testing.F) {
	type base struct {
		k     *Kernel
		s     *Snapshot
		pages []uint64
	}
	var bases []base
	for i, name := range attachable {
		k, s := moduleKernel(f, name)
		bases = append(bases, base{k, s, slices.Sorted(maps.Keys(s.Pages))})
		f.Add(uint8(i), uint16(0), uint16(0), []byte{1, 2, 3, 4, 5, 6, 7, 8})
		for n := range len(s.Pages) {
			if n%8 == i {
				f.Add(uint8(i), uint16(n), uint16(8*n), bytes.Repeat([]byte{0xff}, 8))
			}
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, page, at uint16, patch []byte) {
		b := bases[int(which)%len(bases)]
		pages := maps.Clone(b.s.Pages)
		gpa := b.pages[int(page)%len(b.pages)]
		changed := *pages[gpa]
		copy(changed[at&4095:], patch)
		pages[gpa] = &changed
		k := *b.k
		space := *k.Space
		space.Memory, k.Space = pages, &space
		k.readBootTime(context.Background())
		if err := k.ReadModules(context.Background()); err != nil {
			var object *ObjectError
			if !errors.As(err, &object) {
				t.Errorf("an error that names no object: %v", err)
			}
		}
		for _, sym := range moduleSymbols(&k) {
			if sym.Name == "" || !symbolType(sym.Type) {
				t.Errorf("%+v", sym)
			}
		}
		k.Image.Name(0xffffffffc0001234)
	})
}
