// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
)

// rawBTF makes BTF out of types and strings as they stand there.
func rawBTF(types, text []byte) []byte {
	out := []byte{0x9f, 0xeb, 1, 0}
	for _, v := range []int{24, 0, len(types), len(types), len(text)} {
		out = binary.LittleEndian.AppendUint32(out, uint32(v))
	}
	return append(append(out, types...), text...)
}

func u32(v ...uint32) []byte {
	var out []byte
	for _, v := range v {
		out = binary.LittleEndian.AppendUint32(out, v)
	}
	return out
}

// typeChain is BTF of n pointers, each to the next one, and a struct x that holds
// the first: more than the decoder's recursion can follow, if it is long.
func typeChain(n int) []byte {
	types := u32(1, btfStruct<<24|1, 8, 1, 2, 0)
	for i := range n {
		types = append(types, u32(0, btfPtr<<24, uint32(i+3))...)
	}
	return rawBTF(append(types, u32(1, btfInt<<24, 4, 32)...), []byte("\x00x\x00"))
}

func TestTypesOfRecorded(t *testing.T) {
	// As the BTF in /sys/kernel/btf of these kernels has them.
	want := map[string]map[string]uint32{
		"debian11": {"task_struct.comm": 2736, "task_struct.pid_links[1].next": 2360, "cred.uid": 8, "module.name": 24, "rq.curr": 2416},
		"debian12": {"task_struct.comm": 2976, "task_struct.tasks": 2192, "cred.uid": 8, "module.name": 24, "rq.curr": 2400},
		"debian13": {"task_struct.comm": 2976, "task_struct.pid_links[1].next": 2560, "cred.uid": 8, "rq.curr": 2680, "module.mem[1].base": 392},
		"sid":      {"task_struct.comm": 3344, "task_struct.tasks.prev": 2608, "rq.curr": 24, "rq.donor": 24, "module.mem[1].base": 392},
	}
	for _, name := range recordedNames {
		types, err := ParseTypes(unpack(t, name+".btf.gz"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := types.check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for path, offset := range want[name] {
			typeName, field, _ := strings.Cut(path, ".")
			if f, err := types.structField(typeName, field); err != nil || f.Offset != offset {
				t.Errorf("%s: %s is at %d, not %d: %v", name, path, f.Offset, offset, err)
			}
		}
		for _, typeName := range types.Names() {
			text, err := types.Declaration(typeName)
			if err != nil || text == "" {
				t.Errorf("%s: %s: %q, %v", name, typeName, text, err)
			}
		}
	}
}

func TestParseTypesBad(t *testing.T) {
	good := unpack(t, "debian12.btf.gz")
	cut := func(n int) []byte { return good[:len(good)-n] }
	change := func(at int, v ...byte) []byte {
		p := slices.Clone(good)
		copy(p[at:], v)
		return p
	}
	for name, raw := range map[string][]byte{
		"nothing":            nil,
		"a few bytes":        good[:10],
		"zeros":              make([]byte, 4096),
		"cut":                cut(100),
		"half":               cut(len(good) / 2),
		"big endian":         change(0, 0xeb, 0x9f),
		"version 9":          change(2, 9),
		"header of 4 bytes":  change(4, 4),
		"header of 4 GiB":    change(4, 0xff, 0xff, 0xff, 0xff),
		"types behind it":    change(8, 0xff, 0xff, 0xff, 0x7f),
		"strings behind it":  change(16, 0xff, 0xff, 0xff, 0x7f),
		"types of 4 GiB":     change(12, 0xfc, 0xff, 0xff, 0xff),
		"a type cut off":     rawBTF(u32(0, btfStruct<<24|5, 8), []byte{0}),
		"an unended string":  rawBTF(nil, []byte("\x00x")),
		"strings not of any": rawBTF(nil, []byte("x\x00")),
	} {
		if types, err := ParseTypes(raw, nil); !errors.Is(err, ErrBadTypes) {
			t.Errorf("%s: %v, %v", name, types, err)
		}
	}
}

// TestHostileTypes: what can be decoded, but not be used.
func TestHostileTypes(t *testing.T) {
	text := []byte("\x00x\x00y\x00")
	for _, c := range []struct {
		name string
		raw  []byte
		want error
	}{
		{"half a million pointers in a row", typeChain(500_000), ErrBadTypes},
		{"a reference to nothing", rawBTF(u32(1, btfStruct<<24|1, 8, 3, 77, 0), text), ErrBadTypes},
		{"a struct in itself", rawBTF(u32(1, btfStruct<<24|1, 8, 3, 1, 0), text), nil},
		{"a nameless struct in itself", rawBTF(u32(1, btfStruct<<24|1, 8, 0, 2, 0, 0, btfStruct<<24|1, 8, 0, 2, 0), text), ErrNoField},
		{"a typedef of itself", rawBTF(u32(1, btfStruct<<24|1, 8, 3, 2, 0, 1, btfTypedef<<24, 2), text), ErrNoField},
		{"an array of 4 Gi of itself", rawBTF(u32(1, btfStruct<<24|1, 8, 3, 2, 0, 0, btfArray<<24, 0, 2, 2, 0xffffffff), text), ErrNoField},
		{"an array of 64 GiB", rawBTF(u32(1, btfStruct<<24|1, 8, 3, 2, 0, 0, btfArray<<24, 0, 3, 3, 0xffffffff, 0, btfInt<<24, 16, 128), text), ErrNoField},
		{"a struct of 4 GiB", rawBTF(u32(1, btfStruct<<24|1, 0xffffffff, 3, 2, 0xfffffff8, 0, btfInt<<24, 8, 64), text), ErrNoField},
	} {
		types, err := ParseTypes(c.raw, nil)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		_, err = types.structField("x", "y")
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		k := flat(t, make([]byte, 4096))
		k.Types = types
		if o, err := k.Object(t.Context(), "x", flatBase); err == nil && len(o.data) > maxObject {
			t.Errorf("%s: an object of %d bytes", c.name, len(o.data))
		}
		if out, err := types.Declaration("x"); err == nil && len(out) > 2*maxDeclaration {
			t.Errorf("%s: a declaration of %d bytes", c.name, len(out))
		}
	}
	// A chain that kernels may have is none too long.
	types, err := ParseTypes(typeChain(2000), nil)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := types.Struct("x"); err != nil || s.Size != 8 {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestSplitTypes: a module's types refer to the kernel's, by number and by
// strings.
func TestSplitTypes(t *testing.T) {
	text := []byte("\x00base\x00field\x00int\x00")
	base, err := ParseTypes(rawBTF(u32(
		1, btfStruct<<24|1, 4, 6, 2, 0, // 1: struct base { int field; }
		12, btfInt<<24, 4, 1<<24|32, // 2: int
	), text), nil)
	if err != nil {
		t.Fatal(err)
	}
	const own = 16 // bytes of the base's strings
	raw := rawBTF(u32(
		own, btfStruct<<24|2, 12, 6, 1, 0, own+4, 4, 32, // 3: struct mod { struct base field; struct base *ptr; }
		0, btfPtr<<24, 1, // 4
	), []byte("mod\x00ptr\x00"))
	module, err := ParseTypes(raw, base)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := module.structField("mod", "field.field"); err != nil || f.Offset != 0 || f.Size != 4 || !f.Signed {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err := module.structField("mod", "ptr"); err != nil || f.Offset != 4 || f.Type() != "struct base *" {
		t.Errorf("%+v, %v", f, err)
	} else if s, err := f.Struct(); err != nil || s.Name != "base" {
		t.Errorf("%+v, %v", s, err)
	}
	if f, err := module.structField("base", "field"); err != nil || f.Type() != "int" {
		t.Errorf("of the kernel: %+v, %v", f, err)
	}
	if _, err := base.Struct("mod"); !errors.Is(err, ErrNoType) {
		t.Errorf("the kernel has no types of modules: %v", err)
	}
	if diff := cmp.Diff([]string{"base", "mod"}, module.Names()); diff != "" {
		t.Error(diff)
	}
	if base.Len() != 2 || module.Len() != 2 {
		t.Errorf("%d and %d types", base.Len(), module.Len())
	}
}

func TestDeclaration(t *testing.T) {
	number := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	char := &btf.Int{Name: "char", Size: 1}
	fn := &btf.FuncProto{Return: number, Params: []btf.FuncParam{{Name: "a", Type: &btf.Pointer{Target: &btf.Const{Type: char}}}, {Type: (*btf.Void)(nil)}}}
	s := &btf.Struct{Name: "thing", Size: 56, Members: []btf.Member{
		{Name: "matrix", Type: &btf.Array{Index: number, Type: &btf.Array{Index: number, Type: char, Nelems: 3}, Nelems: 2}},
		{Name: "name", Type: &btf.Const{Type: &btf.Pointer{Target: &btf.Const{Type: char}}}, Offset: 64},
		{Name: "call", Type: &btf.Pointer{Target: fn}, Offset: 128},
		{Name: "table", Type: &btf.Pointer{Target: &btf.Array{Index: number, Type: number, Nelems: 4}}, Offset: 192},
		{Name: "one", Type: number, Offset: 256, BitfieldSize: 1},
		{Name: "two", Type: number, Offset: 257, BitfieldSize: 2},
		{Type: &btf.Union{Size: 8, Members: []btf.Member{{Name: "p", Type: void()}, {Name: "in", Type: &btf.Struct{Size: 4, Members: []btf.Member{{Name: "x", Type: number}}}}}}, Offset: 320},
		{Name: "next", Type: &btf.Pointer{Target: &btf.Fwd{Name: "other"}}, Offset: 384},
	}}
	enum := &btf.Enum{Name: "color", Size: 4, Signed: true, Values: []btf.EnumValue{{Name: "RED", Value: 1}, {Name: "NONE", Value: ^uint64(0)}}}
	types, err := ParseTypes(buildTypes(t, s, enum, &btf.Typedef{Name: "thing_t", Type: s}, &btf.Func{Name: "run", Type: fn}), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"thing": `
struct thing {
	char matrix[2][3];                               /*     0     6 */
	const char *const name;                          /*     8     8 */
	int (*call)(const char *a, ...);                 /*    16     8 */
	int (*table)[4];                                 /*    24     8 */
	int one:1;                                       /*    32 bit 0, width 1 */
	int two:2;                                       /*    32 bit 1, width 2 */
	union {
		void *p;                                         /*    40     8 */
		struct {
			int x;                                           /*    40     4 */
		} in;                                            /*    40     4 */
	};                                               /*    40     8 */
	struct other *next;                              /*    48     8 */
};	/* size: 56 */
`,
		"enum color": `
enum color {
	RED = 1,
	NONE = -1,
};	/* size: 4 */
`,
		"thing_t": "\ntypedef struct thing thing_t;	/* size: 56 */\n",
		"run":     "\nint run(const char *a, ...);\n",
	} {
		got, err := types.Declaration(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(strings.TrimPrefix(want, "\n"), got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	for _, name := range []string{"", "nothing", "enum thing", "struct color"} {
		if got, err := types.Declaration(name); !errors.Is(err, ErrNoType) {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
}

// typesWorld puts BTF, among other data, into the read-only data of a recorded
// guest, which lacks it.
func typesWorld(t testing.TB, name string, rodata []byte, start, stop int) *Kernel {
	t.Helper()
	r := loadRecorded(t, name)
	// Read-only data of its own, where no page is: in the fixmap's place.
	const base = 0xfffffffffe000000
	root := r.Space.Mode.RootOf(r.Space.Root)
	next := uint64(0x7000_0000_0000)
	table := func(entry uint64) uint64 {
		var p [8]byte
		if err := r.pages.ReadPhysical(t.Context(), entry, p[:]); err != nil {
			t.Fatal(err)
		}
		if v := binary.LittleEndian.Uint64(p[:]); v&1 != 0 {
			return v & 0x000ffffffffff000
		}
		next += 4096
		put64(r.pages, entry, next|rw)
		r.pages.WritePhysical(next, make([]byte, 4096))
		return next
	}
	const frames = uint64(0x6000_0000_0000)
	for at := uint64(0); at < uint64(len(rodata)); at += 4096 {
		gva := base + at
		gpa := root
		if r.Space.Mode.Format == Format5Level {
			gpa = table(gpa + gva>>48&511*8)
		}
		for _, shift := range []int{39, 30, 21} {
			gpa = table(gpa + gva>>shift&511*8)
		}
		put64(r.pages, gpa+gva>>12&511*8, frames+at|1)
	}
	r.pages.WritePhysical(frames, append(slices.Clone(rodata), make([]byte, 4096)...))
	var all symbolList
	for sym := range r.Image.Symbols.All() {
		all.add(sym)
	}
	all.add(Symbol{Name: "__start_BTF", Address: base + uint64(start), Type: 'D'})
	all.add(Symbol{Name: "__stop_BTF", Address: base + uint64(stop), Type: 'D'})
	r.Image = NewImage(all.symbols(true), 0)
	r.Types = nil
	r.Rodata = Extent{base, base + uint64(len(rodata))}
	return r.Kernel
}

// TestReadTypes finds a kernel's own BTF among that of programs, of another
// kernel, and what only looks like some.
func TestReadTypes(t *testing.T) {
	own, other := unpack(t, "debian12.btf.gz"), unpack(t, "debian11.btf.gz")
	program := buildTypes(t, &btf.Struct{Name: "task_struct", Size: 8, Members: []btf.Member{{Name: "pid", Type: integer("int", 4)}}})
	var rodata []byte
	add := func(p []byte) (start, stop int) {
		for len(rodata)%8 != 0 {
			rodata = append(rodata, 0)
		}
		start = len(rodata)
		rodata = append(rodata, p...)
		return start, len(rodata)
	}
	add(bytes.Repeat([]byte{0x9f, 0xeb, 1, 0}, 1000))
	for range 40 {
		add(program)
	}
	programStart, programStop := add(program)
	otherStart, otherStop := add(other)
	start, stop := add(own)
	chainStart, chainStop := add(typeChain(30_000))
	add(make([]byte, 100))

	broken := slices.Clone(own)
	copy(broken[200:], bytes.Repeat([]byte{0xff}, 64))
	for _, c := range []struct {
		name        string
		start, stop int
		want        bool
	}{
		{"as the symbols say", start, stop, true},
		{"symbols of a program's", programStart, programStop, true},
		{"symbols of another kernel's", otherStart, otherStop, true},
		{"symbols of a trap", chainStart, chainStop, true},
		{"symbols of nothing", 0, 4096, true},
		{"symbols in reverse", stop, start, true},
		{"symbols of 1 GiB", start, start + 1<<30, true},
		{"symbols of unmapped memory", len(rodata) + 8192, len(rodata) + 16384, true},
	} {
		k := typesWorld(t, "debian12", rodata, c.start, c.stop)
		types, err := ReadTypes(t.Context(), k)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if raw := types.Raw(); !bytes.Equal(raw, own) {
			t.Errorf("%s: BTF of %d bytes, not the kernel's %d", c.name, len(raw), len(own))
		}
	}
	// If the kernel's own is damaged, none is better than a wrong one.
	copy(rodata[start:], broken)
	for _, at := range [][2]int{{start, stop}, {otherStart, otherStop}, {programStart, programStop}} {
		types, err := ReadTypes(t.Context(), typesWorld(t, "debian12", rodata, at[0], at[1]))
		if types != nil || !errors.Is(err, ErrBadTypes) {
			t.Errorf("damaged BTF: %v, %v", types, err)
		}
	}
	if _, err := ReadTypes(t.Context(), loadRecorded(t, "debian12").Kernel); !errors.Is(err, ErrNoTypes) {
		t.Errorf("a kernel without BTF: %v", err)
	}
}

// excerpt is BTF of a few types of a recorded kernel: small enough to fuzz.
func excerpt(t testing.TB, name string, types ...string) []byte {
	t.Helper()
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(unpack(t, name+".btf.gz")))
	if err != nil {
		t.Fatal(err)
	}
	var all []btf.Type
	for _, name := range types {
		found, err := spec.AnyTypesByName(name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return buildTypes(t, all...)
}

// FuzzTypes decodes any bytes as BTF, and looks types up in it.
func FuzzTypes(f *testing.F) {
	for _, name := range recordedNames {
		f.Add(excerpt(f, name, "list_head", "xa_node", "idr", "pid_type"), "xa_node", "slots[3]")
		f.Add(excerpt(f, name, "desc_struct", "x86_hw_tss", "spinlock_t"), "desc_struct", "dpl")
	}
	f.Add(typeChain(50), "x", "x")
	f.Add(rawBTF(u32(1, btfStruct<<24|1, 8, 0, 2, 0, 0, btfStruct<<24|1, 8, 0, 2, 0), []byte("\x00x\x00y\x00")), "x", "y[3].z")
	f.Fuzz(func(t *testing.T, raw []byte, name, path string) {
		types, err := ParseTypes(raw, nil)
		if err != nil {
			if types != nil || !errors.Is(err, ErrBadTypes) {
				t.Errorf("%v, %v", types, err)
			}
			return
		}
		if s, err := types.Struct(name); err == nil {
			if field, err := s.Field(path); err == nil {
				if uint64(field.Offset)+uint64(field.Size) > 4*maxObject {
					t.Errorf("%+v", field)
				}
				field.Type()
				field.number(make([]byte, 64))
				field.Struct()
			}
		}
		types.EnumValue(name, path)
		if text, err := types.Declaration(name); err == nil && len(text) > 2*maxDeclaration {
			t.Errorf("%d bytes", len(text))
		}
		types.check()
		types.Names()
		// As a module's, on top of themselves.
		if split, err := ParseTypes(raw, types); err == nil {
			split.Struct(name)
			split.Declaration(name)
		}
	})
}

// FuzzReadTypes looks for a kernel's BTF in read-only data of any bytes: what is
// found is one that fits this kernel.
func FuzzReadTypes(f *testing.F) {
	own := unpack(f, "debian12.btf.gz")
	r := typesWorld(f, "debian12", append(make([]byte, 64), own...), 64, 64+len(own))
	f.Add(uint16(64), uint16(200), []byte{})
	f.Add(uint16(0), uint16(64), typeChain(3))
	f.Add(uint16(8), uint16(4096), []byte{0x9f, 0xeb, 1, 0, 24})
	f.Fuzz(func(t *testing.T, start, stop uint16, data []byte) {
		rodata := append(make([]byte, 64), own...)
		copy(rodata[int(start)%len(rodata):], data)
		k := *r
		k.Space = &Space{Memory: patchedMemory{r.Space.Memory, 0x6000_0000_0000, rodata}, Mode: r.Space.Mode, Root: r.Space.Root}
		k.Types = nil
		types, err := ReadTypes(t.Context(), &k)
		if err == nil {
			if err := types.fits(t.Context(), &k); err != nil {
				t.Error(err)
			}
		}
		for _, b := range btfBlobs(rodata) {
			if b.start < 0 || b.end > len(rodata) || b.end-b.start < minBTF {
				t.Errorf("%+v", b)
			}
		}
	})
}

// patchedMemory is memory with other bytes from an address on.
type patchedMemory struct {
	Memory
	at   uint64
	data []byte
}

func (o patchedMemory) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	if err := o.Memory.ReadPhysical(ctx, gpa, p); err != nil {
		return err
	}
	if gpa >= o.at && gpa-o.at < uint64(len(o.data)) {
		copy(p, o.data[gpa-o.at:])
	}
	return nil
}

// TestTypesShared: many ask the same types at once, and a module's.
func TestTypesShared(t *testing.T) {
	types, err := ParseTypes(unpack(t, "debian12.btf.gz"), nil)
	if err != nil {
		t.Fatal(err)
	}
	own := uint32(len(types.graph.strings))
	split, err := ParseTypes(rawBTF(u32(own, btfStruct<<24|1, 16, own+9, uint32(types.graph.named("list_head")[0]), 0), []byte("only_mod\x00link\x00")), types)
	if err != nil {
		t.Fatal(err)
	}
	names := types.Names()
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for j := range names {
				name := names[(j+i*17)%len(names)]
				if _, err := types.Declaration(name); err != nil {
					t.Error(err)
				}
				if s, err := types.Struct(name); err == nil {
					s.Field("next")
				}
				if f, err := split.structField("only_mod", "link.next"); err != nil || f.Type() != "struct list_head *" {
					t.Error(f, err)
				}
				if v, err := types.EnumValue("pid_type", "PIDTYPE_TGID"); err != nil || v != 1 {
					t.Error(v, err)
				}
			}
		})
	}
	group.Wait()
}
