// SPDX-License-Identifier: MIT

// Package cache keeps what an emulated KVM host is made of outside the
// checkout: for each Debian suite its root file system, kernel, and the
// kernel modules that a boot needs, all out of stock packages.
//
// Nothing in it is trusted for being there. Each artifact's digest is
// recorded in a manifest that is written last, and is compared before each
// use; whatever is missing or differs is made again.
package cache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// recipe changes whenever the artifacts are made differently.
const recipe = 1

// Names of the artifacts in a root's directory.
const (
	imageName       = "root.squashfs"
	kernelName      = "vmlinuz"
	guestKernelName = "vmlinuz.guest" // where it is not the host's
	hostName        = "host.cpio"
	guestName       = "guest.cpio"
	treeName        = "root"
	manifestName    = "manifest.json"
)

// artifacts are the files of a suite's root.
func (s Suite) artifacts() []string {
	names := []string{imageName, kernelName, hostName, guestName}
	if s.Kernel != nil {
		names = append(names, guestKernelName)
	}
	return names
}

// manifest is the stamp of a completed root.
type manifest struct {
	Kernel string            `json:"kernel"`          // release, as uname -r says
	Guest  string            `json:"guest,omitempty"` // that of the guests, if it is another
	Files  map[string]Digest `json:"files"`
	Tree   Digest            `json:"tree"`
}

// Root is a suite's verified root file system. While it is open no one
// rebuilds it.
type Root struct {
	Suite  Suite
	Kernel string // release of the hosts' kernel, as uname -r says
	Guest  string // release of the guests'
	dir    string
	lock   *lock
	tree   Digest
	image  Digest
	log    *slog.Logger
}

// Dir is where all fixtures are cached: $XDG_CACHE_HOME/kvmaccess, or
// ~/.cache/kvmaccess.
func Dir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place for a cache (set XDG_CACHE_HOME): %w", err)
	}
	return filepath.Join(base, "kvmaccess"), nil
}

// Open returns the root of a suite. It is made if it is not there, and made
// again if any of it differs from what was once completed: that takes about
// a minute and needs root and the package archives.
func Open(ctx context.Context, suite Suite, log *slog.Logger) (*Root, error) {
	base, err := Dir()
	if err != nil {
		return nil, err
	}
	return open(ctx, filepath.Join(base, "roots"), suite, log, build)
}

// builder fills an empty directory with the artifacts of a suite.
type builder func(ctx context.Context, dir string, suite Suite, log *slog.Logger) (*manifest, error)

func open(ctx context.Context, base string, suite Suite, log *slog.Logger, build builder) (*Root, error) {
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, err
	}
	l, err := openLock(filepath.Join(base, suite.Name+".lock"))
	if err != nil {
		return nil, err
	}
	waiting := func() { log.Info("waiting for another process that uses the cache", "suite", suite.Name) }
	r := &Root{Suite: suite, dir: filepath.Join(base, suite.Name), lock: l, log: log}
	fail := func(err error) (*Root, error) {
		l.Close()
		return nil, err
	}
	for try := 0; ; try++ {
		if err := l.acquire(ctx, unix.LOCK_SH, waiting); err != nil {
			return fail(err)
		}
		problem := r.verify()
		if problem == nil {
			return r, nil
		}
		if try == 2 {
			return fail(fmt.Errorf("cache of %s is broken again right after it was made: %w", suite.Name, problem))
		}
		if err := l.acquire(ctx, unix.LOCK_EX, waiting); err != nil {
			return fail(err)
		}
		// Another process may have repaired it between the two locks.
		if r.verify() == nil {
			continue
		}
		if errors.Is(problem, os.ErrNotExist) {
			log.Info("making the host's root file system, once", "suite", suite.Name)
		} else {
			log.Warn("cache is not what it was: making it again", "suite", suite.Name, "why", problem)
		}
		if err := r.rebuild(ctx, build); err != nil {
			return fail(fmt.Errorf("root of %s: %w", suite.Name, err))
		}
	}
}

// Close gives the root up.
func (r *Root) Close() error { return r.lock.Close() }

// Image is the root file system as a squashfs image.
func (r *Root) Image() string { return filepath.Join(r.dir, imageName) }

// Vmlinuz is the hosts' kernel.
func (r *Root) Vmlinuz() string { return filepath.Join(r.dir, kernelName) }

// GuestVmlinuz is the guests' kernel, always the suite's stock one.
func (r *Root) GuestVmlinuz() string {
	if r.Suite.Kernel != nil {
		return filepath.Join(r.dir, guestKernelName)
	}
	return r.Vmlinuz()
}

// HostInitramfs is a cpio archive with the modules that a host needs for its
// root file system, and ModuleList naming them. It lacks an init.
func (r *Root) HostInitramfs() string { return filepath.Join(r.dir, hostName) }

// GuestInitramfs is a cpio archive with busybox and the modules that a guest
// needs, and ModuleList naming them. It lacks an init.
func (r *Root) GuestInitramfs() string { return filepath.Join(r.dir, guestName) }

// Key names this very root: it changes when the root does.
func (r *Root) Key() string { return r.image.SHA256 }

// key is what a recipe is recognised by.
func (s Suite) key() string {
	return recipeKey(struct {
		Recipe int
		Suite  Suite
	}{recipe, s})
}

// stamp is the manifest with the recipe that it belongs to.
type stamp struct {
	Recipe string `json:"recipe"`
	manifest
}

// verify compares each artifact but the tree with the manifest.
func (r *Root) verify() error {
	text, err := os.ReadFile(filepath.Join(r.dir, manifestName))
	if err != nil {
		return err
	}
	var s stamp
	if err := json.Unmarshal(text, &s); err != nil {
		return fmt.Errorf("%s: %w", manifestName, err)
	}
	if s.Recipe != r.Suite.key() {
		return errors.New("it was made by another recipe")
	}
	if err := verifyFiles(r.dir, r.Suite.artifacts(), s.Files); err != nil {
		return err
	}
	r.Kernel, r.Guest, r.tree, r.image = s.Kernel, s.Guest, s.Tree, s.Files[imageName]
	if r.Guest == "" {
		r.Guest = r.Kernel
	}
	return nil
}

// rebuild makes everything anew beside the old and puts it in its place.
func (r *Root) rebuild(ctx context.Context, build builder) error {
	tmp := r.dir + ".new"
	for _, dir := range []string{tmp, r.dir} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	start := time.Now()
	m, err := build(ctx, tmp, r.Suite, r.log)
	if err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	if err := replace(r.dir, tmp, stamp{Recipe: r.Suite.key(), manifest: *m}); err != nil {
		return err
	}
	r.log.Info("root file system is made", "suite", r.Suite.Name, "kernel", m.Kernel, "seconds", int(time.Since(start).Seconds()))
	return nil
}

// Tree returns the root unpacked, verified, for building in it by chroot.
// A tree that differs from what it was is unpacked from the image again.
func (r *Root) Tree(ctx context.Context) (string, error) {
	dir := filepath.Join(r.dir, treeName)
	got, err := digestTree(dir)
	if err == nil && got == r.tree {
		return dir, nil
	}
	r.log.Warn("unpacked root is not what it was: unpacking it again", "suite", r.Suite.Name)
	if err := r.lock.acquire(ctx, unix.LOCK_EX, func() {
		r.log.Info("waiting for another process that uses the cache", "suite", r.Suite.Name)
	}); err != nil {
		return "", err
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := run(ctx, "unsquashfs", "-no-progress", "-dest", dir, r.Image()); err != nil {
		return "", err
	}
	if got, err = digestTree(dir); err != nil {
		return "", err
	}
	if got != r.tree {
		return "", fmt.Errorf("%s: differs from its image right after unpacking", dir)
	}
	return dir, r.lock.acquire(ctx, unix.LOCK_SH, func() {})
}

// writeAtomic replaces a file so that it holds all of text or what it held before.
func writeAtomic(name string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(text); err != nil {
		f.Close()
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Chmod(f.Name(), 0o644); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// run runs a command to its end; an error carries the end of its output.
func run(ctx context.Context, name string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("%w: run 'make deps' first", err)
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		return fmt.Errorf("%s: %w:\n%s", name, err, strings.Join(lines[max(0, len(lines)-15):], "\n"))
	}
	return nil
}
