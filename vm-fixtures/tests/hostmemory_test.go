// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// newMemory maps memory for the rest of the test.
func newMemory(t *testing.T, size int, backing tinyvm.Backing) *tinyvm.Memory {
	t.Helper()
	m, err := tinyvm.NewMemory(size, backing, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func setSlot(t *testing.T, g *tinyvm.Guest, s tinyvm.Slot) {
	t.Helper()
	if err := g.SetSlot(s); err != nil {
		t.Fatal(err)
	}
}

// smaps is a field of the description of the mapping that holds an address, in
// KiB: proc_pid_smaps(5).
func smaps(t *testing.T, address uint64, field string) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		var from, to uint64
		if n, _ := fmt.Sscanf(s.Text(), "%x-%x ", &from, &to); n == 2 {
			inside = address >= from && address < to
		}
		if value, ok := strings.CutPrefix(s.Text(), field+":"); ok && inside {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s of %#x", field, address)
	return 0
}

// hugePages gives the host's pool a number of huge pages for the test's time.
func hugePages(t *testing.T, n int) {
	t.Helper()
	const file = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(n)), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, before, 0); err != nil {
			t.Error(err)
		}
	})
	after, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := strconv.Atoi(strings.TrimSpace(string(after))); got != n {
		t.Fatalf("the host spares %d huge pages of %d", got, n)
	}
}

// Whatever the host keeps a guest's memory in, and in pages of whatever size
// the guest maps it: the bytes are right.
func TestMemoryBackings(t *testing.T) {
	const gpa, size = 1 << 30, 8 << 20
	c, k := newClient(t), openKVM(t)
	for _, backing := range []tinyvm.Backing{tinyvm.Anonymous, tinyvm.Transparent, tinyvm.Hugetlb, tinyvm.Memfd, tinyvm.File} {
		t.Run(backing.String(), func(t *testing.T) {
			if backing == tinyvm.Hugetlb {
				hugePages(t, size/tinyvm.HugePage)
			}
			m := newMemory(t, size, backing)
			copy(m.Bytes(), pattern(gpa, size))
			huge := smaps(t, m.HVA(), "AnonHugePages")
			if backing == tinyvm.Hugetlb {
				huge = smaps(t, m.HVA(), "Private_Hugetlb")
			}
			if want := backing == tinyvm.Transparent || backing == tinyvm.Hugetlb; want != (huge > 0) {
				t.Fatalf("%d KiB of huge pages: not what is to be tested", huge)
			}
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
			// The guest's memory before the file's or pool's: see newMemory.
			t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
			setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
			bases := map[uint64]uint64{tinyvm.Page4K: 0x10000000000, tinyvm.Page2M: 0x20000000000, tinyvm.Page1G: 0x30000000000}
			for page, gva := range bases {
				if err := g.Tables.Map(gva, gpa, max(size, page), page, tinyvm.EntryWrite); err != nil {
					t.Fatal(err)
				}
			}
			started(t, g)
			r := rand.New(rand.NewPCG(20261123, uint64(backing)))
			for range 80 {
				n := 1 + r.IntN(2*tinyvm.Page4K)
				if r.IntN(20) == 0 {
					n = kvmaccess.MaxBytes
				}
				off := uint64(r.IntN(size - n))
				if r.IntN(4) == 0 { // across the end of a large page
					off = tinyvm.Page2M*uint64(1+r.IntN(3)) - uint64(n)/2
				}
				want := pattern(gpa+off, n)
				for _, gva := range bases {
					mustReadVirtual(t, c, vm.ID, 0, gva+off, want)
				}
				got, err := c.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: gpa + off, Length: uint32(n)})
				if err != nil || !bytes.Equal(got[0].Data, want) {
					t.Fatalf("%d bytes at %#x: %v", n, gpa+off, err)
				}
			}
			all := make([]byte, size)
			if err := kvmaccess.NewMemory(c, vm).ReadPhysical(t.Context(), gpa, all); err != nil || !bytes.Equal(all, m.Bytes()) {
				t.Errorf("all of it at once: %v", err)
			}
			stopped(t, g)
		})
	}
}

// One read goes through several slots whose host memory lies elsewhere each,
// and stops at a hole.
func TestSlotBoundaries(t *testing.T) {
	const gpa, size = 1 << 30, 64 << 10
	c, k := newClient(t), openKVM(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	// Three slots in a row, backwards in one mapping with gaps; a hole; a
	// fourth, which the guest may not write to.
	m := newMemory(t, 16*size, tinyvm.Anonymous)
	t.Cleanup(func() {
		for n := uint16(1); n <= 4; n++ {
			setSlot(t, g, tinyvm.Slot{Number: n})
		}
	})
	add := func(number uint16, at, offset uint64, flags uint32) {
		copy(m.Bytes()[offset:], pattern(at, size))
		setSlot(t, g, tinyvm.Slot{Number: number, GPA: at, Size: size, Memory: m, Offset: offset, Flags: flags})
	}
	add(1, gpa, 9*size, 0)
	add(2, gpa+size, 5*size, 0)
	add(3, gpa+2*size, 1*size, tinyvm.SlotLogDirty)
	add(4, gpa+4*size, 13*size, tinyvm.SlotReadonly)
	if err := g.Tables.Map(0xffff888000000000, gpa, tinyvm.Page1G, tinyvm.Page1G, tinyvm.EntryWrite); err != nil {
		t.Fatal(err)
	}
	const gva = 0xffff888000000000
	check := func(off uint64, n uint32) {
		t.Helper()
		end := off + uint64(n)
		var hole uint64 // where reading must fail; 0: nowhere
		switch {
		case off < 4*size && end > 3*size:
			hole = max(off, 3*size)
		case end > 5*size:
			hole = max(off, 5*size)
		}
		for _, virtual := range []bool{false, true} {
			var got []kvmaccess.RangeData
			var err error
			if virtual {
				got, err = c.ReadVirtual(t.Context(), vm.ID, 0, 0, kvmaccess.Range{Address: gva + off, Length: n}, kvmaccess.Range{Address: gva, Length: 1})
			} else {
				got, err = c.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: gpa + off, Length: n}, kvmaccess.Range{Address: gpa, Length: 1})
			}
			if err != nil {
				t.Fatalf("%d bytes at +%#x: %v", n, off, err)
			}
			if hole == 0 {
				if got[0].Err != nil || !bytes.Equal(got[0].Data, pattern(gpa+off, int(n))) {
					t.Fatalf("%d bytes at +%#x, virtual %t: %v, or other bytes", n, off, virtual, got[0].Err)
				}
				continue
			}
			var e *kvmaccess.Error
			address := gpa + hole
			if virtual {
				address = gva + hole
			}
			if !errors.Is(got[0].Err, kvmaccess.ErrNoMemslot) || !errors.As(got[0].Err, &e) || e.Address != address {
				t.Fatalf("%d bytes at +%#x, virtual %t: %v, want %v at %#x", n, off, virtual, got[0].Err, kvmaccess.ErrNoMemslot, address)
			}
		}
	}
	for _, edge := range []uint64{size, 2 * size, 3 * size, 4 * size, 5 * size} {
		for _, before := range []uint64{0, 1, 7, 100, 5000} {
			for _, n := range []uint32{1, 2, 8, 4096, kvmaccess.MaxBytes - 64} {
				check(edge-before, n)
			}
		}
	}
	// As long as the guest runs too, which no slot's kind changes.
	started(t, g)
	for _, edge := range []uint64{size, 2 * size, 4*size + 100} {
		check(edge-100, 4096)
	}
	stopped(t, g)
}

// resident is how many KiB of this process are in memory: smaps_rollup.
func resident(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "Rss:"); ok {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no Rss in %s", text)
	return 0
}

// What a balloon took, or nobody ever touched, is not there, and reading it
// does not bring it back: the VMM does not grow by being looked at.
func TestBalloonedMemory(t *testing.T) {
	const gpa, size = 1 << 30, 16 << 20
	const pages = size / tinyvm.Page4K
	c, k := newClient(t), openKVM(t)
	for _, backing := range []tinyvm.Backing{tinyvm.Anonymous, tinyvm.Transparent, tinyvm.Memfd} {
		t.Run(backing.String(), func(t *testing.T) {
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
			m := newMemory(t, size, backing)
			t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
			setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
			if err := g.Tables.Map(0x40000000, gpa, size, tinyvm.Page2M, tinyvm.EntryWrite); err != nil {
				t.Fatal(err)
			}
			started(t, g)
			defer stopped(t, g)
			// The first quarter is touched; half of that goes again.
			const touched, gone = size / 4, size / 8
			copy(m.Bytes()[:touched], pattern(gpa, touched))
			advice := unix.MADV_DONTNEED
			if backing == tinyvm.Memfd {
				advice = unix.MADV_REMOVE // of a shared mapping only this frees memory
			}
			if err := m.Advise(0, gone, advice); err != nil {
				t.Fatal(err)
			}
			place, err := m.Resident(0, size)
			if err != nil {
				t.Fatal(err)
			}
			in := 0
			for _, p := range place {
				if p {
					in++
				}
			}
			if in < (touched-gone)/tinyvm.Page4K || in > touched/tinyvm.Page4K {
				t.Fatalf("%d of %d pages are in place: not what is to be tested", in, pages)
			}
			before, rss := resident(t), smaps(t, m.HVA(), "Rss")
			good := 0
			for page := range uint64(pages) {
				off := page * tinyvm.Page4K
				if page%5 > 1 {
					continue // enough of them
				}
				var r kvmaccess.RangeData
				var got []kvmaccess.RangeData
				if page%2 == 0 {
					got, err = c.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: gpa + off, Length: 64})
				} else {
					got, err = c.ReadVirtual(t.Context(), vm.ID, 0, 0, kvmaccess.Range{Address: 0x40000000 + off, Length: 64})
					if errors.Is(err, kvmaccess.ErrUnsettled) {
						continue
					}
				}
				if len(got) == 0 {
					t.Fatalf("page %d: %v", page, err)
				}
				r = got[0]
				switch {
				case place[page] && (r.Err != nil || !bytes.Equal(r.Data, pattern(gpa+off, 64))):
					t.Fatalf("page %d is in place: %v, or other bytes", page, r.Err)
				case !place[page] && !errors.Is(r.Err, kvmaccess.ErrNotResident):
					t.Fatalf("page %d is not in place: %v, want %v", page, r.Err, kvmaccess.ErrNotResident)
				case place[page]:
					good++
				}
			}
			after, err := m.Resident(0, size)
			if err != nil {
				t.Fatal(err)
			}
			for page := range place {
				if after[page] != place[page] {
					t.Fatalf("page %d: in place %t before it was read, %t after", page, place[page], after[page])
				}
			}
			if now := smaps(t, m.HVA(), "Rss"); now != rss {
				t.Errorf("the guest's memory was %d KiB, is %d KiB after it was read", rss, now)
			}
			t.Logf("%d of %d pages in place, %d read; the VMM had %d KiB, has %d KiB", in, pages, good, before, resident(t))

			// The client's way through the VMM gives what the guest would find.
			memory := kvmaccess.NewMemory(c, vm)
			zeros := make([]byte, 3*tinyvm.Page4K)
			got := bytes.Repeat([]byte{0xff}, len(zeros))
			for _, off := range []uint64{0, gone - uint64(len(zeros)), touched, size - uint64(len(zeros))} {
				if err := memory.ReadPhysical(t.Context(), gpa+off, got); err != nil || !bytes.Equal(got, zeros) {
					t.Errorf("what is gone at +%#x, through the VMM: %v, or no zeros", off, err)
				}
			}
			if err := memory.ReadPhysical(t.Context(), gpa+gone-100, got[:200]); err != nil ||
				!bytes.Equal(got[:200], append(make([]byte, 100), pattern(gpa+gone, 100)...)) {
				t.Errorf("half gone, half there: %v, or other bytes", err)
			}
		})
	}
}

// swapOn gives the host a disk to swap to, of memory that is not swapped
// itself: a file in a ramfs, behind a loop device, which is a module with stock
// kernels.
func swapOn(t *testing.T, size int) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "ramfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The kernel may take its time to let go of the file.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	f, err := os.Create(filepath.Join(dir, "swap"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// linux/swap.h, union swap_header: version 1, last page, magic.
	header := make([]byte, 4096)
	binary.LittleEndian.PutUint32(header[1024:], 1)
	binary.LittleEndian.PutUint32(header[1028:], uint32(size/4096-1))
	copy(header[4086:], "SWAPSPACE2")
	if _, err := f.Write(header); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/sys/block/loop0"); errors.Is(err, fs.ErrNotExist) {
		if out, err := exec.Command("modprobe", "loop").CombinedOutput(); err != nil {
			t.Fatalf("modprobe loop: %v: %s", err, out)
		}
	}
	const device = "/dev/loop0"
	loop, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	// The last use of the device ends it.
	defer loop.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &config); err != nil {
		t.Fatal(err)
	}
	name := append([]byte(device), 0)
	swap := func(trap uintptr) {
		t.Helper()
		if _, _, errno := unix.Syscall(trap, uintptr(unsafe.Pointer(&name[0])), 0, 0); errno != 0 {
			t.Fatalf("swap on or off: %v", errno)
		}
	}
	swap(unix.SYS_SWAPON)
	t.Cleanup(func() { swap(unix.SYS_SWAPOFF) })
}

// mapped tells of each page whether this process' page tables have it. What is
// being swapped out, or still in the swap cache, is in memory, but not there.
func mapped(t *testing.T, p []byte) []bool {
	t.Helper()
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	entries := make([]byte, len(p)/tinyvm.Page4K*8)
	if _, err := f.ReadAt(entries, int64(uintptr(unsafe.Pointer(&p[0])))/tinyvm.Page4K*8); err != nil {
		t.Fatal(err)
	}
	in := make([]bool, len(entries)/8)
	for i := range in {
		in[i] = entries[8*i+7]>>7 == 1
	}
	return in
}

// What was swapped out stays so when it is read; through the VMM it comes back.
func TestSwappedMemory(t *testing.T) {
	const gpa, size = 1 << 30, 4 << 20
	c, k := newClient(t), openKVM(t)
	swapOn(t, 64<<20)
	for _, backing := range []tinyvm.Backing{tinyvm.Anonymous, tinyvm.Memfd} {
		t.Run(backing.String(), func(t *testing.T) {
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
			m := newMemory(t, size, backing)
			t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
			copy(m.Bytes(), pattern(gpa, size))
			setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
			out := func() (n int, pages []bool) {
				pages = mapped(t, m.Bytes())
				for _, p := range pages {
					if !p {
						n++
					}
				}
				return n, pages
			}
			// Swapping out is a wish.
			for range 100 {
				if err := m.Advise(0, size, unix.MADV_PAGEOUT); err != nil {
					t.Fatal(err)
				}
				if n, _ := out(); n > 100 {
					break
				}
			}
			n, pages := out()
			if n <= 100 {
				t.Fatalf("%d pages are out: nothing to be tested", n)
			}
			for page, in := range pages {
				got, err := c.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: gpa + uint64(page)*tinyvm.Page4K, Length: 64})
				switch {
				case err == nil && bytes.Equal(got[0].Data, pattern(gpa+uint64(page)*tinyvm.Page4K, 64)):
				case errors.Is(err, kvmaccess.ErrNotResident):
					continue
				default:
					t.Fatalf("page %d, in place %t: %v, or other bytes", page, in, err)
				}
				if !in {
					t.Errorf("page %d is out, but was read", page)
				}
			}
			if after, _ := out(); after != n {
				t.Errorf("%d pages were out before reading, %d after", n, after)
			}
			t.Logf("%d of %d pages out", n, len(pages))
			all := make([]byte, size)
			if err := kvmaccess.NewMemory(c, vm).ReadPhysical(t.Context(), gpa, all); err != nil || !bytes.Equal(all, pattern(gpa, size)) {
				t.Errorf("all of it, through the VMM where it is out: %v, or other bytes", err)
			}
		})
	}
}

// Memslots change while they are read: each page is what it was before or
// after, or the error is clear.
func TestSlotsChangeWhileRead(t *testing.T) {
	const gpa, size, rounds = 1 << 30, 32 << 10, 200
	// Two places, and two memories.
	const other = gpa + 4*size
	c, k := newClient(t), openKVM(t)
	for _, tt := range []struct {
		name string
		// change is called again and again.
		change func(g *tinyvm.Guest, m [2]*tinyvm.Memory, round int) error
		stays  bool // the slot's first place is never empty
	}{
		{"moved", func(g *tinyvm.Guest, m [2]*tinyvm.Memory, round int) error {
			return g.SetSlot(tinyvm.Slot{Number: 1, GPA: []uint64{other, gpa}[round%2], Size: size, Memory: m[0]})
		}, false},
		{"removed and added", func(g *tinyvm.Guest, m [2]*tinyvm.Memory, round int) error {
			if round%2 == 0 {
				return g.SetSlot(tinyvm.Slot{Number: 1})
			}
			return g.SetSlot(tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m[0]})
		}, false},
		{"replaced", func(g *tinyvm.Guest, m [2]*tinyvm.Memory, round int) error {
			if err := g.SetSlot(tinyvm.Slot{Number: 1}); err != nil {
				return err
			}
			return g.SetSlot(tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m[(round+1)%2]})
		}, false},
		{"read-only and removed", func(g *tinyvm.Guest, m [2]*tinyvm.Memory, round int) error {
			if err := g.SetSlot(tinyvm.Slot{Number: 1}); err != nil {
				return err
			}
			return g.SetSlot(tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m[0], Flags: tinyvm.SlotReadonly * uint32(round%2)})
		}, false},
		{"logged", func(g *tinyvm.Guest, m [2]*tinyvm.Memory, round int) error {
			return g.SetSlot(tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m[0], Flags: tinyvm.SlotLogDirty * uint32((round+1)%2)})
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
			var m [2]*tinyvm.Memory
			for i := range m {
				m[i] = newMemory(t, size, tinyvm.Anonymous)
				for page := range size / tinyvm.Page4K {
					copy(m[i].Bytes()[page*tinyvm.Page4K:], bytes.Repeat([]byte{byte(1 + 16*i + page)}, tinyvm.Page4K))
				}
			}
			t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
			setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m[0]})
			if err := g.Tables.Map(0x40000000, gpa, 8*size&^(tinyvm.Page4K-1), tinyvm.Page4K, 0); err != nil {
				t.Fatal(err)
			}
			started(t, g)
			defer stopped(t, g)

			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			var mu sync.Mutex
			outcomes := map[string]int{}
			for reader := range 2 {
				rc := newClient(t)
				wg.Go(func() {
					for n := 0; ctx.Err() == nil; n++ {
						// Across pages, at both places.
						off := uint64(n%5) * 1000
						base := []uint64{gpa, other}[n/5%2]
						length := uint32(3*tinyvm.Page4K + n%100)
						var got []kvmaccess.RangeData
						var err error
						if reader == 0 {
							got, err = rc.ReadPhysical(t.Context(), vm.ID, kvmaccess.Range{Address: base + off, Length: length})
						} else {
							got, err = rc.ReadVirtual(t.Context(), vm.ID, 0, 0, kvmaccess.Range{Address: base - gpa + 0x40000000 + off, Length: length})
						}
						outcome := "read"
						switch {
						case err == nil:
							err = wholePages(got[0].Data, off)
							if err != nil {
								t.Error(err)
								return
							}
						case errors.Is(err, kvmaccess.ErrNoMemslot) && (!tt.stays || base == other):
							outcome = "no memslot"
						case errors.Is(err, kvmaccess.ErrUnsettled):
							outcome = "vCPU unsettled"
						default:
							t.Error(err)
							return
						}
						mu.Lock()
						outcomes[outcome]++
						mu.Unlock()
					}
				})
			}
			shown := func() bool {
				mu.Lock()
				defer mu.Unlock()
				return outcomes["read"] > 0
			}
			round := 0
			for late := time.Now().Add(patience * 5 * time.Second); round < rounds || !shown() && time.Now().Before(late); round++ {
				if err := tt.change(g, m, round); err != nil {
					t.Error(err)
					break
				}
			}
			cancel()
			wg.Wait()
			t.Logf("%d changes: %v", round, outcomes)
			if outcomes["read"] == 0 {
				t.Error("nothing was ever read: nothing is shown")
			}
		})
	}
}

// wholePages checks that each page in data, which begins at offset in its slot,
// is of one of the two memories of TestSlotsChangeWhileRead.
func wholePages(data []byte, offset uint64) error {
	for i, b := range data {
		page := (offset + uint64(i)) / tinyvm.Page4K
		if b != byte(1+page) && b != byte(17+page) {
			return fmt.Errorf("byte %d of a read at +%#x is %#x: of no memory", i, offset, b)
		}
		if at := offset + uint64(i); at%tinyvm.Page4K != 0 && i > 0 && data[i-1] != b {
			return fmt.Errorf("byte %d of a read at +%#x is %#x, the one before it in the same page %#x", i, offset, b, data[i-1])
		}
	}
	return nil
}
