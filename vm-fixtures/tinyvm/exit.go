// SPDX-License-Identifier: MIT

package tinyvm

import (
	"encoding/binary"
	"fmt"
)

// Reason is why KVM_RUN returned: KVM_EXIT_*.
type Reason uint32

// Values of Reason that guests of this package can cause.
const (
	ExitIO            Reason = 2
	ExitHLT           Reason = 5
	ExitMMIO          Reason = 6
	ExitIRQWindow     Reason = 7
	ExitShutdown      Reason = 8
	ExitFailEntry     Reason = 9
	ExitInternalError Reason = 17
)

var reasonNames = map[Reason]string{
	ExitIO: "port access", ExitHLT: "HLT", ExitMMIO: "MMIO", ExitIRQWindow: "interrupt window",
	ExitShutdown: "shutdown (triple fault)", ExitFailEntry: "failed entry", ExitInternalError: "internal error",
}

// String returns what happened, or the number of an unknown reason.
func (r Reason) String() string {
	if s, ok := reasonNames[r]; ok {
		return s
	}
	return fmt.Sprintf("exit %d", uint32(r))
}

// Exit is why KVM_RUN returned, with what goes with it.
type Exit struct {
	Reason  Reason
	Write   bool   // ExitIO, ExitMMIO: the guest writes
	Address uint64 // ExitIO: port; ExitMMIO: guest-physical address
	Data    []byte // ExitIO, ExitMMIO: what it writes, or where to put what it reads
	Detail  uint64 // ExitFailEntry, ExitInternalError: the kernel's reason
}

// String describes the exit.
func (e *Exit) String() string {
	switch e.Reason {
	case ExitIO, ExitMMIO:
		return fmt.Sprintf("%v at %#x, write %t, data %x", e.Reason, e.Address, e.Write, e.Data)
	case ExitFailEntry, ExitInternalError:
		return fmt.Sprintf("%v %#x", e.Reason, e.Detail)
	}
	return e.Reason.String()
}

// Offsets in struct kvm_run.
const (
	runImmediateExit = 1
	runReason        = 8
	runUnion         = 32
)

// exit reads struct kvm_run.
func (v *VCPU) exit() *Exit {
	e := &Exit{Reason: Reason(binary.NativeEndian.Uint32(v.area[runReason:]))}
	u := v.area[runUnion:]
	switch e.Reason {
	case ExitIO:
		e.Write = u[0] == 1
		e.Address = uint64(binary.NativeEndian.Uint16(u[2:]))
		n := uint64(u[1]) * uint64(binary.NativeEndian.Uint32(u[4:]))
		offset := binary.NativeEndian.Uint64(u[8:])
		e.Data = v.area[offset : offset+n]
	case ExitMMIO:
		e.Write = u[20] == 1
		e.Address = binary.NativeEndian.Uint64(u)
		e.Data = u[8 : 8+binary.NativeEndian.Uint32(u[16:])]
	case ExitFailEntry:
		e.Detail = binary.NativeEndian.Uint64(u)
	case ExitInternalError:
		e.Detail = uint64(binary.NativeEndian.Uint32(u))
	}
	return e
}
