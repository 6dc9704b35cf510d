// SPDX-License-Identifier: MIT

package tinyvm

import (
	"encoding/binary"
	"fmt"
)

// Paging is a format of page tables: Intel SDM vol. 3, chapter 4.
type Paging struct {
	Levels int  // 2: 32-bit, 3: PAE, 4 and 5: long mode
	PSE    bool // 32-bit: CR4.PSE is set, there are pages of 4 MiB
}

// entrySize is 4 or 8 bytes, bits how many of an address select an entry.
func (p Paging) entrySize() uint64 {
	if p.Levels == 2 {
		return 4
	}
	return 8
}

func (p Paging) bits() int {
	if p.Levels == 2 {
		return 10
	}
	return 9
}

// Sizes of guest pages, in bytes.
const (
	Page4K = 4 << 10
	Page2M = 2 << 20
	Page4M = 4 << 20 // 32-bit paging with PSE
	Page1G = 1 << 30
)

// Bits of page-table entries.
const (
	EntryPresent  = 1 << 0
	EntryWrite    = 1 << 1
	EntryUser     = 1 << 2
	EntryAccessed = 1 << 5
	EntryDirty    = 1 << 6
	EntryLarge    = 1 << 7
)

// Tables are page tables in a guest's memory. The processor sets accessed and
// dirty bits in what is not marked so already, which all of these are.
type Tables struct {
	Paging Paging
	Root   uint64 // guest-physical address of the topmost table, for CR3

	vm   *VM
	next *uint64
}

// NewTables makes an empty topmost table at *next, a guest-physical address
// that is a multiple of 4096. Tables are taken from there, 4096 bytes each,
// and *next goes up; several Tables may share it.
func (vm *VM) NewTables(p Paging, next *uint64) (*Tables, error) {
	if p.Levels < 2 || p.Levels > 5 {
		return nil, fmt.Errorf("page tables of %d levels", p.Levels)
	}
	t := &Tables{Paging: p, vm: vm, next: next}
	var err error
	t.Root, err = t.table()
	return t, err
}

// table takes an empty table.
func (t *Tables) table() (uint64, error) {
	gpa := *t.next
	if err := t.vm.Write(gpa, make([]byte, Page4K)); err != nil {
		return 0, fmt.Errorf("page table: %w", err)
	}
	*t.next += Page4K
	return gpa, nil
}

// Map maps size bytes at guest-virtual gva to guest-physical gpa in pages of
// the size page. All of them are multiples of page. Flags are EntryWrite and
// EntryUser or none.
func (t *Tables) Map(gva, gpa, size, page, flags uint64) error {
	if (gva|gpa|size)%page != 0 {
		return fmt.Errorf("map %#x to %#x, %d bytes: not multiples of %d", gva, gpa, size, page)
	}
	for done := uint64(0); done < size; done += page {
		if err := t.mapPage(gva+done, gpa+done, page, flags); err != nil {
			return fmt.Errorf("map %#x: %w", gva+done, err)
		}
	}
	return nil
}

func (t *Tables) mapPage(gva, gpa, page, flags uint64) error {
	table := t.Root
	for level := t.Paging.Levels; ; level-- {
		shift := 12 + (level-1)*t.Paging.bits()
		index := gva >> shift & (1<<t.Paging.bits() - 1)
		entryAt := table + index*t.Paging.entrySize()
		if uint64(1)<<shift == page {
			return t.put(entryAt, t.leaf(gpa, level, flags))
		}
		if uint64(1)<<shift < page {
			return fmt.Errorf("there are no pages of %d bytes", page)
		}
		entry, err := t.get(entryAt)
		if err != nil {
			return err
		}
		if entry&EntryPresent == 0 {
			if table, err = t.table(); err != nil {
				return err
			}
			// What a page may do is up to the last level; the pointers of
			// PAE have no such bits.
			entry = table | EntryPresent
			if t.Paging.Levels != 3 || level != 3 {
				entry |= EntryWrite | EntryUser | EntryAccessed
			}
			if err := t.put(entryAt, entry); err != nil {
				return err
			}
			continue
		}
		if level < 4 && entry&EntryLarge != 0 && (t.Paging.Levels != 2 || t.Paging.PSE) {
			return fmt.Errorf("a page of %d bytes is there already", uint64(1)<<shift)
		}
		table = entry &^ 0xfff
	}
}

// leaf is an entry that maps a page at a level.
func (t *Tables) leaf(gpa uint64, level int, flags uint64) uint64 {
	entry := flags | EntryPresent | EntryAccessed | EntryDirty
	if level > 1 {
		entry |= EntryLarge
	}
	if t.Paging.Levels == 2 && level == 2 {
		// Bits 39:32 of the address are in 20:13.
		return entry | gpa&0xffc00000 | gpa>>32<<13
	}
	return entry | gpa
}

func (t *Tables) get(gpa uint64) (uint64, error) {
	b, err := t.vm.Bytes(gpa, t.Paging.entrySize())
	if err != nil {
		return 0, err
	}
	if len(b) == 4 {
		return uint64(binary.LittleEndian.Uint32(b)), nil
	}
	return binary.LittleEndian.Uint64(b), nil
}

func (t *Tables) put(gpa, entry uint64) error {
	b, err := t.vm.Bytes(gpa, t.Paging.entrySize())
	if err != nil {
		return err
	}
	if len(b) == 4 {
		binary.LittleEndian.PutUint32(b, uint32(entry))
	} else {
		binary.LittleEndian.PutUint64(b, entry)
	}
	return nil
}
