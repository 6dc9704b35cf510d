// SPDX-License-Identifier: MIT

package peers

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/bench/objects"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// peer is a way to look at the objects of a guest. A look reads them all and
// holds them against what they were; it fails if they differ.
type peer struct {
	name  string
	start func(context.Context) error // nil: nothing to do
	look  func(context.Context) error
	stop  func(context.Context) error
}

// site is what the peers look at.
type site struct {
	client *kvmaccess.Client
	guest  *fixture.Guest
	found  *objects.Objects
	gdb    string // socket of QEMU's gdbstub
	dir    string // for files
	slots  []kvmaccess.Memslot
	debug  *gdb
	held   []int64 // ns for which the debugger held the guest, look by look
}

// peers are all that are measured beside the watch.
func (s *site) peers() []peer {
	return []peer{
		{name: QMPSave, look: func(ctx context.Context) error { return errors.Join(s.registers(ctx), s.pmemsave(ctx)) }},
		{name: QMPPrint, look: func(ctx context.Context) error { return errors.Join(s.registers(ctx), s.xp(ctx)) }},
		{name: GDBStub, start: s.attach, look: s.gdbLook, stop: s.detach},
		{name: Readv, look: func(ctx context.Context) error { return errors.Join(s.registers(ctx), s.readv()) }},
		{name: Poll, look: s.poll},
	}
}

// Names of the peers.
const (
	QMPSave  = "QMP: info registers, pmemsave"
	QMPPrint = "QMP: info registers, xp"
	GDBStub  = "QEMU's gdbstub"
	Readv    = "QMP: info registers; process_vm_readv"
	Poll     = "KvmAccess, poll"
	Watch    = "KvmAccess, watch"
)

func (s *site) same(name string, got, want []byte) error {
	if !bytes.Equal(got, want) {
		return fmt.Errorf("the guest's %s is not what it was", name)
	}
	return nil
}

// What "info registers" says of the registers that do not change.
var (
	tableLine   = regexp.MustCompile(`(GDT|IDT)= +([0-9a-f]+) ([0-9a-f]+)`)
	controlLine = regexp.MustCompile(`(CR0|CR4|EFER)=([0-9a-f]+)`)
)

// registers asks QEMU's monitor for the registers.
func (s *site) registers(ctx context.Context) error {
	text, err := s.guest.Monitor(ctx, "info registers")
	if err != nil {
		return err
	}
	v := s.found.VCPU
	want := map[string]uint64{"GDT": v.GDTR.Base, "IDT": v.IDTR.Base, "CR4": v.CR4}
	seen := 0
	for _, m := range append(tableLine.FindAllStringSubmatch(text, -1), controlLine.FindAllStringSubmatch(text, -1)...) {
		got, err := strconv.ParseUint(m[2], 16, 64)
		if err != nil {
			return fmt.Errorf("info registers: %q: %w", m[0], err)
		}
		seen++
		// A CR0 has a bit that a switch of tasks sets, an EFER one of the host's.
		if w, ok := want[m[1]]; ok && got != w {
			return fmt.Errorf("info registers: %s is %#x, was %#x", m[1], got, w)
		}
	}
	if seen < 5 {
		return fmt.Errorf("info registers: %q", text)
	}
	return nil
}

// pmemsave lets QEMU write physical memory to files, and reads these.
func (s *site) pmemsave(ctx context.Context) error {
	name := filepath.Join(s.dir, "memory")
	for _, r := range s.found.Regions {
		at := 0
		for _, p := range r.Parts {
			if _, err := s.guest.QMP(ctx, "pmemsave", map[string]any{"val": p.GPA, "size": p.Length, "filename": name}); err != nil {
				return err
			}
			got, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			if err := s.same(r.Name, got, r.Data[at:at+p.Length]); err != nil {
				return err
			}
			at += p.Length
		}
	}
	return nil
}

// xp lets QEMU print physical memory.
func (s *site) xp(ctx context.Context) error {
	for _, r := range s.found.Regions {
		at := 0
		for _, p := range r.Parts {
			text, err := s.guest.Monitor(ctx, fmt.Sprintf("xp /%dxg %#x", p.Length/8, p.GPA))
			if err != nil {
				return err
			}
			var got []byte
			for line := range strings.Lines(text) {
				_, words, _ := strings.Cut(line, ":")
				for word := range strings.FieldsSeq(words) {
					v, err := strconv.ParseUint(word, 0, 64)
					if err != nil {
						return fmt.Errorf("xp: %q: %w", line, err)
					}
					got = binary.LittleEndian.AppendUint64(got, v)
				}
			}
			if err := s.same(r.Name, got, r.Data[at:at+p.Length]); err != nil {
				return err
			}
			at += p.Length
		}
	}
	return nil
}

func (s *site) attach(context.Context) (err error) {
	if s.debug, err = dialGDB(s.gdb); err != nil {
		return err
	}
	return s.debug.run()
}

func (s *site) detach(context.Context) error { return s.debug.close() }

// gdbLook stops the guest, reads, and lets it run. Of the registers that are
// watched the stub knows CR0, CR4 and EFER, and no descriptor tables' registers
// and no MSRs of system calls.
func (s *site) gdbLook(context.Context) error {
	if err := s.debug.stop(); err != nil {
		return err
	}
	from := now()
	registers, err := s.debug.ask("g")
	if err != nil {
		return err
	}
	if len(registers) < 2*8*16 {
		return fmt.Errorf("gdbstub: registers %q", registers)
	}
	for _, r := range s.found.Regions {
		got, err := s.debug.memory(r.GVA, r.Length)
		if err != nil {
			return err
		}
		if err := s.same(r.Name, got, r.Data); err != nil {
			return err
		}
	}
	s.held = append(s.held, now()-from)
	return s.debug.run()
}

// readv reads the guest's memory out of QEMU's.
func (s *site) readv() error {
	for _, r := range s.found.Regions {
		data := make([]byte, r.Length)
		local := []unix.Iovec{{Base: &data[0]}}
		local[0].SetLen(len(data))
		var remote []unix.RemoteIovec
		for _, p := range r.Parts {
			hva, err := s.hva(p)
			if err != nil {
				return err
			}
			remote = append(remote, unix.RemoteIovec{Base: hva, Len: p.Length})
		}
		if n, err := unix.ProcessVMReadv(s.guest.PID, local, remote, 0); err != nil || n != len(data) {
			return fmt.Errorf("process_vm_readv: %d of %d bytes, %v", n, len(data), err)
		}
		if err := s.same(r.Name, data, r.Data); err != nil {
			return err
		}
	}
	return nil
}

func (s *site) hva(p objects.Part) (uintptr, error) {
	for _, m := range s.slots {
		if m.AS == 0 && p.GPA >= m.GPA && p.GPA-m.GPA < m.Size {
			return uintptr(m.HVA + p.GPA - m.GPA), nil
		}
	}
	return 0, fmt.Errorf("no memslot at %#x", p.GPA)
}

// poll captures the vCPU and reads the memory by the module.
func (s *site) poll(ctx context.Context) error {
	v, err := s.client.VCPU(ctx, s.found.VM.ID, 0)
	if err != nil {
		return err
	}
	w := s.found.VCPU
	if v.GDTR != w.GDTR || v.IDTR != w.IDTR || v.CR4 != w.CR4 || v.EFER != w.EFER || v.LSTAR != w.LSTAR || v.STAR != w.STAR {
		return fmt.Errorf("registers are %+v, were %+v", v.Registers, w.Registers)
	}
	var dst []kvmaccess.RangeData
	for _, r := range s.found.Regions {
		for _, p := range r.Parts {
			dst = append(dst, kvmaccess.RangeData{Range: kvmaccess.Range{Address: p.GPA, Length: uint32(p.Length)}})
		}
	}
	if err := s.client.ReadPhysicalInto(ctx, s.found.VM.ID, dst); err != nil {
		return err
	}
	for _, r := range s.found.Regions {
		at := 0
		for _, p := range r.Parts {
			if err := s.same(r.Name, dst[0].Data, r.Data[at:at+p.Length]); err != nil {
				return err
			}
			at += p.Length
			dst = dst[1:]
		}
	}
	return nil
}
