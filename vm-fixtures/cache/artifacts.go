// SPDX-License-Identifier: MIT

package cache

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// artifacts are files that are made together, in a directory of their own.
type artifacts struct {
	dir    string
	names  []string // of the files
	recipe string   // what they are made by; empty: dir is called by it
}

// sealed is the manifest of completed artifacts.
type sealed struct {
	Recipe  string            `json:"recipe,omitempty"`
	Release string            `json:"release"`           // of a kernel, as uname -r says
	Package string            `json:"package,omitempty"` // version of the package that it comes from
	Files   map[string]Digest `json:"files"`
}

// open returns the artifacts' manifest. Unless they are there as they were once
// completed, build makes them in a directory that it is given, and says what is
// to be known of them. The caller sees to it that nobody else does meanwhile.
func (a artifacts) open(log *slog.Logger, build func(dir string) (sealed, error)) (sealed, error) {
	s, err := a.verify()
	if err == nil {
		return s, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		log.Warn("what is in the cache is not what was made: making it again", "directory", a.dir, "why", err)
	}
	tmp := a.dir + ".new"
	if err := errors.Join(os.RemoveAll(tmp), os.RemoveAll(a.dir)); err != nil {
		return s, err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return s, err
	}
	if s, err = build(tmp); err != nil {
		return s, errors.Join(err, os.RemoveAll(tmp))
	}
	s.Recipe = a.recipe
	if s.Files, err = digestFiles(tmp, a.names); err != nil {
		return s, errors.Join(err, os.RemoveAll(tmp))
	}
	if err := replace(a.dir, tmp, s); err != nil {
		return s, err
	}
	return a.verify()
}

// verify compares the artifacts with their manifest. The error is
// os.ErrNotExist only if there is none.
func (a artifacts) verify() (sealed, error) {
	var s sealed
	text, err := os.ReadFile(filepath.Join(a.dir, manifestName))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("%s: %w", manifestName, err)
	}
	if s.Recipe != a.recipe {
		return s, errors.New("it was made by another recipe")
	}
	return s, verifyFiles(a.dir, a.names, s.Files)
}

func digestFiles(dir string, names []string) (map[string]Digest, error) {
	files := map[string]Digest{}
	for _, name := range names {
		var err error
		if files[name], err = DigestFile(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// verifyFiles compares files with what a manifest says of them.
func verifyFiles(dir string, names []string, files map[string]Digest) error {
	for _, name := range names {
		want, ok := files[name]
		if !ok {
			return fmt.Errorf("%s: not in the manifest", name)
		}
		got, err := DigestFile(filepath.Join(dir, name))
		if err != nil {
			return fmt.Errorf("it is gone: %s", err) // not ErrNotExist: it once was there
		}
		if got != want {
			return fmt.Errorf("%s: %d bytes, sha256 %s; was %d bytes, %s", name, got.Size, got.SHA256, want.Size, want.SHA256)
		}
	}
	return nil
}

// replace puts what was made in tmp into the place of dir, and its manifest
// into it as the last.
func replace(dir, tmp string, manifest any) error {
	text, err := json.MarshalIndent(manifest, "", "  ")
	if err != nil {
		return err
	}
	unix.Sync() // the manifest must not reach the disk before what it vouches for
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return writeAtomic(filepath.Join(dir, manifestName), text)
}

// recipeKey is what a recipe is recognised by.
func recipeKey(recipe any) string {
	text, err := json.Marshal(recipe)
	if err != nil {
		panic(err) // strings, ints and what is made of them always marshal
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
