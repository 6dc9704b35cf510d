// SPDX-License-Identifier: MIT

// Package stress puts a loaded kvmaccess module under loads that no sane
// program causes: malformed messages by the million, VMs that come and go by
// the thousand while they are read, loading and unloading amid requests,
// allocations that fail, a guest that rewrites its own tables as fast as it
// can. What counts is what the host's kernel says meanwhile, so all of it is
// worth most on a kernel with sanitizers; each part checks as well that the
// module still answers right and that the host's memory stays flat.
//
// It runs on a KVM host, as root.
package stress
