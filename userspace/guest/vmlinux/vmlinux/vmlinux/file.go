// SPDX-License-Identifier: MIT

// Package vmlinux reads the file of a Linux kernel for x86-64, as it is started
// from (vmlinuz) or linked (vmlinux), and tells which bytes of a running one's
// code are not the file's, and why: what a kernel changes in itself at boot and
// later, byte for byte, or nothing.
package vmlinux

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// File is a kernel before it runs.
type File struct {
	// BuildID is the GNU build id, hexadecimal; empty: it has none.
	BuildID  string
	sections []section // those that are loaded and have bytes, by address
	relocs   []reloc
	movable  bool // it comes with what is to be changed when it is moved
}

type section struct {
	name string
	addr uint64
	data []byte
}

// reloc is a place that is changed when the kernel is moved.
type reloc struct {
	addr uint64
	kind relocKind
}

type relocKind uint8

const (
	reloc32      relocKind = iota // 32 bits: add how far
	reloc64                       // 64 bits: add how far
	relocInverse                  // 32 bits: take away
)

// Bounds of a kernel's file.
const (
	maxFile     = 1 << 30
	maxSections = 1 << 12
)

// ErrNoKernel: the file is no kernel that can be read. The error that wraps it
// says what to give instead.
var ErrNoKernel = errors.New("no kernel for x86-64")

// Open reads a file: a vmlinuz, or a vmlinux.
func Open(name string) (*File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	v, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}

// Parse reads a file's bytes. The error wraps ErrNoKernel, or says what of the
// file is damaged.
func Parse(data []byte) (*File, error) {
	data, err := Extract(data)
	if err != nil {
		return nil, err
	}
	return parseELF(data)
}

// Extract takes the ELF file out of a boot image, with what follows it there:
// the places to change when the kernel is moved. An ELF file stays as it is.
func Extract(data []byte) ([]byte, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrNoKernel, maxFile)
	}
	if bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		return data, nil
	}
	payload, err := payload(data)
	if err != nil {
		return nil, err
	}
	return decompress(payload)
}

// payload is the compressed kernel in a boot image
// (Documentation/arch/x86/boot.rst).
func payload(data []byte) ([]byte, error) {
	const header = 0x250
	if len(data) < header || string(data[0x202:0x206]) != "HdrS" {
		return nil, fmt.Errorf("%w: neither an ELF file nor a boot image: give the guest's /boot/vmlinuz-*", ErrNoKernel)
	}
	word := func(at int) uint64 { return uint64(binary.LittleEndian.Uint32(data[at:])) }
	if version := binary.LittleEndian.Uint16(data[0x206:]); version < 0x208 {
		return nil, fmt.Errorf("%w: a boot image of the version %#x, which does not tell where the kernel is", ErrNoKernel, version)
	}
	sectors := uint64(data[0x1f1])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + word(0x248)
	size := word(0x24c)
	if size < 8 || start+size > uint64(len(data)) {
		return nil, fmt.Errorf("%w: its kernel is to be at %d to %d, of %d bytes: the file is cut off", ErrNoKernel, start, start+size, len(data))
	}
	return data[start : start+size], nil
}

// decompress decodes a payload; what follows its end is dropped.
func decompress(payload []byte) ([]byte, error) {
	// Its last four bytes are its length, of gzip's format by itself.
	length := binary.LittleEndian.Uint32(payload[len(payload)-4:])
	if uint64(length) > maxFile {
		return nil, fmt.Errorf("%w: its kernel has %d bytes by its header", ErrNoKernel, length)
	}
	body := payload[:len(payload)-4]
	var in io.Reader
	var err error
	switch {
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(body), zstd.WithDecoderMaxMemory(maxFile), zstd.WithDecoderMaxWindow(256<<20)); err == nil {
			defer z.Close()
			in = z
		}
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ\x00")):
		in, err = xz.ReaderConfig{SingleStream: true, DictCap: 64 << 20}.NewReader(bytes.NewReader(body))
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		in = lz4.NewReader(bytes.NewReader(body))
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		in, err = gzip.NewReader(bytes.NewReader(payload))
	default:
		return nil, fmt.Errorf("%w: its kernel is compressed in a way (% x) that is not known: give the vmlinux", ErrNoKernel, payload[:4])
	}
	if err != nil {
		return nil, fmt.Errorf("decompress the kernel: %w", err)
	}
	out := bytes.NewBuffer(make([]byte, 0, min(length, 256<<20)))
	if _, err := io.CopyN(out, in, int64(length)); err != nil {
		return nil, fmt.Errorf("decompress the kernel: %d of %d bytes: %w", out.Len(), length, err)
	}
	return out.Bytes(), nil
}

func parseELF(data []byte) (*File, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoKernel, err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return nil, fmt.Errorf("%w: it is for %v, %v", ErrNoKernel, f.Machine, f.Class)
	}
	if len(f.Sections) > maxSections {
		return nil, fmt.Errorf("%w: it has %d sections", ErrNoKernel, len(f.Sections))
	}
	v := &File{}
	end := uint64(0)
	for _, s := range f.Sections {
		if s.Type == elf.SHT_NOBITS || s.Type == elf.SHT_NULL || s.Size == 0 {
			continue
		}
		if s.Offset > uint64(len(data)) || s.FileSize > uint64(len(data))-s.Offset || s.FileSize != s.Size {
			return nil, fmt.Errorf("%w: its section %s is not in the file", ErrNoKernel, s.Name)
		}
		end = max(end, s.Offset+s.FileSize)
		if s.Flags&elf.SHF_ALLOC != 0 && s.Addr>>63 == 1 && s.Addr+s.Size > s.Addr {
			v.sections = append(v.sections, section{s.Name, s.Addr, data[s.Offset : s.Offset+s.FileSize : s.Offset+s.FileSize]})
		}
	}
	slices.SortStableFunc(v.sections, func(a, b section) int { return cmp.Compare(a.addr, b.addr) })
	if v.section(".text") == nil {
		return nil, fmt.Errorf("%w: an ELF file without a kernel's text: give the guest's /boot/vmlinuz-*", ErrNoKernel)
	}
	if notes := v.section(".notes"); notes != nil {
		v.BuildID = buildID(notes.data)
	}
	// What is behind the ELF file in a boot image is the list of what to
	// change when it is moved.
	shoff := binary.LittleEndian.Uint64(data[0x28:])
	entry, count := uint64(binary.LittleEndian.Uint16(data[0x3a:])), uint64(binary.LittleEndian.Uint16(data[0x3c:]))
	if shoff < uint64(len(data)) {
		end = max(end, shoff+entry*count)
	}
	if end < uint64(len(data)) {
		if v.relocs, err = relocations(data[end:]); err != nil {
			return nil, err
		}
		v.movable = true
	}
	return v, nil
}

// relocations decodes the lists that arch/x86/tools/relocs.c writes: 64-bit
// places, to 6.14 places to take away from, then 32-bit ones, each list behind
// a zero, as the lower half of an address.
func relocations(data []byte) ([]reloc, error) {
	for len(data)%4 != 0 {
		data = data[1:]
	}
	var lists [][]uint64
	for at := 0; at+4 <= len(data); at += 4 {
		word := binary.LittleEndian.Uint32(data[at:])
		if word == 0 {
			lists = append(lists, nil)
			continue
		}
		if len(lists) == 0 {
			return nil, errors.New("the kernel's list of relocations does not begin with a zero")
		}
		lists[len(lists)-1] = append(lists[len(lists)-1], 0xffffffff<<32|uint64(word))
	}
	for len(lists) > 0 && lists[0] == nil && len(lists) > 3 { // padding
		lists = lists[1:]
	}
	var kinds []relocKind
	switch len(lists) {
	case 2:
		kinds = []relocKind{reloc64, reloc32}
	case 3:
		kinds = []relocKind{reloc64, relocInverse, reloc32}
	default:
		return nil, fmt.Errorf("the kernel has %d lists of relocations, not 2 or 3", len(lists))
	}
	var relocs []reloc
	for i, list := range lists {
		for _, addr := range list {
			relocs = append(relocs, reloc{addr, kinds[i]})
		}
	}
	return relocs, nil
}

// buildID finds NT_GNU_BUILD_ID among ELF notes.
func buildID(notes []byte) string {
	align := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(notes) >= 12 {
		name, size := binary.LittleEndian.Uint32(notes), binary.LittleEndian.Uint32(notes[4:])
		kind := binary.LittleEndian.Uint32(notes[8:])
		body := 12 + align(name)
		if body+align(size) > uint64(len(notes)) {
			break
		}
		const most = 64
		if kind == 3 && string(notes[12:12+name]) == "GNU\x00" && size <= most {
			return hex.EncodeToString(notes[body : body+uint64(size)])
		}
		notes = notes[body+align(size):]
	}
	return ""
}

// section finds one by name; nil: there is none.
func (f *File) section(name string) *section {
	i := slices.IndexFunc(f.sections, func(s section) bool { return s.name == name })
	if i < 0 {
		return nil
	}
	return &f.sections[i]
}

// moved is the kernel in memory before it changes itself: a copy of the
// sections, moved by delta. Addresses stay those of the file.
func (f *File) moved(delta uint64) (*image, error) {
	if delta != 0 && !f.movable {
		return nil, fmt.Errorf("the guest's kernel was moved by %#x, and the file does not say what that changes: give the vmlinuz instead", delta)
	}
	m := &image{}
	for _, s := range f.sections {
		m.sections = append(m.sections, section{s.name, s.addr, bytes.Clone(s.data)})
	}
	if delta == 0 {
		return m, nil
	}
	for _, r := range f.relocs {
		size := 4
		if r.kind == reloc64 {
			size = 8
		}
		p := m.at(r.addr, size)
		if p == nil {
			continue // of a section that is not loaded to where it is linked: per-CPU data
		}
		switch r.kind {
		case reloc32:
			binary.LittleEndian.PutUint32(p, binary.LittleEndian.Uint32(p)+uint32(delta))
		case relocInverse:
			binary.LittleEndian.PutUint32(p, binary.LittleEndian.Uint32(p)-uint32(delta))
		case reloc64:
			binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)+delta)
		}
	}
	return m, nil
}

// image is a kernel's sections in memory, by the file's addresses.
type image struct{ sections []section }

// at are n bytes at an address; nil: they are not in one section.
func (m *image) at(addr uint64, n int) []byte {
	i, ok := slices.BinarySearchFunc(m.sections, addr, func(s section, a uint64) int { return cmp.Compare(s.addr, a) })
	if !ok {
		i--
	}
	if i < 0 || n < 0 {
		return nil
	}
	s := &m.sections[i]
	offset := addr - s.addr
	if offset > uint64(len(s.data)) || uint64(n) > uint64(len(s.data))-offset {
		return nil
	}
	return s.data[offset : offset+uint64(n)]
}

// section finds one by name; nil: there is none.
func (m *image) section(name string) *section {
	i := slices.IndexFunc(m.sections, func(s section) bool { return s.name == name })
	if i < 0 {
		return nil
	}
	return &m.sections[i]
}
