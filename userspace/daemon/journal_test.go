// SPDX-License-Identifier: MIT

package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

func startJournal(t *testing.T, dir string, change func(*Config)) *journal {
	t.Helper()
	config := Default()
	config.StateDir = dir
	if change != nil {
		change(&config)
	}
	if err := config.Check(); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	j := newJournal(&config, log, newProblems(log))
	if err := j.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	return j
}

var someone = identity{Boot: "b", PID: 7, Start: 9, Name: "web"}

// raise makes n findings, numbered on.
func raise(j *journal, n int) {
	last, _ := j.counts()
	for i := range n {
		j.raise(someone, &integrity.Baseline{Version: 1}, integrity.Finding{Message: fmt.Sprintf("finding %d", int(last)+i+1)})
	}
}

func expected(from, to int) []string {
	var all []string
	for i := from; i <= to; i++ {
		all = append(all, fmt.Sprintf("finding %d", i))
	}
	return all
}

// A disk that is full for a while loses nothing and doubles nothing.
func TestJournalFullDisk(t *testing.T) {
	for _, test := range []struct {
		name         string
		sink, store  bool // that fails
		wantProblems []string
	}{
		{"findings file", true, false, []string{"findings"}},
		{"store", false, true, []string{"store"}},
		{"both", true, true, []string{"findings", "store"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				j := startJournal(t, dir, nil)
				raise(j, 3)
				synctest.Wait()

				disk := &fullDisk{regular: true, room: 250} // the fourth, and a part of the fifth
				open, put := j.sink.open, j.put
				text, err := os.ReadFile(j.config.Findings)
				if err != nil {
					t.Fatal(err)
				}
				j.mu.Lock()
				if test.sink {
					disk.text = text
					j.sink.open = disk.open
				}
				if test.store {
					j.put = func(write) error { return unix.ENOSPC }
				}
				j.mu.Unlock()
				raise(j, 700)
				time.Sleep(time.Minute)
				synctest.Wait()
				var subjects []string
				for _, p := range j.problems.list() {
					subjects = append(subjects, p.Subject)
				}
				if diff := cmp.Diff(test.wantProblems, subjects); diff != "" {
					t.Errorf("problems: -want +got:\n%s", diff)
				}
				if _, unwritten := j.counts(); (unwritten > 0) != test.sink {
					t.Errorf("%d findings wait", unwritten)
				}
				// They can be asked for all the while.
				var asked []string
				for seq := uint64(0); ; {
					records, err := j.after(seq, 100)
					if err != nil {
						t.Fatal(err)
					}
					if len(records) == 0 {
						break
					}
					for _, r := range records {
						asked = append(asked, r.Message)
					}
					seq = records[len(records)-1].Seq
				}
				if diff := cmp.Diff(expected(1, 703), asked); diff != "" {
					t.Errorf("asked: -want +got:\n%s", diff)
				}

				j.mu.Lock()
				disk.room = 1 << 30
				j.put = put
				j.mu.Unlock()
				time.Sleep(j.lastRetry)
				synctest.Wait()
				raise(j, 1)
				synctest.Wait()
				if test.sink {
					if err := os.WriteFile(j.config.Findings, disk.text, 0o600); err != nil {
						t.Fatal(err)
					}
					j.sink.open = open
				}
				if diff := cmp.Diff(expected(1, 704), messages(t, j.config.Findings)); diff != "" {
					t.Errorf("written: -want +got:\n%s", diff)
				}
				if left := j.problems.list(); len(left) != 0 {
					t.Errorf("problems: %+v", left)
				}
				if err := j.Shutdown(); err != nil {
					t.Error(err)
				}
				s := mustStore(t, dir)
				defer s.Close()
				if stored, err := s.records(0, 1000); err != nil || len(stored) != 704 {
					t.Errorf("%d findings are stored, want 704 (%v)", len(stored), err)
				}
			})
		})
	}
}

// The daemon ends while the disk is full, and starts when it has room again.
func TestJournalRestartOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		findings := filepath.Join(dir, DefaultFindings)
		j := startJournal(t, dir, nil)
		raise(j, 2)
		synctest.Wait()
		open := j.sink.open
		j.sink.open = func() (sinkFile, error) { return nil, unix.ENOSPC }
		raise(j, 5)
		synctest.Wait()
		if err := j.Shutdown(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(expected(1, 2), messages(t, findings)); diff != "" {
			t.Errorf("before: -want +got:\n%s", diff)
		}
		j = startJournal(t, dir, nil)
		synctest.Wait()
		if diff := cmp.Diff(expected(1, 7), messages(t, findings)); diff != "" {
			t.Errorf("after: -want +got:\n%s", diff)
		}
		if err := j.Shutdown(); err != nil {
			t.Fatal(err)
		}
		_ = open
	})
}

// The daemon is killed after a finding is written, before that is stored.
func TestJournalKilled(t *testing.T) {
	for name, lost := range map[string]func(t *testing.T, dir string){
		"the store does not know what was written": func(t *testing.T, dir string) {
			s := mustStore(t, dir)
			defer s.Close()
			if err := s.put(write{written: 1}); err != nil {
				t.Fatal(err)
			}
		},
		"in the middle of a line": func(t *testing.T, dir string) {
			path := filepath.Join(dir, DefaultFindings)
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, info.Size()-10); err != nil {
				t.Fatal(err)
			}
			s := mustStore(t, dir)
			defer s.Close()
			if err := s.put(write{written: 2}); err != nil {
				t.Fatal(err)
			}
		},
		"the store is lost": func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "state.db")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				j := startJournal(t, dir, nil)
				raise(j, 3)
				if err := j.Shutdown(); err != nil {
					t.Fatal(err)
				}
				lost(t, dir)
				j = startJournal(t, dir, nil)
				synctest.Wait()
				j.raise(someone, &integrity.Baseline{Version: 1}, integrity.Finding{Message: "finding 4"})
				if err := j.Shutdown(); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(expected(1, 4), messages(t, filepath.Join(dir, DefaultFindings))); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			})
		})
	}
}

// What stands in the file is in the store: whoever is killed has told nothing
// that it does not know the next time.
func TestJournalStoresFirst(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := startJournal(t, dir, nil)
		put, release := j.put, make(chan struct{})
		j.mu.Lock()
		j.put = func(w write) error {
			<-release
			return put(w)
		}
		j.mu.Unlock()
		raise(j, 3)
		synctest.Wait()
		if text, err := os.ReadFile(j.config.Findings); err == nil || !os.IsNotExist(err) {
			t.Errorf("written before they are stored: %q, %v", text, err)
		}
		close(release)
		synctest.Wait()
		if _, unwritten := j.counts(); unwritten > 0 {
			t.Errorf("%d findings are stored and not written", unwritten)
		}
		if err := j.Shutdown(); err != nil {
			t.Error(err)
		}
	})
}

func TestJournalPrunes(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := startJournal(t, dir, func(c *Config) { c.Keep = 100 })
		for range 5 {
			raise(j, batch)
			synctest.Wait()
		}
		records, err := j.after(0, 10*batch)
		if err != nil || len(records) < 100 || len(records) > 100+2*batch || records[len(records)-1].Seq != 5*batch {
			t.Errorf("%d findings are kept, want 100 or some more (%v)", len(records), err)
		}
		if n := len(messages(t, j.config.Findings)); n != 5*batch {
			t.Errorf("%d findings are in the file, want %d", n, 5*batch)
		}
		if err := j.Shutdown(); err != nil {
			t.Error(err)
		}
	})
}

// Findings that no place is left for are counted.
func TestJournalBounded(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := startJournal(t, dir, nil)
		j.put = func(write) error { return unix.ENOSPC }
		open := j.sink.open
		j.sink.open = func() (sinkFile, error) { return nil, unix.ENOSPC }
		raise(j, maxUnstored+5)
		synctest.Wait()
		if len(j.unstored) != maxUnstored || j.dropped != 5 {
			t.Errorf("%d are kept and %d dropped", len(j.unstored), j.dropped)
		}
		// As soon as one place takes them, there is room again.
		j.mu.Lock()
		j.sink.open = open
		j.mu.Unlock()
		time.Sleep(j.lastRetry)
		synctest.Wait()
		j.raise(someone, &integrity.Baseline{Version: 1}, integrity.Finding{Message: "the last one"})
		synctest.Wait()
		all := messages(t, j.config.Findings)
		if len(all) != maxUnstored+1 || all[len(all)-1] != "the last one" || len(j.unstored) != maxUnstored {
			t.Errorf("%d are written, %d kept", len(all), len(j.unstored))
		}
		if err := j.Shutdown(); err != nil {
			t.Error(err)
		}
	})
}

// Writing that never ends does not keep the daemon from ending.
func TestJournalStuck(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		j := startJournal(t, dir, nil)
		stuck := make(chan struct{})
		j.sink.open = func() (sinkFile, error) { <-stuck; return nil, unix.EIO }
		raise(j, 1)
		synctest.Wait()
		before := time.Now()
		if err := j.Shutdown(); err == nil {
			t.Error("nothing was said")
		}
		if took := time.Since(before); took > 2*j.flush {
			t.Errorf("it took %v", took)
		}
		close(stuck)
		j.stopStoring()
		<-j.storing
		j.store.Close()
		j.lock.Close()
	})
}
