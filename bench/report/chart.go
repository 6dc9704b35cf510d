// SPDX-License-Identifier: MIT

package report

import (
	"fmt"
	"image/color"
	"io"
	"math"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// Chart is a picture of series against an axis. What has no place on a
// logarithmic axis is left out.
type Chart struct {
	Title  string
	X, Y   Axis
	Series []Series
	Levels []Level
	// LegendLeft puts the legend to the left, LegendBottom to the bottom.
	LegendLeft, LegendBottom bool
}

// Axis of a Chart.
type Axis struct {
	Label    string
	Log      bool
	Min, Max float64
	Text     func(float64) string // of a tick
}

// Series is points in the order of X.
type Series struct {
	Name   string
	Points []Value
	Line   bool // along the points
	Hidden bool // only the line is drawn
	Dashed bool
	Colour int // of the same number: the same
}

// Value is a point, with its interval if that is more than a point.
type Value struct{ X, Y, Low, High float64 }

// Level is a line across.
type Level struct {
	Name string
	Y    float64
}

var colours = []color.RGBA{colourClaim, colourSoaker, colourCheck, {R: 0xcc, G: 0x79, B: 0xa7, A: 0xff}, colourPaper}

// Seconds is a text of ticks of an axis of seconds.
func Seconds(v float64) string {
	return time.Duration(math.Round(v * 1e9)).String()
}

// Number is a text of ticks of any axis.
func Number(v float64) string { return fmt.Sprintf("%g", v) }

// Percent is a text of ticks of an axis of percents.
func Percent(v float64) string { return fmt.Sprintf("%g%%", v) }

// PNG is the File that holds the chart.
func (c *Chart) PNG(name string) File {
	return File{name, func(w io.Writer) error {
		p, err := c.plot()
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

func (c *Chart) plot() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.Title.Padding, p.Title.TextStyle.Font.Size = c.Title, vg.Points(8), vg.Points(13)
	for _, a := range []struct {
		from Axis
		to   *plot.Axis
	}{{c.X, &p.X}, {c.Y, &p.Y}} {
		a.to.Label.Text, a.to.Min, a.to.Max = a.from.Label, a.from.Min, a.from.Max
		a.to.Label.TextStyle.Font.Size, a.to.Tick.Label.Font.Size = vg.Points(12), vg.Points(10)
		if a.from.Log {
			a.to.Scale = plot.LogScale{}
			a.to.Tick.Marker = plot.ConstantTicks(decades(a.from.Min, a.from.Max, a.from.Text))
		}
	}
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = colourGrid, colourGrid
	p.Add(grid)
	floor := math.Inf(-1)
	if c.Y.Log {
		floor = c.Y.Min
	}
	for _, of := range c.Series {
		colour := colours[of.Colour%len(colours)]
		s := new(series).styled(of.Name, draw.CircleGlyph{}, 3.2, colour, of.Line)
		for _, v := range of.Points {
			if !c.X.Log || v.X >= c.X.Min {
				s.add(v.X, v.Y, min(v.Low, v.Y), max(v.High, v.Y), floor)
			}
		}
		if s.Len() == 0 {
			continue
		}
		if !of.Hidden {
			if err := s.draw(p); err != nil {
				return nil, err
			}
			p.Legend.Add(s.name, s.thumbs...)
			continue
		}
		line, err := plotter.NewLine(s.points)
		if err != nil {
			return nil, err
		}
		line.Color, line.Width = colour, vg.Points(1.2)
		if of.Dashed {
			line.Dashes = []vg.Length{vg.Points(5), vg.Points(4)}
		}
		p.Add(line)
		if of.Name != "" {
			p.Legend.Add(of.Name, line)
		}
	}
	for _, l := range c.Levels {
		line, err := plotter.NewLine(plotter.XYs{{X: c.X.Min, Y: l.Y}, {X: c.X.Max, Y: l.Y}})
		if err != nil {
			return nil, err
		}
		line.Color, line.Width, line.Dashes = colourPaper, vg.Points(1), []vg.Length{vg.Points(5), vg.Points(4)}
		p.Add(line)
		p.Legend.Add(l.Name, line)
	}
	p.Legend.Top, p.Legend.Left = !c.LegendBottom, c.LegendLeft
	p.Legend.Padding = vg.Points(3)
	p.Legend.TextStyle.Font.Size = vg.Points(10)
	return p, nil
}
