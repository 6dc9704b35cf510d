// SPDX-License-Identifier: MIT

package report

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/kvmaccess/kvmaccess/bench/sample"
)

// Names of the files that WriteFiles writes.
const (
	SamplesFile  = "samples.csv"
	SummaryFile  = "summary.json"
	BenchFile    = "bench.txt"
	MarkdownFile = "report.md"
	PlotName     = "overhead"
)

// WriteFiles writes all forms of a report into a directory. Nothing is written
// unless all of it can be made.
func WriteFiles(dir string, r *Report, samples []sample.Sample) error {
	files := []struct {
		name  string
		write func(io.Writer) error
	}{
		{SamplesFile, func(w io.Writer) error { return sample.WriteCSV(w, samples) }},
		{SummaryFile, r.Summary.WriteJSON},
		{BenchFile, func(w io.Writer) error { return WriteBench(w, samples) }},
		{MarkdownFile, r.WriteMarkdown},
		{PlotName + ".png", func(w io.Writer) error { return WritePlot(w, "png", r.Summary) }},
		{PlotName + ".svg", func(w io.Writer) error { return WritePlot(w, "svg", r.Summary) }},
	}
	content := make([]bytes.Buffer, len(files))
	for i, f := range files {
		if err := f.write(&content[i]); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.name), content[i].Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}
