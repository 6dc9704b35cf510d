// SPDX-License-Identifier: MIT

package guest

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const someSymbols = `0000000000000000 A fixed_percpu_data
0000000000001000 A cpu_debug_store
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81000040 t helper
ffffffff81000080 t helper
ffffffff81000100 T sys_call_table_walk
ffffffff81001000 T _etext
ffffffff81200000 D sys_call_table
ffffffff81200010 d .LC0
ffffffff81300000 B _end
ffffffffc0000000 t init_module	[evil]
ffffffffc0000100 t sys_call_table	[evil]
ffffffffc0001000 t bpf_prog_6deef7357e7b4530	[bpf]
`

func parse(t *testing.T, text string) *Symbols {
	t.Helper()
	s, err := ParseSymbols(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestParseSymbols(t *testing.T) {
	s := parse(t, someSymbols)
	if s.Len() != 14 || !s.Long() {
		t.Errorf("%d symbols, long %t", s.Len(), s.Long())
	}
	for _, tt := range []struct {
		name string
		want uint64
		ok   bool
	}{
		{"_stext", 0xffffffff81000000, true},
		{"helper", 0xffffffff81000040, true},
		{"sys_call_table", 0xffffffff81200000, true}, // not the module's
		{"cpu_debug_store", 0x1000, true},
		{"init_module", 0, false},
		{"sys_call_tabl", 0, false},
		{"", 0, false},
	} {
		got, ok := s.Lookup(tt.name)
		if got.Address != tt.want || ok != tt.ok {
			t.Errorf("Lookup(%q) = %#x, %t", tt.name, got.Address, ok)
		}
	}
	want := []Symbol{
		{Name: "helper", Address: 0xffffffff81000040, Type: 't'},
		{Name: "helper", Address: 0xffffffff81000080, Type: 't'},
	}
	if diff := cmp.Diff(want, s.LookupAll("helper")); diff != "" {
		t.Errorf("LookupAll: (-want +got)\n%s", diff)
	}
}

func TestParseSymbolsForms(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []Symbol
	}{
		{"System.map of a 32-bit kernel", "c1000000 T _text\nc1000000 T _stext\n", []Symbol{{"_text", "", 0xc1000000, 'T'}, {"_stext", "", 0xc1000000, 'T'}}},
		{"unsorted, empty lines, CRLF, no newline at the end", "ffffffff81000010 t b\r\n\r\n\nffffffff81000000 T a", []Symbol{{"a", "", 0xffffffff81000000, 'T'}, {"b", "", 0xffffffff81000010, 't'}}},
		{"upper case", "FFFFFFFF81000000 W a\n", []Symbol{{"a", "", 0xffffffff81000000, 'W'}}},
		{"module after a space", "ffffffffc0000000 t a [m]\n", []Symbol{{"a", "m", 0xffffffffc0000000, 't'}}},
		{"odd names", "ffffffff81000000 t __pfx_a.constprop.0.cold\nffffffff81000001 ? $x\n", []Symbol{{"__pfx_a.constprop.0.cold", "", 0xffffffff81000000, 't'}, {"$x", "", 0xffffffff81000001, '?'}}},
		{"one zero among others", "0000000000000000 D __per_cpu_start\nffffffff81000000 T a\n", []Symbol{{"__per_cpu_start", "", 0, 'D'}, {"a", "", 0xffffffff81000000, 'T'}}},
	} {
		s, err := ParseSymbols(strings.NewReader(tt.text))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, slices.Collect(s.All()), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
	}
}

func TestParseSymbolsErrors(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		is         error
		line       int
		says       string
	}{
		{"empty", "", ErrNoSymbols, 0, "/proc/kallsyms"},
		{"blank", "\n \n", ErrNoSymbols, 0, "root"},
		{"seen by others than root", "0000000000000000 A fixed_percpu_data\n0000000000000000 T _stext\n0000000000000000 t a\t[m]\n", ErrZeroAddresses, 0, "kptr_restrict"},
		{"no fields", "ffffffff81000000 T a\nhello\n", nil, 2, "address type name"},
		{"no address", "ffffffff81000000 T a\n\nzzz T b\n", nil, 3, "hexadecimal"},
		{"address of 17 digits", "ffffffff810000000 T a\n", nil, 1, "hexadecimal"},
		{"negative address", "-1 T a\n", nil, 1, "hexadecimal"},
		{"type of two letters", "ffffffff81000000 TT a\n", nil, 1, "one letter"},
		{"type is a digit", "ffffffff81000000 1 a\n", nil, 1, "one letter"},
		{"no type", "ffffffff81000000 a\n", nil, 1, "one letter"},
		{"no name", "ffffffff81000000 T \n", nil, 1, "name is missing"},
		{"too much", "ffffffff81000000 T a b c\n", nil, 1, "more than"},
		{"module without brackets", "ffffffff81000000 T a\tm\n", nil, 1, "more than"},
		{"Debian's placeholder", "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n", nil, 1, "-dbg"},
		{"long line", "ffffffff81000000 T a\nffffffff81000000 T " + strings.Repeat("x", 5000) + "\n", nil, 2, "longer than"},
		{"binary", "\x7fELF\x02\x01\x01\x00\x00\x00", nil, 1, "address type name"},
	} {
		_, err := ParseSymbols(strings.NewReader(tt.text))
		if err == nil || tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		var syntax *SyntaxError
		if tt.line != 0 && (!errors.As(err, &syntax) || syntax.Line != tt.line) {
			t.Errorf("%s: %v, want line %d", tt.name, err, tt.line)
		}
		if len(err.Error()) > 400 {
			t.Errorf("%s: %d bytes of error", tt.name, len(err.Error()))
		}
	}
	broken := errors.New("broken")
	if _, err := ParseSymbols(io.MultiReader(strings.NewReader("ffffffff81000000 T a\n"), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Errorf("a reader's error: %v", err)
	}
}

func TestImage(t *testing.T) {
	for _, slide := range []uint64{0, 0x1fe00000, ^uint64(0x600000) + 1} {
		m := NewImage(parse(t, someSymbols), slide)
		const text = 0xffffffff81000000
		if got, want := m.Text(), (Extent{text + slide, text + 0x1000 + slide}); got != want {
			t.Errorf("slide %#x: text %#x, want %#x", slide, got, want)
		}
		if at, _ := m.Lookup("cpu_debug_store"); at != 0x1000 {
			t.Errorf("slide %#x: an absolute symbol moved to %#x", slide, at)
		}
		if at, _ := m.Lookup("sys_call_table"); at != 0xffffffff81200000+slide {
			t.Errorf("slide %#x: sys_call_table at %#x", slide, at)
		}
		if next, ok := m.Next(0xffffffff81200000 + slide); !ok || next != 0xffffffff81200010+slide {
			t.Errorf("slide %#x: Next: %#x, %t", slide, next, ok)
		}
		for _, tt := range []struct {
			at   uint64
			want string
		}{
			{text + slide, "_text"},
			{text + 0x41 + slide, "helper+0x1"},
			{text + 0xfff + slide, "sys_call_table_walk+0xeff"},
			{text - 1 + slide, ""},
			{0xffffffff81300000 + slide, ""}, // _end is none of its own
			{0x1000, ""},
			{0, ""},
			{^uint64(0), ""},
		} {
			if got := m.Name(tt.at); got != tt.want {
				t.Errorf("slide %#x: Name(%#x) = %q, want %q", slide, tt.at, got, tt.want)
			}
		}
		if !m.Is(text+slide, "_stext") || m.Is(text+1+slide, "_stext") {
			t.Errorf("slide %#x: Is", slide)
		}
		for at, want := range map[uint64]string{
			0xffffffffc0000050: "init_module+0x50 [evil]",
			0xffffffffc0000fff: "sys_call_table+0xeff [evil]", // in the last symbol's page
			0xffffffffc0001000: "bpf_prog_6deef7357e7b4530 [bpf]",
			0xffffffffc0002000: "", // behind it
			0xffffffffbfffffff: "",
		} {
			if got := m.Name(at); slide == 0 && got != want {
				t.Errorf("Name(%#x) = %q, want %q", at, got, want)
			}
		}
		want := ""
		if slide == 0 {
			want = "sys_call_table+0x5 [evil]"
		}
		if got := m.Name(0xffffffffc0000105); got != want {
			t.Errorf("slide %#x: in a module: %q, want %q", slide, got, want)
		}
		if m.Is(0xffffffffc0000100, "sys_call_table") {
			t.Errorf("slide %#x: a module's symbol taken for the kernel's", slide)
		}
	}
}

func FuzzParseSymbols(f *testing.F) {
	f.Add([]byte(someSymbols), uint64(0xffffffff81000041))
	f.Add([]byte("c1000000 T _text\nc1000000 T _stext\n"), uint64(0xc1000000))
	f.Add([]byte("0 A a\n0 T b\n"), uint64(0))
	f.Add([]byte("ffffffff81000000 T a\t[\n"), uint64(1))
	f.Fuzz(func(t *testing.T, text []byte, addr uint64) {
		s, err := ParseSymbols(strings.NewReader(string(text)))
		if err != nil {
			if err.Error() == "" {
				t.Fatal("an empty error")
			}
			return
		}
		for sym := range s.All() {
			if sym.Name == "" || strings.ContainsAny(sym.Name, " \t\n") {
				t.Fatalf("symbol %+v", sym)
			}
			if sym.Module == "" {
				if got, ok := s.Lookup(sym.Name); !ok || got.Name != sym.Name {
					t.Fatalf("%q is not found", sym.Name)
				}
			}
		}
		if all, offset := s.At(addr); len(all) > 0 && all[0].Address+offset != addr {
			t.Fatalf("At(%#x): %+v + %#x", addr, all[0], offset)
		}
		m := NewImage(s, addr)
		_ = m.Name(addr)
		m.Next(addr)
	})
}

func BenchmarkParseSymbols(b *testing.B) {
	var text strings.Builder
	for i := range 100000 {
		fmt.Fprintf(&text, "ffffffff%08x t symbol_number_%d\n", 0x81000000+i*16, i)
	}
	b.SetBytes(int64(text.Len()))
	for b.Loop() {
		if _, err := ParseSymbols(strings.NewReader(text.String())); err != nil {
			b.Fatal(err)
		}
	}
}
