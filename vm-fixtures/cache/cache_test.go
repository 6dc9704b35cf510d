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
	"time"

	"github.com/google/go-cmp/cmp"
)

// makeSmall makes a root of a few bytes; made counts how often.
func makeSmall(made *int) builder {
	return func(_ context.Context, dir string, suite Suite, _ *slog.Logger) (*manifest, error) {
		*made++
		m := &manifest{Kernel: "6.1.0-test", Files: map[string]Digest{}}
		for _, name := range []string{imageName, kernelName, hostName, guestName} {
			file := filepath.Join(dir, name)
			if err := os.WriteFile(file, []byte("content of "+name), 0o644); err != nil {
				return nil, err
			}
			d, err := DigestFile(file)
			if err != nil {
				return nil, err
			}
			m.Files[name] = d
		}
		return m, nil
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestOpenRebuildsWhatIsBroken(t *testing.T) {
	suite := Suite{Name: "small", Packages: []string{"linux"}}
	for _, tt := range []struct {
		name   string
		break_ func(dir string) error
		made   int // by the second Open
	}{
		{"untouched", func(string) error { return nil }, 0},
		{"image of the same size", func(dir string) error {
			name := filepath.Join(dir, imageName)
			text, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			text[3] ^= 1
			return os.WriteFile(name, text, 0o644)
		}, 1},
		{"kernel cut short", func(dir string) error { return os.Truncate(filepath.Join(dir, kernelName), 3) }, 1},
		{"initramfs gone", func(dir string) error { return os.Remove(filepath.Join(dir, guestName)) }, 1},
		{"no stamp: it was never completed", func(dir string) error { return os.Remove(filepath.Join(dir, manifestName)) }, 1},
		{"stamp cut short", func(dir string) error { return os.Truncate(filepath.Join(dir, manifestName), 20) }, 1},
		{"stamp empty", func(dir string) error { return os.WriteFile(filepath.Join(dir, manifestName), []byte("{}"), 0o644) }, 1},
		{"stamp of another recipe", func(dir string) error {
			name := filepath.Join(dir, manifestName)
			text, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			return os.WriteFile(name, []byte(strings.Replace(string(text), suite.key(), "0123", 1)), 0o644)
		}, 1},
		{"all gone", os.RemoveAll, 1},
		{"leftovers of a build that was ended", func(dir string) error {
			return errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Join(dir+".new", "root", "bin"), 0o755))
		}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			base, made := t.TempDir(), 0
			r, err := open(t.Context(), base, suite, quiet(), makeSmall(&made))
			if err != nil {
				t.Fatal(err)
			}
			r.Close()
			if made != 1 {
				t.Fatalf("made %d times for the first time", made)
			}
			if err := tt.break_(filepath.Join(base, suite.Name)); err != nil {
				t.Fatal(err)
			}
			made = 0
			r, err = open(t.Context(), base, suite, quiet(), makeSmall(&made))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if made != tt.made {
				t.Errorf("made %d times, want %d", made, tt.made)
			}
			if err := r.verify(); err != nil {
				t.Error(err)
			}
			if r.Kernel != "6.1.0-test" || r.Key() == "" {
				t.Errorf("kernel %q, key %q", r.Kernel, r.Key())
			}
		})
	}
}

func TestOpenAnotherRecipe(t *testing.T) {
	base, made := t.TempDir(), 0
	for _, packages := range []string{"linux", "linux", "linux-next"} {
		r, err := open(t.Context(), base, Suite{Name: "small", Packages: []string{packages}}, quiet(), makeSmall(&made))
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	if made != 2 {
		t.Errorf("made %d times, want 2", made)
	}
}

func TestOpenFailedBuildLeavesNothing(t *testing.T) {
	base := t.TempDir()
	suite := Suite{Name: "small"}
	broken := errors.New("no such package")
	_, err := open(t.Context(), base, suite, quiet(), func(_ context.Context, dir string, _ Suite, _ *slog.Logger) (*manifest, error) {
		return nil, errors.Join(broken, os.WriteFile(filepath.Join(dir, imageName), []byte("half"), 0o644))
	})
	if !errors.Is(err, broken) {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			t.Errorf("%s is left", e.Name())
		}
	}
}

// No one rebuilds what is in use.
func TestOpenWaitsForUsers(t *testing.T) {
	base, made := t.TempDir(), 0
	suite := Suite{Name: "small"}
	user, err := open(t.Context(), base, suite, quiet(), makeSmall(&made))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(user.Image()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := open(ctx, base, suite, quiet(), makeSmall(&made)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a broken root in use was opened: %v", err)
	}
	user.Close()
	r, err := open(t.Context(), base, suite, quiet(), makeSmall(&made))
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	if made != 2 {
		t.Errorf("made %d times, want 2", made)
	}
}

func TestDigestTree(t *testing.T) {
	fill := func(change func(dir string) error) Digest {
		dir := t.TempDir()
		err := errors.Join(
			os.MkdirAll(filepath.Join(dir, "a", "b"), 0o755),
			os.WriteFile(filepath.Join(dir, "a", "file"), []byte("text"), 0o644),
			os.Symlink("file", filepath.Join(dir, "a", "link")),
			change(dir),
		)
		if err != nil {
			t.Fatal(err)
		}
		d, err := digestTree(dir)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	same := fill(func(string) error { return nil })
	if got := fill(func(string) error { return nil }); got != same {
		t.Errorf("equal trees have different digests: %+v, %+v", got, same)
	}
	for name, change := range map[string]func(dir string) error{
		"content": func(dir string) error { return os.WriteFile(filepath.Join(dir, "a", "file"), []byte("tExt"), 0o644) },
		"mode":    func(dir string) error { return os.Chmod(filepath.Join(dir, "a", "file"), 0o600) },
		"name": func(dir string) error {
			return os.Rename(filepath.Join(dir, "a", "file"), filepath.Join(dir, "a", "f"))
		},
		"new":  func(dir string) error { return os.WriteFile(filepath.Join(dir, "new"), nil, 0o644) },
		"gone": func(dir string) error { return os.Remove(filepath.Join(dir, "a", "b")) },
		"link target": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "a", "link")), os.Symlink("other", filepath.Join(dir, "a", "link")))
		},
	} {
		if got := fill(change); got == same {
			t.Errorf("%s: the digest does not show it", name)
		}
	}
}

func TestArchiveLines(t *testing.T) {
	const oneLine = `
# deb http://commented.example/debian bookworm main
deb [signed-by=/usr/share/keyrings/x.gpg arch=amd64] http://mirror.example/debian bookworm main contrib
deb http://security.example/debian-security bookworm-security main # updates
deb-src http://source.example/debian bookworm main
deb https://tools.example/apt stable main
`
	const deb822 = `
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm-backports
Components: main
`
	trixie := Suite{Name: "trixie", Pockets: []string{"-updates", "-security", "-backports"}}
	for _, tt := range []struct {
		name    string
		sources []aptSource
		release string
		suite   Suite
		want    []string
	}{
		{"one line style", parseOneLine(oneLine), "bookworm", trixie, []string{
			"deb http://mirror.example/debian trixie main",
			"deb http://security.example/debian-security trixie-security main",
		}},
		{"deb822 style", parseDeb822(deb822), "bookworm", trixie, []string{
			"deb http://mirror.example/debian trixie main",
			"deb http://mirror.example/debian trixie-updates main",
			"deb http://security.example/debian-security trixie-security main",
		}},
		{"no pockets", parseDeb822(deb822), "bookworm", Suite{Name: "sid"}, []string{"deb http://mirror.example/debian sid main"}},
		{"not Debian's", parseDeb822(deb822), "noble", trixie, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, archiveLines(tt.sources, tt.release, tt.suite)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSuiteNamed(t *testing.T) {
	for _, s := range suites {
		got, err := SuiteNamed(s.Name)
		if err != nil || got.Name != s.Name {
			t.Errorf("%s: %+v, %v", s.Name, got, err)
		}
	}
	if _, err := SuiteNamed("warty"); err == nil || !strings.Contains(err.Error(), suites[0].Name) {
		t.Errorf("%v, want an error that lists the suites", err)
	}
}
