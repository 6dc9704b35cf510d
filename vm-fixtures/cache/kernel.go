// SPDX-License-Identifier: MIT

package cache

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Kernel is a kernel built from a suite's source package, in a root of that
// suite made for it.
type Kernel struct {
	// Source is the package with the source.
	Source string
	// Packages are what building it needs beside it.
	Packages []string
	// Config is a fragment: all else is what "make allnoconfig" says.
	Config string
}

//go:embed sanitizers.config
var sanitizersConfig string

// kernelRecipe changes whenever kernels are built differently.
const kernelRecipe = 1

// Names in a kernel's directory: the image, and an archive of its directory
// in /lib/modules, with what building modules for it needs.
const (
	kernelImageName   = "vmlinuz"
	kernelModulesName = "modules.tar"
)

// kernel returns the directory of a suite's own kernel, which is built if it
// is not there as it was once completed. Its only user is the root of this
// suite, whose lock the caller has.
func kernel(ctx context.Context, suite Suite, log *slog.Logger) (dir string, manifest sealed, err error) {
	base, err := Dir()
	if err != nil {
		return "", manifest, err
	}
	key := recipeKey(struct {
		Recipe  int
		Release string
		Kernel  *Kernel
	}{kernelRecipe, suite.release(), suite.Kernel})
	dir = filepath.Join(base, "kernels", key[:32])
	manifest, err = kernelArtifacts(dir).open(log, func(tmp string) (sealed, error) {
		s, err := buildKernel(ctx, tmp, suite, log)
		if err != nil {
			err = fmt.Errorf("kernel: %w", err)
		}
		return s, err
	})
	return dir, manifest, err
}

func kernelArtifacts(dir string) artifacts {
	return artifacts{dir: dir, names: []string{kernelImageName, kernelModulesName}}
}

// kernelScript builds in the root "$1", with "$2" at its /mnt, from the source
// package "$3". The mounts are seen by it alone and end with it. A line of the
// fragment that does not hold in the outcome, because something that it
// depends on is missing, ends it.
const kernelScript = `
set -e
mount --bind "$2" "$1/mnt"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
mount -t tmpfs tmpfs "$1/tmp"
exec chroot "$1" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/tmp \
	KBUILD_BUILD_USER=kvmaccess KBUILD_BUILD_HOST=fixture nice sh -ec '
		tar -C /mnt -xf "/usr/src/$1.tar.xz"
		cd "/mnt/$1"
		set -- make -s O=/mnt/build
		"$@" KCONFIG_ALLCONFIG=/mnt/config allnoconfig
		grep "CONFIG_[A-Z0-9_]*[= ]" /mnt/config | while read -r line; do
			grep -qxF "$line" /mnt/build/.config || { echo "does not hold: $line"; exit 1; }
		done
		"$@" -j"$(nproc)" bzImage modules
		release=$("$@" kernelrelease)
		modules=/mnt/out/lib/modules/$release
		"$@" INSTALL_MOD_PATH=/mnt/out INSTALL_MOD_STRIP=1 modules_install
		rm -f "$modules/build"
		"$@" run-command KBUILD_RUN_COMMAND="\$(srctree)/scripts/package/install-extmod-build $modules/build"
		tar -C /mnt/out/lib/modules -cf /mnt/modules.tar "$release"
		cp /mnt/build/arch/x86/boot/bzImage /mnt/vmlinuz
		echo "$release" > /mnt/release
	' sh "$3"
`

// buildKernel leaves the image and the archive in dir.
func buildKernel(ctx context.Context, dir string, suite Suite, log *slog.Logger) (s sealed, err error) {
	k := suite.Kernel
	root, work := filepath.Join(dir, "root"), filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		return s, err
	}
	with := suite
	with.Packages = slices.Concat(k.Packages, []string{k.Source})
	if err := bootstrap(ctx, root, "apt", with, log); err != nil {
		return s, err
	}
	status, err := os.ReadFile(filepath.Join(root, "var/lib/dpkg/status"))
	if err != nil {
		return s, err
	}
	if err := os.WriteFile(filepath.Join(work, "config"), []byte(k.Config), 0o644); err != nil {
		return s, err
	}
	version := packageVersion(string(status), k.Source)
	stop := progress(log, "building the kernel, once; it takes twenty minutes or so", "suite", suite.Name, "source", version)
	err = run(ctx, "unshare", "--mount", "--propagation", "private", "sh", "-c", kernelScript, "sh", root, work, k.Source)
	stop()
	if err != nil {
		return s, err
	}
	release, err := os.ReadFile(filepath.Join(work, "release"))
	if err != nil {
		return s, err
	}
	s.Release, s.Package = strings.TrimSpace(string(release)), version
	for _, name := range []string{kernelImageName, kernelModulesName} {
		if err := os.Rename(filepath.Join(work, name), filepath.Join(dir, name)); err != nil {
			return s, err
		}
	}
	return s, errors.Join(os.RemoveAll(root), os.RemoveAll(work))
}

// packageVersion finds a package's version in the text of dpkg's status file.
func packageVersion(status, name string) string {
	_, rest, ok := strings.Cut("\n\n"+status, "\n\nPackage: "+name+"\n")
	if !ok {
		return ""
	}
	stanza, _, _ := strings.Cut(rest, "\n\n")
	for line := range strings.Lines(stanza) {
		if v, ok := strings.CutPrefix(line, "Version: "); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// installKernel adds a suite's own kernel to its root.
func installKernel(ctx context.Context, tree string, suite Suite, log *slog.Logger) (image, release string, err error) {
	dir, manifest, err := kernel(ctx, suite, log)
	if err != nil {
		return "", "", err
	}
	err = run(ctx, "tar", "-C", filepath.Join(tree, "lib/modules"), "-xf", filepath.Join(dir, kernelModulesName))
	return filepath.Join(dir, kernelImageName), manifest.Release, err
}
