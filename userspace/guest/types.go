// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"
)

// What types can lack; errors wrap one of these.
var (
	// ErrNoTypes: the kernel was built without BTF (CONFIG_DEBUG_INFO_BTF).
	ErrNoTypes = errors.New("the kernel has no BTF (it was built without CONFIG_DEBUG_INFO_BTF)")
	// ErrBadTypes: the bytes are no BTF of a kernel.
	ErrBadTypes = errors.New("damaged BTF")
	ErrNoType   = errors.New("no such type")
	ErrNoField  = errors.New("no such field")
)

// Types are the C types of a kernel, or of a module on top of them. They may be
// shared by goroutines. Nil is none: every question is answered by ErrNoTypes.
type Types struct {
	spec *btf.Spec
	base *Types // of a module: its kernel's

	mu      sync.Mutex
	graph   *typeGraph
	structs map[string]*Struct
	enums   map[string]int64 // by "tag name"
	missing map[string]error // structs that there are not
}

// maxNames bounds how many names are remembered: callers may ask for any.
const maxNames = 4096

// ParseTypes decodes BTF, as /sys/kernel/btf has it. With base, the kernel's
// types, raw is a module's split BTF. The error wraps ErrBadTypes.
func ParseTypes(raw []byte, base *Types) (*Types, error) {
	t := &Types{base: base, structs: map[string]*Struct{}, enums: map[string]int64{}, missing: map[string]error{}}
	var above *typeGraph
	var spec *btf.Spec
	if base != nil {
		above, spec = base.graph, base.spec
	}
	var err error
	if t.graph, err = newTypeGraph(raw, above); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadTypes, err)
	}
	if spec == nil {
		t.spec, err = btf.LoadSpecFromReader(bytes.NewReader(raw))
	} else {
		t.spec, err = btf.LoadSplitSpecFromReader(bytes.NewReader(raw), spec)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadTypes, err)
	}
	return t, nil
}

// Len is the number of types, those of a base not counted.
func (t *Types) Len() int { return len(t.graph.offsets) }

// Raw are the bytes that were decoded. They must not be changed.
func (t *Types) Raw() []byte { return t.graph.raw }

// lock holds t and what it builds on: decoding a type changes both.
func (t *Types) lock() func() {
	t.mu.Lock()
	if t.base == nil {
		return t.mu.Unlock
	}
	unlock := t.base.lock()
	return func() {
		unlock()
		t.mu.Unlock()
	}
}

// named decodes the types of a name, those of t before those of its base.
func (t *Types) named(name string, keep func(btf.Type) bool) ([]btf.Type, error) {
	if t == nil {
		return nil, ErrNoTypes
	}
	defer t.lock()()
	var found []btf.Type
	for u := t; u != nil; u = u.base {
		for _, id := range u.graph.named(name) {
			if err := u.graph.descend(id); err != nil {
				return found, fmt.Errorf("type %s: %w: %w", name, ErrBadTypes, err)
			}
			typ, err := u.spec.TypeByID(id)
			if err != nil {
				// What was decoded on the way is not known any more.
				for g := u.graph; g != nil; g = g.base {
					clear(g.visited)
				}
				return found, fmt.Errorf("type %s: %w: %w", name, ErrBadTypes, err)
			}
			if keep(typ) {
				found = append(found, typ)
			}
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("type %s: %w", name, ErrNoType)
	}
	return found, nil
}

// Struct finds a struct or union by its tag, "struct " or "union " before it
// or not, or by the name of a typedef. Of several with the same tag the first
// one is taken. The error wraps ErrNoType or ErrBadTypes.
func (t *Types) Struct(name string) (*Struct, error) {
	if t == nil {
		return nil, ErrNoTypes
	}
	t.mu.Lock()
	s, err := t.structs[name], t.missing[name]
	t.mu.Unlock()
	if s != nil || err != nil {
		return s, err
	}
	tag, kind := cutKind(name)
	all, err := t.named(tag, func(typ btf.Type) bool {
		_, isUnion := typ.(*btf.Union)
		_, isStruct := typ.(*btf.Struct)
		_, isTypedef := typ.(*btf.Typedef)
		switch kind {
		case "struct":
			return isStruct
		case "union":
			return isUnion
		case "enum":
			return false
		}
		_, ok := composite(typ)
		return isStruct || isUnion || isTypedef && ok
	})
	if len(all) == 0 {
		t.mu.Lock()
		if len(t.missing) < maxNames && errors.Is(err, ErrNoType) {
			t.missing[name] = err
		}
		t.mu.Unlock()
		return nil, err
	}
	pick := all[0]
	for _, typ := range slices.Backward(all) {
		if _, ok := typ.(*btf.Typedef); !ok {
			pick = typ
		}
	}
	s = newStruct(tag, pick)
	t.mu.Lock()
	if len(t.structs) < maxNames {
		t.structs[name] = s
	}
	t.mu.Unlock()
	return s, nil
}

// cutKind splits "struct name".
func cutKind(name string) (tag, kind string) {
	for _, kind := range []string{"struct", "union", "enum", "typedef"} {
		if rest, ok := strings.CutPrefix(name, kind+" "); ok {
			return strings.TrimSpace(rest), kind
		}
	}
	return strings.TrimSpace(name), ""
}

// Has says whether there is the struct and, with paths, whether it has each of
// these fields.
func (t *Types) Has(name string, paths ...string) bool {
	s, err := t.Struct(name)
	return err == nil && s.Has(paths...)
}

// EnumValue is the value of one name of an enum. With an empty tag all enums
// that have no tag are looked at. The error wraps ErrNoType, ErrNoField or
// ErrBadTypes.
func (t *Types) EnumValue(tag, name string) (int64, error) {
	if t == nil {
		return 0, ErrNoTypes
	}
	tag, _ = cutKind(tag)
	key := tag + " " + name
	t.mu.Lock()
	value, ok := t.enums[key]
	t.mu.Unlock()
	if ok {
		return value, nil
	}
	all, err := t.named(tag, func(typ btf.Type) bool { _, ok := btf.UnderlyingType(typ).(*btf.Enum); return ok })
	for _, typ := range all {
		for _, v := range btf.UnderlyingType(typ).(*btf.Enum).Values {
			if v.Name == name {
				t.mu.Lock()
				if len(t.enums) < maxNames {
					t.enums[key] = int64(v.Value)
				}
				t.mu.Unlock()
				return int64(v.Value), nil
			}
		}
	}
	if len(all) > 0 {
		return 0, fmt.Errorf("enum %s: %s: %w", tag, name, ErrNoField)
	}
	return 0, err
}

// Struct is the layout of a struct or union.
type Struct struct {
	Name string
	Size uint32 // bytes
	typ  btf.Type

	mu     sync.Mutex
	fields map[string]Field
}

func newStruct(name string, typ btf.Type) *Struct {
	s := &Struct{Name: name, typ: typ, fields: map[string]Field{}}
	if n, err := btf.Sizeof(typ); err == nil {
		s.Size = uint32(n)
	}
	return s
}

// Field is where a member of a struct lies, at any depth.
type Field struct {
	Path   string
	Offset uint32 // bytes from the start of the outermost struct
	Size   uint32 // bytes; of a bit-field, those that it lies in
	// A bit-field's place in the little-endian number of Size bytes at Offset.
	// BitSize 0: no bit-field.
	BitOffset, BitSize uint32
	Signed             bool
	Pointer            bool
	Count, ElemSize    uint32 // of an array; 0: no array
	typ                btf.Type
}

// Type is the field's type in C.
func (f Field) Type() string {
	var p typePrinter
	return strings.TrimSpace(p.declare(f.typ, "", maxNesting))
}

// Struct is the layout of the field itself, if it is a struct or union, or of
// what it points to. The error wraps ErrNoType.
func (f Field) Struct() (*Struct, error) {
	typ := plain(f.typ)
	if p, ok := typ.(*btf.Pointer); ok {
		typ = plain(p.Target)
	}
	if a, ok := typ.(*btf.Array); ok {
		typ = plain(a.Type)
	}
	if _, ok := composite(typ); !ok {
		return nil, fmt.Errorf("%s is no struct: %w", f.Path, ErrNoType)
	}
	return newStruct(typ.TypeName(), typ), nil
}

// Bounds of the nesting of types that is followed.
const (
	maxNesting = 32
	maxMembers = 1 << 17
)

// plain strips names and qualifiers of a type.
func plain(typ btf.Type) btf.Type {
	for range maxNesting {
		switch v := typ.(type) {
		case *btf.Typedef:
			typ = v.Type
		case *btf.Const:
			typ = v.Type
		case *btf.Volatile:
			typ = v.Type
		case *btf.Restrict:
			typ = v.Type
		case *btf.TypeTag:
			typ = v.Type
		default:
			return typ
		}
	}
	return nil
}

// composite returns the members of a struct or union.
func composite(typ btf.Type) ([]btf.Member, bool) {
	switch v := plain(typ).(type) {
	case *btf.Struct:
		return v.Members, true
	case *btf.Union:
		return v.Members, true
	}
	return nil, false
}

// Has says whether the struct has each of the fields.
func (s *Struct) Has(paths ...string) bool {
	for _, path := range paths {
		if _, err := s.Field(path); err != nil {
			return false
		}
	}
	return true
}

// Field finds a member by its path: "a.b[2].c". Members of anonymous structs
// and unions belong to what these are in. The error wraps ErrNoField.
func (s *Struct) Field(path string) (Field, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.fields[path]; ok {
		return f, nil
	}
	f, err := s.find(path)
	if err != nil {
		return Field{}, fmt.Errorf("%s.%s: %w", s.Name, path, err)
	}
	if len(s.fields) < maxNames {
		s.fields[path] = f
	}
	return f, nil
}

func (s *Struct) find(path string) (Field, error) {
	typ := s.typ
	at := btf.Bits(0)
	var bits btf.Bits
	for part := range strings.SplitSeq(path, ".") {
		name, index, indexed, err := cutIndex(part)
		if err != nil {
			return Field{}, err
		}
		budget := maxMembers
		m, offset, ok := member(typ, name, maxNesting, &budget)
		if !ok {
			return Field{}, fmt.Errorf("%q: %w", name, ErrNoField)
		}
		if bits != 0 {
			return Field{}, fmt.Errorf("%q: %w: it is in a bit-field", name, ErrNoField)
		}
		at += offset
		bits, typ = m.BitfieldSize, m.Type
		if indexed {
			a, ok := plain(typ).(*btf.Array)
			if !ok {
				return Field{}, fmt.Errorf("%q: %w: it is no array", name, ErrNoField)
			}
			// Arrays at the end of a struct have no length of their own.
			if a.Nelems != 0 && index >= a.Nelems {
				return Field{}, fmt.Errorf("%q: %w: the array has %d elements", part, ErrNoField, a.Nelems)
			}
			n, err := btf.Sizeof(a.Type)
			if err != nil || n > maxObject || uint64(index)*uint64(n) > maxObject {
				return Field{}, fmt.Errorf("%q: %w: it lies too far away", part, ErrNoField)
			}
			at += btf.Bits(index) * btf.Bits(n) * 8
			typ = a.Type
		}
	}
	f := Field{Path: path, Offset: uint32(at / 8), typ: typ}
	n, err := btf.Sizeof(typ)
	if err != nil || n > maxObject || at/8 > maxObject {
		return Field{}, fmt.Errorf("%w: its size is not known, or too large", ErrNoField)
	}
	f.Size = uint32(n)
	if bits != 0 {
		f.BitOffset, f.BitSize = uint32(at%8), uint32(bits)
		f.Size = (f.BitOffset + f.BitSize + 7) / 8
		if f.BitSize > 64 {
			return Field{}, fmt.Errorf("%w: a bit-field of %d bits", ErrNoField, bits)
		}
	}
	switch v := plain(typ).(type) {
	case *btf.Int:
		f.Signed = v.Encoding&btf.Signed != 0
	case *btf.Enum:
		f.Signed = v.Signed
	case *btf.Pointer:
		f.Pointer = true
	case *btf.Array:
		f.Count = v.Nelems
		if n, err := btf.Sizeof(v.Type); err == nil {
			f.ElemSize = uint32(min(n, maxObject))
		}
	}
	return f, nil
}

func cutIndex(part string) (name string, index uint32, indexed bool, err error) {
	name, rest, indexed := strings.Cut(part, "[")
	if !indexed {
		return part, 0, false, nil
	}
	digits, ok := strings.CutSuffix(rest, "]")
	n, err := strconv.ParseUint(digits, 0, 32)
	if !ok || err != nil {
		return "", 0, false, fmt.Errorf("%q: an index is written as [3]", part)
	}
	return name, uint32(n), true, nil
}

// member finds a named member, in anonymous ones as well, and how far behind
// the start of typ it is.
func member(typ btf.Type, name string, depth int, budget *int) (btf.Member, btf.Bits, bool) {
	members, _ := composite(typ)
	if depth == 0 || name == "" {
		return btf.Member{}, 0, false
	}
	for _, m := range members {
		if *budget--; *budget < 0 {
			return btf.Member{}, 0, false
		}
		if m.Name == name {
			return m, m.Offset, true
		}
	}
	for _, m := range members {
		if m.Name != "" {
			continue
		}
		if found, offset, ok := member(m.Type, name, depth-1, budget); ok {
			return found, m.Offset + offset, true
		}
	}
	return btf.Member{}, 0, false
}

// number reads a field, of at most 8 bytes, out of its struct's bytes.
func (f Field) number(data []byte) (uint64, error) {
	if f.Count != 0 || f.Size == 0 || f.Size > 9 || f.Size > 8 && f.BitSize == 0 || uint64(f.Offset)+uint64(f.Size) > uint64(len(data)) {
		return 0, fmt.Errorf("%s is no number: it has %d bytes", f.Path, f.Size)
	}
	var p [16]byte
	copy(p[:], data[f.Offset:f.Offset+f.Size])
	v := binary.LittleEndian.Uint64(p[:])
	bits := f.Size * 8
	if f.BitSize != 0 {
		v = v>>f.BitOffset | binary.LittleEndian.Uint64(p[8:])<<(64-f.BitOffset)
		bits = f.BitSize
	}
	if bits < 64 {
		v &= 1<<bits - 1
		if f.Signed && v>>(bits-1) != 0 {
			v |= ^uint64(0) << bits
		}
	}
	return v, nil
}

// kernelStructs are some that every kernel has and this package reads, with
// fields that tell them from others of the name.
var kernelStructs = map[string][]string{
	"list_head":   {"next", "prev"},
	"task_struct": {"tasks.next", "pid", "tgid", "comm", "real_cred", "flags", "stack"},
	"cred":        {"uid", "euid", "user_ns"},
	"module":      {"list.next", "name", "state"},
	"mm_struct":   {"pgd"},
}

// check says why the types are not those of a kernel.
func (t *Types) check() error {
	for name, fields := range kernelStructs {
		s, err := t.Struct(name)
		if err != nil {
			return err
		}
		for _, path := range fields {
			if _, err := s.Field(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// fits says why the types are not of this kernel: with them the first task does
// not look like one. A nil error says it does, or that no symbol says where it
// is.
func (t *Types) fits(ctx context.Context, k *Kernel) error {
	at, ok := k.Image.Lookup("init_task")
	if !ok {
		return nil
	}
	with := *k
	with.Types = t
	o, err := with.Part(ctx, "task_struct", at, "pid", "tgid", "comm", "tasks", "real_parent", "group_leader", "real_cred")
	if err != nil {
		return err
	}
	name, err := o.String("comm")
	if err != nil {
		return err
	}
	pid, err1 := o.Uint("pid")
	tgid, err2 := o.Uint("tgid")
	next, err3 := o.Pointer("tasks.next")
	parent, err4 := o.Pointer("real_parent")
	leader, err5 := o.Pointer("group_leader")
	creds, err6 := o.Pointer("real_cred")
	if err := errors.Join(err1, err2, err3, err4, err5, err6); err != nil {
		return err
	}
	head, err := o.Addr("tasks")
	if err != nil {
		return err
	}
	if pid != 0 || tgid != 0 || !strings.HasPrefix(name, "swapper") || parent != at || leader != at {
		return fmt.Errorf("by them the first task is %q with pid %d, the child of %#x", name, pid, parent)
	}
	if cred, err := with.Cred(ctx, creds); err != nil {
		return err
	} else if ns, ok := k.Image.Lookup("init_user_ns"); cred.UID != 0 || cred.EUID != 0 || ok && cred.UserNS != ns {
		return fmt.Errorf("by them the first task is that of user %d", cred.UID)
	}
	if back, err := k.Space.Pointer(ctx, next+8); err != nil || back != head {
		return errors.New("by them the list of tasks does not lead back to the first one")
	}
	return nil
}

// Bounds of what is read as BTF, and of where it is looked for: a
// distribution's kernel has 4 to 8 MiB, of 10 to 30 MiB of read-only data. Types
// take more than ten times as much when they are decoded.
const (
	maxBTF    = 16 << 20
	maxRodata = 64 << 20
	minBTF    = 24
	btfMagic  = 0xeb9f
	btfHeader = 24
)

// ReadTypes reads the kernel's BTF out of its memory. Where it is is said by
// symbols; if what they lead to is not the BTF of this kernel, the kernel's
// read-only data are searched, and of what is found the largest is taken by
// which the first task looks like one. The error wraps ErrNoTypes, ErrBadTypes
// or is the Space's.
func ReadTypes(ctx context.Context, k *Kernel) (*Types, error) {
	start, ok1 := k.Image.Lookup(startBTF)
	stop, ok2 := k.Image.Lookup(stopBTF)
	if !ok1 || !ok2 {
		return nil, ErrNoTypes
	}
	t, err := k.typesAt(ctx, start, stop)
	if err == nil {
		return t, nil
	}
	if found := k.searchTypes(ctx, Extent{start, stop}); found != nil {
		k.doubt(DoubtTypes, "where the symbols have it is none of this kernel, another one that is was found: %v", err)
		return found, nil
	}
	return nil, err
}

// Symbols of the kernel's own BTF.
const startBTF, stopBTF = "__start_BTF", "__stop_BTF"

func (k *Kernel) typesAt(ctx context.Context, start, stop uint64) (*Types, error) {
	d := k.decoding
	if k.decoding = nil; d == nil || d.at != (Extent{start, stop}) {
		d = k.readBTF(ctx, Extent{start, stop})
	}
	<-d.done
	t, err := d.types, d.err
	if err == nil {
		t, err = k.own(ctx, t)
	}
	if err != nil {
		return nil, &ObjectError{"BTF", start, err}
	}
	return t, nil
}

// decoding is BTF that is being decoded.
type decoding struct {
	at    Extent
	done  chan struct{} // closed when what follows is set
	types *Types
	err   error
}

// decodeTypes begins to decode what ReadTypes will, probably: to make out the
// symbols takes as long, on another processor.
func (k *Kernel) decodeTypes(ctx context.Context, x Extent) {
	if x.Start != 0 && x.End != 0 {
		k.decoding = k.readBTF(ctx, x)
	}
}

func (k *Kernel) readBTF(ctx context.Context, x Extent) *decoding {
	d := &decoding{at: x, done: make(chan struct{})}
	fail := func(err error) *decoding {
		d.err = err
		close(d.done)
		return d
	}
	if x.End <= x.Start || x.Size() < minBTF || x.Size() > maxBTF {
		return fail(fmt.Errorf("%w: it has %d bytes", ErrBadTypes, x.End-x.Start))
	}
	raw := make([]byte, x.Size())
	if err := k.Space.Read(ctx, x.Start, raw); err != nil {
		return fail(err)
	}
	go func() {
		defer close(d.done)
		d.types, d.err = k.cache.parseTypes(raw)
	}()
	return d
}

// own takes types if they are this kernel's.
func (k *Kernel) own(ctx context.Context, t *Types) (*Types, error) {
	if err := t.check(); err != nil {
		return nil, fmt.Errorf("%w: not a kernel's: %w", ErrBadTypes, err)
	}
	if err := t.fits(ctx, k); err != nil {
		return nil, fmt.Errorf("%w: not this kernel's: %w", ErrBadTypes, err)
	}
	return t, nil
}

// searchTypes looks for the kernel's BTF in its read-only data; nil: there is
// none.
func (k *Kernel) searchTypes(ctx context.Context, tried Extent) *Types {
	x := k.Rodata
	if x.End <= x.Start || x.Size() > maxRodata {
		return nil
	}
	raw := make([]byte, x.Size())
	const page = 4096
	for at := 0; at < len(raw); at += page { // pages that are not there stay zero
		end := min(at+page, len(raw))
		if err := k.Space.Read(ctx, x.Start+uint64(at), raw[at:end]); err != nil {
			clear(raw[at:end])
		}
	}
	for _, blob := range btfBlobs(raw) {
		if x.Start+uint64(blob.start) == tried.Start && uint64(blob.end-blob.start) == tried.Size() {
			continue
		}
		t, err := k.cache.parseTypes(slices.Clone(raw[blob.start:blob.end]))
		if err == nil {
			t, err = k.own(ctx, t)
		}
		if err == nil {
			return t
		}
	}
	return nil
}

type blob struct{ start, end int }

// btfBlobs finds what looks like a whole kernel's BTF, the largest first. At
// most a few are returned: each costs time to decode.
func btfBlobs(data []byte) []blob {
	const most = 16
	var found []blob
	for at := 0; at+btfHeader <= len(data); {
		i := bytes.Index(data[at:], []byte{btfMagic & 0xff, btfMagic >> 8, 1, 0})
		if i < 0 {
			break
		}
		at += i
		if size, ok := btfSize(data[at:]); ok && at%4 == 0 && kernelBTF(data[at:at+size]) {
			found = append(found, blob{at, at + size})
		}
		at += 4
	}
	slices.SortStableFunc(found, func(a, b blob) int { return (b.end - b.start) - (a.end - a.start) })
	return found[:min(len(found), most)]
}

// kernelBTF says whether BTF has a header of a usual length, and the name of a
// type that kernels have and programs' own types rarely.
func kernelBTF(data []byte) bool {
	const longest = 256
	header := binary.LittleEndian.Uint32(data[4:])
	if header > longest {
		return false
	}
	start := uint64(header) + uint64(binary.LittleEndian.Uint32(data[16:]))
	text := data[start : start+uint64(binary.LittleEndian.Uint32(data[20:]))]
	return len(text) > 0 && text[0] == 0 && text[len(text)-1] == 0 && bytes.Contains(text, []byte("\x00mm_struct\x00"))
}

// btfSize is how many bytes the BTF at the start of data has by its header.
func btfSize(data []byte) (int, bool) {
	if len(data) < btfHeader || binary.LittleEndian.Uint16(data) != btfMagic || data[2] != 1 {
		return 0, false
	}
	word := func(at int) uint64 { return uint64(binary.LittleEndian.Uint32(data[at:])) }
	size := word(4) + max(word(8)+word(12), word(16)+word(20))
	return int(size), word(4) >= btfHeader && size >= minBTF && size <= uint64(len(data))
}
