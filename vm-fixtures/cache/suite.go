// SPDX-License-Identifier: MIT

package cache

import (
	"fmt"
	"slices"
	"strings"
)

// Suite is a Debian suite whose stock packages make a KVM host.
type Suite struct {
	// Name is the suite as the package archive calls it.
	Name string
	// Packages make the host: its kernel, that kernel's headers and
	// compiler, a VMM and a busybox for the guests.
	Packages []string
	// Pockets are the further suites that the archive keeps beside Name;
	// "-security" lies on an archive of its own.
	Pockets []string
	// HostModules are what the emulated host needs to find its root file
	// system, GuestModules what a guest needs to talk to its owner, both in
	// load order. Those built in, or unknown to this kernel, are left out.
	HostModules, GuestModules []string
}

var suites = []Suite{
	{
		Name: "bookworm",
		Packages: []string{
			"linux-image-cloud-amd64", "linux-headers-cloud-amd64",
			"qemu-system-x86", "kmod", "make", "busybox-static", "procps",
		},
		Pockets:      []string{"-updates", "-security"},
		HostModules:  []string{"virtio_pci", "virtio_blk", "virtio_console", "squashfs", "overlay"},
		GuestModules: []string{"virtio_mmio", "virtio_console", "msr"},
	},
}

// SuiteNamed returns the suite of that name, or an error that lists those there are.
func SuiteNamed(name string) (Suite, error) {
	i := slices.IndexFunc(suites, func(s Suite) bool { return s.Name == name })
	if i < 0 {
		var names []string
		for _, s := range suites {
			names = append(names, s.Name)
		}
		return Suite{}, fmt.Errorf("no suite %q: there are %s", name, strings.Join(names, ", "))
	}
	return suites[i], nil
}
