// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// process is a VMM's address space.
type process struct {
	pid int
	// pagemap stays that of the address space it was opened of: once that is
	// gone it is empty, whoever has the pid then.
	pagemap interface {
		io.ReaderAt
		io.Closer
	}
	readv func(pid int, p []byte, hva uint64) (int, error)
}

// initialPIDs is the initial pid namespace's inode (PROC_PID_INIT_INO in
// include/linux/proc_ns.h).
const initialPIDs = "pid:[4026531836]"

// openProcess opens the process that has a pid in the initial pid namespace.
func openProcess(pid int) (*process, error) {
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err == nil && ns != initialPIDs {
		err = errors.New("this program runs in another pid namespace than the initial one, and VMMs have other pids in it")
	}
	if err != nil {
		return nil, err
	}
	return newProcess(pid)
}

func newProcess(pid int) (*process, error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	f, err := os.Open(dir + "/pagemap")
	switch {
	case errors.Is(err, os.ErrNotExist):
		if _, gone := os.Stat(dir); gone == nil {
			return nil, errors.New("this kernel has no /proc/PID/pagemap (CONFIG_PROC_PAGE_MONITOR)")
		}
		return nil, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("process %d: %w: CAP_SYS_PTRACE is needed", pid, err)
	case err != nil:
		return nil, err
	}
	return &process{pid: pid, pagemap: f, readv: processRead}, nil
}

func (p *process) close() error { return p.pagemap.Close() }

const (
	pageSize = 4096
	// pagemapPages is how many pages are asked about at once: 2 KiB of
	// pagemap tell of 1 MiB.
	pagemapPages = 256
	// pagemapPresent says that a page is mapped (pagemap in the kernel's
	// Documentation/admin-guide/mm).
	pagemapPresent = 1 << 63
)

// resident says of how many bytes from hva on, n at most, the pages are mapped
// in the process, or are not.
func (p *process) resident(hva uint64, n int) (run int, resident bool, err error) {
	var buf [8 * pagemapPages]byte
	for run < n {
		at := hva + uint64(run)
		pages := min((at%pageSize+uint64(n-run)+pageSize-1)/pageSize, pagemapPages)
		got, err := p.pagemap.ReadAt(buf[:8*pages], int64(at/pageSize*8))
		if got < 8 {
			if err == nil || errors.Is(err, io.EOF) {
				err = unix.ESRCH
			}
			return 0, false, fmt.Errorf("process %d: pagemap: %w", p.pid, err)
		}
		for b := buf[:got&^7]; len(b) > 0; b = b[8:] {
			present := binary.LittleEndian.Uint64(b)&pagemapPresent != 0
			switch {
			case run == 0:
				resident = present
			case present != resident:
				return run, resident, nil
			}
			run = min(run+pageSize-int((hva+uint64(run))%pageSize), n)
		}
	}
	return run, resident, nil
}

// read copies the process' memory at hva, at least one byte, into p. It fails
// if the process is not there any more, in which case the bytes may be
// another's.
func (p *process) read(b []byte, hva uint64) (int, error) {
	n, err := p.readv(p.pid, b, hva)
	if err == nil && n == 0 {
		err = unix.EFAULT
	}
	if err != nil {
		return 0, err
	}
	var entry [8]byte
	if got, err := p.pagemap.ReadAt(entry[:], 0); got < len(entry) {
		if err == nil || errors.Is(err, io.EOF) {
			err = unix.ESRCH
		}
		return 0, err
	}
	return n, nil
}

func processRead(pid int, p []byte, hva uint64) (int, error) {
	local := []unix.Iovec{{Base: &p[0]}}
	local[0].SetLen(len(p))
	remote := []unix.RemoteIovec{{Base: uintptr(hva), Len: len(p)}}
	return unix.ProcessVMReadv(pid, local, remote, 0)
}
