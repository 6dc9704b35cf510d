// SPDX-License-Identifier: MIT

// Package kbuild builds kernel modules for the kernel of a cached root, in
// that root: compiler and headers then are the kernel's own. What was built
// is kept by the digest of its sources.
package kbuild

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// Sources is a tree of module sources: the files and directories of Dir
// named by Entries, the top one of which has a Kbuild.
type Sources struct {
	Dir     string
	Entries []string
}

// stampName is written last into a completed build's directory.
const stampName = "built.json"

// files are the sources' paths relative to Dir, sorted, build output left out.
func (s Sources) files() ([]string, error) {
	var files []string
	for _, entry := range s.Entries {
		err := filepath.WalkDir(filepath.Join(s.Dir, entry), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			switch filepath.Ext(path) {
			case ".c", ".h", ".S", ".lds":
			default:
				if base := d.Name(); base != "Kbuild" && base != "Makefile" {
					return nil
				}
			}
			if strings.HasSuffix(path, ".mod.c") {
				return nil
			}
			rel, err := filepath.Rel(s.Dir, path)
			files = append(files, rel)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(files)
	return files, nil
}

// copyTo copies the files, which lie below Dir, to the same places below to.
func (s Sources) copyTo(to string, files []string) error {
	for _, f := range files {
		content, err := os.ReadFile(filepath.Join(s.Dir, f))
		if err != nil {
			return err
		}
		name := filepath.Join(to, f)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, content, 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// Check runs sparse, which must be installed here, over the sources; what it
// says is an error.
func Check(ctx context.Context, root *cache.Root, src Sources) error {
	sparse, err := exec.LookPath("sparse")
	if err != nil {
		return err
	}
	files, err := src.files()
	if err != nil {
		return err
	}
	tree, err := root.Tree(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kvmaccess-check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := src.copyTo(dir, files); err != nil {
		return err
	}
	// The root has no sparse, but it runs there.
	program, err := os.ReadFile(sparse)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "sparse"), program, 0o755); err != nil {
		return err
	}
	return compile(ctx, tree, dir, root.Kernel, "C=2", "CHECK=/mnt/sparse", "CF=-Wsparse-error", "SAMPLE=m")
}

// Build builds the sources in root for one of its kernels, Root.Kernel or
// Root.Guest, and returns the directory that holds the modules (*.ko). Any
// warning of the compiler is an error.
func Build(ctx context.Context, root *cache.Root, kernel string, src Sources, log *slog.Logger) (string, error) {
	files, err := src.files()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintln(h, root.Key(), kernel)
	for _, f := range files {
		d, err := cache.DigestFile(filepath.Join(src.Dir, f))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%q %s\n", f, d.SHA256)
	}
	base, err := cache.Dir()
	if err != nil {
		return "", err
	}
	base = filepath.Join(base, "modules")
	if err := os.MkdirAll(base, 0o755); err != nil {
		return "", err
	}
	dir := filepath.Join(base, hex.EncodeToString(h.Sum(nil))[:32])
	if verify(dir) == nil {
		return dir, nil
	}

	tree, err := root.Tree(ctx)
	if err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(base, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := src.copyTo(tmp, files); err != nil {
		return "", err
	}
	log.Info("building modules", "sources", filepath.Base(src.Dir), "kernel", kernel)
	if err := compile(ctx, tree, tmp, kernel, "W=1", "KCFLAGS=-Werror", "SAMPLE=m"); err != nil {
		return "", fmt.Errorf("modules of %s: %w", src.Dir, err)
	}
	if err := writeStamp(tmp); err != nil {
		return "", err
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	// Another process may have put its own, equal build there first.
	return dir, verify(dir)
}

// script runs make in the root with the sources at /mnt. The mounts are seen
// by it alone and end with it.
const script = `
set -e
mount --bind "$2" "$1/mnt"
mount --rbind /dev "$1/dev"
mount --rbind /proc "$1/proc"
mount -t tmpfs tmpfs "$1/tmp"
root=$1 kernel=$3
shift 3
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C \
	make -C "/lib/modules/$kernel/build" M=/mnt "$@" modules
`

func compile(ctx context.Context, tree, dir, kernel string, variables ...string) error {
	var out bytes.Buffer
	args := append([]string{"--mount", "--propagation", "private", "sh", "-c", script, "sh", tree, dir, kernel}, variables...)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	// modpost has no -Werror, and make goes on after sparse.
	if text := out.String(); err == nil && (strings.Contains(text, "WARNING:") || strings.Contains(text, "warning:")) {
		err = errors.New("there are warnings")
	}
	if err != nil {
		return fmt.Errorf("%w:\n%s", err, strings.TrimSpace(out.String()))
	}
	return nil
}

// writeStamp records the modules of a completed build.
func writeStamp(dir string) error {
	built, err := digests(dir)
	if err != nil {
		return err
	}
	if len(built) == 0 {
		return errors.New("the build left no module")
	}
	text, err := json.MarshalIndent(built, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, stampName), text, 0o644)
}

// verify compares the modules in a build's directory with its stamp.
func verify(dir string) error {
	text, err := os.ReadFile(filepath.Join(dir, stampName))
	if err != nil {
		return err
	}
	var want map[string]cache.Digest
	if err := json.Unmarshal(text, &want); err != nil {
		return err
	}
	got, err := digests(dir)
	if err != nil {
		return err
	}
	if len(want) == 0 || len(got) != len(want) {
		return errors.New("modules are missing")
	}
	for name, d := range want {
		if got[name] != d {
			return fmt.Errorf("%s is not what was built", name)
		}
	}
	return nil
}

func digests(dir string) (map[string]cache.Digest, error) {
	files, err := Modules(dir)
	if err != nil {
		return nil, err
	}
	m := map[string]cache.Digest{}
	for _, f := range files {
		if m[filepath.Base(f)], err = cache.DigestFile(f); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// Modules lists the modules in a directory that Build returned.
func Modules(dir string) ([]string, error) {
	return filepath.Glob(filepath.Join(dir, "*.ko"))
}
