// SPDX-License-Identifier: MIT

package tinyvm

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Backing is what a VMM takes a guest's memory from.
type Backing int

// Values of Backing.
const (
	Anonymous   Backing = iota // private, in pages of 4 KiB
	Transparent                // private, aligned for huge pages and advised to use them
	Hugetlb                    // private, in huge pages of 2 MiB out of the host's pool
	Memfd                      // shared, of a memfd
	File                       // shared, of a file on a file system
)

var backingNames = []string{"anonymous", "transparent", "hugetlb", "memfd", "file"}

// String returns the name of the backing.
func (b Backing) String() string {
	if b >= 0 && int(b) < len(backingNames) {
		return backingNames[b]
	}
	return fmt.Sprintf("backing %d", int(b))
}

// HugePage is the size of a huge page of Hugetlb and Transparent, in bytes.
const HugePage = 2 << 20

// Memory is host memory to be given to a guest.
type Memory struct {
	bytes   []byte
	mapping []byte // what has to be unmapped, with what alignment cost
	backing Backing
}

// NewMemory maps size bytes, a multiple of 4096. Nothing of it is touched. A
// file is made in dir and unlinked; the others do not look at dir. For Hugetlb
// the host must have huge pages to spare: /proc/sys/vm/nr_hugepages.
func NewMemory(size int, backing Backing, dir string) (*Memory, error) {
	if size <= 0 || size%os.Getpagesize() != 0 {
		return nil, fmt.Errorf("memory of %d bytes: not a positive multiple of %d", size, os.Getpagesize())
	}
	m := &Memory{backing: backing}
	fd, flags, length := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, size
	switch backing {
	case Anonymous:
	case Transparent:
		length += HugePage
	case Hugetlb:
		if size%HugePage != 0 {
			return nil, fmt.Errorf("hugetlb memory of %d bytes: not a multiple of %d", size, HugePage)
		}
		flags |= unix.MAP_HUGETLB | 21<<unix.MAP_HUGE_SHIFT // 2 MiB = 1 << 21
	case Memfd, File:
		f, err := openBacking(backing, dir)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if err := f.Truncate(int64(size)); err != nil {
			return nil, err
		}
		fd, flags = int(f.Fd()), unix.MAP_SHARED
	default:
		return nil, fmt.Errorf("no such memory: %v", backing)
	}
	var err error
	m.mapping, err = unix.Mmap(fd, 0, length, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of %v memory: %w", length, backing, err)
	}
	start := 0
	advice := unix.MADV_NOHUGEPAGE
	if backing == Transparent {
		start = int(-uintptr(unsafe.Pointer(&m.mapping[0])) & (HugePage - 1))
		advice = unix.MADV_HUGEPAGE
	}
	m.bytes = m.mapping[start : start+size]
	if backing == Anonymous || backing == Transparent {
		if err := unix.Madvise(m.bytes, advice); err != nil {
			return nil, fmt.Errorf("madvise: %w", err)
		}
	}
	return m, nil
}

func openBacking(backing Backing, dir string) (*os.File, error) {
	if backing == Memfd {
		fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("memfd_create: %w", err)
		}
		return os.NewFile(uintptr(fd), "guest"), nil
	}
	f, err := os.CreateTemp(dir, "guest-")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// Bytes is the memory itself, valid until Close.
func (m *Memory) Bytes() []byte { return m.bytes }

// HVA is the address of the first byte in this process.
func (m *Memory) HVA() uint64 { return uint64(uintptr(unsafe.Pointer(&m.bytes[0]))) }

// Advise is madvise(2) on length bytes from offset, such as MADV_DONTNEED,
// which is what a balloon does, or MADV_PAGEOUT.
func (m *Memory) Advise(offset, length, advice int) error {
	return unix.Madvise(m.bytes[offset:offset+length], advice)
}

// Resident tells of each page of 4096 bytes from offset whether it is in place:
// mincore(2), which populates nothing.
func (m *Memory) Resident(offset, length int) ([]bool, error) {
	page := os.Getpagesize()
	vec := make([]byte, (length+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m.bytes[offset])), uintptr(length), uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		return nil, fmt.Errorf("mincore: %w", errno)
	}
	in := make([]bool, len(vec))
	for i, v := range vec {
		in[i] = v&1 == 1
	}
	return in, nil
}

// Close unmaps the memory. A guest that still has it in a memslot finds
// nothing there.
func (m *Memory) Close() error { return unix.Munmap(m.mapping) }
