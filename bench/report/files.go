// SPDX-License-Identifier: MIT

package report

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// Names of the files that WriteFiles writes.
const (
	SamplesFile  = "samples.csv"
	SummaryFile  = "summary.json"
	BenchFile    = "bench.txt"
	MarkdownFile = "report.md"
	PlotName     = "overhead"
)

// WriteFiles writes all forms of a report into a directory.
func WriteFiles(dir string, r *Report, samples []sample.Sample) error {
	return WriteAll(dir,
		File{SamplesFile, func(w io.Writer) error { return sample.WriteCSV(w, samples) }},
		File{SummaryFile, r.Summary.WriteJSON},
		File{BenchFile, func(w io.Writer) error { return WriteBench(w, samples) }},
		File{MarkdownFile, r.WriteMarkdown},
		File{PlotName + ".png", func(w io.Writer) error { return WritePlot(w, "png", r.Summary) }},
		File{PlotName + ".svg", func(w io.Writer) error { return WritePlot(w, "svg", r.Summary) }},
	)
}

// File is one of the files of a report.
type File struct {
	Name  string
	Write func(io.Writer) error
}

// WriteAll writes files into a directory, which is made. Nothing is written
// unless all of them can be made.
func WriteAll(dir string, files ...File) error {
	content := make([]bytes.Buffer, len(files))
	for i, f := range files {
		if err := f.Write(&content[i]); err != nil {
			return fmt.Errorf("%s: %w", f.Name, err)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.Name), content[i].Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// JSON is a File that holds a value as JSON.
func JSON(name string, v any) File {
	return File{name, func(w io.Writer) error {
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		return encoder.Encode(v)
	}}
}

// Markdown is the File that holds a report for people.
func Markdown(page *template.Template, data any) File {
	return File{MarkdownFile, func(w io.Writer) error { return page.Execute(w, data) }}
}

// CSV is a File that holds a table, its first row the names of the columns.
func CSV(name string, rows [][]string) File {
	return File{name, func(w io.Writer) error { return csv.NewWriter(w).WriteAll(rows) }}
}

// Origin is where the numbers of a report come from.
type Origin struct {
	Command string  `json:"command"`
	Date    string  `json:"date"` // UTC
	Machine Machine `json:"machine"`
}

// ThisRun is the Origin of a run of ./bench/cmd/NAME with these arguments, on
// hosts that QEMU emulates, that begins now.
func ThisRun(ctx context.Context, log *slog.Logger, name string, args []string) (Origin, error) {
	o := Origin{
		Command: command(name, args),
		Date:    time.Now().UTC().Format(time.DateOnly),
		Machine: ThisMachine(),
	}
	var err error
	o.Machine.Emulator, err = host.QEMUVersion(ctx, log)
	return o, err
}

// command is how a program was called, but for where its results go.
func command(name string, args []string) string {
	words := []string{"go run ./bench/cmd/" + name}
	for i := 0; i < len(args); i++ {
		switch flag := strings.TrimLeft(args[i], "-"); {
		case flag == "out":
			i++
		case strings.HasPrefix(flag, "out="):
		case args[i] == "":
			words = append(words, "''")
		default:
			words = append(words, args[i])
		}
	}
	return strings.Join(words, " ")
}
