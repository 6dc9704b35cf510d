// SPDX-License-Identifier: MIT

package daemon

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// symbolFiles holds each symbol file in use once, however many guests it
// serves.
type symbolFiles struct {
	mu    sync.Mutex
	files map[string]*symbolFile
}

type symbolFile struct {
	modified time.Time
	size     int64
	symbols  *guest.Symbols
	err      error
}

// load parses a file, again if it changed since the last time.
func (s *symbolFiles) load(path string) (*guest.Symbols, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("symbols: %w", err)
	}
	file := s.files[path]
	if file == nil || !file.modified.Equal(info.ModTime()) || file.size != info.Size() {
		file = &symbolFile{modified: info.ModTime(), size: info.Size()}
		file.symbols, file.err = parseSymbols(path)
		if s.files == nil {
			s.files = map[string]*symbolFile{}
		}
		s.files[path] = file
	}
	return file.symbols, file.err
}

func parseSymbols(path string) (*guest.Symbols, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("symbols: %w", err)
	}
	defer f.Close()
	symbols, err := guest.ParseSymbols(f)
	if err != nil {
		return nil, fmt.Errorf("symbols: %s: %w", path, err)
	}
	return symbols, nil
}
