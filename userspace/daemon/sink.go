// SPDX-License-Identifier: MIT

package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// sink writes findings as JSON lines. It is for one goroutine.
type sink struct {
	name string
	open func() (sinkFile, error)
	// rest of a line of which a part is written already, where that part
	// could not be taken back.
	rest []byte
}

// sinkFile is what a sink needs of a file.
type sinkFile interface {
	io.WriteCloser
	// Size is of a regular file; of others it fails.
	Size() (int64, error)
	Truncate(size int64) error
	Sync() error
}

type osFile struct{ *os.File }

var errNotRegular = errors.New("not a regular file")

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, errNotRegular
	}
	return info.Size(), nil
}

// stdout stays open.
type stdout struct{ osFile }

func (stdout) Close() error { return nil }

// newSink writes to the file with the path, "-" for standard output. The file
// is opened for each batch of findings, so that it may be moved away or
// removed at any time.
func newSink(path string) (*sink, error) {
	if path == "-" {
		return &sink{name: "standard output", open: func() (sinkFile, error) { return stdout{osFile{os.Stdout}}, nil }}, nil
	}
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() && info.Mode()&fs.ModeCharDevice == 0 {
		return nil, fmt.Errorf("findings file %s is neither a regular file nor a character device: name another one, or - for standard output", path)
	}
	return &sink{name: path, open: func() (sinkFile, error) {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOCTTY, 0o600)
		if err != nil {
			return nil, err
		}
		return osFile{f}, nil
	}}, nil
}

// write appends records and returns how many are written in whole. Of one that
// is written in part, the rest comes first the next time: begin with it again.
func (s *sink) write(records []Record) (n int, err error) {
	var lines []byte
	ends := make([]int, len(records))
	for i, r := range records {
		line, err := json.Marshal(r)
		if err != nil {
			return 0, fmt.Errorf("%s: finding %d: %w", s.name, r.Seq, err)
		}
		if i == 0 && s.rest != nil {
			line = s.rest
		} else {
			line = append(line, '\n')
		}
		lines = append(lines, line...)
		ends[i] = len(lines)
	}
	f, err := s.open()
	if err != nil {
		return 0, err
	}
	defer f.Close()
	before, sizeErr := f.Size()
	wrote, err := f.Write(lines)
	for n < len(records) && ends[n] <= wrote {
		n++
	}
	if n > 0 {
		s.rest = nil
	}
	if err == nil && n < len(records) {
		err = io.ErrShortWrite
	}
	if err != nil {
		whole := 0
		if n > 0 {
			whole = ends[n-1]
		}
		if wrote > whole && (s.rest != nil || sizeErr != nil || f.Truncate(before+int64(whole)) != nil) {
			s.rest = bytes.Clone(lines[wrote:ends[n]])
		}
		return n, fmt.Errorf("%s: %w", s.name, unwrapPath(err))
	}
	if sizeErr == nil {
		if err := f.Sync(); err != nil {
			return n, fmt.Errorf("%s: sync: %w", s.name, unwrapPath(err))
		}
	}
	return n, nil
}

// unwrapPath leaves out what a path error repeats.
func unwrapPath(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

// maxLine is longer than a finding with the most watched memory in it.
const maxLine = 1 << 20

// recoverSink makes the findings file end with a whole line, which it does not
// if the daemon was killed while it wrote, and returns that line's sequence
// number; 0 if there is none.
func recoverSink(path string) (seq uint64, err error) {
	if path == "-" {
		return 0, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("findings file: %w", err)
	}
	defer f.Close()
	size, err := osFile{f}.Size()
	switch {
	case errors.Is(err, errNotRegular):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("findings file: %w", err)
	}
	tail := make([]byte, min(size, 2*maxLine))
	if _, err := f.ReadAt(tail, size-int64(len(tail))); err != nil && err != io.EOF {
		return 0, fmt.Errorf("findings file: %w", err)
	}
	end := bytes.LastIndexByte(tail, '\n') + 1
	if partial := tail[end:]; len(partial) > 0 && (end > 0 || int64(len(tail)) == size) && bytes.HasPrefix(partial, []byte(`{"seq":`)) {
		if err := f.Truncate(size - int64(len(partial))); err != nil {
			return 0, fmt.Errorf("findings file: %w", err)
		}
	}
	line := bytes.TrimSuffix(tail[:end], []byte("\n"))
	line = line[bytes.LastIndexByte(line, '\n')+1:]
	var last struct{ Seq uint64 }
	if json.Unmarshal(line, &last) != nil {
		return 0, nil
	}
	return last.Seq, nil
}
