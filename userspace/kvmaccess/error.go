// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// reason is a class of failures that the module reports by one errno.
type reason struct {
	errno unix.Errno
	text  string
}

func (r *reason) Error() string { return "kvmaccess: " + r.text }

// Unwrap lets errors.Is find the errno, and with it fs.ErrPermission for
// ErrPermission and the like.
func (r *reason) Unwrap() error { return r.errno }

// Why a request failed; test for them with errors.Is.
var (
	ErrNoVM        error = &reason{unix.ENOENT, "no VM has this id (any more)"}
	ErrNoVCPU      error = &reason{unix.ENXIO, "the VM has no such vCPU or memslot"}
	ErrDying       error = &reason{unix.ESHUTDOWN, "the VM is being destroyed"}
	ErrNoMemslot   error = &reason{unix.EFAULT, "the guest-physical address lies in no memslot"}
	ErrNotMapped   error = &reason{unix.EADDRNOTAVAIL, "the guest's page tables do not map the address"}
	ErrNotResident error = &reason{unix.ENODATA, "the page is not resident in the host"}
	ErrProtected   error = &reason{unix.EACCES, "the guest's state is encrypted"}
	ErrUnsettled   error = &reason{unix.EAGAIN, "did not come to rest: ask again"}
	ErrUnsupported error = &reason{unix.EOPNOTSUPP, "this host lacks what the command needs"}
	ErrInvalid     error = &reason{unix.EINVAL, "invalid request"}
	ErrTooBig      error = &reason{unix.E2BIG, "more ranges or bytes than a request may ask for"}
	ErrPermission  error = &reason{unix.EPERM, "not permitted: CAP_SYS_ADMIN in the initial user namespace is needed"}
	ErrTruncated   error = &reason{unix.EMSGSIZE, "the reply outgrew its buffer"}
)

var reasons = []error{
	ErrNoVM, ErrNoVCPU, ErrDying, ErrNoMemslot, ErrNotMapped, ErrNotResident,
	ErrProtected, ErrUnsettled, ErrUnsupported, ErrInvalid, ErrTooBig,
	ErrPermission, ErrTruncated,
}

// ErrNoModule says that the generic netlink family is not there. It wraps
// os.ErrNotExist.
var ErrNoModule error = noModule{}

type noModule struct{}

func (noModule) Error() string {
	return "kvmaccess: the kernel module is not loaded: run modprobe kvmaccess (or insmod kvmaccess.ko)"
}

func (noModule) Unwrap() error { return os.ErrNotExist }

// ErrReloaded says that the module was loaded anew since the Client was made.
// VM ids from before mean nothing now: make a new Client and list again.
var ErrReloaded = errors.New("kvmaccess: the kernel module was reloaded: open a new client and list the VMs again")

// ErrEventsLost says that events came faster than they were received and some
// were dropped. The Subscription goes on; list the VMs again.
var ErrEventsLost = errors.New("kvmaccess: VM events were lost: list the VMs again")

// VersionError says that the module speaks another version of the contract
// than this package.
type VersionError struct {
	Client uint8 // what this package speaks
	Module uint8 // what the loaded module speaks
}

// Error tells both versions and what to do.
func (e *VersionError) Error() string {
	older := "the module"
	if e.Client < e.Module {
		older = "this program"
	}
	return fmt.Sprintf("kvmaccess: the loaded module speaks version %d of the contract, this program version %d: update %s",
		e.Module, e.Client, older)
}

// Error is a failed request. errors.Is finds the Err... value of its Errno,
// and the Errno itself.
type Error struct {
	Op      string     // command, such as "vcpu_get"
	VM      VMID       // 0: the request names no VM
	Errno   unix.Errno // see kmod/uapi/kvmaccess.h
	Message string     // the module's explanation (extended acknowledgement), or ""
	Address uint64     // where reading memory failed, or where the unreadable range begins; 0 for all other failures
}

// Error returns the command, the VM and the module's explanation or, without
// one, what the errno means.
func (e *Error) Error() string {
	var sb strings.Builder
	sb.WriteString("kvmaccess: ")
	sb.WriteString(e.Op)
	if e.VM != 0 {
		fmt.Fprintf(&sb, ": vm %d", e.VM)
	}
	if e.Address != 0 {
		fmt.Fprintf(&sb, ": %#x", e.Address)
	}
	sb.WriteString(": ")
	switch {
	case e.Message != "":
		sb.WriteString(strings.TrimPrefix(e.Message, "kvmaccess: "))
	default:
		sb.WriteString(errnoText(e.Errno))
	}
	if name := unix.ErrnoName(e.Errno); name != "" {
		fmt.Fprintf(&sb, " (%s)", name)
	}
	return sb.String()
}

// Unwrap returns the Errno.
func (e *Error) Unwrap() error { return e.Errno }

// Is reports whether target is the Err... value of this error's Errno.
func (e *Error) Is(target error) bool {
	r, ok := target.(*reason)
	return ok && r.errno == e.Errno
}

func errnoText(errno unix.Errno) string {
	for _, err := range reasons {
		if r := err.(*reason); r.errno == errno {
			return r.text
		}
	}
	return errno.Error()
}

// wireError says that a message from the module breaks the contract.
func wireError(format string, args ...any) error {
	return fmt.Errorf("kvmaccess: malformed message from the module: "+format, args...)
}
