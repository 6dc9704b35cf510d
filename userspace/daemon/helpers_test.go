// SPDX-License-Identifier: MIT

package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"testing"
)

// records reads a findings file: whole lines only, numbered without gaps.
func records(t *testing.T, path string) []Record {
	t.Helper()
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(text) > 0 && text[len(text)-1] != '\n' {
		t.Errorf("%s ends in the middle of a line: %q", path, text)
	}
	var all []Record
	for line := range bytes.Lines(text) {
		var r Record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%s: %q: %v", path, line, err)
		}
		if len(all) > 0 && r.Seq != all[len(all)-1].Seq+1 {
			t.Errorf("%s: finding %d follows %d", path, r.Seq, all[len(all)-1].Seq)
		}
		all = append(all, r)
	}
	return all
}

func messages(t *testing.T, path string) []string {
	t.Helper()
	all := []string{}
	for _, r := range records(t, path) {
		all = append(all, r.Message)
	}
	return all
}
