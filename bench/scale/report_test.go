// SPDX-License-Identifier: MIT

package scale

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

func TestSummarize(t *testing.T) {
	rows := []Row{
		{Kind: tinyvm.Halting, VMs: 1, Period: Period, CPUPercent: []float64{0.01}, Instructions: []float64{5000}},
		{Kind: tinyvm.Halting, VMs: 1000, Period: Period, CPUPercent: []float64{9}, Instructions: []float64{4500}},
		{Kind: tinyvm.Spinning, VMs: 1, Period: Period, CPUPercent: []float64{0.016}, Instructions: []float64{8000}},
		{Kind: tinyvm.Spinning, VMs: 1000, Period: Period, CPUPercent: []float64{17}, Instructions: []float64{8800}},
	}
	s, err := Summarize(rows)
	if err != nil {
		t.Fatal(err)
	}
	if s.ScaleCostRatio != 1.1 || s.VMs != 1000 || !s.Met() {
		t.Errorf("%+v", s)
	}
	dir := t.TempDir()
	if err := s.Write(dir, rows); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil || !strings.Contains(string(text), "A VM among 1000 that are watched costs **1.10 times**") {
		t.Errorf("%v\n%s", err, text)
	}
	if _, err := Summarize(rows[1:2]); err == nil {
		t.Error("nothing to compare with is no error")
	}
	few, err := Summarize([]Row{rows[0], {Kind: tinyvm.Halting, VMs: 10, Period: Period, CPUPercent: []float64{0.1}, Instructions: []float64{5000}}})
	if err != nil || few.Met() {
		t.Errorf("ten VMs are no thousand: %+v, %v", few, err)
	}
}

func TestNumbers(t *testing.T) {
	if got := Numbers(1000); len(got) != 4 || got[3] != 1000 {
		t.Errorf("%v", got)
	}
	if got := Numbers(99); len(got) != 2 {
		t.Errorf("%v", got)
	}
}
