// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// TestLocateUserHalf finds the image where a vCPU runs a program on page tables
// that map next to nothing of the kernel.
func TestLocateUserHalf(t *testing.T) {
	s := attachSnapshot(t, "sid")
	cpu := s.CPUs[0]
	if cpu.CPL != 3 || cpu.CR3&userHalf == 0 {
		t.Fatalf("the snapshot's vCPU is at CPL %d with CR3 %#x", cpu.CPL, cpu.CR3)
	}
	found, err := locate(context.Background(), s, s.CPUs, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := found[0].extent.Start, note(t, s, "_text"); got != want {
		t.Errorf("image at %#x, want %#x", got, want)
	}
	if found[0].space.Root&userHalf != 0 {
		t.Errorf("the program's page tables %#x were taken", found[0].space.Root)
	}
	if !found[0].booted {
		t.Error("a vCPU runs a program, and yet the guest has not booted")
	}
}

// TestLocateFRED has a kernel that takes events without an interrupt table.
func TestLocateFRED(t *testing.T) {
	s := attachSnapshot(t, "sid")
	s.CPUs[0].CR4 |= CR4FRED
	s.CPUs[0].IDTR = kvmaccess.TableRegister{}
	equalsGuest(t, s, mustAttach(t, s))
}

// TestLocateLiar has a vCPU of several lead elsewhere: the others count.
func TestLocateLiar(t *testing.T) {
	s := attachSnapshot(t, "debian12")
	honest := s.CPUs[0]
	// Page tables of its own that have the image 2 MiB higher: the same table
	// for the kernel's addresses, its entries moved by one.
	mode := ModeOf(&honest.Registers)
	const root, l4, l3, l2 = 0x40000000, 0x40001000, 0x40002000, 0x40003000
	walk := func(table uint64, index int) uint64 {
		return binary.LittleEndian.Uint64(readGuest(t, s, table+uint64(8*index), 8)) & mode.addressMask()
	}
	copyTable := func(from, to uint64) *[4096]byte {
		page := new([4096]byte)
		copy(page[:], readGuest(t, s, from, 4096))
		s.Pages[to] = page
		return page
	}
	old5 := mode.RootOf(honest.CR3)
	old4 := walk(old5, 511)
	old3 := walk(old4, 511)
	old2 := walk(old3, 510)
	put := func(page *[4096]byte, index int, gpa uint64) {
		binary.LittleEndian.PutUint64(page[8*index:], gpa|0x63)
	}
	put(copyTable(old5, root), 511, l4)
	put(copyTable(old4, l4), 511, l3)
	put(copyTable(old3, l3), 510, l2)
	moved := copyTable(old2, l2)
	copy(moved[8:], moved[:4088])
	liar := honest
	liar.ID, liar.CR3 = 0, root
	s.CPUs = []kvmaccess.VCPU{liar, honest, honest}
	s.CPUs[1].ID, s.CPUs[2].ID = 1, 2
	found, err := locate(context.Background(), s, s.CPUs, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != 2 || found[0].cpus != 2 || found[0].extent.Start != note(t, s, "_text") {
		t.Errorf("%d places, the first by %d vCPUs at %#x", len(found), found[0].cpus, found[0].extent.Start)
	}
	equalsGuest(t, s, mustAttach(t, s))
}

// TestLocateStale has page tables of an earlier kernel in memory, too.
func TestLocateStale(t *testing.T) {
	s := attachSnapshot(t, "debian13")
	// One root of another kernel, which maps the image elsewhere.
	const root, l3, l2 = 0x50000000, 0x50001000, 0x50002000
	s.Pages.WritePhysical(root+511*8, binary.LittleEndian.AppendUint64(nil, l3|0x67))
	s.Pages.WritePhysical(l3+510*8, binary.LittleEndian.AppendUint64(nil, l2|0x63))
	s.Pages.WritePhysical(l3+511*8, binary.LittleEndian.AppendUint64(nil, 0x50003000|0x67))
	for i := range uint64(20) {
		s.Pages.WritePhysical(l2+(16+i)*8, binary.LittleEndian.AppendUint64(nil, 0x60000000+i<<21|0x1e3))
	}
	s.Pages.WritePhysical(0x50003000, make([]byte, 4096))
	s.CPUs = nil
	equalsGuest(t, s, mustAttach(t, s))
}

func TestSpacesOfNote(t *testing.T) {
	page := []byte("OSRELEASE=6.1.0\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)=ffffffffb4410000\nNUMBER(phys_base)=-855638016\nNUMBER(pgtable_l5_enabled)=1\n\x00rest")
	got := spacesOfNote(nil, page)
	if len(got) != 1 || got[0].Root != 0x1410000 || got[0].Mode.Format != Format5Level {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{"", "OSRELEASE=\n", "SYMBOL(swapper_pg_dir)=x\nNUMBER(phys_base)=1", "SYMBOL(swapper_pg_dir)=1000\nNUMBER(phys_base)=1", "SYMBOL(swapper_pg_dir)=ffffffff82000000"} {
		if got := spacesOfNote(nil, []byte(bad)); got != nil {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

// FuzzLocate overwrites a part of a real guest's interrupt table or page
// tables, and sets registers.
func FuzzLocate(f *testing.F) {
	type base struct {
		s     *Snapshot
		pages []uint64
	}
	var bases []base
	for _, name := range attachable {
		s := attachSnapshot(f, name)
		r := NewRecorder(s)
		if _, err := locate(context.Background(), r, s.CPUs, nil); err != nil {
			f.Fatal(err)
		}
		bases = append(bases, base{s, slices.Sorted(maps.Keys(r.Pages))})
		for i := range len(r.Pages) {
			f.Add(uint8(len(bases)-1), uint8(i), uint16(8*i), []byte{0xff, 0xff}, s.CPUs[0].CR3, s.CPUs[0].IDTR.Base, false)
		}
		f.Add(uint8(len(bases)-1), uint8(0), uint16(4088), binary.LittleEndian.AppendUint64(nil, r.firstRoot(s)|3), s.CPUs[0].CR3, s.CPUs[0].IDTR.Base, true)
	}
	f.Fuzz(func(t *testing.T, which, page uint8, at uint16, patch []byte, cr3, idt uint64, memory bool) {
		b := bases[int(which)%len(bases)]
		s := &Snapshot{CPUs: slices.Clone(b.s.CPUs), Pages: maps.Clone(b.s.Pages)}
		gpa := b.pages[int(page)%len(b.pages)]
		changed := *s.Pages[gpa]
		copy(changed[at&4095:], patch)
		s.Pages[gpa] = &changed
		s.CPUs[0].CR3, s.CPUs[0].IDTR.Base = cr3, idt
		var regions []Region
		if memory {
			s.CPUs = nil
			for _, gpa := range b.pages {
				regions = append(regions, Region{gpa, 4096})
			}
		}
		found, err := locate(context.Background(), NewPageCache(s), s.CPUs, regions)
		if (err == nil) != (len(found) > 0) {
			t.Fatalf("%d places, %v", len(found), err)
		}
		for _, l := range found {
			if l.extent.Start < imageStart || l.extent.End > imageEnd || l.extent.Start >= l.extent.End || len(l.parts) == 0 {
				t.Errorf("image %#x", l.extent)
			}
			for _, m := range l.parts {
				if m.GVA < l.extent.Start || m.GVA+m.Size > l.extent.End || l.gpa(m.GVA) != m.GPA {
					t.Errorf("part %+v of image %#x at %#x", m, l.extent, l.physical)
				}
				l.mapped(m.GVA)
			}
			l.mapped(l.extent.End)
			l.mapped(0)
		}
	})
}

// firstRoot is the page that CR3 of the first vCPU has.
func (r *Recorder) firstRoot(s *Snapshot) uint64 {
	return ModeOf(&s.CPUs[0].Registers).RootOf(s.CPUs[0].CR3)
}

// FuzzSpacesOfNote has notes for crash dumps.
func FuzzSpacesOfNote(f *testing.F) {
	f.Add([]byte("OSRELEASE=6.1.0\nSYMBOL(swapper_pg_dir)=ffffffffb4410000\nNUMBER(phys_base)=-1342177280\nNUMBER(pgtable_l5_enabled)=1\n"))
	f.Fuzz(func(t *testing.T, page []byte) {
		for _, s := range spacesOfNote(nil, page) {
			if s.Root&4095 != 0 {
				t.Errorf("root %#x", s.Root)
			}
		}
		buildID(page)
		distribution(string(page), string(page))
	})
}
