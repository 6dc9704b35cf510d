// SPDX-License-Identifier: MIT

package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

// numbered makes records from..to.
func numbered(from, to uint64) []Record {
	var all []Record
	for seq := from; seq <= to; seq++ {
		all = append(all, Record{Seq: seq, Finding: integrity.Finding{Message: fmt.Sprintf("finding %d", seq)}})
	}
	return all
}

// fullDisk is a file on a disk that has room for so many bytes more.
type fullDisk struct {
	text        []byte
	room        int
	regular     bool
	noTruncate  bool
	openErr     error
	syncErr     error
	truncations int
}

func (d *fullDisk) open() (sinkFile, error) {
	if d.openErr != nil {
		return nil, d.openErr
	}
	return d, nil
}

func (d *fullDisk) Write(p []byte) (int, error) {
	n := min(len(p), d.room)
	d.text = append(d.text, p[:n]...)
	d.room -= n
	if n < len(p) {
		return n, unix.ENOSPC
	}
	return n, nil
}

func (d *fullDisk) Size() (int64, error) {
	if !d.regular {
		return 0, errNotRegular
	}
	return int64(len(d.text)), nil
}

func (d *fullDisk) Truncate(size int64) error {
	if d.noTruncate {
		return unix.EIO
	}
	d.truncations++
	d.room += len(d.text) - int(size)
	d.text = d.text[:size]
	return nil
}

func (d *fullDisk) Sync() error  { return d.syncErr }
func (d *fullDisk) Close() error { return nil }

func (d *fullDisk) seqs(t *testing.T) []uint64 {
	t.Helper()
	var seqs []uint64
	for line := range strings.Lines(string(d.text)) {
		var r struct{ Seq uint64 }
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		seqs = append(seqs, r.Seq)
	}
	return seqs
}

// TestSinkFullDisk gives room back a few bytes at a time: whatever the sizes,
// each line is there once, whole, and in order.
func TestSinkFullDisk(t *testing.T) {
	for _, kind := range []fullDisk{{regular: true}, {regular: true, noTruncate: true}, {}} {
		for _, step := range []int{1, 7, 60, 61, 100, 1000} {
			t.Run(fmt.Sprintf("regular %v, truncate %v, %d bytes", kind.regular, !kind.noTruncate, step), func(t *testing.T) {
				disk := kind
				s := &sink{name: "disk", open: disk.open}
				all := numbered(1, 9)
				written := 0
				for tries := 0; written < len(all); tries++ {
					if tries > 10000 {
						t.Fatal("it never ends")
					}
					n, err := s.write(all[written:])
					if err != nil && !errors.Is(err, unix.ENOSPC) {
						t.Fatal(err)
					}
					if (err == nil) != (written+n == len(all)) {
						t.Fatalf("%d of %d are written, and the error is %v", n, len(all)-written, err)
					}
					written += n
					if disk.regular && !disk.noTruncate && len(disk.text) > 0 && disk.text[len(disk.text)-1] != '\n' {
						t.Fatalf("half a line is left: %q", disk.text)
					}
					disk.room += step
				}
				if diff := cmp.Diff([]uint64{1, 2, 3, 4, 5, 6, 7, 8, 9}, disk.seqs(t)); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			})
		}
	}
}

func TestSinkErrors(t *testing.T) {
	disk := fullDisk{regular: true, room: 1 << 20, openErr: errBroken}
	s := &sink{name: "disk", open: disk.open}
	if n, err := s.write(numbered(1, 2)); n != 0 || !errors.Is(err, errBroken) {
		t.Errorf("open: %d, %v", n, err)
	}
	disk.openErr, disk.syncErr = nil, errBroken
	if n, err := s.write(numbered(1, 2)); n != 2 || !errors.Is(err, errBroken) {
		t.Errorf("sync: %d, %v", n, err)
	}
	full, err := newSink("/dev/full")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := full.write(numbered(1, 2)); n != 0 || !errors.Is(err, unix.ENOSPC) || !strings.HasPrefix(err.Error(), "/dev/full: ") {
		t.Errorf("/dev/full: %d, %v", n, err)
	}
	if _, err := newSink(t.TempDir()); err == nil {
		t.Error("a directory was taken for a findings file")
	}
}

// The file may be moved away at any time.
func TestSinkRotated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "findings.jsonl")
	s, err := newSink(path)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := s.write(numbered(1, 2)); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if n, err := s.write(numbered(3, 3)); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if diff := cmp.Diff([]string{"finding 3"}, messages(t, path)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"finding 1", "finding 2"}, messages(t, path+".1")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600 (%v)", info.Mode(), err)
	}
}

func TestRecoverSink(t *testing.T) {
	line := func(seq uint64) string {
		text, err := json.Marshal(numbered(seq, seq)[0])
		if err != nil {
			t.Fatal(err)
		}
		return string(text) + "\n"
	}
	long := strings.Repeat("x", 3*maxLine)
	for _, test := range []struct {
		name, text, left string
		seq              uint64
	}{
		{"empty", "", "", 0},
		{"whole", line(1) + line(2), line(1) + line(2), 2},
		{"half a line", line(1) + line(2)[:20], line(1), 1},
		{"half a line alone", line(1)[:20], "", 0},
		{"without its end", line(1) + strings.TrimSuffix(line(2), "\n"), line(1), 1},
		{"someone else's", "hello\nworld\n", "hello\nworld\n", 0},
		{"someone else's last line", line(3) + "world", line(3) + "world", 3},
		{"long line before", long + "\n" + line(4), long + "\n" + line(4), 4},
		{"nothing but a long line", long, long, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "findings.jsonl")
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			seq, err := recoverSink(path)
			if err != nil || seq != test.seq {
				t.Errorf("last finding %d, %v, want %d", seq, err, test.seq)
			}
			left, err := os.ReadFile(path)
			if err != nil || string(left) != test.left {
				t.Errorf("%d bytes are left, %v, want %d", len(left), err, len(test.left))
			}
		})
	}
	for _, path := range []string{"-", "/dev/full", filepath.Join(t.TempDir(), "absent")} {
		if seq, err := recoverSink(path); seq != 0 || err != nil {
			t.Errorf("%s: %d, %v", path, seq, err)
		}
	}
}
