// SPDX-License-Identifier: MIT

package cache

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// GuestKernel is a stock kernel that guests can have whatever their host's is.
type GuestKernel struct {
	// Name is what a guest asks for it by.
	Name string
	// Suite says where its packages are; they are unpacked, not installed.
	Suite Suite
}

var guestKernels = []GuestKernel{
	// The archive's own release has no update of its package.
	{Name: "5.10", Suite: guestSuite("bullseye", "linux-image-cloud-amd64")},
	{Name: "6.1", Suite: guestSuite("bookworm", "linux-image-cloud-amd64", "-updates", "-security")},
	{Name: "6.12", Suite: guestSuite("trixie", "linux-image-cloud-amd64", "-updates", "-security")},
	// Its libcrc32c, which nf_tables needs, asks for this one by name alone.
	{Name: "6.12-full", Suite: withModules(guestSuite("trixie", "linux-image-amd64", "-updates", "-security"), "crc32c_generic")},
	{Name: "7.2", Suite: guestSuite("sid", "linux-image-cloud-amd64")},
}

// guestSuite are the packages that the kernel in one of them needs to be a
// guest's, and modules beside those that any guest needs: some that depend on
// others.
func guestSuite(name, kernel string, pockets ...string) Suite {
	return Suite{
		Name: name,
		// base-files has the links /lib and /sbin where /usr is all there is.
		// depmod opens liblzma5 to read modules, but newer ones do not need it.
		Packages: []string{"base-files", kernel, "busybox-static", "liblzma5"},
		Pockets:  pockets,
		// What is older than the archive's last update has passed its date.
		AptOptions: []string{`Acquire::Check-Valid-Until "false"`},
		// virtio_pci is for guests without KVM, which have a PC's timers.
		GuestModules: slices.Concat(guestModules, []string{"virtio_pci", "loop", "dm_mod", "overlay", "fuse", "nf_tables"}),
	}
}

// withModules has the suite's guests load these modules before all others.
func withModules(s Suite, names ...string) Suite {
	s.GuestModules = slices.Concat(names, s.GuestModules)
	return s
}

// GuestKernelNames are those there are, by ascending version.
func GuestKernelNames() []string {
	var names []string
	for _, k := range guestKernels {
		names = append(names, k.Name)
	}
	return names
}

// GuestKernelNamed returns the kernel of that name, or an error that lists
// those there are.
func GuestKernelNamed(name string) (GuestKernel, error) {
	i := slices.IndexFunc(guestKernels, func(k GuestKernel) bool { return k.Name == name })
	if i < 0 {
		return GuestKernel{}, fmt.Errorf("no guest kernel %q: there are %s", name, strings.Join(GuestKernelNames(), ", "))
	}
	return guestKernels[i], nil
}

// guestKernelRecipe changes whenever guests' kernels are made differently.
const guestKernelRecipe = 1

// GuestBoot is what boots a guest.
type GuestBoot struct {
	Release   string // of its kernel, as uname -r says
	Vmlinuz   string
	Initramfs string // as Root.GuestInitramfs
}

// OpenGuestKernel returns the files of a guest's kernel. They are made if they
// are not there, or not what they were when they were completed: that takes
// half a minute and needs root and the package archives.
func OpenGuestKernel(ctx context.Context, k GuestKernel, log *slog.Logger) (GuestBoot, error) {
	base, err := Dir()
	if err != nil {
		return GuestBoot{}, err
	}
	return openGuestKernel(ctx, filepath.Join(base, "guests"), k, log, buildGuestKernel)
}

func openGuestKernel(ctx context.Context, base string, k GuestKernel, log *slog.Logger,
	build func(ctx context.Context, dir string, k GuestKernel, log *slog.Logger) (release string, err error),
) (GuestBoot, error) {
	if err := os.MkdirAll(base, 0o755); err != nil {
		return GuestBoot{}, err
	}
	l, err := openLock(filepath.Join(base, k.Name+".lock"))
	if err != nil {
		return GuestBoot{}, err
	}
	defer l.Close()
	if err := l.acquire(ctx, unix.LOCK_EX, func() {
		log.Info("waiting for another process that makes a guest's kernel", "kernel", k.Name)
	}); err != nil {
		return GuestBoot{}, err
	}
	a := artifacts{dir: filepath.Join(base, k.Name), names: []string{kernelName, guestName}, recipe: k.key()}
	s, err := a.open(log, func(tmp string) (s sealed, err error) {
		if s.Release, err = build(ctx, tmp, k, log); err != nil {
			err = fmt.Errorf("guest kernel %s: %w", k.Name, err)
		}
		return s, err
	})
	if err != nil {
		return GuestBoot{}, err
	}
	return GuestBoot{Release: s.Release, Vmlinuz: filepath.Join(a.dir, kernelName), Initramfs: filepath.Join(a.dir, guestName)}, nil
}

// key is what a recipe is recognised by.
func (k GuestKernel) key() string {
	return recipeKey(struct {
		Recipe int
		Kernel GuestKernel
	}{guestKernelRecipe, k})
}

// buildGuestKernel leaves the kernel and its initramfs in dir.
func buildGuestKernel(ctx context.Context, dir string, k GuestKernel, log *slog.Logger) (release string, err error) {
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("making it needs root (uid is %d)", os.Geteuid())
	}
	tree := filepath.Join(dir, treeName)
	if err := bootstrap(ctx, tree, "extract", k.Suite, log); err != nil {
		return "", err
	}
	image, release, err := onlyKernel(tree)
	if err != nil {
		return "", err
	}
	if err := run(ctx, "chroot", tree, "/sbin/depmod", release); err != nil {
		return "", err
	}
	if err := os.Rename(image, filepath.Join(dir, kernelName)); err != nil {
		return "", err
	}
	if err := guestRecords(filepath.Join(dir, guestName), tree, release, k.Suite.GuestModules); err != nil {
		return "", err
	}
	return release, os.RemoveAll(tree)
}
