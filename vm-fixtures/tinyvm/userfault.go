// SPDX-License-Identifier: MIT

package tinyvm

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// uffdioAPI, uffdioRegister and uffdRange are structures of
// linux/userfaultfd.h; uffdioZeropage is like uffdioRegister.
type uffdioAPI struct{ api, features, ioctls uint64 }

type uffdRange struct{ start, length uint64 }

type uffdioRegister struct {
	uffdRange
	mode, ioctls uint64
}

const (
	uffdType        = 0xaa
	uffdAPI         = 0xaa
	uffdModeMissing = 1
)

func uffdioRequest(name string, number, size uintptr) request {
	return request{name, (iocRead|iocWrite)<<30 | size<<16 | uffdType<<8 | number}
}

// Hold makes whoever touches a page from offset that is not in place wait, the
// guest included, until release is called; then each is given a page of zeros.
// Offset and length are multiples of 4096; the memory is not of huge pages.
func (m *Memory) Hold(offset, length int) (release func() error, err error) {
	n, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return nil, fmt.Errorf("userfaultfd: %w", errno)
	}
	fd := int(n)
	api := uffdioAPI{api: uffdAPI}
	if _, err = ioctlAt(fd, uffdioRequest("UFFDIO_API", 0x3f, unsafe.Sizeof(api)), &api); err == nil {
		r := uffdioRegister{uffdRange: uffdRange{m.HVA() + uint64(offset), uint64(length)}, mode: uffdModeMissing}
		_, err = ioctlAt(fd, uffdioRequest("UFFDIO_REGISTER", 0, unsafe.Sizeof(r)), &r)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	// Without its descriptor nothing waits any more; who does, tries again.
	return func() error { return unix.Close(fd) }, nil
}
