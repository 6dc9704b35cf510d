// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// The contract is written down three times: in the uapi header, in the YNL
// spec and in this package's constants. Each is reduced to the same form, and
// the forms must not differ.

const (
	headerPath = "../../kmod/uapi/kvmaccess.h"
	specPath   = "../../kmod/kvmaccess.yaml"
)

// contract is the common form.
type contract struct {
	Family  string
	Group   string
	Numbers []number // defines
	Enums   []enum   // in the header's order
}

type number struct {
	Name  string
	Value int64
}

// enum has the entries in the order in which they are written, with the name
// as in the header but for KVMACCESS_. Flags are enums of powers of two.
type enum struct {
	Prefix  string // of all entries
	Flags   bool
	Entries []entry
}

// entry is an enumerator. Type, Multi and Of are those of an attribute.
type entry struct {
	Name  string
	Value int64
	Type  string // u32, u64, string, binary, nest, pad
	Multi bool   // may be repeated
	Of    string // prefix of the enum that a u32 has its values from
}

// ---- header ----

var (
	comments  = regexp.MustCompile(`(?s)/\*.*?\*/`)
	defines   = regexp.MustCompile(`(?m)^#define\s+KVMACCESS_(\w+)[ \t]+(.+?)[ \t]*$`)
	enumDecl  = regexp.MustCompile(`(?s)\benum\s+kvmaccess_(\w+)\s*\{(.*?)\}`)
	attrNote  = regexp.MustCompile(`^(u32|u64|string|binary|nest)\b(, repeated)?`)
	enumNote  = regexp.MustCompile(`\benum kvmaccess_(\w+)`)
	headerPfx = "KVMACCESS_"
)

// parseHeader reads the defines and enums of the uapi header and, of
// attributes, the types that their comments begin with. An attribute without a
// comment has the type of the one before it.
func parseHeader(src string) (contract, error) {
	var c contract
	for _, m := range defines.FindAllStringSubmatch(comments.ReplaceAllString(src, ""), -1) {
		name, value := m[1], m[2]
		if s, err := strconv.Unquote(value); err == nil {
			switch name {
			case "GENL_NAME":
				c.Family = s
			case "MCGRP_VM":
				c.Group = s
			default:
				return c, fmt.Errorf("string %s is new here", name)
			}
			continue
		}
		n, err := strconv.ParseInt(value, 0, 64)
		if err != nil {
			return c, fmt.Errorf("define %s: %w", name, err)
		}
		c.Numbers = append(c.Numbers, number{name, n})
	}

	prefixOf := map[string]string{} // of enum kvmaccess_KEY
	of := map[string]string{}       // entry -> enum that its comment names
	for _, m := range enumDecl.FindAllStringSubmatch(src, -1) {
		e := enum{Prefix: headerPrefix(m[1])}
		prefixOf[m[1]] = e.Prefix
		next := int64(0)
		var last entry
		// An enumerator's comment follows its comma.
		rest := m[2]
		for {
			name, note, value, tail, ok := enumerator(rest)
			if !ok {
				break
			}
			rest = tail
			v := next
			if value != "" {
				var err error
				if v, err = evaluate(value); err != nil {
					if strings.HasSuffix(name, "_MAX") {
						continue
					}
					return c, fmt.Errorf("%s: %w", name, err)
				}
				e.Flags = true
			}
			next = v + 1
			if strings.HasPrefix(name, "__") {
				continue
			}
			name, found := strings.CutPrefix(name, headerPfx)
			if !found || !strings.HasPrefix(name, e.Prefix) {
				return c, fmt.Errorf("%s in enum with prefix %s", name, e.Prefix)
			}
			x := entry{Name: name, Value: v}
			if strings.HasPrefix(e.Prefix, "A_") && !strings.HasSuffix(name, "_UNSPEC") {
				switch t := attrNote.FindStringSubmatch(note); {
				case strings.HasSuffix(name, "_PAD"):
					x.Type = "pad"
				case t != nil:
					x.Type, x.Multi = t[1], t[2] != ""
					if n := enumNote.FindStringSubmatch(note); n != nil {
						of[name] = n[1]
					}
				case note == "":
					x.Type = last.Type
				default:
					return c, fmt.Errorf("%s: no type in %q", name, note)
				}
			}
			last = x
			e.Entries = append(e.Entries, x)
		}
		c.Enums = append(c.Enums, e)
	}
	for i := range c.Enums {
		for j := range c.Enums[i].Entries {
			x := &c.Enums[i].Entries[j]
			if name, ok := of[x.Name]; ok {
				p, ok := prefixOf[name]
				if !ok {
					return c, fmt.Errorf("%s: no enum kvmaccess_%s", x.Name, name)
				}
				x.Of = p
			}
		}
	}
	return c, nil
}

// enumerator takes the first enumerator off s.
func enumerator(s string) (name, note, value, rest string, ok bool) {
	s = strings.TrimSpace(s)
	for strings.HasPrefix(s, "/*") {
		_, s, _ = strings.Cut(s, "*/")
		s = strings.TrimSpace(s)
	}
	if s == "" {
		return "", "", "", "", false
	}
	decl, rest, _ := strings.Cut(s, ",")
	name, value, _ = strings.Cut(decl, "=")
	line, _, _ := strings.Cut(rest, "\n")
	if line = strings.TrimSpace(line); strings.HasPrefix(line, "/*") {
		note, rest, _ = strings.Cut(rest[strings.Index(rest, "/*")+2:], "*/")
		note = strings.Join(strings.Fields(note), " ")
	}
	return strings.TrimSpace(name), note, strings.TrimSpace(value), rest, true
}

// evaluate computes "N" and "N << M".
func evaluate(s string) (int64, error) {
	base, shift, shifted := strings.Cut(s, "<<")
	v, err := strconv.ParseInt(strings.TrimSpace(base), 0, 64)
	if err == nil && shifted {
		var n int64
		n, err = strconv.ParseInt(strings.TrimSpace(shift), 0, 8)
		v <<= n
	}
	return v, err
}

// headerPrefix is what the enumerators of enum kvmaccess_NAME begin with.
func headerPrefix(name string) string {
	return strings.ToUpper(strings.Replace(name, "_flag", "_f", 1)) + "_"
}

// ---- spec ----

type spec struct {
	Name        string `yaml:"name"`
	Protocol    string `yaml:"protocol"`
	Header      string `yaml:"uapi-header"`
	Doc         string `yaml:"doc"`
	Definitions []struct {
		Type    string      `yaml:"type"`
		Name    string      `yaml:"name"`
		Doc     string      `yaml:"doc"`
		Value   int64       `yaml:"value"`
		Entries []specEntry `yaml:"entries"`
	} `yaml:"definitions"`
	Sets []struct {
		Name  string     `yaml:"name"`
		Attrs []specAttr `yaml:"attributes"`
	} `yaml:"attribute-sets"`
	Operations struct {
		List []specOp `yaml:"list"`
	} `yaml:"operations"`
	Groups struct {
		List []struct {
			Name  string   `yaml:"name"`
			Flags []string `yaml:"flags"`
		} `yaml:"list"`
	} `yaml:"mcast-groups"`
}

type specEntry struct {
	Name string `yaml:"name"`
	Doc  string `yaml:"doc"`
}

type specAttr struct {
	Name   string `yaml:"name"`
	Type   string `yaml:"type"`
	Doc    string `yaml:"doc"`
	Multi  bool   `yaml:"multi-attr"`
	Nested string `yaml:"nested-attributes"`
	Enum   string `yaml:"enum"`
}

type specOp struct {
	Name   string    `yaml:"name"`
	Doc    string    `yaml:"doc"`
	Set    string    `yaml:"attribute-set"`
	Flags  []string  `yaml:"flags"`
	Do     *specBoth `yaml:"do"`
	Dump   *specBoth `yaml:"dump"`
	Event  *specList `yaml:"event"`
	Notify string    `yaml:"notify"`
	Group  string    `yaml:"mcgrp"`
}

type specBoth struct {
	Request specList `yaml:"request"`
	Reply   specList `yaml:"reply"`
}

type specList struct {
	Attributes []string `yaml:"attributes"`
}

func readSpec(src string) (spec, error) {
	var s spec
	d := yaml.NewDecoder(strings.NewReader(src))
	d.KnownFields(true)
	err := d.Decode(&s)
	return s, err
}

// specName turns a name of the spec into the header's, by the rules of the
// kernel's generator: prefix, upper case, underscores.
func specName(prefix, name string) string {
	return prefix + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// parseSpec reduces the spec. Values are not written in it: an enum's entries
// count from 0, flags are the bits from 0 up, attributes and commands count
// from 1.
func parseSpec(src string) (contract, error) {
	s, err := readSpec(src)
	if err != nil {
		return contract{}, err
	}
	c := contract{Family: s.Name}
	if len(s.Groups.List) != 1 {
		return c, fmt.Errorf("%d multicast groups", len(s.Groups.List))
	}
	c.Group = s.Groups.List[0].Name

	cmds := enum{Prefix: "CMD_", Entries: []entry{{Name: "CMD_UNSPEC"}}}
	for i, op := range s.Operations.List {
		cmds.Entries = append(cmds.Entries, entry{Name: specName("CMD_", op.Name), Value: int64(i) + 1})
	}
	c.Enums = append(c.Enums, cmds)

	flags := map[string]bool{}
	for _, d := range s.Definitions {
		switch d.Type {
		case "const":
			c.Numbers = append(c.Numbers, number{specName("", d.Name), d.Value})
		case "enum", "flags":
			e := enum{Prefix: specName("", d.Name) + "_", Flags: d.Type == "flags"}
			flags[d.Name] = true
			for i, x := range d.Entries {
				v := int64(i)
				if e.Flags {
					v = 1 << i
				}
				e.Entries = append(e.Entries, entry{Name: specName(e.Prefix, x.Name), Value: v})
			}
			c.Enums = append(c.Enums, e)
		default:
			return c, fmt.Errorf("definition %s has type %s", d.Name, d.Type)
		}
	}
	for _, set := range s.Sets {
		e := enum{Prefix: specName("A_", set.Name) + "_"}
		e.Entries = append(e.Entries, entry{Name: e.Prefix + "UNSPEC"})
		for i, a := range set.Attrs {
			x := entry{Name: specName(e.Prefix, a.Name), Value: int64(i) + 1, Type: a.Type, Multi: a.Multi}
			if a.Enum != "" {
				if !flags[a.Enum] {
					return c, fmt.Errorf("%s: no definition %s", a.Name, a.Enum)
				}
				x.Of = specName("", a.Enum) + "_"
			}
			e.Entries = append(e.Entries, x)
		}
		c.Enums = append(c.Enums, e)
	}
	return c, nil
}

// ---- Go ----

// goTypes are the exported types that stand for the header's enums.
var goTypes = map[string]string{
	"Vendor": "VENDOR_", "Caps": "CAP_", "VMFlags": "VM_F_", "Condition": "CONDITION_",
	"Method": "METHOD_", "VCPUFlags": "VCPU_F_", "TableKind": "TABLE_",
	"ItemKind": "KIND_", "Register": "REGISTER_", "ItemState": "STATE_", "WatchFlags": "WATCH_F_",
}

// stdlib imports what the files with constants import, once.
var (
	fset   = token.NewFileSet()
	stdlib = importer.ForCompiler(fset, "source", nil)
)

// goConstants evaluates the package's constants, in the order of their files.
func goConstants(files map[string]string) ([]*types.Const, error) {
	var parsed []*ast.File
	for _, name := range []string{"consts.go", "enums.go"} {
		f, err := parser.ParseFile(fset, name, files[name], 0)
		if err != nil {
			return nil, err
		}
		parsed = append(parsed, f)
	}
	conf := types.Config{Importer: stdlib}
	pkg, err := conf.Check("kvmaccess", fset, parsed, nil)
	if err != nil {
		return nil, err
	}
	var all []*types.Const
	for _, name := range pkg.Scope().Names() {
		if k, ok := pkg.Scope().Lookup(name).(*types.Const); ok {
			all = append(all, k)
		}
	}
	slices.SortFunc(all, func(a, b *types.Const) int { return int(a.Pos() - b.Pos()) })
	return all, nil
}

// parseGo reduces the constants. Go's names are the header's without
// underscores (and the F of flags) and in another case, so that model, the
// header's contract, has to tell where words end; types of attributes are not
// constants, TestAttributeTypes compares them.
func parseGo(files map[string]string, model contract) (contract, error) {
	consts, err := goConstants(files)
	if err != nil {
		return contract{}, err
	}
	fold := func(s string) string {
		return strings.ToLower(strings.ReplaceAll(strings.Replace(s, "_F_", "_", 1), "_", ""))
	}
	var c contract
	enums := map[string]*enum{}
	var order []string
	add := func(prefix, name string, v int64) {
		e := enums[prefix]
		if e == nil {
			e = &enum{Prefix: prefix}
			enums[prefix] = e
			order = append(order, prefix)
		}
		e.Entries = append(e.Entries, entry{Name: name, Value: v})
	}
	headerName := func(prefix, name string) string {
		for _, e := range model.Enums {
			for _, x := range e.Entries {
				if (prefix == "" || e.Prefix == prefix) && fold(x.Name) == strings.ToLower(name) {
					return x.Name
				}
			}
		}
		return "only in Go: " + name
	}
	prefixes := make([]string, 0, len(model.Enums))
	for _, e := range model.Enums {
		prefixes = append(prefixes, e.Prefix)
	}
	for _, k := range consts {
		name := k.Name()
		if k.Val().Kind() == constant.String {
			switch name {
			case "genlName":
				c.Family = constant.StringVal(k.Val())
			case "mcgrpVM":
				c.Group = constant.StringVal(k.Val())
			default:
				return c, fmt.Errorf("string %s is new here", name)
			}
			continue
		}
		v, exact := constant.Int64Val(k.Val())
		if !exact {
			return c, fmt.Errorf("%s is no integer", name)
		}
		if named, ok := k.Type().(*types.Named); ok {
			if prefix, ok := goTypes[named.Obj().Name()]; ok {
				add(prefix, headerName(prefix, name), v)
			} else if named.Obj().Name() != "EventKind" {
				return c, fmt.Errorf("type %s is new here", named.Obj().Name())
			}
			continue
		}
		// The longest prefix that fits: A_VM_ before A_VMX_ cannot be told
		// apart otherwise.
		full := headerName("", name)
		best := ""
		for _, p := range prefixes {
			if strings.HasPrefix(full, p) && len(p) > len(best) {
				best = p
			}
		}
		if best != "" {
			add(best, full, v)
			continue
		}
		i := slices.IndexFunc(model.Numbers, func(n number) bool { return fold(n.Name) == strings.ToLower(name) })
		if i < 0 {
			return c, fmt.Errorf("constant %s is not in the header", name)
		}
		c.Numbers = append(c.Numbers, number{model.Numbers[i].Name, v})
	}
	for _, p := range order {
		c.Enums = append(c.Enums, *enums[p])
	}
	return c, nil
}

// ---- comparison ----

// canonical sorts what may be written in another order: the enums among each
// other, and the defines. The entries of an enum keep theirs.
func canonical(c contract) contract {
	c.Enums = slices.Clone(c.Enums)
	slices.SortFunc(c.Enums, func(a, b enum) int { return strings.Compare(a.Prefix, b.Prefix) })
	c.Numbers = slices.Clone(c.Numbers)
	slices.SortFunc(c.Numbers, func(a, b number) int { return strings.Compare(a.Name, b.Name) })
	return c
}

// untyped removes what Go's constants do not have. The command enum is no
// definition in the spec.
func untyped(c contract) contract {
	c = canonical(c)
	for i := range c.Enums {
		c.Enums[i].Flags = false
		c.Enums[i].Entries = slices.Clone(c.Enums[i].Entries)
		for j := range c.Enums[i].Entries {
			x := &c.Enums[i].Entries[j]
			*x = entry{Name: x.Name, Value: x.Value}
		}
	}
	return c
}

// sources are the texts of the contract.
type sources struct {
	header, spec string
	goFiles      map[string]string
}

func mustRead(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func mustHeader(t testing.TB) contract {
	t.Helper()
	c, err := parseHeader(mustRead(t, headerPath))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func readSources(t testing.TB) sources {
	t.Helper()
	return sources{
		header: mustRead(t, headerPath), spec: mustRead(t, specPath),
		goFiles: map[string]string{"consts.go": mustRead(t, "consts.go"), "enums.go": mustRead(t, "enums.go")},
	}
}

// differences returns "" if the three texts say the same.
func differences(s sources) string {
	header, err := parseHeader(s.header)
	if err != nil {
		return "header: " + err.Error()
	}
	spec, err := parseSpec(s.spec)
	if err != nil {
		return "spec: " + err.Error()
	}
	// The spec cannot name the command enum; nothing else may be left out.
	for i := range header.Enums {
		for j := range header.Enums[i].Entries {
			if x := &header.Enums[i].Entries[j]; x.Of == "CMD_" {
				x.Of = ""
			}
		}
	}
	var sb strings.Builder
	if diff := cmp.Diff(canonical(header), canonical(spec)); diff != "" {
		fmt.Fprintf(&sb, "header and spec differ (-header +spec):\n%s", diff)
	}
	code, err := parseGo(s.goFiles, header)
	if err != nil {
		return sb.String() + "Go: " + err.Error()
	}
	if diff := cmp.Diff(untyped(header), untyped(code)); diff != "" {
		fmt.Fprintf(&sb, "header and Go differ (-header +Go):\n%s", diff)
	}
	return sb.String()
}

func TestContract(t *testing.T) {
	if diff := differences(readSources(t)); diff != "" {
		t.Error(diff)
	}
}

// TestContractOperations checks what the header tells in prose only: which
// attributes the requests have.
func TestContractOperations(t *testing.T) {
	s, err := readSpec(readSources(t).spec)
	if err != nil {
		t.Fatal(err)
	}
	sets := map[string]map[string]specAttr{}
	for _, set := range s.Sets {
		sets[set.Name] = map[string]specAttr{}
		for _, a := range set.Attrs {
			sets[set.Name][a.Name] = a
		}
	}
	for _, set := range s.Sets {
		for _, a := range set.Attrs {
			if (a.Type == "nest") != (a.Nested != "") || a.Nested != "" && sets[a.Nested] == nil {
				t.Errorf("%s %s: type %s, nested attributes %q", set.Name, a.Name, a.Type, a.Nested)
			}
		}
	}
	got := map[string]string{}
	for _, op := range s.Operations.List {
		var sb strings.Builder
		for _, way := range []struct {
			name string
			both *specBoth
		}{{"do", op.Do}, {"dump", op.Dump}} {
			if way.both == nil {
				continue
			}
			fmt.Fprintf(&sb, "%s(%s) ", way.name, strings.Join(way.both.Request.Attributes, " "))
			reply := way.both.Reply.Attributes
			for _, name := range slices.Concat(way.both.Request.Attributes, reply) {
				if _, ok := sets[op.Set][name]; !ok {
					t.Errorf("%s: set %s has no attribute %s", op.Name, op.Set, name)
				}
			}
			want := len(sets[op.Set])
			if _, ok := sets[op.Set]["pad"]; ok {
				want--
			}
			// What requests about watches have alone is not in their replies.
			if op.Set == "watch" {
				want -= len([]string{"key", "item", "cookie"})
			}
			if len(reply) != want {
				t.Errorf("%s %s: the reply has %d attributes, the set %d", op.Name, way.name, len(reply), want)
			}
		}
		if op.Event != nil {
			fmt.Fprintf(&sb, "event of %d", len(op.Event.Attributes))
		} else if op.Notify != "" {
			fmt.Fprintf(&sb, "notify %s to %s", op.Notify, op.Group)
		} else if !slices.Equal(op.Flags, []string{"admin-perm"}) {
			t.Errorf("%s: flags %q", op.Name, op.Flags)
		}
		got[op.Name] = strings.TrimSpace(sb.String())
	}
	want := map[string]string{
		"info":         "do()",
		"vm-get":       "do(id) dump()",
		"memslot-get":  "do(vm-id as-id slot) dump(vm-id)",
		"vcpu-get":     "do(vm-id id) dump(vm-id)",
		"table-get":    "do(vm-id vcpu-id kind offset length)",
		"mem-read":     "do(vm-id vcpu-id root range)",
		"stats":        "do(vm-id) dump()",
		"vm-created":   "notify vm-get to vm",
		"vm-destroyed": "notify vm-get to vm",
		"watch-new":    "do(vm-id period budget key)",
		"watch-add":    "do(id item)",
		"watch-del":    "do(id cookie)",
		"watch-get":    "do(id) dump()",
		"watch-event":  "event of 16",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("operations (-want +got):\n%s", diff)
	}
}

// TestContractMutations shows that TestContract fails when one text changes.
func TestContractMutations(t *testing.T) {
	type mutation struct {
		name     string
		text     string // header, spec, consts.go or enums.go
		old, new string
	}
	for _, m := range []mutation{
		{"family name", "header", `"kvmaccess"`, `"kvmacces"`},
		{"version", "header", "GENL_VERSION\t1", "GENL_VERSION\t2"},
		{"group", "header", `MCGRP_VM	"vm"`, `MCGRP_VM	"vms"`},
		{"limit", "header", "MAX_BYTES\t28672", "MAX_BYTES\t28671"},
		{"limit added", "header", "#define KVMACCESS_MAX_RANGES", "#define KVMACCESS_MAX_VMS 3\n#define KVMACCESS_MAX_RANGES"},
		{"command added", "header", "\tKVMACCESS_CMD_STATS,\n", "\tKVMACCESS_CMD_STATS,\n\tKVMACCESS_CMD_WATCH,\n"},
		{"commands swapped", "header", "\tKVMACCESS_CMD_TABLE_GET,\n\tKVMACCESS_CMD_MEM_READ,\n", "\tKVMACCESS_CMD_MEM_READ,\n\tKVMACCESS_CMD_TABLE_GET,\n"},
		{"attribute renamed", "header", "A_VM_SEEN", "A_VM_FIRST"},
		{"attribute type", "header", "A_VM_PID,\t\t/* u32:", "A_VM_PID,\t\t/* u64:"},
		{"attribute repeated", "header", "MISSING,	/* string, repeated:", "MISSING,	/* string:"},
		{"attribute's enum", "header", "A_INFO_VENDOR,	/* u32: enum kvmaccess_vendor", "A_INFO_VENDOR,	/* u32: enum kvmaccess_table"},
		{"type of a run", "header", "A_VCPU_RAX,		/* u64", "A_VCPU_RAX,		/* u32"},
		{"flag's bit", "header", "CAP_EVENTS	= 1 << 2", "CAP_EVENTS	= 1 << 3"},
		{"enum entry", "header", "\tKVMACCESS_CONDITION_NEW,", "\tKVMACCESS_CONDITION_LOST,\n\tKVMACCESS_CONDITION_NEW,"},
		{"register dropped", "header", "\tKVMACCESS_A_VCPU_DR6,\n", ""},

		{"family name", "spec", "name: kvmaccess\n", "name: kvm\n"},
		{"version", "spec", "value: 1\n", "value: 2\n"},
		{"group", "spec", "name: vm\n      flags", "name: vms\n      flags"},
		{"limit", "spec", "value: 64", "value: 65"},
		{"attribute renamed", "spec", "name: seen\n", "name: first\n"},
		{"attribute type", "spec", "name: pid\n        type: u32", "name: pid\n        type: u64"},
		{"attribute repeated", "spec", "        multi-attr: true\n", ""},
		{"attribute's enum", "spec", "enum: condition", "enum: method"},
		{"attribute dropped", "spec", "      -\n        name: r15\n        type: u64\n", ""},
		{"enum entry", "spec", "      -\n        name: vmx\n", ""},
		{"flags as enum", "spec", "type: flags", "type: enum"},
		{"command renamed", "spec", "name: mem-read\n", "name: mem-get\n"},
		{"pad type", "spec", "type: pad", "type: u64"},
		{"unknown key", "spec", "doc: The state", "docs: The state"},

		{"family name", "consts.go", `"kvmaccess"`, `"kvm"`},
		{"group", "consts.go", `"vm"`, `"vms"`},
		{"version", "consts.go", "genlVersion = 1", "genlVersion = 2"},
		{"limit", "consts.go", "MaxRanges = 64", "MaxRanges = 63"},
		{"attributes swapped", "consts.go", "\taVCPURAX\n\taVCPURBX\n", "\taVCPURBX\n\taVCPURAX\n"},
		{"attribute renamed", "consts.go", "\taVMSeen\n", "\taVMFirst\n"},
		{"attribute dropped", "consts.go", "\taVCPUPAT\n", ""},
		{"attribute added", "consts.go", "\taVCPUPAT\n", "\taVCPUPAT\n\taVCPUTSC\n"},
		{"command dropped", "consts.go", "\tcmdVMDestroyed\n", ""},
		{"enum entry renamed", "enums.go", "ConditionPreempted ", "ConditionScheduled "},
		{"enum entry dropped", "enums.go", "\tMethodLocal            // on the requester's CPU, interrupts off\n", ""},
		{"flag's bit", "enums.go", "VCPUNested    VCPUFlags = 1 << iota", "VCPUNested    VCPUFlags = 2 << iota"},
	} {
		t.Run(m.text+"/"+m.name, func(t *testing.T) {
			s := readSources(t)
			text := map[string]*string{"header": &s.header, "spec": &s.spec}[m.text]
			if text == nil {
				file := s.goFiles[m.text]
				text = &file
			}
			if !strings.Contains(*text, m.old) {
				t.Fatalf("nothing to change: no %q", m.old)
			}
			*text = strings.Replace(*text, m.old, m.new, 1)
			if _, ok := s.goFiles[m.text]; ok {
				s.goFiles[m.text] = *text
			}
			if differences(s) == "" {
				t.Errorf("%q became %q unnoticed", m.old, m.new)
			}
		})
	}
}
