// SPDX-License-Identifier: MIT

package cache

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

// Peer is what drgn, which reads kernels' memory by their debug info, needs to
// read that of a guest: squashfs images.
type Peer struct {
	Root  string            // Debian's drgn with Python, to change root into
	Debug map[string]string // by the name of a guest's kernel: what belongs to its /usr/lib/debug
}

var (
	// peerSuite has a drgn that reads live guests through QEMU's monitor.
	peerSuite = Suite{
		Name:       "sid",
		Packages:   []string{"base-files", "python3-drgn"},
		AptOptions: []string{`Acquire::Check-Valid-Until "false"`},
	}
	// compilePeer compiles what Python loads, as installing it does.
	compilePeer = []string{"/usr/bin/python3", "-m", "compileall", "-q", "/usr/lib/python3/dist-packages", "/usr/lib"}
)

const (
	// peerRecipe changes whenever images are made differently.
	peerRecipe = 1
	peerName   = "drgn" // of the directory with Peer.Root; the others' are those of kernels
	peerImage  = "image.squashfs"
	debugDir   = "usr/lib/debug"
)

// OpenPeer returns what drgn needs for guests of these kernels, each as
// GuestKernelNamed has it. What is not there is made, out of 300 MB of packages
// for each kernel, in a minute or two; that needs root.
func OpenPeer(ctx context.Context, kernels []string, log *slog.Logger) (*Peer, error) {
	base, err := Dir()
	if err != nil {
		return nil, err
	}
	base = filepath.Join(base, "peers")
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, err
	}
	l, err := openLock(filepath.Join(base, "lock"))
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := l.acquire(ctx, unix.LOCK_EX, func() { log.Info("waiting for another process that makes what drgn needs") }); err != nil {
		return nil, err
	}
	p := &Peer{Debug: map[string]string{}}
	if p.Root, err = peerArtifact(ctx, filepath.Join(base, peerName), peerSuite, log, compile); err != nil {
		return nil, err
	}
	for _, name := range kernels {
		k, err := GuestKernelNamed(name)
		if err != nil {
			return nil, err
		}
		boot, err := OpenGuestKernel(ctx, k, log)
		if err != nil {
			return nil, err
		}
		modules, err := initramfsModules(boot.Initramfs)
		if err != nil {
			return nil, err
		}
		suite := k.Suite
		suite.Packages = []string{"linux-image-" + boot.Release + "-dbg"}
		p.Debug[name], err = peerArtifact(ctx, filepath.Join(base, name), suite, log, func(_ context.Context, tree string) (string, error) {
			return debugInfo(tree, boot.Release, modules)
		})
		if err != nil {
			return nil, fmt.Errorf("debug info of guest kernel %s: %w", name, err)
		}
	}
	return p, nil
}

// peerArtifact makes an image of what finish leaves of a suite's packages.
func peerArtifact(ctx context.Context, dir string, suite Suite, log *slog.Logger, finish func(context.Context, string) (string, error)) (string, error) {
	a := artifacts{dir: dir, names: []string{peerImage}, recipe: recipeKey(struct {
		Recipe int
		Suite  Suite
	}{peerRecipe, suite})}
	_, err := a.open(log, func(tmp string) (s sealed, err error) {
		if os.Geteuid() != 0 {
			return s, fmt.Errorf("making it needs root (uid is %d)", os.Geteuid())
		}
		tree := filepath.Join(tmp, treeName)
		if err := bootstrap(ctx, tree, "extract", suite, log); err != nil {
			return s, err
		}
		top, err := finish(ctx, tree)
		if err != nil {
			return s, err
		}
		// What is measured is how it is read, not how it is unpacked.
		if err := run(ctx, "mksquashfs", top, filepath.Join(tmp, peerImage), "-noI", "-noD", "-noF", "-noX", "-no-progress", "-quiet"); err != nil {
			return s, err
		}
		return s, os.RemoveAll(tree)
	})
	return filepath.Join(dir, peerImage), err
}

// compile makes of the unpacked packages a root as if they had been installed.
func compile(ctx context.Context, tree string) (string, error) {
	if err := os.MkdirAll(filepath.Join(tree, debugDir), 0o755); err != nil { // to be mounted on
		return "", err
	}
	return tree, run(ctx, "chroot", append([]string{tree}, compilePeer...)...)
}

// debugInfo removes all that an unpacked package has but the debug info of the
// kernel itself and of the modules of these names.
func debugInfo(tree, release string, modules []string) (string, error) {
	top := filepath.Join(tree, debugDir)
	image := filepath.Join("boot", "vmlinux-"+release)
	found := false
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(top, path)
		if err != nil {
			return err
		}
		name, _, isModule := strings.Cut(filepath.Base(path), ".ko")
		switch {
		case rel == image || filepath.Base(rel) == "vmlinux": // or the one leads to the other
			found = found || d.Type().IsRegular()
			return nil
		case isModule && d.Type().IsRegular() && slices.Contains(modules, moduleName(name)):
			return nil
		}
		return os.Remove(path)
	})
	if err == nil && !found {
		err = fmt.Errorf("the package has no %s", image)
	}
	return top, err
}

// initramfsModules are the names of the modules that an initramfs lists.
func initramfsModules(name string) ([]string, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	for r := cpio.Newc.Reader(file); ; {
		rec, err := r.ReadRecord()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s: it has no %s", name, ModuleList)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if rec.Name != ModuleList {
			continue
		}
		var modules []string
		lines := bufio.NewScanner(io.NewSectionReader(rec, 0, int64(rec.FileSize)))
		for lines.Scan() {
			modules = append(modules, moduleName(lines.Text()))
		}
		return modules, lines.Err()
	}
}
