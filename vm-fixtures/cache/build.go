// SPDX-License-Identifier: MIT

package cache

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
)

// ModuleList is the file in an initramfs that names its modules, one path a
// line, in load order.
const ModuleList = "modules.list"

// build makes a suite's artifacts out of stock packages.
func build(ctx context.Context, dir string, suite Suite, log *slog.Logger) (*manifest, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("making it needs root (uid is %d)", os.Geteuid())
	}
	tree := filepath.Join(dir, treeName)
	if err := bootstrap(ctx, tree, "apt", suite, log); err != nil {
		return nil, err
	}

	image, stock, err := onlyKernel(tree)
	if err != nil {
		return nil, err
	}
	m := &manifest{Kernel: stock}
	images := map[string]string{kernelName: image}
	if suite.Kernel != nil {
		m.Guest = stock
		images[guestKernelName] = image
		if images[kernelName], m.Kernel, err = installKernel(ctx, tree, suite, log); err != nil {
			return nil, err
		}
	}
	for name, from := range images {
		image, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, name), image, 0o644); err != nil {
			return nil, err
		}
	}

	host, err := moduleRecords(tree, m.Kernel, suite.HostModules)
	if err != nil {
		return nil, err
	}
	if err := WriteInitramfs(filepath.Join(dir, hostName), host); err != nil {
		return nil, err
	}
	if err := guestRecords(filepath.Join(dir, guestName), tree, stock, suite.GuestModules); err != nil {
		return nil, err
	}

	log.Info("packing the image", "suite", suite.Name)
	if err := run(ctx, "mksquashfs", tree, filepath.Join(dir, imageName), "-comp", "lz4", "-no-progress", "-quiet"); err != nil {
		return nil, err
	}
	if m.Files, err = digestFiles(dir, suite.artifacts()); err != nil {
		return nil, err
	}
	m.Tree, err = digestTree(tree)
	return m, err
}

// onlyKernel is the one kernel in a root: its image and its release.
func onlyKernel(tree string) (image, release string, err error) {
	kernels, err := filepath.Glob(filepath.Join(tree, "boot", "vmlinuz-*"))
	if err != nil {
		return "", "", err
	}
	if len(kernels) == 0 {
		// Until it is installed, it lies beside its modules in newer packages.
		if kernels, err = filepath.Glob(filepath.Join(tree, "lib/modules/*/vmlinuz")); err != nil {
			return "", "", err
		}
	}
	if len(kernels) != 1 {
		return "", "", fmt.Errorf("%d kernels in the root, want one: %v", len(kernels), kernels)
	}
	release, ok := strings.CutPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	if !ok {
		release = filepath.Base(filepath.Dir(kernels[0]))
	}
	return kernels[0], release, nil
}

// guestRecords writes what a guest's initramfs has beside its init: modules of
// a root's kernel, busybox, and directories.
func guestRecords(name, tree, kernel string, modules []string) error {
	records, err := moduleRecords(tree, kernel, modules)
	if err != nil {
		return err
	}
	for _, dir := range []string{"dev", "proc", "sys", "tmp"} {
		records = append(records, cpio.Directory(dir, 0o755))
	}
	busybox, err := busyboxRecords(tree)
	if err != nil {
		return err
	}
	return WriteInitramfs(name, append(records, busybox...))
}

// bootstrap unpacks a suite and installs its packages into dir: in the variant
// "apt", with "extract" they are unpacked alone.
func bootstrap(ctx context.Context, dir, variant string, suite Suite, log *slog.Logger) error {
	sources, err := aptSources("/etc/apt")
	if err != nil {
		return err
	}
	options, err := aptOptions(ctx)
	if err != nil {
		return err
	}
	args := []string{"--variant=" + variant, "--format=directory", "--quiet"}
	for _, p := range suite.Packages {
		args = append(args, "--include="+p)
	}
	for _, unneeded := range []string{"doc", "info", "locale", "man"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+unneeded+"/*")
	}
	args = append(args, options...)
	for _, o := range suite.AptOptions {
		args = append(args, "--aptopt="+o)
	}
	// An initramfs of the package's own is never booted.
	args = append(args, "--customize-hook=rm -f \"$1\"/boot/initrd.img-*")
	args = append(args, suite.release(), dir)
	args = append(args, archiveLines(sources, osRelease(), suite)...)

	stop := progress(log, "installing packages into the root", "suite", suite.Name, "packages", len(suite.Packages))
	defer stop()
	return run(ctx, "mmdebstrap", args...)
}

// progress says what goes on, at once and every ten seconds until stopped.
func progress(log *slog.Logger, msg string, args ...any) (stop func()) {
	start := time.Now()
	log.Info(msg, args...)
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				log.Info(msg, append(args[:len(args):len(args)], "seconds", int(time.Since(start).Seconds()))...)
			}
		}
	}()
	return func() { close(done) }
}
