// SPDX-License-Identifier: MIT

package capture

import (
	_ "embed"
	"fmt"
	"io"
	"text/template"

	"github.com/kvmaccess/kvmaccess/bench/report"
)

// Report is what a measurement of all hosts gave.
type Report struct {
	report.Origin
	Rows []Row
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
func (r *Report) Write(dir string, clocks []Clock, runs []*Run) error {
	return report.WriteAll(dir,
		report.Markdown(page, r),
		report.JSON(report.SummaryFile, r.Rows),
		report.File{Name: report.SamplesFile, Write: func(w io.Writer) error { return WriteCSV(w, clocks, runs) }},
	)
}
