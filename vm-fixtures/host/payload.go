// SPDX-License-Identifier: MIT

package host

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/kbuild"
)

// Files of a payload, relative to its directory.
const (
	// ModuleFile is the module, built for the host's kernel.
	ModuleFile = "kvmaccess.ko"
	// SampleFile is the sample user of its API, if it was built beside it.
	SampleFile = "kvmaccess_sample.ko"
	// GuestKernel and GuestInitramfs boot a guest; in the latter AttackDir
	// holds the modules that a guest can be asked to load.
	GuestKernel    = "guest/vmlinuz"
	GuestInitramfs = "guest/initramfs.cpio"
	AttackDir      = "/attacks"
	// KernelDir has a directory for each guest kernel besides, by its name,
	// with two files of these base names. Their guests have no attacks.
	KernelDir = "guests"
)

// Env is the environment variable that names a payload's directory.
const Env = "KVMACCESS_FIXTURE"

// OutEnv is the environment variable that names the directory where a
// command leaves files for the outside.
const OutEnv = "KVMACCESS_OUT"

// self is this very program, which is the first process of hosts and guests
// too: it must not need a dynamic linker.
func self() (string, error) {
	name, err := os.Executable()
	if err != nil {
		return "", err
	}
	return name, checkStatic(name)
}

// checkStatic returns an error if a program needs a dynamic linker.
func checkStatic(name string) error {
	f, err := elf.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is dynamically linked and cannot run in a fixture: build it with CGO_ENABLED=0", name)
		}
	}
	return nil
}

// checkout is the top of the source tree that the working directory is in.
func checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "vm-fixtures", "attacks", "Kbuild")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not in a checkout of KvmAccess: no vm-fixtures/attacks above it", dir)
		}
	}
}

// moduleSources are those of kvmaccess.ko in the checkout.
func moduleSources() (kbuild.Sources, error) {
	top, err := checkout()
	return kbuild.Sources{Dir: top, Entries: []string{"Kbuild", "kmod"}}, err
}

// BuildModule builds kvmaccess.ko of the checkout for the root's kernel and
// returns its path.
func BuildModule(ctx context.Context, root *cache.Root, log *slog.Logger) (string, error) {
	src, err := moduleSources()
	if err != nil {
		return "", err
	}
	dir, err := kbuild.Build(ctx, root, root.Kernel, src, log)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, ModuleFile), nil
}

// CheckModule runs sparse over the sources of kvmaccess.ko in the checkout.
func CheckModule(ctx context.Context, root *cache.Root) error {
	src, err := moduleSources()
	if err != nil {
		return err
	}
	return kbuild.Check(ctx, root, src)
}

// stage fills dir with all that a host is given.
func stage(ctx context.Context, dir string, root *cache.Root, c Config) error {
	top, err := checkout()
	if err != nil {
		return err
	}
	for _, d := range []string{"bin", "guest"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	if err := stageInstall(dir, top); err != nil {
		return err
	}
	module := c.Module
	if module == "" {
		if module, err = BuildModule(ctx, root, c.Log); err != nil {
			return err
		}
	}
	attacks, err := kbuild.Build(ctx, root, root.Guest, kbuild.Sources{Dir: filepath.Join(top, "vm-fixtures", "attacks"), Entries: []string{"."}}, c.Log)
	if err != nil {
		return err
	}
	me, err := self()
	if err != nil {
		return err
	}
	files := map[string]string{
		ModuleFile:      module,
		GuestKernel:     root.GuestVmlinuz(),
		"bin/vmfixture": me,
	}
	sample := filepath.Join(filepath.Dir(module), SampleFile)
	if _, err := os.Stat(sample); err == nil {
		files[SampleFile] = sample
	}
	for _, f := range c.Files {
		files[f.To] = f.From
	}
	for to, from := range files {
		if err := CopyFile(filepath.Join(dir, to), from); err != nil {
			return err
		}
	}
	for _, name := range c.GuestKernels {
		if err := StageKernel(ctx, dir, name, c.Log); err != nil {
			return err
		}
	}
	return guestInitramfs(filepath.Join(dir, GuestInitramfs), root, me, attacks)
}

// StageKernel puts a guest kernel of that name, as cache.GuestKernelNamed has
// it, into the payload that is made in dir.
func StageKernel(ctx context.Context, dir, name string, log *slog.Logger) error {
	me, err := self()
	if err != nil {
		return err
	}
	dir = filepath.Join(dir, KernelDir, name)
	k, err := cache.GuestKernelNamed(name)
	if err != nil {
		return err
	}
	boot, err := cache.OpenGuestKernel(ctx, k, log)
	if err != nil {
		return err
	}
	if err := CopyFile(filepath.Join(dir, filepath.Base(GuestKernel)), boot.Vmlinuz); err != nil {
		return err
	}
	return initramfs(filepath.Join(dir, filepath.Base(GuestInitramfs)), boot.Initramfs, agent.Init, me, nil)
}

// guestInitramfs appends the init and the attacks to what the root has.
func guestInitramfs(name string, root *cache.Root, init, attacks string) error {
	records := []cpio.Record{cpio.Directory(AttackDir[1:], 0o755)}
	modules, err := kbuild.Modules(attacks)
	if err != nil {
		return err
	}
	for _, m := range modules {
		content, err := os.ReadFile(m)
		if err != nil {
			return err
		}
		records = append(records, cpio.StaticFile(filepath.Join(AttackDir[1:], filepath.Base(m)), string(content), 0o644))
	}
	return initramfs(name, root.GuestInitramfs(), agent.Init, init, records)
}

// initramfs writes base, then records, then the program init under the name as.
func initramfs(name, base, as, init string, records []cpio.Record) error {
	content, err := os.ReadFile(init)
	if err != nil {
		return err
	}
	if err := cache.WriteInitramfs(name, append(records, cpio.StaticFile(as[1:], string(content), 0o755))); err != nil {
		return err
	}
	own, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	first, err := os.ReadFile(base)
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(first, own...), 0o644)
}

// CopyFile copies a file with its mode; directories are made as needed.
func CopyFile(to, from string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
