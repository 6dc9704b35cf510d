// SPDX-License-Identifier: MIT

package dump

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// load is a PT_LOAD to be written.
type load struct {
	paddr, vaddr uint64
	data         []byte
	memsz        uint64 // 0: as data
	same         int    // the file's bytes are those of load same-1, from paddr's difference on; 0: its own
}

// core writes an ELF core as QEMU does: header, PT_NOTE, PT_LOADs, with more
// than 65534 of them a section, notes, memory.
func core(loads []load, notes []byte, long bool) []byte {
	var out bytes.Buffer
	put := func(v any) { _ = binary.Write(&out, binary.LittleEndian, v) }
	phnum := len(loads) + 1
	ident := [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)}
	head, entry, section := 64, 56, 64
	if !long {
		ident[elf.EI_CLASS] = byte(elf.ELFCLASS32)
		head, entry, section = 52, 32, 40
	}
	shoff := uint64(0)
	start := head + entry*phnum
	if phnum >= xnum {
		shoff = uint64(start)
		start += section
	}
	e := elf.Header64{Ident: ident, Type: uint16(elf.ET_CORE), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: uint64(head), Ehsize: uint16(head), Phentsize: uint16(entry), Phnum: uint16(min(phnum, xnum))}
	if shoff != 0 {
		e.Shoff, e.Shentsize, e.Shnum = shoff, uint16(section), 1
	}
	if long {
		put(e)
	} else {
		put(elf.Header32{Ident: ident, Type: e.Type, Machine: uint16(elf.EM_386), Version: 1, Phoff: uint32(e.Phoff), Ehsize: e.Ehsize, Phentsize: e.Phentsize, Phnum: e.Phnum, Shoff: uint32(e.Shoff), Shentsize: e.Shentsize, Shnum: e.Shnum})
	}
	segment := func(kind elf.ProgType, offset, paddr, vaddr, filesz, memsz uint64) {
		if long {
			put(elf.Prog64{Type: uint32(kind), Off: offset, Vaddr: vaddr, Paddr: paddr, Filesz: filesz, Memsz: memsz})
		} else {
			put(elf.Prog32{Type: uint32(kind), Off: uint32(offset), Vaddr: uint32(vaddr), Paddr: uint32(paddr), Filesz: uint32(filesz), Memsz: uint32(memsz)})
		}
	}
	segment(elf.PT_NOTE, uint64(start), 0, 0, uint64(len(notes)), uint64(len(notes)))
	at := uint64(start + len(notes))
	offsets := make([]uint64, len(loads))
	for i, l := range loads {
		if l.same > 0 {
			offsets[i] = offsets[l.same-1] + l.paddr - loads[l.same-1].paddr
		} else {
			offsets[i] = at
			at += uint64(len(l.data))
		}
		memsz := l.memsz
		if memsz == 0 {
			memsz = uint64(len(l.data))
		}
		segment(elf.PT_LOAD, offsets[i], l.paddr, l.vaddr, uint64(len(l.data)), memsz)
	}
	if shoff != 0 {
		if long {
			put(elf.Section64{Info: uint32(phnum)})
		} else {
			put(elf.Section32{Info: uint32(phnum)})
		}
	}
	out.Write(notes)
	for _, l := range loads {
		if l.same == 0 {
			out.Write(l.data)
		}
	}
	return out.Bytes()
}

func note(name string, kind uint32, content []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(name)+1))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(content)))
	b = binary.LittleEndian.AppendUint32(b, kind)
	pad := func() {
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	b = append(b, name...)
	b = append(b, 0)
	pad()
	b = append(b, content...)
	pad()
	return b
}

func state(s cpuState, size int) []byte {
	s.Version = cpuStateVersion
	s.Size = uint32(size)
	var out bytes.Buffer
	_ = binary.Write(&out, binary.LittleEndian, s)
	return out.Bytes()[:size]
}

// ram is n pages from gpa on, each byte of which tells where it is.
func ram(gpa uint64, n int) []byte {
	p := make([]byte, n<<12)
	for i := range p {
		a := gpa + uint64(i)
		p[i] = byte(a>>12) ^ byte(a>>3) ^ byte(a>>32)
	}
	return p
}

func lime(version uint32, start, last uint64, data []byte) []byte {
	var out bytes.Buffer
	_ = binary.Write(&out, binary.LittleEndian, limeHeader{Magic: limeMagic, Version: version, Start: start, Last: last})
	return append(out.Bytes(), data...)
}

func open(b []byte) (*Dump, error) { return New(bytes.NewReader(b), int64(len(b))) }

func mustOpen(t *testing.T, b []byte) *Dump {
	t.Helper()
	d, err := open(b)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// kernelState is of a vCPU in a 64-bit kernel.
func kernelState() cpuState {
	code := segment{Selector: 0x10, Limit: 0xffffffff, Flags: 0xaf9b00}
	data := segment{Selector: 0x18, Limit: 0xffffffff, Flags: 0xcf9300}
	s := cpuState{
		RAX: 1, RBX: 2, RCX: 3, RDX: 4, RSI: 5, RDI: 6, RSP: 0xffffc90000001000, RBP: 8,
		R8: 9, R9: 10, R10: 11, R11: 12, R12: 13, R13: 14, R14: 15, R15: 16,
		RIP: 0xffffffff81000000, RFLAGS: 0x202,
		CS: code, SS: data, GS: segment{Base: 0xffff88803ec00000},
		TR:           segment{Selector: 0x40, Limit: 0x4087, Flags: 0x8b00, Base: 0xfffffe0000003000},
		GDT:          segment{Limit: 0x7f, Base: 0xfffffe0000001000},
		IDT:          segment{Limit: 0xfff, Base: 0xfffffe0000000000},
		CR:           [5]uint64{0x80050033, 0, 0x7f0000001000, 0x102a000, 0x7506f0},
		KernelGSBase: 0x7f1234,
	}
	return s
}

func TestELF(t *testing.T) {
	notes := bytes.Join([][]byte{
		note("CORE", uint32(elf.NT_PRSTATUS), make([]byte, 336)),
		note("CORE", uint32(elf.NT_PRSTATUS), make([]byte, 336)),
		note("QEMU", 0, state(kernelState(), 440)),
		note("QEMU", 0, state(kernelState(), cpuStateSize)),
		note("VMCOREINFO", 0, []byte("OSRELEASE=6.1\n")),
	}, nil)
	d := mustOpen(t, core([]load{
		{paddr: 0x100000, data: ram(0x100000, 3)},
		{paddr: 0, data: ram(0, 2)},
		{paddr: 0x100000000, data: ram(0x100000000, 1), memsz: 0x3000},
		{paddr: 0xf0000000, memsz: 0x1000},
	}, notes, true))
	if d.Format() != FormatELF {
		t.Errorf("format %v", d.Format())
	}
	regions, err := d.Regions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]guest.Region{{GPA: 0, Size: 0x2000}, {GPA: 0x100000, Size: 0x3000}, {GPA: 0x100000000, Size: 0x1000}}, regions); diff != "" {
		t.Errorf("regions (-want +got):\n%s", diff)
	}
	for _, tt := range []struct {
		gpa uint64
		n   int
		ok  bool
	}{
		{0, 0x2000, true}, {1, 1, true}, {0x1fff, 1, true}, {0x1fff, 2, false}, {0x2000, 1, false},
		{0x100ffe, 0x1000, true}, {0x102fff, 1, true}, {0x103000, 1, false}, {0xfffff, 2, false},
		{0x100000000, 0x1000, true}, {0x100001000, 1, false}, {0xf0000000, 1, false}, {1 << 63, 8, false},
	} {
		p := make([]byte, tt.n)
		err := d.ReadPhysical(t.Context(), tt.gpa, p)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, kvmaccess.ErrNoMemslot) {
			t.Errorf("%d bytes at %#x: %v", tt.n, tt.gpa, err)
		}
		if err == nil && !bytes.Equal(p, ram(tt.gpa&^4095, tt.n>>12+2)[tt.gpa&4095:][:tt.n]) {
			t.Errorf("%d bytes at %#x: wrong", tt.n, tt.gpa)
		}
	}

	cpus, err := d.VCPUs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := kvmaccess.VCPU{CPU: -1, Flags: kvmaccess.VCPUPartial, Registers: kvmaccess.Registers{
		RAX: 1, RBX: 2, RCX: 3, RDX: 4, RSI: 5, RDI: 6, RSP: 0xffffc90000001000, RBP: 8,
		R8: 9, R9: 10, R10: 11, R11: 12, R12: 13, R13: 14, R14: 15, R15: 16,
		RIP: 0xffffffff81000000, RFLAGS: 0x202,
		CR0: 0x80050033, CR2: 0x7f0000001000, CR3: 0x102a000, CR4: 0x7506f0,
		EFER: guest.EFERSCE | guest.EFERLME | guest.EFERLMA | guest.EFERNXE,
		CS:   kvmaccess.Segment{Selector: 0x10, Limit: 0xffffffff, Attrs: 0xa09b},
		SS:   kvmaccess.Segment{Selector: 0x18, Limit: 0xffffffff, Attrs: 0xc093},
		DS:   kvmaccess.Segment{Attrs: 0x10000}, ES: kvmaccess.Segment{Attrs: 0x10000}, FS: kvmaccess.Segment{Attrs: 0x10000},
		GS:   kvmaccess.Segment{Base: 0xffff88803ec00000, Attrs: 0x10000},
		LDTR: kvmaccess.Segment{Attrs: 0x10000},
		TR:   kvmaccess.Segment{Selector: 0x40, Base: 0xfffffe0000003000, Limit: 0x4087, Attrs: 0x8b},
		GDTR: kvmaccess.TableRegister{Base: 0xfffffe0000001000, Limit: 0x7f},
		IDTR: kvmaccess.TableRegister{Base: 0xfffffe0000000000, Limit: 0xfff},

		KernelGSBase: 0x7f1234,
	}}
	second := want
	second.ID, second.KernelGSBase = 1, 0
	if diff := cmp.Diff([]kvmaccess.VCPU{want, second}, cpus); diff != "" {
		t.Errorf("vCPUs (-want +got):\n%s", diff)
	}
}

// What a processor does and an ELF file does not say is implied.
func TestImpliedRegisters(t *testing.T) {
	user := kernelState()
	user.RIP, user.RSP = 0x401000, 0xffe000 // 32-bit code under a 64-bit kernel
	user.CS = segment{Selector: 0x23, Limit: 0xffffffff, Flags: 0xcffb00}
	user.SS = segment{Selector: 0x2b, Limit: 0xffffffff, Flags: 0xcff300}
	pae := user
	pae.GDT.Base, pae.IDT.Base, pae.TR.Base = 0xc1234000, 0xc1235000, 0xc1236000
	pae.CR[2], pae.CR[3], pae.CR[4] = 0, 0x1234020, 0x6f0
	plain := pae
	plain.CR[4] = 0x6d0
	real := cpuState{RIP: 0xfff0, CS: segment{Selector: 0xf000, Limit: 0xffff, Flags: 0x9b00, Base: 0xffff0000}, CR: [5]uint64{0x60000010}}
	v86 := plain
	v86.RFLAGS |= rflagsVM
	v86.SS.Flags = 0
	for _, tt := range []struct {
		name string
		s    cpuState
		mode guest.Format
		cpl  int
	}{
		{"64-bit kernel", kernelState(), guest.Format4Level, 0},
		{"32-bit program of a 64-bit kernel", user, guest.Format4Level, 3},
		{"PAE", pae, guest.FormatPAE, 3},
		{"32-bit", plain, guest.Format32, 3},
		{"real mode", real, guest.FormatNone, 0},
		{"virtual-8086 mode", v86, guest.Format32, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := mustOpen(t, core([]load{{data: ram(0, 1)}}, note("QEMU", 0, state(tt.s, 440)), tt.mode >= guest.Format4Level))
			cpus, err := d.VCPUs(t.Context())
			if err != nil || len(cpus) != 1 {
				t.Fatalf("%d vCPUs, %v", len(cpus), err)
			}
			if mode := guest.ModeOf(&cpus[0].Registers).Format; mode != tt.mode || cpus[0].CPL != tt.cpl {
				t.Errorf("%v, CPL %d; want %v, %d", mode, cpus[0].CPL, tt.mode, tt.cpl)
			}
		})
	}
}

// A dump by virtual mappings has each page as often as it is mapped, and more
// mappings than an ELF header can count.
func TestPagingDump(t *testing.T) {
	loads := []load{
		{paddr: 0x200000, vaddr: 0xffff888000200000, data: ram(0x200000, 64)},
		{paddr: 0x210000, vaddr: 0xffffffff81000000, data: ram(0x210000, 16), same: 1},
		{paddr: 0x1000, vaddr: 0x7fff0000, data: ram(0x1000, 1)},
	}
	for range 70000 {
		loads = append(loads, load{paddr: 0x1000, vaddr: 0x400000, data: loads[2].data, same: 3})
	}
	for _, long := range []bool{false, true} {
		d := mustOpen(t, core(loads, nil, long))
		regions, err := d.Regions(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]guest.Region{{GPA: 0x1000, Size: 0x1000}, {GPA: 0x200000, Size: 64 << 12}}, regions); diff != "" {
			t.Errorf("regions (-want +got):\n%s", diff)
		}
		p := make([]byte, 64<<12)
		if err := d.ReadPhysical(t.Context(), 0x200000, p); err != nil || !bytes.Equal(p, ram(0x200000, 64)) {
			t.Errorf("wrong bytes or %v", err)
		}
	}
}

func TestLiME(t *testing.T) {
	b := bytes.Join([][]byte{
		lime(1, 0x1000, 0x9efff, ram(0x1000, 0x9e)),
		lime(1, 0x100000, 0x10100f, ram(0x100000, 2)[:0x1010]),
		lime(1, 1<<32, 1<<32+0xfff, ram(1<<32, 1)),
	}, nil)
	d := mustOpen(t, b)
	regions, err := d.Regions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]guest.Region{{GPA: 0x1000, Size: 0x9e000}, {GPA: 0x100000, Size: 0x1010}, {GPA: 1 << 32, Size: 0x1000}}, regions); diff != "" {
		t.Errorf("regions (-want +got):\n%s", diff)
	}
	p := make([]byte, 0x1000)
	if err := d.ReadPhysical(t.Context(), 1<<32, p); err != nil || !bytes.Equal(p, ram(1<<32, 1)) {
		t.Errorf("wrong bytes or %v", err)
	}
	if cpus, err := d.VCPUs(t.Context()); err != nil || len(cpus) != 0 || d.Format() != FormatLiME {
		t.Errorf("%d vCPUs, %v, format %v", len(cpus), err, d.Format())
	}
}

func TestRaw(t *testing.T) {
	want := ram(0, 512)
	d := mustOpen(t, want)
	p := make([]byte, len(want))
	if err := d.ReadPhysical(t.Context(), 0, p); err != nil || !bytes.Equal(p, want) || d.Format() != FormatRaw {
		t.Errorf("wrong bytes, format %v or %v", d.Format(), err)
	}
	if err := d.ReadPhysical(t.Context(), uint64(len(want))-4, p[:5]); !errors.Is(err, kvmaccess.ErrNoMemslot) {
		t.Errorf("behind the end: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.ReadPhysical(ctx, 0, p[:1]); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestSnapshot(t *testing.T) {
	const file = "../../integrity/testdata/debian12-pti.snapshot"
	d, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	regions, err := d.Regions(t.Context())
	if err != nil || len(regions) == 0 || d.Format() != FormatSnapshot {
		t.Fatalf("%d regions, format %v, %v", len(regions), d.Format(), err)
	}
	for _, r := range regions {
		p := make([]byte, r.Size)
		if err := d.ReadPhysical(t.Context(), r.GPA, p); err != nil {
			t.Error(err)
		}
	}
	cpus, err := d.VCPUs(t.Context())
	if err != nil || len(cpus) == 0 || cpus[0].Flags&kvmaccess.VCPUPartial != 0 || cpus[0].LSTAR == 0 {
		t.Errorf("vCPUs %+v, %v", cpus, err)
	}
}

// Files are read where they are asked for, and a file that shrinks is told.
func TestOpen(t *testing.T) {
	name := filepath.Join(t.TempDir(), "mem")
	if err := os.WriteFile(name, ram(0, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := Open(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, 4096); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	if err := d.ReadPhysical(t.Context(), 0, p); err != nil {
		t.Error(err)
	}
	if err := d.ReadPhysical(t.Context(), 4096, p); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a file that was cut off: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.ReadPhysical(t.Context(), 0, p); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := Open(filepath.Join(t.TempDir(), "nothing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a directory: %v", err)
	}
}

// change returns b with some bytes written over.
func change(b []byte, at int, value ...byte) []byte {
	b = bytes.Clone(b)
	copy(b[at:], value)
	return b
}

func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

func TestBadFiles(t *testing.T) {
	good := core([]load{{paddr: 0x1000, data: ram(0x1000, 2)}, {paddr: 0x100000, data: ram(0x100000, 4)}}, note("QEMU", 0, state(kernelState(), 440)), true)
	const first, second = 64 + 56, 64 + 2*56 // PT_LOADs
	cpu := bytes.Index(good, []byte("QEMU\x00")) + 8
	many := core(make([]load, 70000), nil, true)
	image := bytes.Join([][]byte{lime(1, 0x1000, 0x2fff, ram(0x1000, 2)), lime(1, 0x5000, 0x5fff, ram(0x5000, 1))}, nil)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, _ = z.Write(good)
	_ = z.Close()
	big := func(head string) []byte { return append([]byte(head), make([]byte, 1<<20-len(head))...) }
	for _, tt := range []struct {
		name        string
		file        []byte
		want        string
		unsupported bool
	}{
		{"empty", nil, "the file is empty", false},
		{"small", []byte("hello"), "5 bytes too small for an image of physical memory", true},
		{"odd size", make([]byte, 1<<20+100), "1048676 bytes are no multiple of a page", false},
		{"ELF, cut in the header", good[:40], "cut off in its ELF header", false},
		{"ELF, cut in the magic", good[:10], "cut off in its ELF header", false},
		{"ELF, cut in program headers", good[:100], "3 program headers at offset 64, the file has 100 bytes", false},
		{"ELF, cut in notes", good[:first+120], "notes of", false},
		{"ELF, cut in memory", good[:len(good)-1], "guest-physical 0x100000 to 0x103fff needs 16384 bytes at offset", false},
		{"ELF, class", change(good, elf.EI_CLASS, 7), "class 7", false},
		{"ELF, big endian", change(good, elf.EI_DATA, 2), "not little-endian", true},
		{"ELF, executable", change(good, 16, byte(elf.ET_EXEC)), "no core (ET_EXEC)", true},
		{"ELF, other machine", change(good, 18, byte(elf.EM_AARCH64)), "EM_AARCH64", true},
		{"ELF, program headers elsewhere", change(good, 32, le64(1<<62)...), "program headers at offset 4611686018427387904", false},
		{"ELF, size of program headers", change(good, 54, 55), "program headers of 55 bytes", false},
		{"ELF, no program headers", change(good, 56, 0), "without program headers", true},
		{"ELF, no memory", core(nil, nil, true), "no PT_LOAD", true},
		{"ELF, memory without bytes", core([]load{{paddr: 0x1000, memsz: 4096}}, nil, true), "no PT_LOAD has bytes", false},
		{"ELF, of a process", core([]load{{vaddr: 0x1000, data: ram(0, 1)}, {vaddr: 0x5000, data: ram(0, 1)}}, nil, true), "an ELF core of a process", true},
		{"ELF, overlap", change(good, first+24, le64(0xfe000+0x1800)...), "guest-physical 0x100000 to 0x1017ff is in the file twice", false},
		{"ELF, beyond 52 bits", change(good, first+24, le64(1<<52-0x1000)...), "passes 52 bits", false},
		{"ELF, wraps", change(good, first+24, le64(1<<64-0x1000)...), "passes 52 bits", false},
		{"ELF, offset", change(good, second+8, le64(1<<63)...), "program header 2", false},
		{"ELF, more in the file", change(good, first+40, le64(0x1fff)...), "8192 bytes in the file of a segment of 8191", false},
		{"ELF, note's name", change(good, cpu-20, 0xff, 0xff, 0xff, 0xff), "pass the end of the notes", false},
		{"ELF, note's content", change(good, cpu-16, 0xff, 0xff, 0xff), "pass the end of the notes", false},
		{"ELF, vCPU's version", change(good, cpu, 9), "vCPU 0: version 9", false},
		{"ELF, vCPU's size", change(good, cpu+4, 0xff, 0xff), "says that it has 65535 bytes", false},
		{"ELF, vCPU too short", core([]load{{data: ram(0, 1)}}, note("QEMU", 0, make([]byte, 100)), true), "100 bytes, QEMU writes at least 432", false},
		{"ELF, section elsewhere", change(many, 40, le64(1<<40)...), "sections at offset 1099511627776", false},
		{"ELF, more program headers than file", change(many, 64+70001*56+44, 0xff, 0xff, 0xff, 0x7f), "2147483647 program headers", false},
		{"LiME, cut in a header", image[:20], "LiME header at offset 0: the file is cut off", false},
		{"LiME, cut in memory", image[:0x2030], "LiME header at offset 8224: the file is cut off", false},
		{"LiME, cut in the last range", image[:len(image)-1], "needs 4096 bytes at offset 8256", false},
		{"LiME, version", change(image, 4, 2), "version 2, only 1", true},
		{"LiME, magic of the second", change(image, 32+0x2000, 'x'), "LiME header at offset 8224: it begins with 0x4c694d78", false},
		{"LiME, backwards", change(image, 16, le64(0xfff)...), "ends at 0xfff and begins at 0x1000", false},
		{"LiME, beyond 52 bits", change(image, 16, le64(1<<63)...), "passes 52 bits", false},
		{"LiME, too long", change(image, 16, le64(1<<40)...), "the file has", false},
		{"LiME, overlap", change(image, 32+0x2000+8, append(le64(0x2800), le64(0x37ff)...)...), "guest-physical 0x2800 to 0x2fff is in the file twice", false},
		{"kdump", big("KDUMP   "), "without -z", true},
		{"flat kdump", big("makedumpfile\x00"), "makedumpfile -R", true},
		{"AVML", big("AVML\x02\x00\x00\x00"), "avml-convert", true},
		{"saved by libvirt", big("LibvirtQemudSave"), "virsh dump --memory-only", true},
		{"migration stream", big("QEVM"), "--memory-only", true},
		{"Windows", big("PAGEDU64"), "Windows", true},
		{"disk image", big("QFI\xfb"), "disk image", true},
		{"zstd", big("\x28\xb5\x2f\xfd"), "unzstd", true},
		{"gzip", packed.Bytes(), "gunzip", false},
		{"gzip, damaged", packed.Bytes()[:30], "gunzip", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := open(tt.file)
			if err == nil {
				t.Fatalf("opened as %v", d.Format())
			}
			if !strings.Contains(err.Error(), tt.want) || errors.Is(err, ErrUnsupported) != tt.unsupported {
				t.Errorf("%v\nwant %q, unsupported %t", err, tt.want, tt.unsupported)
			}
		})
	}
}

// FuzzOpen: whatever a file holds, it is refused or can be read where it says
// that it has memory.
func FuzzOpen(f *testing.F) {
	// Little memory, or most of what changes is that.
	some := ram(0x1000, 1)[:64]
	f.Add(core([]load{{paddr: 0x1000, data: some}, {paddr: 0x100000, data: some}}, note("QEMU", 0, state(kernelState(), 440)), true))
	f.Add(core([]load{{paddr: 0x1000, data: some}, {paddr: 0x1020, data: some[32:], same: 1}}, note("QEMU", 0, state(kernelState(), 432)), false))
	f.Add(core([]load{{paddr: 0x1000, data: some, memsz: 4096}, {memsz: 4096}}, note("VMCOREINFO", 0, []byte("OSRELEASE=6.1")), true))
	f.Add(bytes.Join([][]byte{lime(1, 0x1000, 0x103f, some), lime(1, 0x5000, 0x503f, some)}, nil))
	tiny := guest.Snapshot{CPUs: []kvmaccess.VCPU{{ID: 1}}, Pages: guest.Pages{0x1000: new([4096]byte)}}
	for _, write := range []func(io.Writer) error{tiny.Encode, tiny.Write} {
		var out bytes.Buffer
		if err := write(&out); err != nil {
			f.Fatal(err)
		}
		f.Add(out.Bytes())
	}
	// A real guest's registers and the first page of its memory.
	real := readWhole(f)
	first := slices.Min(slices.Collect(maps.Keys(real.Pages)))
	real.Pages = guest.Pages{first: real.Pages[first]}
	for format, content := range files(f, real) {
		if format != FormatRaw {
			f.Add(content)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := open(b)
		if err != nil {
			return
		}
		regions, err := d.Regions(t.Context())
		if err != nil || len(regions) == 0 {
			t.Fatalf("%d regions, %v", len(regions), err)
		}
		end := uint64(0)
		for i, r := range regions {
			if r.Size == 0 || i > 0 && r.GPA < end {
				t.Fatalf("region %+v after one up to %#x", r, end)
			}
			end = r.GPA + r.Size
			if r.Size > uint64(len(b)) && d.Format() != FormatSnapshot {
				t.Fatalf("region %+v of a file of %d bytes", r, len(b))
			}
			if err := d.ReadPhysical(t.Context(), r.GPA, make([]byte, min(r.Size, 1<<20))); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.ReadPhysical(t.Context(), end, make([]byte, 1)); !errors.Is(err, kvmaccess.ErrNoMemslot) {
			t.Fatalf("behind all regions: %v", err)
		}
		if _, err := d.VCPUs(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}
