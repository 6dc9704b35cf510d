// SPDX-License-Identifier: MIT

package kbuild

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{
		"Kbuild", "go.mod", "kmod/main.c", "kmod/main.h", "kmod/call.S", "kmod/uapi/wire.h",
		"kmod/main.o", "kmod/x.mod.c", "kmod/spec.yaml", "userspace/main.go",
	} {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Sources{Dir: dir, Entries: []string{"Kbuild", "kmod"}}.files()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"Kbuild", "kmod/call.S", "kmod/main.c", "kmod/main.h", "kmod/uapi/wire.h"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := (Sources{Dir: dir, Entries: []string{"nonexistent"}}).files(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("sources that are not there: %v", err)
	}
}

// A build is used again only as it was completed.
func TestVerify(t *testing.T) {
	for name, breaks := range map[string]func(dir string) error{
		"changed":     func(dir string) error { return os.WriteFile(filepath.Join(dir, "a.ko"), []byte("B"), 0o644) },
		"gone":        func(dir string) error { return os.Remove(filepath.Join(dir, "a.ko")) },
		"one more":    func(dir string) error { return os.WriteFile(filepath.Join(dir, "b.ko"), []byte("b"), 0o644) },
		"no stamp":    func(dir string) error { return os.Remove(filepath.Join(dir, stampName)) },
		"empty stamp": func(dir string) error { return os.WriteFile(filepath.Join(dir, stampName), []byte("{}"), 0o644) },
		"bad stamp":   func(dir string) error { return os.Truncate(filepath.Join(dir, stampName), 5) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			err := errors.Join(os.WriteFile(filepath.Join(dir, "a.ko"), []byte("A"), 0o644), writeStamp(dir))
			if err != nil {
				t.Fatal(err)
			}
			if err := verify(dir); err != nil {
				t.Fatal(err)
			}
			if err := breaks(dir); err != nil {
				t.Fatal(err)
			}
			if verify(dir) == nil {
				t.Error("it is taken for what was built")
			}
		})
	}
	if writeStamp(t.TempDir()) == nil {
		t.Error("a build without a module is stamped")
	}
}
