// SPDX-License-Identifier: MIT

package report

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"text/template"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// Instructions is the clock of numbers that are counted in instructions of an
// emulated host with one CPU, one a nanosecond.
const Instructions = "instructions (QEMU -icount)"

// Funcs are for templates of reports.
var Funcs = template.FuncMap{
	"percent": percent,
	"seconds": func(s float64) string { return period(s) },
	"inverse": func(v float64) string { return fmt.Sprintf("%.0f", 1/v) },
	"machine": func(m Machine) string {
		rows := "| | |\n|---|---|\n"
		for _, r := range [][2]string{
			{"processor", fmt.Sprintf("%s, %d CPUs", m.Processor, m.CPUs)}, {"system", m.System}, {"emulator", m.Emulator},
			{"kernel of the host", m.Kernel}, {"Go", m.Go}, {"KvmAccess", m.Revision},
		} {
			if r[1] != "" {
				rows += "| " + r[0] + " | " + r[1] + " |\n"
			}
		}
		return rows
	},
}

// Float is a number for a table.
func Float(v float64) string { return strconv.FormatFloat(v, 'g', 8, 64) }

// Bars is a picture of bars side by side, each of parts on top of each other.
type Bars struct {
	Title, Label string
	Log          bool     // parts cannot be more than one then
	Parts        []string // names, or none
	Bars         []Bar
}

// Bar of Bars.
type Bar struct {
	Name  string
	Parts []float64
}

// PNG is the File that holds the picture.
func (b Bars) PNG(name string) File {
	return File{name, func(w io.Writer) error {
		p, err := b.plot()
		if err != nil {
			return err
		}
		out, err := p.WriterTo(plotWidth, plotHeight, "png")
		if err != nil {
			return err
		}
		_, err = out.WriteTo(w)
		return err
	}}
}

func (b Bars) plot() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.Title.Padding, p.Title.TextStyle.Font.Size = b.Title, vg.Points(8), vg.Points(13)
	p.X.Label.Text, p.X.Label.TextStyle.Font.Size = b.Label, vg.Points(12)
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Width = colourGrid, 0
	p.Add(grid)
	names := make([]string, len(b.Bars))
	var under *plotter.BarChart
	for part := range len(b.Bars[0].Parts) {
		values := make(plotter.Values, len(b.Bars))
		for i, bar := range b.Bars {
			names[i], values[i] = bar.Name, bar.Parts[part]
			if b.Log {
				values[i] = max(0, math.Log10(bar.Parts[part]))
			}
		}
		bars, err := plotter.NewBarChart(values, vg.Points(20))
		if err != nil {
			return nil, err
		}
		bars.Horizontal, bars.Color, bars.LineStyle.Width = true, colours[part%len(colours)], 0
		if under != nil {
			bars.StackOn(under)
		}
		under = bars
		p.Add(bars)
		if len(b.Parts) > 0 {
			p.Legend.Add(b.Parts[part], bars)
		}
	}
	p.NominalY(names...)
	if b.Log { // bars begin at 1
		var ticks []plot.Tick
		for v := 0.0; v <= p.X.Max+1; v++ {
			ticks = append(ticks, plot.Tick{Value: v, Label: fmt.Sprintf("%g", math.Pow(10, v))})
		}
		p.X.Tick.Marker = plot.ConstantTicks(ticks)
	}
	p.Legend.Top, p.Legend.Padding = true, vg.Points(3)
	p.Legend.TextStyle.Font.Size = vg.Points(10)
	return p, nil
}
