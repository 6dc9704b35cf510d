// SPDX-License-Identifier: MIT

// Package tinyvm is a VMM of a few hundred lines over the raw ioctls of
// /dev/kvm. It has no devices and no firmware: its guests are a few
// instructions long, begin in the CPU mode that a test wants, and everything
// about them is known. What it can do that a real VMM does not offer: set and
// get every register while the vCPU is stopped, keep a vCPU in a condition of
// choice, move memslots under a running guest, and start a thousand VMs.
//
// Linux only, x86-64 only. The ioctls and their structures are those of
// Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h in the kernel's
// source.
package tinyvm
