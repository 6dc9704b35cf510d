// SPDX-License-Identifier: MIT

package cache

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A guest's kernel is made once, and again when it is not what it was, or made
// by another recipe.
func TestOpenGuestKernel(t *testing.T) {
	base, built := t.TempDir(), 0
	k := GuestKernel{Name: "1.0", Suite: guestSuite("suite", "kernel")}
	fill := func(_ context.Context, dir string, _ GuestKernel, _ *slog.Logger) (string, error) {
		built++
		return "1.0.0-test", errors.Join(
			os.WriteFile(filepath.Join(dir, kernelName), []byte("kernel"), 0o644),
			os.WriteFile(filepath.Join(dir, guestName), []byte("initramfs"), 0o644),
		)
	}
	open := func() GuestBoot {
		t.Helper()
		boot, err := openGuestKernel(t.Context(), base, k, slog.New(slog.DiscardHandler), fill)
		if err != nil {
			t.Fatal(err)
		}
		for file, want := range map[string]string{boot.Vmlinuz: "kernel", boot.Initramfs: "initramfs"} {
			if text, err := os.ReadFile(file); err != nil || string(text) != want {
				t.Errorf("%s: %q, %v; want %q", file, text, err, want)
			}
		}
		if boot.Release != "1.0.0-test" {
			t.Errorf("release %q", boot.Release)
		}
		return boot
	}
	boot := open()
	for _, step := range []struct {
		name   string
		change func() error
		want   int // builds so far
	}{
		{"nothing", func() error { return nil }, 1},
		{"kernel", func() error { return os.WriteFile(boot.Vmlinuz, []byte("other"), 0o644) }, 2},
		{"no initramfs", func() error { return os.Remove(boot.Initramfs) }, 3},
		{"manifest", func() error { return os.WriteFile(filepath.Join(base, "1.0", manifestName), []byte("{"), 0o644) }, 4},
		{"recipe", func() error { k.Suite.Packages = append(k.Suite.Packages, "more"); return nil }, 5},
		{"all gone", func() error { return os.RemoveAll(filepath.Join(base, "1.0")) }, 6},
	} {
		if err := step.change(); err != nil {
			t.Fatal(err)
		}
		open()
		if built != step.want {
			t.Errorf("after %s: built %d times, want %d", step.name, built, step.want)
		}
	}
}

// What fails leaves nothing that the next one takes for complete.
func TestOpenGuestKernelFails(t *testing.T) {
	base := t.TempDir()
	k := GuestKernel{Name: "1.0"}
	want := errors.New("no archive")
	_, err := openGuestKernel(t.Context(), base, k, slog.New(slog.DiscardHandler),
		func(_ context.Context, dir string, _ GuestKernel, _ *slog.Logger) (string, error) {
			return "", errors.Join(want, os.WriteFile(filepath.Join(dir, kernelName), nil, 0o644))
		})
	if !errors.Is(err, want) || !strings.Contains(err.Error(), "1.0") {
		t.Errorf("error %v", err)
	}
	for _, dir := range []string{"1.0", "1.0.new"} {
		if _, err := os.Stat(filepath.Join(base, dir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", dir, err)
		}
	}
}

func TestGuestKernelNamed(t *testing.T) {
	for _, name := range GuestKernelNames() {
		if k, err := GuestKernelNamed(name); err != nil || k.Name != name {
			t.Errorf("%s: %+v, %v", name, k, err)
		}
	}
	if _, err := GuestKernelNamed("2.4"); err == nil || !strings.Contains(err.Error(), "5.10") {
		t.Errorf("error %v does not list those there are", err)
	}
}
