// SPDX-License-Identifier: MIT

package report

import (
	_ "embed"
	"fmt"
	"io"
	"math"
	"strings"
	"text/template"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/sample"
	"github.com/kvmaccess/kvmaccess/bench/soaker"
)

// Report is a run with all that a reader has to know of it.
type Report struct {
	Summary *overhead.Summary
	Plans   []sample.Plan // what was run: the claim's first
	Machine Machine
}

//go:embed report.md.tmpl
var markdown string

var markdownTemplate = template.Must(template.New("report").Funcs(template.FuncMap{
	"percent":      percent,
	"seconds":      func(s float64) string { return period(s) },
	"milliseconds": func(s *float64) string { return fmt.Sprintf("%.3g ms", *s*1e3) },
	"difference":   difference,
	"agreeWithin":  func() string { return fmt.Sprintf("%g%%", 100*overhead.AgreeWithin) },
	"agreeAbove":   func() string { return fmt.Sprintf("%g%%", overhead.AgreeAbove) },
}).Parse(markdown))

// WriteMarkdown writes the report for people.
func (r *Report) WriteMarkdown(w io.Writer) error { return markdownTemplate.Execute(w, r) }

// First is the claim at the longest period measured.
func (r *Report) First() overhead.Period { return r.Summary.Periods[0] }

// LoopInstructions is the length of the counting loop.
func (r *Report) LoopInstructions() int { return soaker.LoopInstructions }

// MemoryRange is how much guest memory a check compares, in bytes.
func (r *Report) MemoryRange() int { return sample.MemoryRange }

// Lengths says how often and how long each clock was measured.
func (r *Report) Lengths() string {
	parts := make([]string, len(r.Plans))
	for i, p := range r.Plans {
		parts[i] = fmt.Sprintf("%s: %d repetitions with monitored windows of %v, but of no fewer than %d and no more than %d periods",
			clockName(p.Clock), p.Repetitions, p.Window, p.MinTicks, p.MaxTicks)
	}
	text := strings.Join(parts, "; ")
	return strings.ToUpper(text[:1]) + text[1:]
}

func clockName(c sample.Clock) string {
	if c == sample.Icount {
		return "instruction clock"
	}
	return "wall clock"
}

// percent has three significant digits.
func percent(v float64) string {
	if v == 0 {
		return "0%"
	}
	digits := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	return fmt.Sprintf("%.*f%%", digits, v)
}

// period is a period in s as people say it.
func period(s float64) string {
	d := time.Duration(math.Round(s * 1e9))
	if d < time.Second {
		return fmt.Sprintf("%g ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%g s", d.Seconds())
}

// difference is a ratio in percent, with its sign.
func difference(v float64) string {
	if math.Abs(v) > 10 {
		return "–" // nothing to compare with
	}
	return fmt.Sprintf("%+.1f%%", 100*v)
}
