// SPDX-License-Identifier: MIT

package cache

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// Digest says what a file held when it was completed.
type Digest struct {
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

// DigestFile reads a file and digests it.
func DigestFile(name string) (Digest, error) {
	f, err := os.Open(name)
	if err != nil {
		return Digest{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return Digest{}, err
	}
	return Digest{Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}

// digestTree digests every name, mode, link target and content below dir.
// Times are left out. Size is the sum of the files' sizes.
func digestTree(dir string) (Digest, error) {
	type entry struct {
		path string
		mode fs.FileMode
		sum  string
	}
	var (
		entries []entry
		size    int64
	)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := entry{path: path, mode: info.Mode()}
		switch {
		case info.Mode().IsRegular():
			size += info.Size()
		case info.Mode()&fs.ModeSymlink != 0:
			if e.sum, err = os.Readlink(path); err != nil {
				return err
			}
		}
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return Digest{}, err
	}

	var (
		wg    sync.WaitGroup
		next  = make(chan int)
		mu    sync.Mutex
		first error
	)
	for range runtime.NumCPU() {
		wg.Go(func() {
			for i := range next {
				d, err := DigestFile(entries[i].path)
				if err != nil {
					mu.Lock()
					first = err
					mu.Unlock()
				}
				entries[i].sum = d.SHA256
			}
		})
	}
	for i, e := range entries {
		if e.mode.IsRegular() {
			next <- i
		}
	}
	close(next)
	wg.Wait()
	if first != nil {
		return Digest{}, first
	}

	h := sha256.New()
	for _, e := range entries {
		rel, err := filepath.Rel(dir, e.path)
		if err != nil {
			return Digest{}, err
		}
		fmt.Fprintf(h, "%q %v %q\n", rel, e.mode, e.sum)
	}
	return Digest{Size: size, SHA256: hex.EncodeToString(h.Sum(nil))}, nil
}
