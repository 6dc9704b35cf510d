// SPDX-License-Identifier: MIT

package cache

import (
	"fmt"
	"slices"
	"strings"
)

// Suite is a Debian suite whose stock packages make a KVM host.
type Suite struct {
	// Name is the suite as the package archive calls it, or Release is.
	Name    string
	Release string `json:",omitempty"`
	// Kernel is that of the hosts; nil: the stock one, which the guests have
	// in any case.
	Kernel *Kernel `json:",omitempty"`
	// Packages make the host: its kernel, that kernel's headers and
	// compiler, a VMM and a busybox for the guests.
	Packages []string
	// Pockets are the further suites that the archive keeps beside Name;
	// "-security" lies on an archive of its own.
	Pockets []string
	// AptOptions are apt.conf(5) lines for the making of the root.
	AptOptions []string `json:",omitempty"`
	// HostModules are what the emulated host needs to find its root file
	// system, GuestModules what a guest needs to talk to its owner, both in
	// load order. Those built in are left out.
	HostModules, GuestModules []string
}

var (
	packages = []string{
		"linux-image-cloud-amd64", "linux-headers-cloud-amd64",
		"qemu-system-x86", "kmod", "make", "busybox-static", "procps",
	}
	// bochsPackages are what boots an Intel host, of whatever suite.
	bochsPackages = []string{
		"bochs", "bochs-term", "bochsbios", "vgabios", "isolinux", "syslinux-common", "xorriso",
	}
	hostModules = []string{
		"virtio_pci", "virtio_blk", "virtio_console", // what QEMU has
		"ata_piix", "sd_mod", // what Bochs has
		"squashfs", "overlay",
	}
	guestModules = []string{"virtio_mmio", "virtio_console", "msr"}
)

var suites = []Suite{
	{
		Name:         "bookworm", // Linux 6.1
		Packages:     packages,
		Pockets:      []string{"-updates", "-security"},
		HostModules:  hostModules,
		GuestModules: guestModules,
	},
	{
		Name: "trixie", // Linux 6.12
		// Kbuild checks comments by scripts/kernel-doc, for which perl-base
		// lacks Pod::Usage.
		Packages:     slices.Concat(packages, bochsPackages, []string{"perl"}),
		Pockets:      []string{"-updates", "-security"},
		HostModules:  hostModules,
		GuestModules: guestModules,
	},
	{
		Name:     "sid", // Linux 7.2
		Packages: packages,
		// The Release file of a mirror that is not brought up to date may
		// have passed its date; it is signed all the same.
		AptOptions:   []string{`Acquire::Check-Valid-Until "false"`},
		HostModules:  hostModules,
		GuestModules: guestModules,
	},
	{
		Name:    "sanitizers", // Linux 6.12 that looks for mistakes; guests as in trixie
		Release: "trixie",
		// Its build directory calls the compiler by no more than gcc.
		Packages: slices.Concat(packages, []string{"perl", "gcc"}),
		Pockets:  []string{"-updates", "-security"},
		Kernel: &Kernel{
			Source: "linux-source-6.12",
			Packages: []string{
				"gcc", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "dwarves",
				"xz-utils", "cpio", "rsync", "kmod", "perl", "python3-minimal",
			},
			Config: sanitizersConfig,
		},
		HostModules:  hostModules,
		GuestModules: guestModules,
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

// release is what the package archive calls the suite.
func (s Suite) release() string {
	if s.Release != "" {
		return s.Release
	}
	return s.Name
}
