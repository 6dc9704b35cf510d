// SPDX-License-Identifier: MIT

package dump

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// whole is a snapshot of a real guest with all that is read of one; main.go
// beside it made it.
const whole = "../testdata/whole/debian12.snapshot.xz"

func readWhole(t testing.TB) *guest.Snapshot {
	t.Helper()
	f, err := os.Open(whole)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := guest.ReadSnapshot(f)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// files writes the guest as each kind of dump there is. Pages that the snapshot
// lacks are absent, and zero in the raw image.
func files(t testing.TB, s *guest.Snapshot) map[Format][]byte {
	t.Helper()
	regions, err := s.Regions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var notes []byte
	for _, c := range s.CPUs {
		notes = append(notes, note("QEMU", 0, state(stateOf(&c.Registers), 440))...)
	}
	var (
		loads []load
		image []byte
		raw   = make([]byte, (regions[len(regions)-1].GPA+regions[len(regions)-1].Size+leastRaw)&^4095)
	)
	for _, r := range regions {
		p := make([]byte, r.Size)
		if err := s.ReadPhysical(t.Context(), r.GPA, p); err != nil {
			t.Fatal(err)
		}
		loads = append(loads, load{paddr: r.GPA, data: p})
		image = append(image, lime(limeVersion, r.GPA, r.GPA+r.Size-1, p)...)
		copy(raw[r.GPA:], p)
	}
	return map[Format][]byte{FormatELF: core(loads, notes, true), FormatLiME: image, FormatRaw: raw}
}

// stateOf is what QEMU writes of a vCPU's registers.
func stateOf(r *kvmaccess.Registers) cpuState {
	flags := func(attrs uint32) uint32 { return attrs & 0xf0ff << 8 }
	seg := func(x kvmaccess.Segment) segment {
		return segment{Selector: uint32(x.Selector), Limit: x.Limit, Flags: flags(x.Attrs), Base: x.Base}
	}
	return cpuState{
		RAX: r.RAX, RBX: r.RBX, RCX: r.RCX, RDX: r.RDX, RSI: r.RSI, RDI: r.RDI, RSP: r.RSP, RBP: r.RBP,
		R8: r.R8, R9: r.R9, R10: r.R10, R11: r.R11, R12: r.R12, R13: r.R13, R14: r.R14, R15: r.R15,
		RIP: r.RIP, RFLAGS: r.RFLAGS,
		CS: seg(r.CS), DS: seg(r.DS), ES: seg(r.ES), FS: seg(r.FS), GS: seg(r.GS), SS: seg(r.SS), LDT: seg(r.LDTR), TR: seg(r.TR),
		GDT: segment{Base: r.GDTR.Base, Limit: uint32(r.GDTR.Limit)}, IDT: segment{Base: r.IDTR.Base, Limit: uint32(r.IDTR.Limit)},
		CR: [5]uint64{r.CR0, 0, r.CR2, r.CR3, r.CR4}, KernelGSBase: r.KernelGSBase,
	}
}

// Whatever kind of dump a guest is in, with registers or without, its kernel
// says the same: all symbols and types that the guest itself had, and its
// modules.
func TestWholeGuest(t *testing.T) {
	s := readWhole(t)
	dumps := map[string]*Dump{}
	for format, content := range files(t, s) {
		dumps[string(format)] = mustOpen(t, content)
		if got := dumps[string(format)].Format(); got != format {
			t.Fatalf("%v is taken for %v", format, got)
		}
	}
	var err error
	if dumps["snapshot"], err = Open(filepath.FromSlash(whole)); err != nil {
		t.Fatal(err)
	}
	defer dumps["snapshot"].Close()
	for name, d := range dumps {
		t.Run(name, func(t *testing.T) {
			cpus, err := d.VCPUs(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			want := s.CPUs
			if name == "LiME" || name == "raw" {
				want = nil
			}
			if diff := cmp.Diff(want, cpus); diff != "" {
				t.Errorf("vCPUs (-want +got):\n%s", diff)
			}
			k, err := guest.Attach(t.Context(), d, guest.AttachOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if len(k.Doubts) > 0 {
				t.Errorf("doubts: %v", k.Doubts)
			}
			if k.Fingerprint.Release != s.Notes["release"] {
				t.Errorf("release %q, want %q", k.Fingerprint.Release, s.Notes["release"])
			}
			var lines []string
			for sym := range k.Image.All() {
				line := fmt.Sprintf("%016x %c %s", sym.Address, sym.Type, sym.Name)
				if sym.Module != "" {
					line += "\t[" + sym.Module + "]"
				}
				lines = append(lines, line+"\n")
			}
			slices.Sort(lines)
			if sum := fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(lines, "")))); sum != s.Notes["kallsyms"] {
				t.Errorf("%d symbols are not those of the guest's /proc/kallsyms", len(lines))
			}
			if k.Types == nil {
				t.Fatal(k.TypesErr)
			}
			if sum := fmt.Sprintf("%x", sha256.Sum256(k.Types.Raw())); sum != s.Notes["btf"] {
				t.Error("the types are not those of the guest's /sys/kernel/btf/vmlinux")
			}
			modules, err := k.Modules(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var names, wantNames []string
			for _, m := range modules {
				names = append(names, m.Name)
			}
			for line := range strings.Lines(s.Notes["modules"]) {
				wantNames = append(wantNames, strings.Fields(line)[0])
			}
			if diff := cmp.Diff(wantNames, names); diff != "" {
				t.Errorf("modules (-want +got):\n%s", diff)
			}
			if tasks, err := k.Tasks(t.Context()); err != nil || len(tasks) < 20 {
				t.Errorf("%d tasks, %v", len(tasks), err)
			}
		})
	}
}

// Of a dump without registers the tables are checked that the kernel keeps for
// its CPUs: a gate that leads elsewhere is found there, too.
func TestImpliedVCPUs(t *testing.T) {
	s := readWhole(t)
	check := func() []integrity.Finding {
		t.Helper()
		src := &Dump{whole: s}
		k, err := guest.Attach(t.Context(), src, guest.AttachOptions{})
		if err != nil {
			t.Fatal(err)
		}
		cpus, err := k.ImpliedVCPUs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(cpus) != len(s.CPUs) {
			t.Fatalf("%d vCPUs, want %d", len(cpus), len(s.CPUs))
		}
		for i, c := range cpus {
			if c.GDTR != s.CPUs[i].GDTR || c.IDTR != s.CPUs[i].IDTR || c.TR.Base != s.CPUs[i].TR.Base || c.TR.Selector != s.CPUs[i].TR.Selector {
				t.Errorf("vCPU %d: GDTR %+v, IDTR %+v, TR %+v; were %+v, %+v, %+v", i, c.GDTR, c.IDTR, c.TR, s.CPUs[i].GDTR, s.CPUs[i].IDTR, s.CPUs[i].TR)
			}
		}
		m, err := integrity.NewMonitor(&guest.Machine{CPUs: cpus, Memory: src}, integrity.VM{}, integrity.Options{
			Memory: src, Settle: -1,
			Checks: []integrity.Check{integrity.GDTCheck{}, integrity.IDTCheck{}, integrity.SyscallCheck{}, integrity.MSRCheck{}},
		})
		if err != nil {
			t.Fatal(err)
		}
		findings, err := m.Attach(t.Context())
		if err != nil || m.State() != integrity.StateWatching {
			t.Fatalf("%v, %+v", err, m.Status())
		}
		return findings
	}
	if found := check(); len(found) > 0 {
		t.Errorf("an honest guest has findings: %v", found)
	}
	k, err := guest.Attach(t.Context(), &Dump{whole: s}, guest.AttachOptions{NoTypes: true})
	if err != nil {
		t.Fatal(err)
	}
	at, ok := k.Image.Lookup("idt_table")
	if !ok {
		t.Fatal("no idt_table")
	}
	const pageFault = 14
	tr, err := guest.Translate(t.Context(), s, k.Space.Mode, k.Space.Root, at+16*pageFault)
	if err != nil {
		t.Fatal(err)
	}
	var gate [16]byte
	if err := s.ReadPhysical(t.Context(), tr.GPA, gate[:]); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint16(gate[:], binary.LittleEndian.Uint16(gate[:])+1)
	s.Pages.WritePhysical(tr.GPA, bytes.Clone(gate[:]))
	if found := check(); len(found) != 1 || found[0].Entry == nil || *found[0].Entry != pageFault {
		t.Errorf("findings of a gate that leads elsewhere: %+v", found)
	}
}

// FuzzAttach changes words of a real guest's memory and registers: attaching to
// it, and listing what it has, ends; without a kernel in an error that says
// which kind of guest it is, or with one whose symbols hold together.
func FuzzAttach(f *testing.F) {
	s := readWhole(f)
	frames := slices.Sorted(maps.Keys(s.Pages))
	edit := func(page, offset uint16, value uint64) []byte {
		return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, page), offset), value)
	}
	f.Add(false, []byte(nil))
	f.Add(true, []byte(nil))
	for i := range 6 {
		page := uint16(i * len(frames) / 6)
		f.Add(i%2 == 0, slices.Concat(edit(page, 0, 0), edit(page, 8, ^uint64(0)), edit(page+1, 512, frames[i]|3)))
	}
	reasons := []error{
		guest.ErrNotLinux, guest.ErrNotBooted, guest.Err32Bit, guest.ErrNoMemory, guest.ErrNoTables, kvmaccess.ErrNoMemslot,
	}
	f.Fuzz(func(t *testing.T, registers bool, edits []byte) {
		changed := &guest.Snapshot{CPUs: slices.Clone(s.CPUs), Pages: maps.Clone(s.Pages)}
		const size, most = 12, 16
		for n := 0; len(edits) >= size && n < most; n++ {
			gpa := frames[int(binary.LittleEndian.Uint16(edits))%len(frames)]
			page := *changed.Pages[gpa]
			copy(page[binary.LittleEndian.Uint16(edits[2:])&4088:], edits[4:size])
			changed.Pages[gpa] = &page
			edits = edits[size:]
		}
		if len(edits) >= 8 && registers {
			v := binary.LittleEndian.Uint64(edits)
			for i, field := range []*uint64{&changed.CPUs[0].CR3, &changed.CPUs[0].IDTR.Base, &changed.CPUs[0].CR4, &changed.CPUs[0].CR0} {
				if edits[0]>>i&1 != 0 {
					*field ^= v >> 8
				}
			}
		}
		if !registers {
			changed.CPUs = nil
		}
		k, err := guest.Attach(t.Context(), &Dump{whole: changed}, guest.AttachOptions{})
		if err != nil {
			if !slices.ContainsFunc(reasons, func(reason error) bool { return errors.Is(err, reason) }) {
				t.Fatalf("what kind of guest it is is not said: %v", err)
			}
			return
		}
		if k.Image.Len() == 0 || k.Text.Size() == 0 {
			t.Errorf("%d symbols, text %#x", k.Image.Len(), k.Text)
		}
		k.Tasks(t.Context())
		k.PIDTable(t.Context())
		k.Modules(t.Context())
		k.ModuleAreas(t.Context())
		k.RunQueues(t.Context())
		k.Refresh(t.Context())
		k.Runs(t.Context(), changed.CPUs)
	})
}

// BenchmarkAttach attaches to a guest that was never seen before, and to one of a
// kernel that was.
func BenchmarkAttach(b *testing.B) {
	s := readWhole(b)
	for name, cache := range map[string]*guest.Cache{"cold": nil, "cached": {}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := guest.Attach(b.Context(), &Dump{whole: s}, guest.AttachOptions{Cache: cache}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
