// SPDX-License-Identifier: MIT

package daemon

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

// storeVersion is of the layout of state.db:
//
//	meta      "version": decimal; "written": big-endian Seq up to which
//	          findings are in the findings file
//	findings  big-endian Seq: Record
//	vms       key of a guest: guestState, without the open findings
//	open      key of a guest: openState, which is written far more often
//
// In version 1 there was no bucket open, and open findings were in vms.
const (
	storeVersion = "2"
	firstVersion = "1"
)

var (
	metaBucket     = []byte("meta")
	findingsBucket = []byte("findings")
	vmsBucket      = []byte("vms")
	openBucket     = []byte("open")
	versionKey     = []byte("version")
	writtenKey     = []byte("written")
)

// guestState is what is kept of a VM for as long as its VMM runs.
type guestState struct {
	Identity identity `json:"identity"`
	// Baseline is nil while there is none. It holds the open findings.
	Baseline *integrity.Baseline `json:"baseline,omitempty"`
	Findings uint64              `json:"findings"` // raised so far
}

// openState is what of a guestState changes with each finding.
type openState struct {
	Open     []integrity.Open `json:"open,omitempty"` // of the baseline
	Findings uint64           `json:"findings"`
}

// store is what survives a restart. It is safe for concurrent use.
type store struct {
	db *bolt.DB
}

// errNewerStore says that a later version wrote the store.
var errNewerStore = errors.New("the state is of a later version of kvmaccessd")

// openStore opens dir/state.db. One that is damaged is moved aside, a new one
// begun, and aside says where the old one is and what was wrong.
func openStore(dir string) (s *store, aside string, err error) {
	path := filepath.Join(dir, "state.db")
	s, err = tryStore(path)
	var broken *brokenStoreError
	if !errors.As(err, &broken) {
		return s, "", err
	}
	moved := path + ".broken-" + time.Now().UTC().Format("20060102T150405Z")
	if err := os.Rename(path, moved); err != nil {
		return nil, "", fmt.Errorf("%s is damaged (%w) and cannot be moved aside: %w", path, broken.reason, err)
	}
	if s, err = tryStore(path); err != nil {
		return nil, "", err
	}
	return s, fmt.Sprintf("%s was damaged (%v): moved to %s; findings and baselines start anew", path, broken.reason, moved), nil
}

// brokenStoreError says that the file is there and is no sound store.
type brokenStoreError struct {
	path   string
	reason error
}

func (e *brokenStoreError) Error() string { return fmt.Sprintf("%s is damaged: %v", e.path, e.reason) }

// tryStore opens a store and reads all of it once. bbolt panics on some kinds
// of damage and touches pages beyond the end of the file on others.
func tryStore(path string) (s *store, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			s, err = nil, &brokenStoreError{path, fmt.Errorf("%v", r)}
		}
	}()
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("%s is in use by another process", path)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return nil, &brokenStoreError{path, err}
	case err != nil:
		if info, serr := os.Stat(path); serr == nil && info.Mode().IsRegular() && info.Size() > 0 && !isErrno(err) {
			return nil, &brokenStoreError{path, err}
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	s = &store{db: db}
	if err := s.check(); err != nil {
		s.abandon()
		if errors.Is(err, errNewerStore) || isErrno(err) {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return nil, &brokenStoreError{path, err}
	}
	return s, nil
}

// check reads all of the store and brings the layout about.
func (s *store) check() error {
	sound := false
	if err := s.db.View(func(tx *bolt.Tx) error {
		info, err := os.Stat(s.db.Path())
		if err != nil {
			return err
		}
		if tx.Size() > info.Size() {
			return fmt.Errorf("%d bytes are left of %d", info.Size(), tx.Size())
		}
		// Before tx.Check: that one runs in a goroutine of its own, in which
		// a bad page number would end the process.
		if err := tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error { return nil })
		}); err != nil {
			return err
		}
		var first error
		for err := range tx.Check() {
			if first == nil {
				first = err
			}
		}
		if first != nil {
			return first
		}
		meta := tx.Bucket(metaBucket)
		if meta == nil {
			return nil // new
		}
		switch version := string(meta.Get(versionKey)); version {
		case storeVersion:
			sound = true
		case firstVersion:
		default:
			return fmt.Errorf("%w: format %q, this one knows %q: update kvmaccessd, or name another state directory", errNewerStore, version, storeVersion)
		}
		return nil
	}); err != nil || sound {
		return err
	}
	return s.db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{findingsBucket, vmsBucket, openBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta, err := tx.CreateBucketIfNotExists(metaBucket)
		if err != nil {
			return err
		}
		return meta.Put(versionKey, []byte(storeVersion))
	})
}

// abandon closes a store that may be damaged.
func (s *store) abandon() {
	defer func() { _ = recover() }()
	_ = s.db.Close()
}

func (s *store) Close() error { return s.db.Close() }

func seqKey(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

// last returns the sequence number of the last finding, and that up to which
// findings are written out.
func (s *store) last() (last, written uint64, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		if k, _ := tx.Bucket(findingsBucket).Cursor().Last(); len(k) == 8 {
			last = binary.BigEndian.Uint64(k)
		}
		if v := tx.Bucket(metaBucket).Get(writtenKey); len(v) == 8 {
			written = binary.BigEndian.Uint64(v)
		}
		return nil
	})
	return last, written, err
}

// write is what one transaction puts into the store.
type write struct {
	records []Record
	guests  map[string]*guestState // nil values delete
	open    map[string]*guestState // of which only openState changed
	written uint64                 // 0: as it was
	// Findings with a Seq up to prune are dropped.
	prune uint64
}

func (w *write) empty() bool {
	return len(w.records) == 0 && len(w.guests) == 0 && len(w.open) == 0 && w.written == 0 && w.prune == 0
}

// put carries out a write, all of it or nothing.
func (s *store) put(w write) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		findings := tx.Bucket(findingsBucket)
		for _, r := range w.records {
			value, err := json.Marshal(r)
			if err != nil {
				return err
			}
			if err := findings.Put(seqKey(r.Seq), value); err != nil {
				return err
			}
		}
		for key, state := range w.guests {
			if err := putGuest(tx, key, state); err != nil {
				return err
			}
		}
		for key, state := range w.open {
			if err := putOpen(tx, key, state); err != nil {
				return err
			}
		}
		if w.written != 0 {
			if err := tx.Bucket(metaBucket).Put(writtenKey, seqKey(w.written)); err != nil {
				return err
			}
		}
		if w.prune != 0 {
			var old [][]byte
			cursor := findings.Cursor()
			for k, _ := cursor.First(); k != nil && binary.BigEndian.Uint64(k) <= w.prune; k, _ = cursor.Next() {
				old = append(old, bytes.Clone(k))
			}
			for _, k := range old {
				if err := findings.Delete(k); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// putGuest stores all of a guest's state; nil: none.
func putGuest(tx *bolt.Tx, key string, state *guestState) error {
	if state == nil {
		return errors.Join(tx.Bucket(vmsBucket).Delete([]byte(key)), tx.Bucket(openBucket).Delete([]byte(key)))
	}
	own := *state
	if own.Baseline != nil {
		items := *own.Baseline
		items.Open = nil
		own.Baseline = &items
	}
	if err := putJSON(tx.Bucket(vmsBucket), key, own); err != nil {
		return err
	}
	return putOpen(tx, key, state)
}

func putOpen(tx *bolt.Tx, key string, state *guestState) error {
	o := openState{Findings: state.Findings}
	if state.Baseline != nil {
		o.Open = state.Baseline.Open
	}
	return putJSON(tx.Bucket(openBucket), key, o)
}

func putJSON(b *bolt.Bucket, key string, v any) error {
	value, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put([]byte(key), value)
}

// records returns up to limit stored findings after a sequence number.
func (s *store) records(after uint64, limit int) ([]Record, error) {
	var records []Record
	err := s.db.View(func(tx *bolt.Tx) error {
		cursor := tx.Bucket(findingsBucket).Cursor()
		for k, v := cursor.Seek(seqKey(after + 1)); k != nil && len(records) < limit; k, v = cursor.Next() {
			var r Record
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("finding %d in the store: %w", binary.BigEndian.Uint64(k), err)
			}
			records = append(records, r)
		}
		return nil
	})
	return records, err
}

// guests returns all that are stored. Those that do not decode are left out
// and their keys returned.
func (s *store) guests() (guests map[string]*guestState, broken []string, err error) {
	guests = map[string]*guestState{}
	err = s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(vmsBucket).ForEach(func(k, v []byte) error {
			state, open := new(guestState), new(openState)
			value := tx.Bucket(openBucket).Get(k)
			if json.Unmarshal(v, state) != nil || value != nil && json.Unmarshal(value, open) != nil {
				broken = append(broken, string(k))
				return nil
			}
			if value != nil {
				state.Findings = open.Findings
				if state.Baseline != nil {
					state.Baseline.Open = open.Open
				}
			}
			guests[string(k)] = state
			return nil
		})
	})
	return guests, broken, err
}

// isErrno says that the system refused something, so that the fault is not in
// the file's contents.
func isErrno(err error) bool {
	var errno unix.Errno
	return errors.As(err, &errno)
}
