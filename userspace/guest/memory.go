// SPDX-License-Identifier: MIT

// Package guest knows what the bytes of a guest mean: page tables, descriptor
// tables, and of a Linux kernel, which Attach finds in memory, its symbols, its
// types and its objects. It reads through small interfaces that a live VM, a
// recorded snapshot and a memory dump all satisfy.
//
// All that a guest holds may be made to mislead: whatever is read is checked and
// bounded, and errors name the object.
package guest

import "context"

// Memory is the guest-physical memory of a VM.
type Memory interface {
	// ReadPhysical fills p from guest-physical address gpa on, or returns an
	// error and leaves p undefined.
	ReadPhysical(ctx context.Context, gpa uint64, p []byte) error
}
