// SPDX-License-Identifier: MIT

package cache

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

// WriteInitramfs writes records as a cpio archive that a kernel unpacks. The
// kernel takes several archives one after another, so an archive may be
// appended to another.
func WriteInitramfs(name string, records []cpio.Record) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	w := cpio.Newc.Writer(f)
	cpio.MakeAllReproducible(records)
	if err := cpio.WriteRecordsAndDirs(w, records); err != nil {
		return err
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return err
	}
	return f.Close()
}

// moduleRecords are the named modules of a root's kernel with all that they
// depend on, uncompressed, and ModuleList.
func moduleRecords(tree, kernel string, names []string) ([]cpio.Record, error) {
	dir := filepath.Join(tree, "lib/modules", kernel)
	text, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, err
	}
	depends := map[string][]string{} // path: paths that it needs
	byName := map[string]string{}    // name: path
	for line := range strings.Lines(string(text)) {
		p, deps, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		depends[p] = strings.Fields(deps)
		byName[moduleName(p)] = p
	}
	text, err = os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	builtin := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		builtin[moduleName(strings.TrimSpace(line))] = true
	}

	var order []string
	var add func(p string)
	add = func(p string) {
		// modules.dep lists all a module needs, the outermost first.
		for _, d := range slices.Backward(depends[p]) {
			add(d)
		}
		if !slices.Contains(order, p) {
			order = append(order, p)
		}
	}
	for _, name := range names {
		p, ok := byName[name]
		if !ok && !builtin[name] {
			return nil, fmt.Errorf("kernel %s has no module %s", kernel, name)
		}
		if ok {
			add(p)
		}
	}

	var records []cpio.Record
	var list strings.Builder
	for _, p := range order {
		content, err := readModule(filepath.Join(dir, p))
		if err != nil {
			return nil, err
		}
		to := path.Join("modules", moduleName(p)+".ko")
		records = append(records, cpio.StaticFile(to, string(content), 0o644))
		fmt.Fprintf(&list, "/%s\n", to)
	}
	return append(records, cpio.StaticFile(ModuleList, list.String(), 0o644)), nil
}

// moduleName is the kernel's name of the module in a file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

func readModule(name string) ([]byte, error) {
	content, err := os.ReadFile(name)
	if err != nil || !strings.HasSuffix(name, ".xz") {
		return content, err
	}
	r, err := xz.NewReader(bytes.NewReader(content))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return io.ReadAll(r)
}

// busyboxRecords are busybox, a static one, and a shell by its name.
func busyboxRecords(tree string) ([]cpio.Record, error) {
	for _, name := range []string{"bin/busybox", "usr/bin/busybox"} {
		content, err := os.ReadFile(filepath.Join(tree, name))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return []cpio.Record{
			cpio.StaticFile("bin/busybox", string(content), 0o755),
			cpio.Symlink("bin/sh", "busybox"),
		}, nil
	}
	return nil, errors.New("no busybox in the root")
}
