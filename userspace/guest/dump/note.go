// SPDX-License-Identifier: MIT

package dump

import (
	"debug/elf"
	"encoding/binary"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// segment is QEMUCPUSegment of QEMU's target/i386/arch_dump.c.
type segment struct {
	Selector, Limit, Flags, _ uint32
	Base                      uint64
}

// cpuState is QEMUCPUState of the same. Its size tells which of the fields at
// the end, that came later, are there.
type cpuState struct {
	Version, Size                          uint32
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11, R12, R13, R14, R15   uint64
	RIP, RFLAGS                            uint64
	CS, DS, ES, FS, GS, SS                 segment
	LDT, TR, GDT, IDT                      segment
	CR                                     [5]uint64
	KernelGSBase                           uint64 // since 6.2
}

const (
	cpuStateVersion = 1
	cpuStateSize    = 432 // without what came later

	maxNoteSegments = 64
	maxNotes        = 1 << 16
	maxVCPUs        = 4096 // KVM_MAX_VCPUS of x86 since 6.7, at most
)

// readNotes takes the vCPUs' states out of a segment of notes.
func (d *Dump) readNotes(h header, p program) error {
	end := p.offset + p.filesz
	at := p.offset
	for i := 0; end-at >= 12; i++ {
		if i == maxNotes {
			return fmt.Errorf("notes at offset %d: more than %d", p.offset, maxNotes)
		}
		var n struct{ Name, Desc, Kind uint32 }
		if err := decode(d.file, int64(at), &n); err != nil {
			return fmt.Errorf("note at offset %d: %w", at, err)
		}
		name := at + 12
		desc := name + align4(n.Name)
		next := desc + align4(n.Desc)
		if desc+uint64(n.Desc) > end {
			return fmt.Errorf("note at offset %d: name of %d and content of %d bytes pass the end of the notes at %d: the headers are damaged", at, n.Name, n.Desc, end)
		}
		// "QEMU" with its NUL.
		if n.Name == 5 && n.Kind == 0 {
			var text [5]byte
			if err := decode(d.file, int64(name), &text); err != nil {
				return fmt.Errorf("note at offset %d: %w", at, err)
			}
			if string(text[:]) == "QEMU\x00" {
				if err := d.readCPU(h, desc, n.Desc); err != nil {
					return fmt.Errorf("note at offset %d: state of vCPU %d: %w", at, len(d.cpus), err)
				}
			}
		}
		at = min(next, end)
	}
	return nil
}

func align4(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }

// readCPU takes one vCPU's state. QEMU writes them by the vCPUs' numbers.
func (d *Dump) readCPU(h header, at uint64, size uint32) error {
	if size < cpuStateSize {
		return fmt.Errorf("%d bytes, QEMU writes at least %d", size, cpuStateSize)
	}
	if len(d.cpus) == maxVCPUs {
		return fmt.Errorf("more than %d vCPUs", maxVCPUs)
	}
	b := make([]byte, binary.Size(cpuState{}))
	if n, err := d.file.ReadAt(b[:min(int(size), len(b))], int64(at)); n < min(int(size), len(b)) {
		return err
	}
	var s cpuState
	if _, err := binary.Decode(b, binary.LittleEndian, &s); err != nil {
		return err
	}
	if s.Version != cpuStateVersion {
		return fmt.Errorf("version %d, only %d is known", s.Version, cpuStateVersion)
	}
	if s.Size > size {
		return fmt.Errorf("says that it has %d bytes, the note has %d", s.Size, size)
	}
	d.cpus = append(d.cpus, s.vcpu(uint32(len(d.cpus)), h.machine == elf.EM_X86_64 && len(d.cpus) == 0))
	return nil
}

// vcpu is the state as the module gives it. That the file is of a 64-bit
// machine says of the first vCPU that it is in long mode.
func (s *cpuState) vcpu(id uint32, long bool) kvmaccess.VCPU {
	r := kvmaccess.Registers{
		RAX: s.RAX, RBX: s.RBX, RCX: s.RCX, RDX: s.RDX, RSI: s.RSI, RDI: s.RDI, RSP: s.RSP, RBP: s.RBP,
		R8: s.R8, R9: s.R9, R10: s.R10, R11: s.R11, R12: s.R12, R13: s.R13, R14: s.R14, R15: s.R15,
		RIP: s.RIP, RFLAGS: s.RFLAGS,
		CR0: s.CR[0], CR2: s.CR[2], CR3: s.CR[3], CR4: s.CR[4],
		CS: s.CS.segment(), DS: s.DS.segment(), ES: s.ES.segment(), FS: s.FS.segment(), GS: s.GS.segment(), SS: s.SS.segment(),
		TR: s.TR.segment(), LDTR: s.LDT.segment(),
		GDTR: kvmaccess.TableRegister{Base: s.GDT.Base, Limit: uint16(s.GDT.Limit)},
		IDTR: kvmaccess.TableRegister{Base: s.IDT.Base, Limit: uint16(s.IDT.Limit)},
	}
	if s.Size > cpuStateSize {
		r.KernelGSBase = s.KernelGSBase
	}
	r.EFER = s.efer(long)
	cpl := 0
	switch {
	case s.CR[0]&guest.CR0PE == 0:
	case s.RFLAGS&rflagsVM != 0:
		cpl = 3
	default:
		cpl = int(s.SS.Flags >> 13 & 3)
	}
	return kvmaccess.VCPU{ID: id, CPU: -1, CPL: cpl, Flags: kvmaccess.VCPUPartial, Registers: r}
}

const rflagsVM = 1 << 17 // virtual-8086 mode

// efer is what the other registers imply: in long mode, what a 64-bit kernel
// sets. Without it, that entries of PAE's page tables may forbid execution.
func (s *cpuState) efer(long bool) uint64 {
	if s.CR[0]&guest.CR0PG == 0 || s.CR[4]&guest.CR4PAE == 0 {
		return 0
	}
	const descriptorL = 1 << 21
	long = long || s.CS.Flags&descriptorL != 0
	for _, v := range []uint64{s.RIP, s.RSP, s.GDT.Base, s.IDT.Base, s.TR.Base, s.CR[3]} {
		long = long || v>>32 != 0
	}
	if !long {
		return guest.EFERNXE
	}
	return guest.EFERSCE | guest.EFERLME | guest.EFERLMA | guest.EFERNXE
}

// segment turns the flags, bits 8 to 23 of a descriptor's upper half, into
// access rights as a VMCS has them (Intel SDM vol. 3, 24.4.1).
func (s segment) segment() kvmaccess.Segment {
	const unusable = 1 << 16
	attrs := s.Flags >> 8 & 0xf0ff
	if attrs&(1<<7) == 0 {
		attrs |= unusable
	}
	return kvmaccess.Segment{Selector: uint16(s.Selector), Base: s.Base, Limit: s.Limit, Attrs: attrs}
}
