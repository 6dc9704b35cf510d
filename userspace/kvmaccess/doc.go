// SPDX-License-Identifier: MIT

// Package kvmaccess is the client of the kernel module kvmaccess, which
// reaches the state of running KVM guests on their host: memory slots, vCPU
// registers, descriptor tables and memory, without pausing a guest.
//
// A Client asks, over generic netlink:
//
//	c, err := kvmaccess.New()
//	if err != nil {
//		return err // the module is not loaded, say
//	}
//	defer c.Close()
//	vms, err := c.VMs(ctx)
//
// A Subscription tells of VMs that come and go. Memory reads guest-physical
// memory, pages included that the host swapped out. Identify finds a VM's name
// in its VMM's command line.
//
// All of it needs CAP_SYS_ADMIN in the initial user namespace. What the module
// refuses is an *Error with its explanation; errors.Is tells the reasons
// (ErrNoVM, ErrNotMapped, ...) apart. The contract with the module and the
// meaning of each value is in kmod/uapi/kvmaccess.h.
package kvmaccess
