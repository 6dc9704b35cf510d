// SPDX-License-Identifier: MIT

package capture

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"text/template"

	"github.com/kvmaccess/kvmaccess/bench/report"
)

// Report is what a measurement of all hosts gave.
type Report struct {
	Command string
	Date    string
	Rows    []Row
	Machine report.Machine
}

//go:embed report.md.tmpl
var text string

var page = template.Must(template.New("report").Funcs(template.FuncMap{
	"cost": func(c Cost, of Row) string {
		if of.Clock == Wall {
			return fmt.Sprintf("× %.2f", c.Median)
		}
		return fmt.Sprintf("%.0f (%.0f to %.0f)", c.Median, c.Low, c.High)
	},
}).Parse(text))

// Write writes report.md, summary.json and samples.csv into a directory.
// Nothing is written unless all of it can be made.
func (r *Report) Write(dir string, clocks []Clock, runs []*Run) error {
	var md, samples bytes.Buffer
	if err := page.Execute(&md, r); err != nil {
		return err
	}
	if err := WriteCSV(&samples, clocks, runs); err != nil {
		return err
	}
	summary, err := json.MarshalIndent(r.Rows, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, content := range map[string][]byte{
		"report.md": md.Bytes(), "summary.json": append(summary, '\n'), "samples.csv": samples.Bytes(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}
