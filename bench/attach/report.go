// SPDX-License-Identifier: MIT

package attach

import (
	_ "embed"
	"fmt"
	"image/color"
	"io"
	"slices"
	"strconv"
	"text/template"

	"github.com/montanaflynn/stats"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

	"github.com/kvmaccess/kvmaccess/bench/report"
)

// Report is what a measurement of all kernels gave.
type Report struct {
	report.Origin
	Host string // kernel of the emulated host
	Load string // of the emulating machine meanwhile: load averages before and after
	Rows []Row
}

// Peers are the rows that drgn has a part in.
func (r *Report) Peers() []Row {
	return slices.DeleteFunc(slices.Clone(r.Rows), func(row Row) bool { return row.Peer == "" })
}

// Summarize fills in the times of a run's rows.
func (r *Run) Summarize() error {
	for i := range r.Rows {
		row := &r.Rows[i]
		median := func(kind Kind, of func(Sample) float64) (float64, int, error) {
			var all []float64
			for _, s := range r.Samples {
				if s.Guest == row.Guest && s.Kind == kind {
					all = append(all, of(s))
				}
			}
			m, err := stats.Median(all)
			if err != nil {
				err = fmt.Errorf("%s, %s: %w", row.Guest, kind, err)
			}
			return m, len(all), err
		}
		seconds := func(s Sample) float64 { return s.Seconds }
		size := func(s Sample) float64 { return float64(s.Bytes) }
		times := map[Kind]*float64{Cold: &row.AttachCold, Cached: &row.AttachCached, Process: &row.Process}
		if row.Peer != "" {
			times[Peer], times[PeerAll] = &row.PeerSeconds, &row.PeerProcess
		}
		for kind, to := range times {
			var err error
			if *to, row.Attachments, err = median(kind, seconds); err != nil {
				return err
			}
		}
		for _, s := range slices.Backward(r.Samples) {
			switch {
			case s.Guest != row.Guest:
			case s.Kind == Cold:
				row.AttachFirst = s.Seconds
			case s.Kind == Peer:
				row.PeerFirst = s.Seconds
			}
		}
		for kind, to := range map[Kind]*uint64{Cold: &row.BytesRead, Cached: &row.BytesCached} {
			bytes, _, err := median(kind, size)
			if err != nil {
				return err
			}
			*to = uint64(bytes)
		}
	}
	return nil
}

//go:embed report.md.tmpl
var text string

var page = template.Must(template.New("report").Funcs(template.FuncMap{
	"mib": func(n uint64) string { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) },
	"onoff": func(on bool) string {
		if on {
			return "on"
		}
		return "off"
	},
	"times": func(a, b float64) string { return fmt.Sprintf("%.1f", a/b) },
}).Parse(text))

// Write writes report.md, summary.json, samples.csv and attach.png into a
// directory.
func (r *Report) Write(dir string, samples []Sample) error {
	return report.WriteAll(dir,
		report.Markdown(page, r),
		report.JSON(report.SummaryFile, r.Rows),
		report.CSV(report.SamplesFile, table(samples)),
		report.File{Name: "attach.png", Write: r.draw},
	)
}

func table(samples []Sample) [][]string {
	rows := [][]string{{"guest", "kind", "seconds", "bytes", "reads"}}
	for _, s := range samples {
		rows = append(rows, []string{
			s.Guest, string(s.Kind), strconv.FormatFloat(s.Seconds, 'f', 6, 64),
			strconv.FormatUint(s.Bytes, 10), strconv.FormatUint(s.Reads, 10),
		})
	}
	return rows
}

// draw draws a bar for each time of each guest.
func (r *Report) draw(w io.Writer) error {
	p := plot.New()
	p.Title.Text = "Time to attach to a guest that was never seen before"
	p.Y.Label.Text = "seconds of the emulated host (median)"
	p.Y.Min = 0
	p.Legend.Top = true
	width := vg.Points(14)
	var names []string
	type bars struct {
		name   string
		of     func(Row) float64
		colour color.Color
	}
	series := []bars{
		{"cold", func(r Row) float64 { return r.AttachCold }, color.RGBA{R: 0x00, G: 0x9e, B: 0x73, A: 0xff}},
		{"cached", func(r Row) float64 { return r.AttachCached }, color.RGBA{R: 0xa3, G: 0xdb, B: 0xcb, A: 0xff}},
	}
	if len(r.Peers()) > 0 {
		series = append(series, bars{"drgn, with debug info", func(r Row) float64 { return r.PeerSeconds }, color.RGBA{R: 0xd5, G: 0x5e, B: 0x00, A: 0xff}})
	}
	for i, s := range series {
		var values plotter.Values
		for _, row := range r.Rows {
			values = append(values, s.of(row))
		}
		chart, err := plotter.NewBarChart(values, width)
		if err != nil {
			return err
		}
		chart.Color = s.colour
		chart.LineStyle.Width = 0
		chart.Offset = width * vg.Length(2*i-len(series)+1) / 2
		p.Add(chart)
		p.Legend.Add(s.name, chart)
	}
	for _, row := range r.Rows {
		names = append(names, row.Guest)
	}
	p.NominalX(names...)
	p.X.Tick.Label.Rotation = 0.6
	p.X.Tick.Label.XAlign = -1
	out, err := p.WriterTo(vg.Length(max(6, len(r.Rows)))*vg.Inch, 5*vg.Inch, "png")
	if err != nil {
		return err
	}
	_, err = out.WriteTo(w)
	return err
}
