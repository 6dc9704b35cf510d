// SPDX-License-Identifier: MIT

package dump

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

func isELF(head []byte) bool { return bytes.HasPrefix(head, []byte(elf.ELFMAG)) }

// xnum in e_phnum says that section 0 has the number of program headers
// (PN_XNUM in the generic ABI). Dumps by virtual mappings can have that many,
// and package debug/elf does not know it.
const xnum = 0xffff

// header is what matters of an ELF header, of either width.
type header struct {
	machine          elf.Machine
	phoff, shoff     uint64
	phentsize, phnum uint32
	shnum            uint16
	long             bool // ELFCLASS64
}

// program is what matters of a program header, of either width.
type program struct {
	kind                         elf.ProgType
	offset, paddr, filesz, memsz uint64
}

// readELF reads an ELF core of physical memory. QEMU writes 32-bit ones of
// guests that are not in long mode.
func (d *Dump) readELF(size int64) error {
	d.format = FormatELF
	h, err := readHeader(d.file, size)
	if err != nil {
		return err
	}
	if h.phnum == 0 {
		return fmt.Errorf("%w: an ELF core without program headers, such as Xen's: only those with PT_LOAD can be read", ErrUnsupported)
	}
	entry := uint64(binary.Size(elf.Prog32{}))
	if h.long {
		entry = uint64(binary.Size(elf.Prog64{}))
	}
	if uint64(h.phentsize) != entry {
		return fmt.Errorf("ELF header: program headers of %d bytes, they have %d: it is damaged", h.phentsize, entry)
	}
	if table := uint64(h.phnum) * uint64(h.phentsize); h.phoff > uint64(size) || table > uint64(size)-h.phoff {
		return fmt.Errorf("ELF header: %d program headers at offset %d, the file has %d bytes: it is cut off or damaged", h.phnum, h.phoff, size)
	}

	var (
		in    = io.NewSectionReader(d.file, int64(h.phoff), int64(uint64(h.phnum)*uint64(h.phentsize)))
		buf   = make([]byte, 4096*h.phentsize)
		loads int
		moved bool // a PT_LOAD beyond the first lies elsewhere than at 0
		notes []program
	)
	for i := uint32(0); i < h.phnum; {
		n := min(h.phnum-i, 4096)
		if _, err := io.ReadFull(in, buf[:n*h.phentsize]); err != nil {
			return fmt.Errorf("program header %d: %w", i, err)
		}
		for j := range n {
			p := h.program(buf[j*h.phentsize:])
			what := fmt.Sprintf("program header %d", i+j)
			switch p.kind {
			case elf.PT_NOTE:
				if p.offset > uint64(size) || p.filesz > uint64(size)-p.offset {
					return fmt.Errorf("%s: notes of %d bytes at offset %d, the file has %d: it is cut off or damaged", what, p.filesz, p.offset, size)
				}
				if notes = append(notes, p); len(notes) > maxNoteSegments {
					return fmt.Errorf("%s: more than %d segments of notes", what, maxNoteSegments)
				}
			case elf.PT_LOAD:
				loads++
				moved = moved || p.paddr != 0
				if p.filesz > p.memsz {
					return fmt.Errorf("%s: %d bytes in the file of a segment of %d", what, p.filesz, p.memsz)
				}
				// What the file has no bytes of is not zero but absent: QEMU
				// leaves out what is no RAM or was not asked for.
				if err := d.chunks.add(chunk{gpa: p.paddr, size: p.filesz, offset: p.offset}, size, what); err != nil {
					return err
				}
			}
		}
		i += n
	}
	switch {
	case loads == 0:
		return fmt.Errorf("%w: an ELF core without memory (no PT_LOAD)", ErrUnsupported)
	case loads > 1 && !moved:
		return fmt.Errorf("%w: an ELF core of a process, without physical addresses: dump the guest, not its VMM (dump-guest-memory, virsh dump --memory-only)", ErrUnsupported)
	case len(d.chunks) == 0:
		return errors.New("the dump has no memory: no PT_LOAD has bytes in the file")
	}
	if err := d.chunks.merge(); err != nil {
		return err
	}
	for _, p := range notes {
		if err := d.readNotes(h, p); err != nil {
			return err
		}
	}
	return nil
}

func readHeader(r io.ReaderAt, size int64) (header, error) {
	var h header
	ident := make([]byte, elf.EI_NIDENT)
	if _, err := r.ReadAt(ident, 0); err != nil {
		return h, errors.New("the file is cut off in its ELF header")
	}
	switch class := elf.Class(ident[elf.EI_CLASS]); class {
	case elf.ELFCLASS64:
		h.long = true
	case elf.ELFCLASS32:
	default:
		return h, fmt.Errorf("ELF header: class %d, neither 32 nor 64 bits", class)
	}
	if data := elf.Data(ident[elf.EI_DATA]); data != elf.ELFDATA2LSB {
		return h, fmt.Errorf("%w: ELF file of a machine that is not little-endian (%v)", ErrUnsupported, data)
	}
	var kind elf.Type
	if h.long {
		var e elf.Header64
		if err := decode(r, 0, &e); err != nil {
			return h, errors.New("the file is cut off in its ELF header")
		}
		kind = elf.Type(e.Type)
		h.machine, h.phoff, h.shoff, h.phentsize, h.phnum, h.shnum = elf.Machine(e.Machine), e.Phoff, e.Shoff, uint32(e.Phentsize), uint32(e.Phnum), e.Shnum
	} else {
		var e elf.Header32
		if err := decode(r, 0, &e); err != nil {
			return h, errors.New("the file is cut off in its ELF header")
		}
		kind = elf.Type(e.Type)
		h.machine, h.phoff, h.shoff, h.phentsize, h.phnum, h.shnum = elf.Machine(e.Machine), uint64(e.Phoff), uint64(e.Shoff), uint32(e.Phentsize), uint32(e.Phnum), e.Shnum
	}
	if kind != elf.ET_CORE {
		return h, fmt.Errorf("%w: an ELF file, but no core (%v): a program, library or kernel image", ErrUnsupported, kind)
	}
	if h.machine != elf.EM_X86_64 && h.machine != elf.EM_386 {
		return h, fmt.Errorf("%w: a core of another machine than x86 (%v)", ErrUnsupported, h.machine)
	}
	if h.phnum == xnum && h.shoff != 0 {
		if h.shoff > uint64(size) {
			return h, fmt.Errorf("ELF header: sections at offset %d, the file has %d bytes: it is cut off or damaged", h.shoff, size)
		}
		var err error
		if h.long {
			var s elf.Section64
			err = decode(r, int64(h.shoff), &s)
			h.phnum = s.Info
		} else {
			var s elf.Section32
			err = decode(r, int64(h.shoff), &s)
			h.phnum = s.Info
		}
		if err != nil {
			return h, fmt.Errorf("ELF section 0 at offset %d: %w", h.shoff, err)
		}
	}
	return h, nil
}

func (h header) program(b []byte) program {
	le := binary.LittleEndian
	if h.long {
		return program{
			kind: elf.ProgType(le.Uint32(b)), offset: le.Uint64(b[8:]), paddr: le.Uint64(b[24:]),
			filesz: le.Uint64(b[32:]), memsz: le.Uint64(b[40:]),
		}
	}
	return program{
		kind: elf.ProgType(le.Uint32(b)), offset: uint64(le.Uint32(b[4:])), paddr: uint64(le.Uint32(b[12:])),
		filesz: uint64(le.Uint32(b[16:])), memsz: uint64(le.Uint32(b[20:])),
	}
}

// decode reads a little-endian structure of fixed size.
func decode(r io.ReaderAt, at int64, v any) error {
	b := make([]byte, binary.Size(v))
	if n, err := r.ReadAt(b, at); n < len(b) {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	_, err := binary.Decode(b, binary.LittleEndian, v)
	return err
}
