// SPDX-License-Identifier: MIT

package cache

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"
)

func TestModuleRecords(t *testing.T) {
	tree := t.TempDir()
	dir := filepath.Join(tree, "lib/modules/6.1.0")
	var packed bytes.Buffer
	w, err := xz.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("code of c-d")); err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		w.Close(),
		os.MkdirAll(filepath.Join(dir, "kernel"), 0o755),
		os.WriteFile(filepath.Join(dir, "modules.dep"), []byte(
			"kernel/a.ko: kernel/b.ko kernel/c-d.ko.xz\nkernel/b.ko: kernel/c-d.ko.xz\nkernel/c-d.ko.xz:\nkernel/e.ko:\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/built-in.ko\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "kernel/a.ko"), []byte("code of a"), 0o644),
		os.WriteFile(filepath.Join(dir, "kernel/b.ko"), []byte("code of b"), 0o644),
		os.WriteFile(filepath.Join(dir, "kernel/c-d.ko.xz"), packed.Bytes(), 0o644),
	)
	if err != nil {
		t.Fatal(err)
	}
	records, err := moduleRecords(tree, "6.1.0", []string{"built_in", "a", "c_d"})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, r := range records {
		content := make([]byte, r.FileSize)
		if _, err := r.ReadAt(content, 0); err != nil && len(content) > 0 && content[0] == 0 {
			t.Fatal(err)
		}
		got[r.Name] = string(content)
	}
	want := map[string]string{
		"modules/c_d.ko": "code of c-d",
		"modules/b.ko":   "code of b",
		"modules/a.ko":   "code of a",
		ModuleList:       "/modules/c_d.ko\n/modules/b.ko\n/modules/a.ko\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := moduleRecords(tree, "6.1.0", []string{"nonexistent"}); err == nil {
		t.Error("a module that the kernel lacks is no error")
	}
}

func TestWriteInitramfs(t *testing.T) {
	name := filepath.Join(t.TempDir(), "initramfs")
	err := WriteInitramfs(name, []cpio.Record{
		cpio.StaticFile("dir/file", "text", 0o755),
		cpio.Symlink("link", "dir/file"),
	})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(f))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range records {
		if r.Name != "." {
			names = append(names, r.Name)
		}
	}
	// A kernel makes no directories by itself.
	if diff := cmp.Diff([]string{"dir", "dir/file", "link"}, names); diff != "" {
		t.Error(diff)
	}
}
