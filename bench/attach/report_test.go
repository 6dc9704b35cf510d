// SPDX-License-Identifier: MIT

package attach

import (
	"encoding/csv"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmaccess/kvmaccess/bench/report"
)

// What is written has the medians of the samples, and all that the summary's
// readers look for.
func TestWrite(t *testing.T) {
	r := Run{
		Host: "6.1.0-test",
		Rows: []Row{{Guest: "one", Kernel: "6.12.1", KASLR: true, KPTI: true, Levels: 4, Symbols: 10, SymbolsEqual: 9, Offsets: 7, OffsetsEqual: 7, Peer: "drgn 1"}},
		Samples: []Sample{
			{"one", Cold, 3, 300, 3}, {"one", Cold, 1, 100, 1}, {"one", Cold, 2, 200, 2},
			{"one", Cached, 0.5, 50, 1}, {"one", Process, 4, 0, 0}, {"one", Peer, 40, 0, 0}, {"one", PeerAll, 60, 0, 0},
		},
	}
	if err := r.Summarize(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	rep := Report{Origin: report.Origin{Command: "make", Date: "2026-11-23"}, Host: r.Host, Rows: r.Rows}
	if err := rep.Write(dir, r.Samples); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	var rows []map[string]any
	if err := json.Unmarshal([]byte(read("summary.json")), &rows); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{
		"guest_kernel": "6.12.1", "kaslr": true, "kpti": true, "levels": 4.0, "symbols_guest": 10.0, "symbols_equal": 9.0,
		"offsets_checked": 7.0, "offsets_equal": 7.0, "attach_cold_s": 2.0, "attach_cached_s": 0.5, "bytes_read": 200.0, "peer": "drgn 1", "peer_s": 40.0, "process_s": 4.0, "peer_process_s": 60.0, "attach_first_s": 3.0, "peer_first_s": 40.0,
	} {
		if got := rows[0][key]; got != want {
			t.Errorf("%s: %v, want %v", key, got, want)
		}
	}
	table, err := csv.NewReader(strings.NewReader(read("samples.csv"))).ReadAll()
	if err != nil || len(table) != 1+len(r.Samples) {
		t.Errorf("%d lines of samples, %v", len(table), err)
	}
	if text := read("report.md"); !strings.Contains(text, "| 9 of 10 | 7 of 7 |") || !strings.Contains(text, "| 2.00 | 0.50 |") || !strings.Contains(text, "| 20.0 |") || !strings.Contains(text, "| 15.0 |") {
		t.Error(text)
	}
	if picture := read("attach.png"); !strings.HasPrefix(picture, "\x89PNG") {
		t.Errorf("picture begins with %.8q", picture)
	}
}

// A guest without samples of both kinds has no medians.
func TestSummarizeNothing(t *testing.T) {
	r := Run{Rows: []Row{{Guest: "one"}}, Samples: []Sample{{"one", Cold, 1, 1, 1}}}
	if err := r.Summarize(); err == nil {
		t.Error("a median of nothing")
	}
}
