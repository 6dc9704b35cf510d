// SPDX-License-Identifier: MIT

package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

func mustStore(t *testing.T, dir string) *store {
	t.Helper()
	s, aside, err := openStore(dir)
	if err != nil || aside != "" {
		t.Fatal(aside, err)
	}
	return s
}

func sampleGuest(pid int) *guestState {
	entry := 59
	return &guestState{
		Identity: identity{Boot: "b", PID: pid, Start: 4, Name: "web", UUID: "u"},
		Baseline: &integrity.Baseline{
			Version: 1, Taken: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), VM: integrity.VM{ID: 3, Name: "web", PID: pid},
			Items: []integrity.Item{{Check: "syscalls", Object: "sys_call_table", Entry: &entry, Value: integrity.Value{Value: 0xffffffff81234560, Symbol: "__x64_sys_execve"}}},
		},
		Findings: 2,
	}
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s := mustStore(t, dir)
	a, b := sampleGuest(1), sampleGuest(2)
	if err := s.put(write{records: numbered(1, 5), guests: map[string]*guestState{"a": a, "b": b}, written: 3}); err != nil {
		t.Fatal(err)
	}
	if err := s.put(write{guests: map[string]*guestState{"b": nil}, prune: 2}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustStore(t, dir)
	defer s.Close()
	last, written, err := s.last()
	if last != 5 || written != 3 || err != nil {
		t.Errorf("last %d, written %d, %v", last, written, err)
	}
	got, err := s.records(0, 10)
	if diff := cmp.Diff(numbered(3, 5), got); diff != "" || err != nil {
		t.Errorf("%v -want +got:\n%s", err, diff)
	}
	got, err = s.records(3, 1)
	if diff := cmp.Diff(numbered(4, 4), got); diff != "" || err != nil {
		t.Errorf("%v -want +got:\n%s", err, diff)
	}
	guests, broken, err := s.guests()
	if diff := cmp.Diff(map[string]*guestState{"a": a}, guests); diff != "" || len(broken) != 0 || err != nil {
		t.Errorf("%v %v -want +got:\n%s", broken, err, diff)
	}
	if info, err := os.Stat(filepath.Join(dir, "state.db")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600 (%v)", info.Mode(), err)
	}
}

// What changes with each finding is stored by itself, and one with all of the
// rest supersedes it.
func TestStoreOpen(t *testing.T) {
	dir := t.TempDir()
	s := mustStore(t, dir)
	defer func() { s.Close() }()
	found := func(message string, n uint64) *guestState {
		g := sampleGuest(1)
		g.Findings = n
		g.Baseline.Open = []integrity.Open{{Finding: integrity.Finding{Message: message}, Item: g.Baseline.Items[0]}}
		return g
	}
	cleared := sampleGuest(1)
	cleared.Findings = 9
	for _, step := range []struct {
		name string
		write
		want *guestState
	}{
		{"first", write{guests: map[string]*guestState{"a": sampleGuest(1)}}, sampleGuest(1)},
		{"found", write{open: map[string]*guestState{"a": found("x", 7)}}, found("x", 7)},
		{"all", write{guests: map[string]*guestState{"a": found("y", 8)}}, found("y", 8)},
		{"cleared", write{open: map[string]*guestState{"a": cleared}}, cleared},
		{"gone", write{guests: map[string]*guestState{"a": nil}}, nil},
	} {
		if err := s.put(step.write); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = mustStore(t, dir)
		guests, broken, err := s.guests()
		if diff := cmp.Diff(step.want, guests["a"]); diff != "" || len(broken) != 0 || err != nil {
			t.Errorf("%s: %v %v -want +got:\n%s", step.name, broken, err, diff)
		}
	}
	if err := s.db.View(func(tx *bolt.Tx) error {
		if k, _ := tx.Bucket(openBucket).Cursor().First(); k != nil {
			t.Errorf("%s is left", k)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// A store of version 1 is taken over.
func TestStoreFirstVersion(t *testing.T) {
	dir := t.TempDir()
	s := mustStore(t, dir)
	g := sampleGuest(1)
	g.Baseline.Open = []integrity.Open{{Finding: integrity.Finding{Message: "x"}, Item: g.Baseline.Items[0]}}
	if err := s.db.Update(func(tx *bolt.Tx) error {
		return errors.Join(putJSON(tx.Bucket(vmsBucket), "a", g), tx.DeleteBucket(openBucket),
			tx.Bucket(metaBucket).Put(versionKey, []byte(firstVersion)), tx.Bucket(metaBucket).Put(writtenKey, seqKey(4)))
	}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	for range 2 {
		s = mustStore(t, dir)
		guests, _, err := s.guests()
		if diff := cmp.Diff(map[string]*guestState{"a": g}, guests); diff != "" || err != nil {
			t.Errorf("%v -want +got:\n%s", err, diff)
		}
		if _, written, err := s.last(); written != 4 || err != nil {
			t.Errorf("written %d, %v", written, err)
		}
		s.Close()
	}
}

// Whatever is in state.db, the daemon starts, and does not throw it away.
func TestStoreDamaged(t *testing.T) {
	good := t.TempDir()
	s := mustStore(t, good)
	w := write{records: numbered(1, 2000), guests: map[string]*guestState{}}
	for i := range 50 {
		w.guests[fmt.Sprint(i)] = sampleGuest(i)
	}
	if err := s.put(w); err != nil {
		t.Fatal(err)
	}
	s.Close()
	text, err := os.ReadFile(filepath.Join(good, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	damages := map[string]func([]byte) []byte{
		"garbage":       func([]byte) []byte { return []byte(strings.Repeat("garbage ", 4096)) },
		"short":         func([]byte) []byte { return []byte("x") },
		"zeros":         func(b []byte) []byte { return make([]byte, len(b)) },
		"cut to metas":  func(b []byte) []byte { return b[:2*page] },
		"cut in half":   func(b []byte) []byte { return b[:len(b)/2/page*page] },
		"cut in a page": func(b []byte) []byte { return b[:3*page+100] },
	}
	for i := 2; i < 40 && (i+1)*page <= len(text); i += 3 {
		damages[fmt.Sprintf("page %d overwritten", i)] = func(b []byte) []byte {
			for j := i * page; j < (i+1)*page; j++ {
				b[j] = 0xa5
			}
			return b
		}
	}
	found := 0
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "state.db")
			broken := damage(append([]byte(nil), text...))
			if err := os.WriteFile(path, broken, 0o600); err != nil {
				t.Fatal(err)
			}
			s, aside, err := openStore(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if aside == "" {
				if !strings.HasPrefix(name, "page ") {
					t.Error("the damage was not noticed")
				}
				return // a page that is free
			}
			found++
			kept, err := filepath.Glob(path + ".broken-*")
			if err != nil || len(kept) != 1 {
				t.Fatalf("moved aside: %q, %v", kept, err)
			}
			if b, err := os.ReadFile(kept[0]); err != nil || string(b) != string(broken) {
				t.Errorf("what was moved aside is not what was there (%v)", err)
			}
			if !strings.Contains(aside, kept[0]) {
				t.Errorf("%q does not say where it is", aside)
			}
			if err := s.put(write{records: numbered(1, 1)}); err != nil {
				t.Error(err)
			}
		})
	}
	if found < 10 {
		t.Errorf("only %d of %d damages were found", found, len(damages))
	}
}

func TestStoreRefused(t *testing.T) {
	dir := t.TempDir()
	s := mustStore(t, dir)
	if _, _, err := openStore(dir); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a store in use: %v", err)
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(metaBucket).Put(versionKey, []byte("3")) }); err != nil {
		t.Fatal(err)
	}
	s.Close()
	_, _, err := openStore(dir)
	if !errors.Is(err, errNewerStore) || !strings.Contains(err.Error(), "update kvmaccessd") {
		t.Errorf("a later version's store: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*broken*")); len(left) != 0 {
		t.Errorf("a later version's store was moved aside: %q", left)
	}
	if _, _, err := openStore(filepath.Join(dir, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

// One guest's state that does not decode costs that guest's baseline alone.
func TestStoreBrokenGuest(t *testing.T) {
	dir := t.TempDir()
	s := mustStore(t, dir)
	if err := s.put(write{guests: map[string]*guestState{"a": sampleGuest(1)}}); err != nil {
		t.Fatal(err)
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(vmsBucket).Put([]byte("b"), []byte("{")) }); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	guests, broken, err := s.guests()
	if err != nil || len(guests) != 1 || len(broken) != 1 || broken[0] != "b" {
		t.Errorf("%v, %v, %v", guests, broken, err)
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	l, err := takeLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := takeLock(dir); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("the second lock: %v", err)
	}
	l.Close()
	again, err := takeLock(dir)
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	again.Close()
}
