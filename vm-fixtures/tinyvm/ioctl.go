// SPDX-License-Identifier: MIT

package tinyvm

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kvmio is the ioctl type of KVM: KVMIO.
const kvmio = 0xae

// Directions of ioctl numbers, as seen from user space: asm-generic/ioctl.h.
const (
	iocNone  = 0
	iocWrite = 1
	iocRead  = 2
)

// request is an ioctl: its number and, for errors, its name.
type request struct {
	name string
	nr   uintptr
}

func newRequest(name string, direction, number, size uintptr) request {
	return request{name: name, nr: direction<<30 | size<<16 | kvmio<<8 | number}
}

var (
	getAPIVersion     = newRequest("KVM_GET_API_VERSION", iocNone, 0x00, 0)
	createVM          = newRequest("KVM_CREATE_VM", iocNone, 0x01, 0)
	checkExtension    = newRequest("KVM_CHECK_EXTENSION", iocNone, 0x03, 0)
	getVCPUMmapSize   = newRequest("KVM_GET_VCPU_MMAP_SIZE", iocNone, 0x04, 0)
	getSupportedCPUID = newRequest("KVM_GET_SUPPORTED_CPUID", iocRead|iocWrite, 0x05, cpuidHeader)
	createVCPU        = newRequest("KVM_CREATE_VCPU", iocNone, 0x41, 0)
	setMemoryRegion   = newRequest("KVM_SET_USER_MEMORY_REGION", iocWrite, 0x46, unsafe.Sizeof(memoryRegion{}))
	setTSSAddress     = newRequest("KVM_SET_TSS_ADDR", iocNone, 0x47, 0)
	setIdentityMap    = newRequest("KVM_SET_IDENTITY_MAP_ADDR", iocWrite, 0x48, 8)
	createIRQChip     = newRequest("KVM_CREATE_IRQCHIP", iocNone, 0x60, 0)
	run               = newRequest("KVM_RUN", iocNone, 0x80, 0)
	getRegs           = newRequest("KVM_GET_REGS", iocRead, 0x81, unsafe.Sizeof(Regs{}))
	setRegs           = newRequest("KVM_SET_REGS", iocWrite, 0x82, unsafe.Sizeof(Regs{}))
	getSRegs          = newRequest("KVM_GET_SREGS", iocRead, 0x83, unsafe.Sizeof(SRegs{}))
	setSRegs          = newRequest("KVM_SET_SREGS", iocWrite, 0x84, unsafe.Sizeof(SRegs{}))
	getMSRs           = newRequest("KVM_GET_MSRS", iocRead|iocWrite, 0x88, msrHeader)
	setMSRs           = newRequest("KVM_SET_MSRS", iocWrite, 0x89, msrHeader)
	setCPUID          = newRequest("KVM_SET_CPUID2", iocWrite, 0x90, cpuidHeader)
	setMPState        = newRequest("KVM_SET_MP_STATE", iocWrite, 0x99, 4)
	getVCPUEvents     = newRequest("KVM_GET_VCPU_EVENTS", iocRead, 0x9f, unsafe.Sizeof(VCPUEvents{}))
	setVCPUEvents     = newRequest("KVM_SET_VCPU_EVENTS", iocWrite, 0xa0, unsafe.Sizeof(VCPUEvents{}))
	getDebugRegs      = newRequest("KVM_GET_DEBUGREGS", iocRead, 0xa1, unsafe.Sizeof(DebugRegs{}))
	setDebugRegs      = newRequest("KVM_SET_DEBUGREGS", iocWrite, 0xa2, unsafe.Sizeof(DebugRegs{}))
	signalMSI         = newRequest("KVM_SIGNAL_MSI", iocWrite, 0xa5, unsafe.Sizeof(msi{}))
	raiseSMI          = newRequest("KVM_SMI", iocNone, 0xb7, 0)
)

// ioctl returns what the kernel returned. A signal makes it begin again, but
// for run, whose caller wants to know.
func ioctl(fd int, r request, arg uintptr) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), r.nr, arg)
		if again, err := r.outcome(errno); !again {
			return int(n), err
		}
	}
}

// ioctlAt is ioctl with the address of a structure.
func ioctlAt[T any](fd int, r request, arg *T) (int, error) {
	for {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), r.nr, uintptr(unsafe.Pointer(arg)))
		if again, err := r.outcome(errno); !again {
			return int(n), err
		}
	}
}

func (r request) outcome(errno unix.Errno) (again bool, err error) {
	switch {
	case errno == 0:
		return false, nil
	case errno == unix.EINTR && r != run:
		return true, nil
	}
	return false, fmt.Errorf("%s: %w", r.name, errno)
}
