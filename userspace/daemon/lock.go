// SPDX-License-Identifier: MIT

package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// lock keeps a second daemon out of a state directory. It ends with the
// process, however that ends; the file stays.
type lock struct{ file *os.File }

func takeLock(dir string) (*lock, error) {
	path := filepath.Join(dir, "kvmaccessd.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		defer f.Close()
		holder := make([]byte, 32)
		n, _ := f.Read(holder)
		pid := strings.TrimSpace(string(holder[:n]))
		if pid == "" {
			pid = "unknown"
		}
		return nil, fmt.Errorf("another kvmaccessd (pid %s) uses %s: stop it, or name another state directory and socket", pid, dir)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: flock: %w", path, err)
	}
	// The number is for the message above alone: the lock holds without it,
	// and a full disk is no reason not to start.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	return &lock{f}, nil
}

func (l *lock) Close() error { return l.file.Close() }
