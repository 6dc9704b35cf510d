// SPDX-License-Identifier: MIT

package truth

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
)

// checkComparison holds a comparison against truth, equal, extra.
func checkComparison(t *testing.T, c Comparison, want [3]int) {
	t.Helper()
	if got := [3]int{c.Truth, c.Equal, c.Extra}; got != want {
		t.Errorf("truth, equal, extra: %v, want %v\n%s", got, want, strings.Join(c.Examples, "\n"))
	}
	if ok := want[0] > 0 && want[0] == want[1] && want[2] == 0; (c.Err() == nil) != ok {
		t.Errorf("error %v", c.Err())
	}
}

func TestSymbols(t *testing.T) {
	const kallsyms = "0000000000000000 A percpu\nffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81000010 t twice\nffffffff81000010 t twice\n" +
		"ffffffffc0001000 t f\t[module]\nffffffffc0002000 t bpf_prog_1234\t[bpf]\n"
	all := []guest.Symbol{
		{Name: "percpu", Type: 'A'}, {Name: "_text", Address: 0xffffffff81000000, Type: 'T'}, {Name: "_stext", Address: 0xffffffff81000000, Type: 'T'},
		{Name: "twice", Address: 0xffffffff81000010, Type: 't'}, {Name: "twice", Address: 0xffffffff81000010, Type: 't'},
		{Name: "f", Module: "module", Address: 0xffffffffc0001000, Type: 't'},
	}
	change := func(i int, f func(*guest.Symbol)) []guest.Symbol {
		other := slices.Clone(all)
		f(&other[i])
		return other
	}
	for name, tt := range map[string]struct {
		found []guest.Symbol
		want  [3]int
	}{
		"all":             {all, [3]int{6, 6, 0}},
		"none":            {nil, [3]int{6, 0, 0}},
		"one missing":     {all[1:], [3]int{6, 5, 0}},
		"one twice":       {append(slices.Clone(all), all[0]), [3]int{6, 6, 1}},
		"another address": {change(1, func(s *guest.Symbol) { s.Address++ }), [3]int{6, 5, 1}},
		"another name":    {change(2, func(s *guest.Symbol) { s.Name = "_etext" }), [3]int{6, 5, 1}},
		"another type":    {change(3, func(s *guest.Symbol) { s.Type = 'T' }), [3]int{6, 5, 1}},
		"another module":  {change(5, func(s *guest.Symbol) { s.Module = "other" }), [3]int{6, 5, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Symbols([]byte(kallsyms), slices.Values(tt.found))
			if err != nil {
				t.Fatal(err)
			}
			checkComparison(t, c, tt.want)
		})
	}
	if _, err := Symbols([]byte("what\n"), slices.Values(all)); err == nil {
		t.Error("a malformed list is no error")
	}
}

// blob is a BTF with a struct of numbers, a bit-field and an anonymous union.
func blob(t *testing.T, second uint32) []byte {
	t.Helper()
	u32 := &btf.Int{Name: "unsigned int", Size: 4}
	nested := &btf.Union{Size: 4, Members: []btf.Member{{Name: "c", Type: u32}, {Name: "d", Type: u32}}}
	s := &btf.Struct{Name: "s", Size: 16, Members: []btf.Member{
		{Name: "a", Type: u32}, {Name: "b", Type: u32, Offset: btf.Bits(second)}, {Type: nested, Offset: 64},
		{Name: "bits", Type: u32, Offset: 99, BitfieldSize: 3},
	}}
	b, err := btf.NewBuilder([]btf.Type{s}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := b.Marshal(nil, btf.KernelMarshalOptions())
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestTypes(t *testing.T) {
	raw := blob(t, 32)
	for name, tt := range map[string]struct {
		found []byte
		want  [3]int
	}{
		"the same":       {raw, [3]int{5, 5, 0}},
		"another offset": {blob(t, 40), [3]int{5, 4, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			types, err := guest.ParseTypes(tt.found, nil)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Types(raw, types, 1)
			if err != nil {
				t.Fatal(err)
			}
			checkComparison(t, c, tt.want)
		})
	}
	for _, n := range []int{0, 10, 23, len(raw) - 1} {
		if _, err := Types(raw[:n], nil, 1); err == nil {
			t.Errorf("%d bytes of BTF are no error", n)
		}
	}
}

func TestTasks(t *testing.T) {
	one := agent.Task{TGID: 1, TID: 1, Name: "init", State: "S", Start: 10}
	two := agent.Task{TGID: 7, TID: 8, PPID: 1, Name: "kworker/0:1-events", State: "I", UID: 5, EUID: 6, GID: 7, Start: 20}
	zombie := agent.Task{TGID: 9, TID: 9, PPID: 1, Name: "z", State: "Z", Start: 30}
	as := func(a agent.Task) guest.Task {
		return guest.Task{TGID: a.TGID, PID: a.TID, PPID: a.PPID, Name: a.Name, State: a.State, UID: a.UID, EUID: a.EUID, GID: a.GID,
			Start: time.Duration(a.Start)*tick + time.Millisecond}
	}
	all := []agent.Task{one, two, zombie}
	other := func(a agent.Task, f func(*guest.Task)) guest.Task {
		g := as(a)
		f(&g)
		return g
	}
	for name, tt := range map[string]struct {
		after []agent.Task
		found []guest.Task
		want  [3]int
	}{
		"all":              {all, []guest.Task{as(one), as(two), as(zombie)}, [3]int{3, 3, 0}},
		"one ended":        {all[:2], []guest.Task{as(one), as(two)}, [3]int{2, 2, 0}},
		"one hidden":       {all, []guest.Task{as(one), as(zombie)}, [3]int{3, 2, 0}},
		"one besides":      {all, []guest.Task{as(one), as(two), as(zombie), {PID: 99}}, [3]int{3, 3, 1}},
		"worker's work":    {all, []guest.Task{as(one), other(two, func(g *guest.Task) { g.Name = "kworker/0:1-rcu" }), as(zombie)}, [3]int{3, 3, 0}},
		"another name":     {all, []guest.Task{as(one), other(two, func(g *guest.Task) { g.Name = "kworker/0:2" }), as(zombie)}, [3]int{3, 2, 0}},
		"another user":     {all, []guest.Task{as(one), other(two, func(g *guest.Task) { g.EUID = 0 }), as(zombie)}, [3]int{3, 2, 0}},
		"another parent":   {all, []guest.Task{as(one), other(two, func(g *guest.Task) { g.PPID = 2 }), as(zombie)}, [3]int{3, 2, 0}},
		"woken up":         {all, []guest.Task{other(one, func(g *guest.Task) { g.State = "R" }), as(two), as(zombie)}, [3]int{3, 3, 0}},
		"zombie that runs": {all, []guest.Task{as(one), as(two), other(zombie, func(g *guest.Task) { g.State = "R" })}, [3]int{3, 2, 0}},
	} {
		t.Run(name, func(t *testing.T) { checkComparison(t, Tasks(all, tt.after, tt.found), tt.want) })
	}
}

func TestModules(t *testing.T) {
	const proc = "a 16384 2 b,c, Live 0xffffffffc0001000\nb 8192 0 - Live 0xffffffffc0002000\nc 8192 1 [permanent], Live 0xffffffffc0003000 (OE)\n"
	a := guest.Module{Name: "a", Size: 16384, Refcount: 2, Users: []string{"b", "c"}, State: "Live", Base: 0xffffffffc0001000}
	b := guest.Module{Name: "b", Size: 8192, State: "Live", Base: 0xffffffffc0002000}
	c := guest.Module{Name: "c", Size: 8192, Refcount: 1, State: "Live", Base: 0xffffffffc0003000, Exitless: true}
	elsewhere := b
	elsewhere.Base += 4096
	for name, tt := range map[string]struct {
		found []guest.Module
		want  [3]int
	}{
		"all":         {[]guest.Module{a, b, c}, [3]int{3, 3, 0}},
		"one hidden":  {[]guest.Module{a, c}, [3]int{3, 2, 0}},
		"one besides": {[]guest.Module{a, b, c, {Name: "d"}}, [3]int{3, 3, 1}},
		"elsewhere":   {[]guest.Module{a, elsewhere, c}, [3]int{3, 2, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Modules([]byte(proc), tt.found)
			if err != nil {
				t.Fatal(err)
			}
			checkComparison(t, c, tt.want)
		})
	}
	if _, err := Modules([]byte("a 1\n"), nil); err == nil {
		t.Error("a malformed line is no error")
	}
}
