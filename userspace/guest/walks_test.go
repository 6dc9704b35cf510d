// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/arch/x86/x86asm"
)

// flatBase is where flat memory lies in the guest's kernel.
const flatBase = 0xffff888000000000

// flat is a kernel of which only some memory is there, at flatBase, and no
// symbols.
func flat(t testing.TB, memory []byte) *Kernel {
	t.Helper()
	pages := Pages{}
	put64(pages, 0x1000+8*(flatBase>>39&511), 0x2000|rw)
	put64(pages, 0x2000, 0x3000|rw)
	put64(pages, 0x3000, 0x4000|rw)
	for i := range (len(memory) + 4095) / 4096 {
		put64(pages, 0x4000+8*uint64(i), 0x100000+uint64(i)<<12|rw)
	}
	pages.WritePhysical(0x100000, memory)
	if last := len(memory) % 4096; last != 0 {
		pages.WritePhysical(0x100000+uint64(len(memory)), make([]byte, 4096-last))
	}
	symbols := &Symbols{long: true}
	return &Kernel{
		Space: &Space{Memory: pages, Mode: Mode{Format: Format4Level, NX: true}, Root: 0x1000},
		Image: NewImage(symbols, 0),
	}
}

// words are memory for flat.
func words(at map[uint64]uint64) []byte {
	m := make([]byte, 16<<10)
	for offset, v := range at {
		copy(m[offset:], le(v))
	}
	return m
}

type visitor func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error

func visit(t *testing.T, memory map[uint64]uint64, most int, walk visitor) ([]uint64, error) {
	t.Helper()
	var got []uint64
	err := walk(flat(t, words(memory)), t.Context(), most, func(at uint64) error { got = append(got, at-flatBase); return nil })
	return got, err
}

func TestList(t *testing.T) {
	const b = flatBase
	list := func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error {
		return k.List(ctx, "the list", b, most, f)
	}
	good := map[uint64]uint64{0: b + 0x100, 8: b + 0x300, 0x100: b + 0x200, 0x108: b, 0x200: b + 0x300, 0x208: b + 0x100, 0x300: b, 0x308: b + 0x200}
	with := func(offset, v uint64) map[uint64]uint64 {
		m := map[uint64]uint64{}
		for k, v := range good {
			m[k] = v
		}
		m[offset] = v
		return m
	}
	for _, c := range []struct {
		name   string
		memory map[uint64]uint64
		most   int
		want   []uint64
		err    error
	}{
		{"good", good, 3, []uint64{0x100, 0x200, 0x300}, nil},
		{"empty", map[uint64]uint64{0: b, 8: b}, 3, nil, nil},
		{"too long", good, 2, []uint64{0x100, 0x200}, ErrTooLong},
		{"cycle", with(0x300, b+0x100), 9, []uint64{0x100, 0x200, 0x300}, ErrCycle},
		{"itself", with(0x200, b+0x200), 9, []uint64{0x100, 0x200}, ErrCycle},
		{"null", with(0x200, 0), 9, []uint64{0x100, 0x200}, ErrNull},
		{"user", with(0x200, 0x1000), 9, []uint64{0x100, 0x200}, ErrNotKernel},
		{"not canonical", with(0x200, 0x8000_0000_0000_0000), 9, []uint64{0x100, 0x200}, ErrNotKernel},
		{"unaligned", with(0x200, b+0x301), 9, []uint64{0x100, 0x200}, ErrUnaligned},
		{"unmapped", with(0x200, b+0x100000), 9, []uint64{0x100, 0x200}, ErrNotPresent},
		{"the end of memory", with(0x200, b+16<<10-8), 9, []uint64{0x100, 0x200}, ErrNotPresent},
		{"back", with(0x208, b+0x300), 9, []uint64{0x100, 0x200, 0x300}, ErrBackLink},
		{"back of the head", with(8, b+0x200), 9, []uint64{0x100, 0x200, 0x300}, ErrBackLink},
		{"zeros", nil, 9, nil, ErrNull},
	} {
		got, err := visit(t, c.memory, c.most, list)
		checkWalk(t, c.name, got, err, c.want, c.err)
	}
	k := flat(t, words(good))
	n := 0
	if err := k.List(t.Context(), "the list", b, 9, func(uint64) error { n++; return ErrStop }); err != nil || n != 1 {
		t.Errorf("stopped: %d, %v", n, err)
	}
	other := errors.New("other")
	if err := k.List(t.Context(), "the list", b, 9, func(uint64) error { return other }); !errors.Is(err, other) {
		t.Errorf("%v", err)
	}
	if err := k.List(t.Context(), "the list", 0x1234, 9, func(uint64) error { return nil }); !errors.Is(err, ErrNotKernel) {
		t.Errorf("%v", err)
	}
}

func checkWalk(t *testing.T, name string, got []uint64, err error, want []uint64, wantErr error) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
	if !errors.Is(err, wantErr) {
		t.Errorf("%s: error %v, want %v", name, err, wantErr)
	}
	if object := new(ObjectError); err != nil && (!errors.As(err, &object) || object.Object == "") {
		t.Errorf("%s: error %v names no object", name, err)
	}
}

func TestHList(t *testing.T) {
	const b = flatBase
	list := func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error {
		return k.HList(ctx, "the list", b, most, f)
	}
	for _, c := range []struct {
		name   string
		memory map[uint64]uint64
		most   int
		want   []uint64
		err    error
	}{
		{"good", map[uint64]uint64{0: b + 0x100, 0x100: b + 0x200, 0x108: b, 0x208: b + 0x100}, 2, []uint64{0x100, 0x200}, nil},
		{"empty", nil, 2, nil, nil},
		{"too long", map[uint64]uint64{0: b + 0x100, 0x100: b + 0x200, 0x108: b, 0x208: b + 0x100}, 1, []uint64{0x100}, ErrTooLong},
		{"cycle", map[uint64]uint64{0: b + 0x100, 0x100: b + 0x100, 0x108: b}, 9, []uint64{0x100}, ErrCycle},
		{"back", map[uint64]uint64{0: b + 0x100, 0x100: b + 0x200, 0x108: b + 0x50, 0x208: b + 0x100}, 9, []uint64{0x100, 0x200}, ErrBackLink},
		{"user", map[uint64]uint64{0: 0x100}, 9, nil, ErrNotKernel},
	} {
		got, err := visit(t, c.memory, c.most, list)
		checkWalk(t, c.name, got, err, c.want, c.err)
	}
}

func TestTree(t *testing.T) {
	const b = flatBase
	tree := func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error {
		return k.Tree(ctx, "the tree", b, most, f)
	}
	// __rb_parent_color, rb_right, rb_left
	good := func() map[uint64]uint64 {
		return map[uint64]uint64{
			0:     b + 0x100,
			0x100: 1, 0x108: b + 0x300, 0x110: b + 0x200,
			0x200: b + 0x100, 0x208: b + 0x400,
			0x300: b + 0x100 | 1,
			0x400: b + 0x200,
		}
	}
	for _, c := range []struct {
		name   string
		offset uint64
		value  uint64
		most   int
		want   []uint64
		err    error
	}{
		{"good", 0x1000, 0, 4, []uint64{0x200, 0x400, 0x100, 0x300}, nil},
		{"empty", 0, 0, 4, nil, nil},
		{"too long", 0x1000, 0, 3, []uint64{0x200, 0x400, 0x100}, ErrTooLong},
		{"cycle to the right", 0x408, b + 0x100, 9, []uint64{0x200, 0x400}, ErrCycle},
		{"cycle to the left", 0x210, b + 0x100, 9, nil, ErrCycle},
		{"parent", 0x300, b + 0x200, 9, []uint64{0x200, 0x400, 0x100, 0x300}, ErrBackLink},
		{"user", 0x108, 0x1000, 9, []uint64{0x200, 0x400, 0x100}, ErrNotKernel},
		{"unmapped", 0x108, b + 0x100000, 9, []uint64{0x200, 0x400, 0x100}, ErrNotPresent},
	} {
		m := good()
		m[c.offset] = c.value
		got, err := visit(t, m, c.most, tree)
		checkWalk(t, c.name, got, err, c.want, c.err)
	}
}

func void() *btf.Pointer { return &btf.Pointer{Target: (*btf.Void)(nil)} }

func integer(name string, size uint32) *btf.Int { return &btf.Int{Name: name, Size: size} }

// buildTypes makes BTF.
func buildTypes(t testing.TB, all ...btf.Type) []byte {
	t.Helper()
	builder, err := btf.NewBuilder(all, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := builder.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// xarrayTypes are those that walks of xarrays and IDRs need, with 4 slots to a
// node, which keeps tests small.
func xarrayTypes(t testing.TB) *Types {
	t.Helper()
	byteType, number := integer("unsigned char", 1), integer("unsigned int", 4)
	node := &btf.Struct{Name: "xa_node", Size: 64, Members: []btf.Member{
		{Name: "shift", Type: byteType}, {Name: "offset", Type: byteType, Offset: 8},
		{Name: "parent", Type: void(), Offset: 64},
		{Name: "slots", Type: &btf.Array{Index: number, Type: void(), Nelems: 4}, Offset: 128},
	}}
	array := &btf.Struct{Name: "xarray", Size: 16, Members: []btf.Member{{Name: "xa_head", Type: void(), Offset: 64}}}
	idr := &btf.Struct{Name: "idr", Size: 24, Members: []btf.Member{{Name: "idr_rt", Type: array}, {Name: "idr_base", Type: number, Offset: 128}}}
	types, err := ParseTypes(buildTypes(t, node, array, idr), nil)
	if err != nil {
		t.Fatal(err)
	}
	return types
}

func TestXArray(t *testing.T) {
	const b = flatBase
	types := xarrayTypes(t)
	// A root with two leaves: entries 1, 4 and 7, and a value.
	good := func() map[uint64]uint64 {
		return map[uint64]uint64{
			8:     b + 0x100 | 2,
			16:    10, // idr_base
			0x100: 2,  // shift
			0x110: b + 0x200 | 2, 0x118: b + 0x300 | 2,
			0x208: b + 0x100, 0x218: b + 0x1010, 0x220: 5<<1 | 1,
			0x300: 0x100, 0x308: b + 0x100, 0x310: b + 0x1040, 0x328: b + 0x1070,
		}
	}
	for _, c := range []struct {
		name   string
		change map[uint64]uint64
		most   int
		want   map[uint64]uint64
		err    error
	}{
		{"good", nil, 3, map[uint64]uint64{11: 0x1010, 14: 0x1040, 17: 0x1070}, nil},
		{"empty", map[uint64]uint64{8: 0}, 3, nil, nil},
		{"one entry", map[uint64]uint64{8: b + 0x1000}, 3, map[uint64]uint64{10: 0x1000}, nil},
		{"too long", nil, 2, map[uint64]uint64{11: 0x1010, 14: 0x1040}, ErrTooLong},
		{"cycle", map[uint64]uint64{0x118: b + 0x100 | 2}, 9, map[uint64]uint64{11: 0x1010}, ErrCycle},
		{"twice", map[uint64]uint64{0x118: b + 0x200 | 2}, 9, map[uint64]uint64{11: 0x1010}, ErrCycle},
		{"user entry", map[uint64]uint64{0x218: 0x1000}, 9, map[uint64]uint64{14: 0x1040, 17: 0x1070}, ErrNotKernel},
		{"user node", map[uint64]uint64{0x110: 0x2000 | 2}, 9, map[uint64]uint64{14: 0x1040, 17: 0x1070}, ErrNotKernel},
		{"unmapped node", map[uint64]uint64{0x110: b + 0x100000 | 2}, 9, map[uint64]uint64{14: 0x1040, 17: 0x1070}, ErrNotPresent},
		{"parent", map[uint64]uint64{0x208: b + 0x300}, 9, map[uint64]uint64{11: 0x1010, 14: 0x1040, 17: 0x1070}, ErrBackLink},
		{"huge shift", map[uint64]uint64{0x100: 200}, 9, nil, errAny},
		{"odd shift", map[uint64]uint64{0x100: 3}, 9, nil, errAny},
		{"leaf with a node", map[uint64]uint64{0x210: b + 0x300 | 2}, 9, map[uint64]uint64{11: 0x1010, 14: 0x1040, 17: 0x1070}, errAny},
	} {
		m := good()
		for offset, v := range c.change {
			m[offset] = v
		}
		k := flat(t, words(m))
		k.Types = types
		var got map[uint64]uint64
		err := k.IDR(t.Context(), "the table", b, c.most, func(id, value uint64) error {
			if got == nil {
				got = map[uint64]uint64{}
			}
			got[id] = value - b
			return nil
		})
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if c.err == errAny && err == nil || c.err != errAny && !errors.Is(err, c.err) {
			t.Errorf("%s: error %v, want %v", c.name, err, c.err)
		}
	}
	k := flat(t, words(good()))
	k.Types = types
	n := 0
	if err := k.XArray(t.Context(), "the table", b, 9, func(_, _ uint64) error { n++; return ErrStop }); err != nil || n != 1 {
		t.Errorf("stopped: %d, %v", n, err)
	}
}

var errAny = errors.New("any error")

// FuzzWalks walks structures that are made of any bytes: each walk ends within
// its bounds and visits nothing twice.
func FuzzWalks(f *testing.F) {
	const b = flatBase
	types := xarrayTypes(f)
	for _, m := range []map[uint64]uint64{
		{0: b + 0x100, 8: b + 0x100, 0x100: b, 0x108: b},
		{0: b + 0x100, 0x100: 1, 0x108: b + 0x300, 0x110: b + 0x200, 0x200: b + 0x100, 0x300: b + 0x100},
		{8: b + 0x100 | 2, 0x100: 2, 0x110: b + 0x200 | 2, 0x208: b + 0x100, 0x218: b + 0x310},
	} {
		f.Add(words(m)[:0x400])
	}
	// Snippets of real lists: the first page of a task and of an xarray's node.
	for _, name := range []string{"debian11", "sid"} {
		r := loadRecorded(f, name)
		at, err := r.symbol("init_pid_ns")
		if err != nil {
			f.Fatal(err)
		}
		p := make([]byte, 2048)
		if err := r.Space.Read(f.Context(), at, p[:1024]); err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// Words that are small lead into the data.
		data = slices.Clone(data[:min(len(data), 8192)])
		for i := 0; i+8 <= len(data); i += 8 {
			if data[i+7] == 0 && data[i+6] == 0 && (data[i] != 0 || data[i+1] != 0) && data[i+2]&1 != 0 {
				copy(data[i:], le(uint64(data[i])|uint64(data[i+1]&31)<<8|flatBase))
			}
		}
		k := flat(t, data)
		k.Types = types
		const most = 64
		for name, walk := range map[string]visitor{
			"list": func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error {
				return k.List(ctx, "x", b, most, f)
			},
			"hlist": func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error {
				return k.HList(ctx, "x", b, most, f)
			},
			"tree": func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error {
				return k.Tree(ctx, "x", b, most, f)
			},
			"xarray": func(k *Kernel, ctx context.Context, most int, f func(uint64) error) error {
				return k.XArray(ctx, "x", b, most, func(index, _ uint64) error { return f(index) })
			},
		} {
			seen := map[uint64]bool{}
			err := walk(k, t.Context(), most, func(at uint64) error {
				if seen[at] {
					t.Errorf("%s: %#x twice", name, at)
				}
				seen[at] = true
				return nil
			})
			if len(seen) > most {
				t.Errorf("%s: %d visited", name, len(seen))
			}
			if object := new(ObjectError); err != nil && !errors.As(err, &object) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestObject(t *testing.T) {
	const b = flatBase
	number, long := integer("unsigned int", 4), integer("unsigned long", 8)
	signed := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	char := &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}
	inner := &btf.Struct{Name: "inner", Size: 8, Members: []btf.Member{{Name: "x", Type: number}, {Name: "y", Type: signed, Offset: 32}}}
	s := &btf.Struct{Name: "thing", Size: 80, Members: []btf.Member{
		{Name: "a", Type: number},
		{Name: "b", Type: signed, Offset: 32},
		{Name: "name", Type: &btf.Array{Index: number, Type: char, Nelems: 8}, Offset: 64},
		{Type: &btf.Union{Size: 8, Members: []btf.Member{{Name: "p", Type: void()}, {Type: &btf.Struct{Size: 8, Members: []btf.Member{{Name: "low", Type: number}, {Name: "high", Type: number, Offset: 32}}}}}}, Offset: 128},
		{Name: "flag", Type: number, Offset: 192 + 3, BitfieldSize: 1},
		{Name: "width", Type: signed, Offset: 192 + 4, BitfieldSize: 3},
		{Name: "across", Type: long, Offset: 192 + 7, BitfieldSize: 60},
		{Name: "in", Type: &btf.Array{Index: number, Type: &btf.Const{Type: inner}, Nelems: 3}, Offset: 320},
		{Name: "p2", Type: &btf.Pointer{Target: inner}, Offset: 512},
		{Name: "rest", Type: &btf.Array{Index: number, Type: number, Nelems: 0}, Offset: 640},
	}}
	enum := &btf.Enum{Name: "color", Size: 4, Signed: true, Values: []btf.EnumValue{{Name: "RED", Value: 1}, {Name: "NONE", Value: ^uint64(0)}}}
	types, err := ParseTypes(buildTypes(t, s, enum, &btf.Typedef{Name: "thing_t", Type: s}), nil)
	if err != nil {
		t.Fatal(err)
	}
	memory := make([]byte, 4096)
	copy(memory[0x100:], []byte{1, 2, 3, 4, 0xfe, 0xff, 0xff, 0xff})
	copy(memory[0x108:], "nam\x00junk")
	copy(memory[0x110:], le(0x1122334455667788))
	copy(memory[0x118:], []byte{0x78, 0xff, 0, 0, 0, 0, 0, 0, 2}) // flag 1, width -1, across from bit 7 on
	copy(memory[0x128:], []byte{1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 2})
	k := flat(t, memory)
	k.Types = types
	for _, typeName := range []string{"thing", "struct thing", "thing_t"} {
		for _, o := range []func() (*Object, error){
			func() (*Object, error) { return k.Object(t.Context(), typeName, b+0x100) },
			func() (*Object, error) {
				return k.Part(t.Context(), typeName, b+0x100, "a", "b", "name", "p", "flag", "width", "across", "in")
			},
		} {
			o, err := o()
			if err != nil {
				t.Fatal(err)
			}
			for path, want := range map[string]int64{
				"a": 0x04030201, "b": -2, "p": 0x1122334455667788, "low": 0x55667788, "high": 0x11223344,
				"flag": 1, "width": -1, "across": 0x1fe | 2<<57, "in[0].x": 1, "in[0].y": -1, "in[1].x": 2,
			} {
				if got, err := o.Int(path); err != nil || got != want {
					t.Errorf("%s: %#x, %v, want %#x", path, got, err, want)
				}
			}
			if name, err := o.String("name"); err != nil || name != "nam" {
				t.Errorf("%q, %v", name, err)
			}
			if at, err := o.Addr("in[2].y"); err != nil || at != b+0x100+60-4+8-4 {
				t.Errorf("%#x, %v", at, err)
			}
			for _, path := range []string{"", "c", "a.x", "in", "in[3].x", "in[x]", "name[99]", "flag.x", "p2.x"} {
				if v, err := o.Uint(path); err == nil {
					t.Errorf("%q is %d", path, v)
				}
			}
			if _, err := o.Pointer("a"); err == nil {
				t.Error("a pointer of 4 bytes")
			}
		}
	}
	part, err := k.Part(t.Context(), "thing", b+0x100, "a")
	if err != nil {
		t.Fatal(err)
	}
	if v, err := part.Uint("b"); err == nil {
		t.Errorf("what was not read is %d", v)
	}
	if v, err := types.EnumValue("enum color", "NONE"); err != nil || v != -1 {
		t.Errorf("%d, %v", v, err)
	}
	if _, err := types.EnumValue("color", "BLUE"); !errors.Is(err, ErrNoField) {
		t.Errorf("%v", err)
	}
	if f, err := types.structField("thing", "rest[3]"); err != nil || f.Offset != 92 {
		t.Errorf("an array without a length: %+v, %v", f, err)
	}
	for _, c := range []struct {
		typeName string
		addr     uint64
		want     error
	}{
		{"nothing", b, ErrNoType}, {"color", b, ErrNoType}, {"thing", 0, ErrNull}, {"thing", 0x1000, ErrNotKernel},
		{"thing", b + 4096, ErrNotPresent}, {"thing", b + 4090, ErrNotPresent}, {"thing", ^uint64(0), errAny},
	} {
		o, err := k.Object(t.Context(), c.typeName, c.addr)
		if err == nil || c.want != errAny && !errors.Is(err, c.want) {
			t.Errorf("%s at %#x: %v, %v, want %v", c.typeName, c.addr, o, err, c.want)
		}
		if object := new(ObjectError); !errors.As(err, &object) || object.Address != c.addr {
			t.Errorf("%s at %#x: %v", c.typeName, c.addr, err)
		}
	}
}

func (t *Types) structField(name, path string) (Field, error) {
	s, err := t.Struct(name)
	if err != nil {
		return Field{}, err
	}
	return s.Field(path)
}

// FuzzDispatcher follows any code: it ends.
func FuzzDispatcher(f *testing.F) {
	r := loadRecorded(f, "debian12")
	at, _ := r.Image.Lookup("x64_sys_call")
	d, err := r.dispatcher(f.Context(), at)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(d.code, uint64(0))
	f.Add(d.code[:300], uint64(1000))
	f.Add([]byte{0xeb, 0xfe}, uint64(3))                               // jmp .
	f.Add([]byte{0x81, 0xfe, 3, 0, 0, 0, 0x74, 0xf8, 0xc3}, uint64(3)) // cmp $3, %esi; je .-8; ret
	f.Fuzz(func(t *testing.T, code []byte, nr uint64) {
		if len(code) > maxDispatcher {
			return
		}
		d := &dispatcher{start: flatBase, code: code, insts: map[uint64]x86asm.Inst{}}
		handler, err := d.run(nr)
		if again, err2 := d.run(nr); again != handler || (err == nil) != (err2 == nil) {
			t.Errorf("%#x, %v; again %#x, %v", handler, err, again, err2)
		}
		if len(d.insts) > maxSteps {
			t.Errorf("%d instructions", len(d.insts))
		}
	})
}
