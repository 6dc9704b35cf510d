// SPDX-License-Identifier: MIT

package host

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPipe(t *testing.T) {
	name := filepath.Join(t.TempDir(), "port")
	p, err := openPipe(name)
	if err != nil {
		t.Fatal(err)
	}
	defer p.r.Close()
	// One that comes and goes before it is read ends nothing yet.
	for _, text := range []string{"one ", "two"} {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(p.r); err != nil || string(got) != "one two" {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := openPipe(name); err == nil {
		t.Error("made again what is there")
	}
}

func TestEmulatorOf(t *testing.T) {
	for vendor, want := range map[string]emulator{"": qemu{}, SVM: qemu{}, VMX: bochs{}} {
		if got, err := emulatorOf(vendor); got != want || err != nil {
			t.Errorf("%q: %T, %v", vendor, got, err)
		}
	}
	if _, err := emulatorOf("arm"); err == nil || !strings.Contains(err.Error(), VMX) {
		t.Errorf("%v, want an error that says which there are", err)
	}
}
