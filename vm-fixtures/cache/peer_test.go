// SPDX-License-Identifier: MIT

package cache

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/cpio"
)

// Of an unpacked package with debug info, what a guest can have loaded is left:
// the kernel, under either of its names, and the modules of its initramfs.
func TestDebugInfo(t *testing.T) {
	const release = "6.12.1-cloud-amd64"
	modules := "usr/lib/debug/lib/modules/" + release
	for name, tt := range map[string]struct {
		files []string
		link  bool // boot/vmlinux-RELEASE leads to the modules' directory
		want  []string
	}{
		"own file": {
			[]string{"usr/lib/debug/boot/vmlinux-" + release, "usr/lib/debug/boot/System.map-" + release, modules + "/kernel/fs/fuse/fuse.ko", modules + "/kernel/drivers/md/dm-mod.ko", "usr/share/doc/copyright"},
			false,
			[]string{"boot/vmlinux-" + release, "lib/modules/" + release + "/kernel/drivers/md/dm-mod.ko"},
		},
		"link": {
			[]string{modules + "/vmlinux", modules + "/kernel/drivers/md/dm-mod.ko.debug"},
			true,
			[]string{"boot/vmlinux-" + release, "lib/modules/" + release + "/kernel/drivers/md/dm-mod.ko.debug", "lib/modules/" + release + "/vmlinux"},
		},
		"no kernel": {[]string{modules + "/kernel/drivers/md/dm-mod.ko"}, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			tree := t.TempDir()
			for _, file := range tt.files {
				file = filepath.Join(tree, file)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if tt.link {
				boot := filepath.Join(tree, "usr/lib/debug/boot")
				if err := os.MkdirAll(boot, 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink("../lib/modules/"+release+"/vmlinux", filepath.Join(boot, "vmlinux-"+release)); err != nil {
					t.Fatal(err)
				}
			}
			top, err := debugInfo(tree, release, []string{"dm_mod", "loop"})
			if (err != nil) != (tt.want == nil) {
				t.Fatal(err)
			}
			if tt.want == nil {
				return
			}
			var left []string
			err = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				if err == nil && !d.IsDir() {
					rel, _ := filepath.Rel(top, path)
					left = append(left, rel)
				}
				return err
			})
			if diff := cmp.Diff(tt.want, left); err != nil || diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
		})
	}
}

func TestInitramfsModules(t *testing.T) {
	name := filepath.Join(t.TempDir(), "guest.cpio")
	if _, err := initramfsModules(name); !os.IsNotExist(err) {
		t.Errorf("no file: %v", err)
	}
	if err := WriteInitramfs(name, []cpio.Record{cpio.StaticFile("modules/a.ko", "x", 0o644)}); err != nil {
		t.Fatal(err)
	}
	if got, err := initramfsModules(name); err == nil {
		t.Errorf("without a list: %v", got)
	}
	if err := WriteInitramfs(name, []cpio.Record{
		cpio.StaticFile("modules/dm_mod.ko", "x", 0o644), cpio.StaticFile(ModuleList, "/modules/dm_mod.ko\n/modules/loop.ko\n", 0o644),
	}); err != nil {
		t.Fatal(err)
	}
	got, err := initramfsModules(name)
	if diff := cmp.Diff([]string{"dm_mod", "loop"}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}
