// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// Many bytes come from the VMM, few from the module, and both are what the
// guest has. What is not resident stays so unless it is asked for.
func TestBulkReads(t *testing.T) {
	const gpa, size = 1 << 30, 16 << 20
	const gone = size / 4 // of the second quarter nothing is resident
	c, k := newClient(t), openKVM(t)
	for _, backing := range []tinyvm.Backing{tinyvm.Anonymous, tinyvm.Memfd} {
		t.Run(backing.String(), func(t *testing.T) {
			g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
			m := newMemory(t, size, backing)
			t.Cleanup(func() { setSlot(t, g, tinyvm.Slot{Number: 1}) })
			setSlot(t, g, tinyvm.Slot{Number: 1, GPA: gpa, Size: size, Memory: m})
			started(t, g)
			defer stopped(t, g)
			copy(m.Bytes()[:gone], pattern(gpa, gone))
			copy(m.Bytes()[2*gone:], pattern(gpa+2*gone, 2*gone))
			memory := kvmaccess.NewMemory(c, vm)
			defer memory.Close()
			resident := memory.Resident()
			read := func(off, n uint64) error {
				t.Helper()
				p := make([]byte, n)
				err := resident.ReadPhysical(t.Context(), gpa+off, p)
				if err == nil && !bytes.Equal(p, pattern(gpa+off, int(n))) {
					t.Errorf("%d bytes at +%#x: wrong", n, off)
				}
				return err
			}
			rss := smaps(t, m.HVA(), "Rss")
			for _, n := range []uint64{1, 4096, kvmaccess.BulkBytes - 1, kvmaccess.BulkBytes, kvmaccess.MaxBytes + 1, 1 << 20, gone - 1234} {
				for _, off := range []uint64{0, 1234, 2 * gone, 3*gone + 77} {
					if err := read(off, min(n, size-off, 2*gone)); off+n <= gone && err != nil || off >= 2*gone && err != nil {
						t.Errorf("%d bytes at +%#x: %v", n, off, err)
					}
				}
			}
			for _, off := range []uint64{gone - 4096, gone, 2*gone - 1} {
				if err := read(off, 1<<20); !errors.Is(err, kvmaccess.ErrNotResident) {
					t.Errorf("1 MiB at +%#x: %v, want %v", off, err, kvmaccess.ErrNotResident)
				}
			}
			if now := smaps(t, m.HVA(), "Rss"); now != rss {
				t.Errorf("the guest had %d KiB, and %d KiB after it was read", rss, now)
			}
			s := memory.Stats()
			if s.Bulk.Bytes < gone || s.Netlink.Bytes == 0 || s.Cold.Bytes != 0 || s.Barred != "" {
				t.Errorf("%+v", s)
			}
			p := make([]byte, 1<<20)
			if err := memory.ReadPhysical(t.Context(), gpa+gone, p); err != nil || !bytes.Equal(p, make([]byte, len(p))) {
				t.Errorf("what was never touched: %v, or no zeros", err)
			}
			if got := memory.Stats().Cold.Bytes; got != uint64(len(p)) {
				t.Errorf("%d bytes faulted in, want %d", got, len(p))
			}

			for _, n := range []int{4 << 10, 16 << 10, 64 << 10, 1 << 20} {
				var took [2]time.Duration
				dst := []kvmaccess.RangeData{{Range: kvmaccess.Range{Address: gpa + 2*gone, Length: uint32(n)}}}
				p := make([]byte, n)
				const rounds = 20
				for range rounds {
					begin := time.Now()
					if err := c.ReadPhysicalInto(t.Context(), vm.ID, dst); err != nil {
						t.Fatal(err)
					}
					took[0] += time.Since(begin)
					begin = time.Now()
					if err := resident.ReadPhysical(t.Context(), gpa+2*gone, p); err != nil {
						t.Fatal(err)
					}
					took[1] += time.Since(begin)
				}
				t.Logf("%7d bytes: netlink %v, as Memory chooses %v", n, took[0]/rounds, took[1]/rounds)
			}
		})
	}
}

// A program in another pid namespace knows VMMs by other numbers, and does
// without them.
func TestBulkInPIDNamespace(t *testing.T) {
	web := sharedGuest(t, "web1")
	c := newClient(t)
	vm := vmOf(t, c, web)
	cmd := exec.CommandContext(testContext(t), "/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+roleReader, fmt.Sprintf("%s=%d", readerEnv, vm.ID))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	var s kvmaccess.MemoryStats
	if err := json.Unmarshal(out.Bytes(), &s); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	if s.Netlink.Bytes != 1<<20 || s.Bulk.Bytes != 0 || s.Cold.Bytes != 0 || s.Barred == "" {
		t.Errorf("%+v", s)
	}
}

// roleReader reads the first MiB of a VM's memory behind 1 MiB, and says how.
const (
	roleReader = "reader"
	readerEnv  = "KVMACCESS_TEST_READ"
)

func playReader() error {
	c, err := kvmaccess.New()
	if err != nil {
		return err
	}
	defer c.Close()
	var id kvmaccess.VMID
	if _, err := fmt.Sscan(os.Getenv(readerEnv), &id); err != nil {
		return err
	}
	vm, err := c.VM(context.Background(), id)
	if err != nil {
		return err
	}
	m := kvmaccess.NewMemory(c, vm)
	p := make([]byte, 1<<20)
	if err := m.ReadPhysical(context.Background(), 1<<20, p); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(m.Stats())
}
