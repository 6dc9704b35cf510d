// SPDX-License-Identifier: MIT

package tinyvm

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Capabilities of KVM that a test may ask for: KVM_CAP_*.
const (
	CapReadonlyMem       = 81
	CapX86SMM            = 117
	CapMultiAddressSpace = 118
)

// KVM is an open /dev/kvm.
type KVM struct {
	fd      int
	runSize int
	cpuid   []CPUID
}

// CPUID is what the CPUID instruction answers to one leaf: struct
// kvm_cpuid_entry2.
type CPUID struct {
	Function           uint32 // EAX of the question
	Index              uint32 // ECX of the question, where it matters
	Flags              uint32 // KVM_CPUID_FLAG_*
	EAX, EBX, ECX, EDX uint32
	_                  [3]uint32
}

const (
	cpuidHeader  = 8
	cpuidEntries = 256
)

// cpuidList is struct kvm_cpuid2.
type cpuidList struct {
	n, _    uint32
	entries [cpuidEntries]CPUID
}

// Open opens /dev/kvm.
func Open() (*KVM, error) {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/kvm", Err: err}
	}
	k := &KVM{fd: fd}
	if err := k.init(); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return k, nil
}

func (k *KVM) init() error {
	version, err := ioctl(k.fd, getAPIVersion, 0)
	if err != nil {
		return err
	}
	if version != 12 {
		return fmt.Errorf("KVM has version %d of its interface, want 12", version)
	}
	if k.runSize, err = ioctl(k.fd, getVCPUMmapSize, 0); err != nil {
		return err
	}
	list := cpuidList{n: cpuidEntries}
	if _, err := ioctlAt(k.fd, getSupportedCPUID, &list); err != nil {
		return err
	}
	k.cpuid = append(k.cpuid, list.entries[:list.n]...)
	return nil
}

// Close closes /dev/kvm; VMs live on.
func (k *KVM) Close() error { return unix.Close(k.fd) }

// Has returns what KVM says of a capability: 0 means that it lacks it.
func (k *KVM) Has(capability int) (int, error) {
	return ioctl(k.fd, checkExtension, uintptr(capability))
}

// CPUID returns what KVM can offer to a guest, in a new slice.
func (k *KVM) CPUID() []CPUID { return append([]CPUID(nil), k.cpuid...) }

// HasLA57 reports whether guests can have 5-level paging (CPUID leaf 7, ECX
// bit 16: Intel SDM vol. 2, CPUID).
func (k *KVM) HasLA57() bool {
	for _, e := range k.cpuid {
		if e.Function == 7 && e.Index == 0 {
			return e.ECX>>16&1 == 1
		}
	}
	return false
}

// HasPage1G reports whether guests can have pages of 1 GiB (CPUID leaf
// 0x80000001, EDX bit 26).
func (k *KVM) HasPage1G() bool {
	for _, e := range k.cpuid {
		if e.Function == 0x80000001 {
			return e.EDX>>26&1 == 1
		}
	}
	return false
}
