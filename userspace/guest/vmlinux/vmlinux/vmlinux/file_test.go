// SPDX-License-Identifier: MIT

package vmlinux

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// kernelELF is an ELF file with the sections, all loaded, and what follows it.
func kernelELF(sections []section, behind []uint32) []byte {
	names := []byte{0}
	var nameAt []int
	for _, s := range sections {
		nameAt = append(nameAt, len(names))
		names = append(append(names, s.name...), 0)
	}
	strings := len(names)
	names = append(names, ".shstrtab\x00"...)

	const header = 64
	var body []byte
	headers := make([]byte, 64) // the null section
	entry := func(name int, kind elf.SectionType, flags elf.SectionFlag, addr uint64, data []byte) {
		h := elf.Section64{Name: uint32(name), Type: uint32(kind), Flags: uint64(flags), Addr: addr, Off: uint64(header + len(body)), Size: uint64(len(data)), Addralign: 1}
		headers, _ = binary.Append(headers, binary.LittleEndian, h)
		body = append(body, data...)
	}
	for i, s := range sections {
		entry(nameAt[i], elf.SHT_PROGBITS, elf.SHF_ALLOC, s.addr, s.data)
	}
	entry(strings, elf.SHT_STRTAB, 0, 0, names)
	for len(body)%8 != 0 {
		body = append(body, 0)
	}
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Ehsize: header,
		Shoff: uint64(header + len(body)), Shentsize: 64, Shnum: uint16(len(sections) + 2), Shstrndx: uint16(len(sections) + 1),
	}
	out, _ := binary.Append(nil, binary.LittleEndian, h)
	out = append(append(out, body...), headers...)
	for _, word := range behind {
		out = binary.LittleEndian.AppendUint32(out, word)
	}
	return out
}

// bootImage puts a compressed kernel of the length into a boot image.
func bootImage(compressed []byte, length int) []byte {
	image := make([]byte, 5*512)
	image[0x1f1] = 4
	copy(image[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(image[0x206:], 0x20f)
	payload := binary.LittleEndian.AppendUint32(bytes.Clone(compressed), uint32(length))
	binary.LittleEndian.PutUint32(image[0x248:], 16)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	return append(append(append(image, make([]byte, 16)...), payload...), "what follows"...)
}

const textAt = 0xffffffff81000000

func buildNote(id string) []byte {
	raw, _ := hex.DecodeString(id)
	note := binary.LittleEndian.AppendUint32(nil, 4)
	note = binary.LittleEndian.AppendUint32(note, uint32(len(raw)))
	note = binary.LittleEndian.AppendUint32(note, 3)
	return append(append(note, "GNU\x00"...), raw...)
}

func testSections() []section {
	text := make([]byte, 64)
	binary.LittleEndian.PutUint32(text[4:], 0x81000020)
	binary.LittleEndian.PutUint32(text[8:], 0x00001000)
	binary.LittleEndian.PutUint64(text[16:], textAt+0x30)
	return []section{{".text", textAt, text}, {".notes", textAt + 0x1000, append([]byte{4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 'X', 'e', 'n', 0}, buildNote("0123456789abcdef0123456789abcdef01234567")...)}}
}

func TestParseBootImages(t *testing.T) {
	kernel := kernelELF(testSections(), []uint32{0, 0x81000010, 0, 0x81000008, 0, 0x81000004})
	pack := func(write func(w io.Writer) (io.WriteCloser, error)) []byte {
		var out bytes.Buffer
		w, err := write(&out)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(kernel); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	tests := map[string][]byte{
		"vmlinux": kernel,
		"zstd":    bootImage(pack(func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) }), len(kernel)),
		"xz":      bootImage(pack(func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) }), len(kernel)),
		"gzip":    bootImage(pack(func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil }), len(kernel)),
		"lz4": bootImage(pack(func(w io.Writer) (io.WriteCloser, error) {
			z := lz4.NewWriter(w)
			return z, z.Apply(lz4.LegacyOption(true))
		}), len(kernel)),
	}
	for name, data := range tests {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "vmlinuz")
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := Open(file)
			if err != nil {
				t.Fatal(err)
			}
			if want := "0123456789abcdef0123456789abcdef01234567"; f.BuildID != want {
				t.Errorf("build id %q, want %q", f.BuildID, want)
			}
			want := []reloc{{textAt + 0x10, reloc64}, {textAt + 8, relocInverse}, {textAt + 4, reloc32}}
			if d := cmp.Diff(want, f.relocs, cmp.AllowUnexported(reloc{})); d != "" {
				t.Errorf("relocations (-want +got):\n%s", d)
			}
			m, err := f.moved(0x5000000)
			if err != nil {
				t.Fatal(err)
			}
			p := m.at(textAt, 64)
			if a, b, c := binary.LittleEndian.Uint32(p[4:]), binary.LittleEndian.Uint32(p[8:]), binary.LittleEndian.Uint64(p[16:]); a != 0x86000020 || b != 0xfb001000 || c != textAt+0x5000030 {
				t.Errorf("moved to %#x, %#x, %#x", a, b, c)
			}
			if bytes.Equal(p, f.section(".text").data) {
				t.Error("the file itself was moved")
			}
		})
	}
}

func TestParseErrors(t *testing.T) {
	kernel := kernelELF(testSections(), nil)
	arm := bytes.Clone(kernel)
	arm[0x12] = byte(elf.EM_AARCH64)
	old := bootImage([]byte("?"), 1)
	old[0x206], old[0x207] = 7, 2
	tests := []struct {
		name string
		data []byte
		want string
	}{
		{"nothing", nil, "vmlinuz"},
		{"text", []byte(strings.Repeat("System.map ", 100)), "vmlinuz"},
		{"old boot image", old, "0x207"},
		{"cut off", bootImage(make([]byte, 64), 1)[:2600], "cut off"},
		{"unknown compression", bootImage([]byte("LZO? no"), 7), "give the vmlinux"},
		{"damaged zstd", bootImage([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3, 4}, 100), "decompress"},
		{"longer than it says", bootImage([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0}, 1<<31), "2147483648"},
		{"another processor", arm, "AARCH64"},
		{"no text", kernelELF([]section{{".data", textAt, []byte{1}}}, nil), "without a kernel's text"},
		{"relocations", kernelELF(testSections(), []uint32{1, 2, 3}), "relocations"},
		{"many lists of relocations", kernelELF(testSections(), []uint32{0, 1, 0, 1, 0, 1, 0, 1}), "4 lists"},
		{"half an ELF file", kernel[:100], "no kernel"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := Parse(tt.data)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Parse = %v, %v, want an error with %q", f, err, tt.want)
			}
		})
	}
	if _, err := Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of no file: %v", err)
	}
}

func TestMovedWithoutRelocations(t *testing.T) {
	f, err := Parse(kernelELF(testSections(), nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.moved(0); err != nil {
		t.Errorf("a kernel that was not moved: %v", err)
	}
	if _, err := f.moved(0x1000000); err == nil || !strings.Contains(err.Error(), "give the vmlinuz") {
		t.Errorf("a kernel that was moved, of which the file does not say what that changes: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(kernelELF(testSections(), []uint32{0, 0x81000010, 0, 0x81000004}))
	f.Add(bootImage([]byte{0x28, 0xb5, 0x2f, 0xfd, 1, 2, 3, 4}, 100))
	f.Add(kernelELF([]section{{".text", ^uint64(0) - 3, make([]byte, 4)}}, nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := Parse(data)
		if err != nil {
			return
		}
		m, err := v.moved(0x200000)
		if err == nil {
			m.at(textAt, 16)
		}
	})
}
