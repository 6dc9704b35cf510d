// SPDX-License-Identifier: MIT

package guest

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// Names lists the names of all structs, unions, enums and typedefs, sorted;
// those of a base as well.
func (t *Types) Names() []string {
	if t == nil {
		return nil
	}
	var names []string
	for g := t.graph; g != nil; g = g.base {
		for _, offset := range g.offsets {
			switch kind, _ := g.kind(int(offset)); kind {
			case btfStruct, btfUnion, btfEnum, btfEnum64, btfTypedef:
				if name := g.string(binary.LittleEndian.Uint32(g.types[offset:])); len(name) > 0 {
					names = append(names, string(name))
				}
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Declaration writes a type as C declares it: "task_struct", "struct
// task_struct", "enum pid_type", a typedef. Members of structs carry their
// offset and size in bytes, bit-fields their first bit and their width. Several
// types of one name follow each other, and a typedef is followed by what it is
// of. The error wraps ErrNoType or ErrBadTypes.
func (t *Types) Declaration(name string) (string, error) {
	if t == nil {
		return "", ErrNoTypes
	}
	tag, kind := cutKind(name)
	all, err := t.named(tag, func(typ btf.Type) bool {
		if tag == "" {
			return false
		}
		switch typ.(type) {
		case *btf.Struct:
			return kind == "" || kind == "struct"
		case *btf.Union:
			return kind == "" || kind == "union"
		case *btf.Enum:
			return kind == "" || kind == "enum"
		case *btf.Typedef:
			return kind == "" || kind == "typedef"
		}
		return kind == ""
	})
	if len(all) == 0 {
		return "", err
	}
	var p typePrinter
	for i, typ := range all {
		if i > 0 {
			p.line(0, "")
		}
		p.define(typ)
	}
	return p.out.String(), nil
}

// typePrinter writes types in C. What it writes is bounded: types can contain
// themselves if the guest wills it.
type typePrinter struct {
	out  strings.Builder
	full bool
}

// maxDeclaration bounds what is printed of a type, in bytes.
const maxDeclaration = 1 << 20

func (p *typePrinter) line(indent int, format string, args ...any) {
	if p.out.Len() > maxDeclaration {
		p.full = true
	}
	if p.full {
		return
	}
	s := strings.TrimRight(strings.Repeat("\t", indent)+fmt.Sprintf(format, args...), " \t")
	p.out.WriteString(s + "\n")
}

func (p *typePrinter) define(typ btf.Type) {
	switch v := typ.(type) {
	case *btf.Struct:
		p.composite("struct "+v.Name, v.Members, v.Size, 0, 0, "", maxNesting)
	case *btf.Union:
		p.composite("union "+v.Name, v.Members, v.Size, 0, 0, "", maxNesting)
	case *btf.Enum:
		p.line(0, "%s {", strings.TrimSpace("enum "+v.Name))
		p.enum(v, 1)
		p.line(0, "};\t/* size: %d */", v.Size)
	case *btf.Typedef:
		switch of := v.Type.(type) {
		case *btf.Struct:
			if of.Name == "" {
				p.composite("typedef struct", of.Members, of.Size, 0, 0, v.Name, maxNesting)
				return
			}
		case *btf.Union:
			if of.Name == "" {
				p.composite("typedef union", of.Members, of.Size, 0, 0, v.Name, maxNesting)
				return
			}
		case *btf.Enum:
			if of.Name == "" {
				p.line(0, "typedef enum {")
				p.enum(of, 1)
				p.line(0, "} %s;\t/* size: %d */", v.Name, of.Size)
				return
			}
		}
		p.line(0, "typedef %s;%s", p.declare(v.Type, v.Name, maxNesting), sizeNote(v.Type))
	case *btf.Func:
		p.line(0, "%s;", p.declare(v.Type, v.Name, maxNesting))
	case *btf.Var:
		p.line(0, "%s;%s", p.declare(v.Type, v.Name, maxNesting), sizeNote(v.Type))
	case *btf.Int, *btf.Float:
		p.line(0, "%s;%s", typ.TypeName(), sizeNote(typ))
	case *btf.Fwd:
		p.line(0, "%v %s;\t/* not defined */", v.Kind, v.Name)
	case *btf.Datasec:
		p.line(0, "/* section %s: %d variables, %d bytes */", v.Name, len(v.Vars), v.Size)
	}
}

func sizeNote(typ btf.Type) string {
	if n, err := btf.Sizeof(typ); err == nil {
		return fmt.Sprintf("\t/* size: %d */", n)
	}
	return ""
}

func (p *typePrinter) enum(v *btf.Enum, indent int) {
	for _, e := range v.Values {
		if v.Signed {
			p.line(indent, "%s = %d,", e.Name, int64(e.Value))
		} else {
			p.line(indent, "%s = %d,", e.Name, e.Value)
		}
	}
}

// composite writes a struct or union that begins base bits behind the outermost
// one. Members without a name are written out where they stand.
func (p *typePrinter) composite(head string, members []btf.Member, size uint32, base btf.Bits, indent int, name string, depth int) {
	if depth == 0 || p.full {
		p.line(indent, "%s { ... };", strings.TrimSpace(head))
		return
	}
	p.line(indent, "%s {", strings.TrimSpace(head))
	for _, m := range members {
		if p.full {
			break
		}
		at := base + m.Offset
		switch v := m.Type.(type) {
		case *btf.Struct:
			if v.Name == "" {
				p.composite("struct", v.Members, v.Size, at, indent+1, m.Name, depth-1)
				continue
			}
		case *btf.Union:
			if v.Name == "" {
				p.composite("union", v.Members, v.Size, at, indent+1, m.Name, depth-1)
				continue
			}
		}
		text := p.declare(m.Type, m.Name, depth-1)
		if m.BitfieldSize != 0 {
			p.line(indent+1, "%-48s /* %5d bit %d, width %d */", fmt.Sprintf("%s:%d;", text, m.BitfieldSize), at/8, at%8, m.BitfieldSize)
			continue
		}
		n, _ := btf.Sizeof(m.Type)
		p.line(indent+1, "%-48s /* %5d %5d */", text+";", at/8, n)
	}
	if name != "" {
		name = " " + name
	}
	if indent == 0 {
		p.line(indent, "}%s;\t/* size: %d */", name, size)
	} else {
		p.line(indent, "%-48s /* %5d %5d */", "}"+name+";", base/8, size)
	}
}

// declare writes the declaration of name with the type, by C's rules: what is
// next to the name binds first.
func (p *typePrinter) declare(typ btf.Type, name string, depth int) string {
	if depth == 0 || len(name) > 4096 {
		return "... " + name
	}
	base := func(s string) string {
		if name == "" || strings.HasPrefix(name, "[") || strings.HasPrefix(name, "(") && !strings.HasPrefix(name, "(*") {
			return s + name
		}
		return s + " " + name
	}
	switch v := typ.(type) {
	case nil:
		return base("?")
	case *btf.Void:
		return base("void")
	case *btf.Struct:
		return base("struct " + tagOr(v.Name))
	case *btf.Union:
		return base("union " + tagOr(v.Name))
	case *btf.Enum:
		if v.Name != "" {
			return base("enum " + v.Name)
		}
		var all []string
		for i, e := range v.Values {
			if i == 64 {
				all = append(all, "...")
				break
			}
			all = append(all, fmt.Sprintf("%s = %d", e.Name, int64(e.Value)))
		}
		return base("enum { " + strings.Join(all, ", ") + " }")
	case *btf.Fwd:
		return base(fmt.Sprintf("%v %s", v.Kind, v.Name))
	case *btf.Const:
		return p.qualified("const", v.Type, name, depth)
	case *btf.Volatile:
		return p.qualified("volatile", v.Type, name, depth)
	case *btf.Restrict:
		return p.qualified("restrict", v.Type, name, depth)
	case *btf.TypeTag:
		return p.declare(v.Type, name, depth-1)
	case *btf.Pointer:
		switch unqualified(v.Target).(type) {
		case *btf.Array, *btf.FuncProto:
			return p.declare(v.Target, "(*"+name+")", depth-1)
		}
		return p.declare(v.Target, "*"+name, depth-1)
	case *btf.Array:
		return p.declare(v.Type, fmt.Sprintf("%s[%d]", name, v.Nelems), depth-1)
	case *btf.FuncProto:
		var params []string
		for i, param := range v.Params {
			if i == 64 {
				params = append(params, "...")
				break
			}
			if _, ok := param.Type.(*btf.Void); ok {
				params = append(params, "...")
				continue
			}
			params = append(params, p.declare(param.Type, param.Name, min(depth-1, 8)))
		}
		if len(params) == 0 {
			params = []string{"void"}
		}
		return p.declare(v.Return, name+"("+strings.Join(params, ", ")+")", depth-1)
	}
	return base(typ.TypeName())
}

func tagOr(name string) string {
	if name == "" {
		return "{ ... }"
	}
	return name
}

func unqualified(typ btf.Type) btf.Type {
	if tag, ok := typ.(*btf.TypeTag); ok {
		return tag.Type
	}
	return typ
}

// qualified puts const and its like before a type, or behind the star of a
// pointer.
func (p *typePrinter) qualified(word string, typ btf.Type, name string, depth int) string {
	if _, ok := unqualified(typ).(*btf.Pointer); ok {
		return p.declare(typ, strings.TrimSpace(word+" "+name), depth-1)
	}
	return word + " " + p.declare(typ, name, depth-1)
}
