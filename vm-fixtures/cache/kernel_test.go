// SPDX-License-Identifier: MIT

package cache

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestPackageVersion(t *testing.T) {
	const status = `Package: linux-source-6.1
Version: 1

Package: linux-source-6.12
Status: install ok installed
Version: 6.12.9-1

Package: linux-source-6.12-extra
Version: 2
`
	for name, want := range map[string]string{
		"linux-source-6.1": "1", "linux-source-6.12": "6.12.9-1", "linux-source": "", "none": "",
	} {
		if got := packageVersion(status, name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// Each line of the fragment is one that the build compares with the outcome.
func TestSanitizersConfig(t *testing.T) {
	line := regexp.MustCompile(`^(CONFIG_[A-Z0-9_]+=("[^"]*"|[a-z0-9]+)|# CONFIG_[A-Z0-9_]+ is not set|#.*|)$`)
	seen := map[string]bool{}
	for l := range strings.Lines(sanitizersConfig) {
		l = strings.TrimSuffix(l, "\n")
		if !line.MatchString(l) {
			t.Errorf("neither a setting nor a comment: %q", l)
		}
		if name, _, ok := strings.Cut(l, "="); ok && seen[name] {
			t.Errorf("%s is set twice", name)
		} else if ok {
			seen[name] = true
		}
	}
	for _, name := range []string{"KASAN", "PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "DEBUG_LIST", "DEBUG_KMEMLEAK", "FAILSLAB", "PANIC_ON_OOPS"} {
		if !seen["CONFIG_"+name] {
			t.Errorf("%s is not on", name)
		}
	}
}

// A kernel is used again only as it was completed.
func TestVerifyKernel(t *testing.T) {
	dir := t.TempDir()
	if _, err := kernelArtifacts(dir).verify(); !os.IsNotExist(err) {
		t.Errorf("a kernel that is not there: %v", err)
	}
	files := map[string]string{kernelImageName: "image", kernelModulesName: "modules"}
	text := `{"release": "6.12", "files": {`
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		d, err := DigestFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text += `"` + name + `": {"size": ` + string(rune('0'+d.Size)) + `, "sha256": "` + d.SHA256 + `"},`
	}
	text = strings.TrimSuffix(text, ",") + "}}"
	if err := os.WriteFile(filepath.Join(dir, manifestName), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if s, err := kernelArtifacts(dir).verify(); err != nil || s.Release != "6.12" {
		t.Fatalf("%+v, %v", s, err)
	}
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte("other"), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := kernelArtifacts(dir).verify(); err == nil {
			t.Errorf("%s may change", name)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
