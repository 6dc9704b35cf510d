// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// The snapshots are of Debian's cloud kernels, see testdata/attach: 5.10, 6.12
// and 7.2 with page-table isolation, all vCPUs in user mode, 6.1 with 5-level
// paging.
var attachable = []string{"debian11", "debian12", "debian13", "sid"}

var snapshots struct {
	sync.Mutex
	read map[string]*Snapshot
}

// attachSnapshot is a copy of which pages can be replaced, not written to.
func attachSnapshot(tb testing.TB, name string) *Snapshot {
	tb.Helper()
	snapshots.Lock()
	defer snapshots.Unlock()
	s := snapshots.read[name]
	if s == nil {
		f, err := os.Open(filepath.Join("testdata/attach", name+".snapshot"))
		if err != nil {
			tb.Fatal(err)
		}
		defer f.Close()
		if s, err = ReadSnapshot(f); err != nil {
			tb.Fatal(err)
		}
		if snapshots.read == nil {
			snapshots.read = map[string]*Snapshot{}
		}
		snapshots.read[name] = s
	}
	return &Snapshot{VM: s.VM, CPUs: slices.Clone(s.CPUs), Pages: maps.Clone(s.Pages), Notes: s.Notes}
}

// write writes to a copy of what is there.
func (s *Snapshot) write(tb testing.TB, gpa uint64, p []byte) {
	tb.Helper()
	for len(p) > 0 {
		old := s.Pages[gpa&^4095]
		if old == nil {
			tb.Fatalf("the snapshot has no page at %#x", gpa)
		}
		page := *old
		n := copy(page[gpa&4095:], p)
		s.Pages[gpa&^4095] = &page
		p, gpa = p[n:], gpa+uint64(n)
	}
}

var quick = AttachOptions{NoTypes: true}

func mustAttach(tb testing.TB, src Source) *Kernel {
	tb.Helper()
	k, err := Attach(context.Background(), src, quick)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func note(tb testing.TB, s *Snapshot, name string) uint64 {
	tb.Helper()
	v, err := strconv.ParseUint(s.Notes[name], 16, 64)
	if err != nil {
		tb.Fatal(err)
	}
	return v
}

// equalsGuest compares with what the guest itself said.
func equalsGuest(t *testing.T, s *Snapshot, k *Kernel) {
	t.Helper()
	var lines []string
	for sym := range k.Image.All() {
		lines = append(lines, fmt.Sprintf("%016x %c %s", sym.Address, sym.Type, sym.Name))
	}
	slices.Sort(lines)
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	if got := hex.EncodeToString(sum[:]); strconv.Itoa(len(lines)) != s.Notes["symbols"] || got != s.Notes["digest"] {
		t.Errorf("%d symbols with digest %s, the guest has %s with %s", len(lines), got, s.Notes["symbols"], s.Notes["digest"])
	}
	for _, name := range []string{"_text", "_etext", "entry_SYSCALL_64", "sys_call_table", "init_top_pgt", "_end"} {
		if at, ok := k.Image.Lookup(name); !ok || at != note(t, s, name) {
			t.Errorf("%s at %#x, the guest has it at %s", name, at, s.Notes[name])
		}
	}
	if k.Text.End != note(t, s, "_etext") {
		t.Errorf("text %#x", k.Text)
	}
	if k.Fingerprint.Version != s.Notes["version"] {
		t.Errorf("version %q, the guest has %q", k.Fingerprint.Version, s.Notes["version"])
	}
	if len(k.Doubts) != 0 {
		t.Errorf("doubts %q of an honest kernel", k.Doubts)
	}
}

func TestAttach(t *testing.T) {
	for _, name := range attachable {
		s := attachSnapshot(t, name)
		other := []kvmaccess.VCPU{
			{ID: 8}, // in reset
			{ID: 9, Condition: kvmaccess.ConditionNew},
		}
		for _, tt := range []struct {
			name string
			cpus func(cpus []kvmaccess.VCPU) []kvmaccess.VCPU
		}{
			{"as recorded", func(c []kvmaccess.VCPU) []kvmaccess.VCPU { return c }},
			{"memory alone", func([]kvmaccess.VCPU) []kvmaccess.VCPU { return nil }},
			{"others first", func(c []kvmaccess.VCPU) []kvmaccess.VCPU { return append(slices.Clone(other), c...) }},
			{"halted", func(c []kvmaccess.VCPU) []kvmaccess.VCPU {
				c[0].Condition = kvmaccess.ConditionHalted
				return c
			}},
			{"LSTAR hooked", func(c []kvmaccess.VCPU) []kvmaccess.VCPU {
				c[0].LSTAR = 0xffffffffc0100000
				return c
			}},
		} {
			t.Run(name+", "+tt.name, func(t *testing.T) {
				s := attachSnapshot(t, name)
				s.CPUs = tt.cpus(s.CPUs)
				equalsGuest(t, s, mustAttach(t, s))
			})
		}
		t.Run(name+", cache", func(t *testing.T) {
			cache := &Cache{}
			opts := AttachOptions{NoTypes: true, Cache: cache}
			a, err := Attach(context.Background(), s, opts)
			if err != nil {
				t.Fatal(err)
			}
			b, err := Attach(context.Background(), s, opts)
			if err != nil {
				t.Fatal(err)
			}
			if a.Image.Symbols != b.Image.Symbols {
				t.Error("the same kernel was decoded twice")
			}
			equalsGuest(t, s, b)
			if err := b.Runs(context.Background(), s.CPUs); err != nil {
				t.Errorf("does not run any more: %v", err)
			}
		})
	}
}

// TestAttachFile attaches with a symbol file.
func TestAttachFile(t *testing.T) {
	s := attachSnapshot(t, "debian11")
	k := mustAttach(t, s)
	const slide = 0x2a00000
	var text strings.Builder
	for sym := range k.Image.All() {
		if !sym.Absolute() {
			sym.Address -= slide
		}
		fmt.Fprintf(&text, "%x %c %s\n", sym.Address, sym.Type, sym.Name)
	}
	symbols := parse(t, text.String())
	got, err := Attach(context.Background(), s, AttachOptions{NoTypes: true, Symbols: symbols})
	if err != nil {
		t.Fatal(err)
	}
	equalsGuest(t, s, got)
	other := attachSnapshot(t, "sid")
	if _, err := Attach(context.Background(), other, AttachOptions{NoTypes: true, Symbols: symbols}); !errors.Is(err, ErrSymbolsMismatch) {
		t.Errorf("another kernel: %v", err)
	}
}

// image gives the guest-physical address of an address in the image.
func imageGPA(k *Kernel, gva uint64) uint64 { return k.found.gpa(gva) }

// tables finds the snapshot's symbol table anew.
func tablesOf(tb testing.TB, s *Snapshot) (*kallsyms, *location) {
	tb.Helper()
	found, err := locate(context.Background(), s, s.CPUs, nil)
	if err != nil {
		tb.Fatal(err)
	}
	k, _, err := found[0].findTables(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	return k, found[0]
}

// TestTampered attaches to guests that lie in their tables: each lie is an
// error or a doubt.
func TestTampered(t *testing.T) {
	for _, name := range attachable {
		honest := attachSnapshot(t, name)
		k, l := tablesOf(t, honest)
		kernel := mustAttach(t, honest)
		// The snapshot has what is read of an honest kernel's image only.
		whole := func(s *Snapshot) {
			for _, m := range l.parts {
				for gpa := m.GPA; gpa < m.GPA+m.Size; gpa += 4096 {
					if s.Pages[gpa] == nil {
						s.Pages[gpa] = new([4096]byte)
					}
				}
			}
		}
		// Where the i-th symbol's address is.
		offset := func(i int) uint64 { return l.gpa(k.at + 4*uint64(i)) }
		hooked := -1
		for i := range k.count {
			if k.address(i) == note(t, honest, "entry_SYSCALL_64") {
				hooked = i
			}
		}
		if hooked < 0 {
			t.Fatal("no entry_SYSCALL_64")
		}
		names := k.parts[1].Start // behind the number of names
		for _, tt := range []struct {
			name   string
			change func(s *Snapshot)
			err    error
			doubt  string
		}{
			{"tokens overwritten", func(s *Snapshot) { s.write(t, l.gpa(k.parts[0].Start), make([]byte, 1024)) }, ErrNoTables, ""},
			{"one token overwritten", func(s *Snapshot) { s.write(t, l.gpa(k.parts[0].Start), []byte{0, 0}) }, ErrNoTables, ""},
			{"names overwritten", func(s *Snapshot) {
				s.write(t, l.gpa(names+4096), bytes.Repeat([]byte{0xff}, 4096))
			}, ErrNoTables, ""},
			{"addresses overwritten", func(s *Snapshot) {
				s.write(t, offset(0), make([]byte, 4*k.count))
			}, ErrNoTables, ""},
			{"a symbol moved", func(s *Snapshot) {
				p := binary.LittleEndian.AppendUint32(nil, binary.LittleEndian.Uint32(k.offsets[4*hooked:])+1<<20)
				s.write(t, offset(hooked), p)
			}, nil, DoubtSymbols},
			{"banner overwritten", func(s *Snapshot) {
				at, _ := kernel.Image.Lookup("linux_banner")
				s.write(t, l.gpa(at), []byte("Minix"))
			}, nil, DoubtBanner},
			{"direct map moved", func(s *Snapshot) {
				at, _ := kernel.Image.Lookup("page_offset_base")
				s.write(t, l.gpa(at), binary.LittleEndian.AppendUint64(nil, 0xffff888000000000))
			}, nil, DoubtBases},
			{"page tables emptied", func(s *Snapshot) {
				at, _ := kernel.Image.Lookup("init_top_pgt")
				s.write(t, l.gpa(at), make([]byte, 4096))
			}, nil, DoubtTables},
		} {
			t.Run(name+", "+tt.name, func(t *testing.T) {
				s := attachSnapshot(t, name)
				whole(s)
				tt.change(s)
				k, err := Attach(context.Background(), s, quick)
				if tt.err != nil {
					if !errors.Is(err, tt.err) {
						t.Fatalf("error %v, want %v", err, tt.err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if !slices.ContainsFunc(k.Doubts, func(d Doubt) bool { return d.Object == tt.doubt }) {
					t.Errorf("doubts %q, want one of %s", k.Doubts, tt.doubt)
				}
			})
		}
	}
}

// TestRenamed swaps two names, which the order of names gives away.
func TestRenamed(t *testing.T) {
	for _, name := range attachable[1:] { // 5.10 has no such order
		s := attachSnapshot(t, name)
		k, l := tablesOf(t, s)
		if k.order == nil {
			t.Fatalf("%s: no order of names was found", name)
		}
		// Two symbols with names as long as each other's, one behind the other.
		at, last, length := 0, -1, 0
		for range k.count {
			n, size := nameLength(k.names[at:])
			if last >= 0 && n == length && n > 6 && !bytes.Equal(k.names[at:at+n+size], k.names[last:last+n+size]) && k.names[at+size] != k.names[last+size] {
				break
			}
			last, length = at, n
			at += n + size
		}
		first := k.parts[1].Start
		for s.Pages[l.gpa(first)&^4095] == nil || !bytes.HasPrefix(readGuest(t, s, l.gpa(first), 16), k.names[:16]) {
			first += 4
		}
		end := at + length + 1
		swapped := append(slices.Clone(k.names[at:end]), k.names[last:at]...)
		s.write(t, l.gpa(first+uint64(last)), swapped)
		got := mustAttach(t, s)
		if !slices.ContainsFunc(got.Doubts, func(d Doubt) bool { return d.Object == DoubtSymbols }) {
			t.Errorf("%s: two names were swapped, doubts %q", name, got.Doubts)
		}
	}
}

func readGuest(tb testing.TB, mem Memory, gpa uint64, n int) []byte {
	tb.Helper()
	p := make([]byte, n)
	if err := mem.ReadPhysical(context.Background(), gpa, p); err != nil {
		tb.Fatal(err)
	}
	return p
}

// failing memory.
type failing struct{ err error }

func (f failing) ReadPhysical(context.Context, uint64, []byte) error { return f.err }
func (f failing) VCPUs(context.Context) ([]kvmaccess.VCPU, error)    { return nil, nil }
func (f failing) Regions(context.Context) ([]Region, error)          { return []Region{{0, 1 << 20}}, nil }

func TestAttachErrors(t *testing.T) {
	ctx := context.Background()
	base := func() *Snapshot { return attachSnapshot(t, "debian11") }
	for _, tt := range []struct {
		name string
		src  func() Source
		want error
	}{
		{"reset", func() Source {
			s := base()
			s.CPUs[0].Registers = kvmaccess.Registers{}
			return s
		}, ErrNotBooted},
		{"firmware in long mode", func() Source {
			s := base()
			s.CPUs[0].IDTR.Base = 0x7f00000
			return s
		}, ErrNotBooted},
		{"32 bits", func() Source {
			s := base()
			s.CPUs[0].EFER = 0
			s.CPUs[0].CR4 &^= CR4PAE
			s.CPUs[0].CR3 = 0x1000
			s.CPUs[0].IDTR.Base = 0xc0000000
			page := new([4096]byte)
			binary.LittleEndian.PutUint32(page[0xc00:], 0x2003)
			s.Pages[0x1000], s.Pages[0x2000] = page, &[4096]byte{3, 0x30}
			s.Pages[0x3000] = new([4096]byte)
			return s
		}, Err32Bit},
		{"handlers and mappings elsewhere", func() Source {
			s := base()
			for _, root := range []uint64{s.CPUs[0].CR3 &^ 0xfff, s.CPUs[0].CR3 &^ 0x1fff} {
				s.write(t, root+511*8, make([]byte, 8))
			}
			var table [4096]byte
			for i := range 256 {
				binary.LittleEndian.PutUint64(table[16*i:], 0x8e00<<32|0x10<<16)
				binary.LittleEndian.PutUint64(table[16*i+8:], 0xfffff801)
			}
			tr, err := Translate(ctx, s, ModeOf(&s.CPUs[0].Registers), s.CPUs[0].CR3, s.CPUs[0].IDTR.Base)
			if err != nil {
				t.Fatal(err)
			}
			s.write(t, tr.GPA, table[:])
			return s
		}, ErrNotLinux},
		{"no gates", func() Source {
			s := base()
			tr, err := Translate(ctx, s, ModeOf(&s.CPUs[0].Registers), s.CPUs[0].CR3, s.CPUs[0].IDTR.Base)
			if err != nil {
				t.Fatal(err)
			}
			s.write(t, tr.GPA, make([]byte, 4096))
			return s
		}, ErrNotBooted},
		{"another kernel's image", func() Source {
			s := base()
			_, l := tablesOf(t, s)
			for gpa := l.physical; gpa < l.gpa(l.extent.End); gpa += 4096 {
				if s.Pages[gpa] == nil {
					s.Pages[gpa] = new([4096]byte)
				}
			}
			tr, err := Translate(ctx, s, ModeOf(&s.CPUs[0].Registers), s.CPUs[0].CR3, s.CPUs[0].IDTR.Base)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range l.parts {
				for gpa := m.GPA; gpa < m.GPA+m.Size && !m.Writable; gpa += 4096 {
					if gpa != tr.GPA&^4095 {
						s.Pages[gpa] = &[4096]byte{0x90}
					}
				}
			}
			return s
		}, ErrNotLinux},
		{"still booting", func() Source {
			s := base()
			k := mustAttach(t, s)
			at, _ := k.Image.Lookup("system_state")
			s.write(t, imageGPA(k, at), make([]byte, 4))
			s.CPUs[0].CPL = 0
			return s
		}, ErrNotBooted},
		{"protected", func() Source { return failing{kvmaccess.ErrProtected} }, ErrNoMemory},
		{"nothing", func() Source { return &Snapshot{} }, ErrNoMemory},
		{"memory of something else", func() Source {
			s := &Snapshot{Pages: Pages{}}
			s.Pages.WritePhysical(0x1000, bytes.Repeat([]byte("text"), 4096))
			return s
		}, ErrNotLinux},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, err := Attach(ctx, tt.src(), quick)
			if !errors.Is(err, tt.want) {
				t.Errorf("%v, %v; want %v", k, err, tt.want)
			}
		})
	}
	confidential := attachSnapshot(t, "debian11")
	if _, err := Attach(ctx, protectedSource{confidential}, quick); !errors.Is(err, ErrConfidential) {
		t.Errorf("encrypted: %v", err)
	}
}

type protectedSource struct{ *Snapshot }

func (protectedSource) VCPUs(context.Context) ([]kvmaccess.VCPU, error) {
	return nil, kvmaccess.ErrProtected
}

// TestEarly attaches to a kernel that still boots, on demand.
func TestEarly(t *testing.T) {
	s := attachSnapshot(t, "debian13")
	k := mustAttach(t, s)
	at, _ := k.Image.Lookup("system_state")
	s.write(t, imageGPA(k, at), make([]byte, 4))
	s.CPUs[0].CPL = 0
	opts := quick
	opts.Early = true
	k, err := Attach(context.Background(), s, opts)
	if err != nil {
		t.Fatal(err)
	}
	equalsGuest(t, s, k)
}

// TestOneHook replaces a single handler, which must not lead astray.
func TestOneHook(t *testing.T) {
	s := attachSnapshot(t, "debian12")
	cpu := &s.CPUs[0]
	tr, err := Translate(context.Background(), s, ModeOf(&cpu.Registers), cpu.CR3, cpu.IDTR.Base)
	if err != nil {
		t.Fatal(err)
	}
	for _, vector := range []uint64{0, 3, 14} {
		s.write(t, tr.GPA+16*vector, []byte{0, 0x10, 0x10, 0, 0, 0x8e, 0x10, 0xc0, 0xff, 0xff, 0xff, 0xff})
	}
	equalsGuest(t, s, mustAttach(t, s))
}

// TestAllHooked replaces all handlers: what page tables map is Linux still.
func TestAllHooked(t *testing.T) {
	for _, name := range attachable {
		s := attachSnapshot(t, name)
		cpu := &s.CPUs[0]
		tr, err := Translate(context.Background(), s, ModeOf(&cpu.Registers), cpu.CR3, cpu.IDTR.Base)
		if err != nil {
			t.Fatal(err)
		}
		for vector := range uint64(256) {
			s.write(t, tr.GPA+16*vector, []byte{0, 0x10, 0x10, 0, 0, 0x8e, 0x10, 0xc0, 0xff, 0xff, 0xff, 0xff})
		}
		equalsGuest(t, s, mustAttach(t, s))
	}
}

func TestSeal(t *testing.T) {
	ctx := context.Background()
	s := attachSnapshot(t, "debian11")
	k := mustAttach(t, s)
	look := func() (changes int) {
		for range k.Seal.Pieces() {
			same, err := k.Seal.Look(ctx, k.Space)
			if err != nil {
				t.Fatal(err)
			}
			if !same {
				changes++
			}
		}
		return changes
	}
	if n := look(); n != 0 || k.Seal.Broken() != nil {
		t.Fatalf("%d changes, broken %v", n, k.Seal.Broken())
	}
	x := k.Seal.Extents(DoubtSymbols)[1]
	gpa := imageGPA(k, x.Start+100)
	old := readGuest(t, s, gpa, 1)
	s.write(t, gpa, []byte{old[0] ^ 1})
	if n := look(); n != 1 || len(k.Seal.Broken()) != 1 || k.Seal.Broken()[0].Object != DoubtSymbols {
		t.Errorf("one bit flipped: %d changes, broken %v", n, k.Seal.Broken())
	}
	s.write(t, gpa, old)
	if n := look(); n != 1 || k.Seal.Broken() != nil {
		t.Errorf("flipped back: %d changes, broken %v", n, k.Seal.Broken())
	}
	if same, err := (&Seal{}).Look(ctx, k.Space); !same || err != nil {
		t.Errorf("a seal of nothing: %t, %v", same, err)
	}
}

func TestDistribution(t *testing.T) {
	for _, tt := range []struct{ release, banner, want string }{
		{"6.1.0-9-amd64", "Linux version 6.1.0-9-amd64 (debian-kernel@lists.debian.org) (gcc-12 (Debian 12.2.0-14) 12.2.0) #1 SMP PREEMPT_DYNAMIC Debian 6.1.27-1 (2023-05-08)", "Debian 6.1.27-1"},
		{"5.10.0-32-cloud-amd64", "Linux version 5.10.0-32-cloud-amd64 (debian-kernel@lists.debian.org) (gcc-10 (Debian 10.2.1-6)) #1 SMP Debian 5.10.223-1 (2024-08-10)", "Debian 5.10.223-1"},
		{"6.8.0-47-generic", "Linux version 6.8.0-47-generic (buildd@lcy02) (x86_64-linux-gnu-gcc-13 (Ubuntu 13.2.0-23ubuntu4) 13.2.0) #47-Ubuntu SMP PREEMPT_DYNAMIC Fri Sep 27 21:40:26 UTC 2024", "Ubuntu 6.8.0-47.47"},
		{"6.8.0-47-generic", "Linux version 6.8.0-47-generic (x) #47~22.04.1-Ubuntu SMP", "Ubuntu 6.8.0-47.47~22.04.1"},
		{"5.14.0-427.el9.x86_64", "Linux version 5.14.0-427.el9.x86_64 (x) (gcc (GCC) 11.4.1 20231218 (Red Hat 11.4.1-3)) #1 SMP", "Red Hat 5.14.0-427.el9.x86_64"},
		{"6.12.1", "Linux version 6.12.1 (me@here) (gcc 13) #1 SMP", ""},
		{"", "", ""},
	} {
		if got := distribution(tt.release, tt.banner); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.banner, got, tt.want)
		}
	}
}

func TestBuildID(t *testing.T) {
	note := func(name string, kind uint32, content string) []byte {
		p := binary.LittleEndian.AppendUint32(nil, uint32(len(name)))
		p = binary.LittleEndian.AppendUint32(p, uint32(len(content)))
		p = binary.LittleEndian.AppendUint32(p, kind)
		for _, s := range []string{name, content} {
			p = append(p, s...)
			p = append(p, make([]byte, -len(s)&3)...)
		}
		return p
	}
	id := note("GNU\x00", 3, "\x12\x34\x56\x78\x9a")
	for _, tt := range []struct {
		notes []byte
		want  string
	}{
		{id, "123456789a"},
		{append(note("Xen\x00", 6, "linux"), id...), "123456789a"},
		{note("GNU\x00", 1, "xxxx"), ""},
		{id[:len(id)-4], ""},
		{bytes.Repeat([]byte{0xff}, 64), ""},
		{nil, ""},
	} {
		if diff := cmp.Diff(tt.want, buildID(tt.notes)); diff != "" {
			t.Error(diff)
		}
	}
}
