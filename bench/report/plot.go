// SPDX-License-Identifier: MIT

package report

import (
	"fmt"
	"image/color"
	"io"
	"math"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
)

const (
	plotWidth  = 22 * vg.Centimeter
	plotHeight = 15 * vg.Centimeter
)

// Colours that people with colour blindness tell apart (Okabe and Ito).
var (
	colourClaim  = color.RGBA{R: 0x00, G: 0x72, B: 0xb2, A: 0xff}
	colourSoaker = color.RGBA{R: 0xd5, G: 0x5e, B: 0x00, A: 0xff}
	colourCheck  = color.RGBA{R: 0x00, G: 0x9e, B: 0x73, A: 0xff}
	colourNoisy  = color.RGBA{R: 0xa3, G: 0xdb, B: 0xcb, A: 0xff} // the same, lighter
	colourPaper  = color.RGBA{R: 0x20, G: 0x20, B: 0x20, A: 0xff}
	colourGrid   = color.RGBA{R: 0xe4, G: 0xe4, B: 0xe4, A: 0xff}
)

// WritePlot draws the cost against the period on logarithmic axes, in a
// format that gonum/plot knows: "png", "svg". What has no place on such an axis
// (a median of 0 or less) is left out of the picture, not of the numbers.
func WritePlot(w io.Writer, format string, s *overhead.Summary) error {
	p, err := newPlot(s)
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	out, err := p.WriterTo(plotWidth, plotHeight, format)
	if err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	_, err = out.WriteTo(w)
	return err
}

// series is one set of points with their intervals.
type series struct {
	points plotter.XYs
	errors plotter.YErrors

	name   string
	glyph  draw.GlyphStyle
	joined bool
	thumbs []plot.Thumbnailer
}

func (s *series) YError(i int) (low, high float64) { return s.errors.YError(i) }
func (s *series) XY(i int) (x, y float64)          { return s.points.XY(i) }
func (s *series) Len() int                         { return len(s.points) }

// add adds a point with its interval, cut off at the lower end of the axis.
func (s *series) add(x, y, low, high, floor float64) {
	if y < floor {
		return
	}
	s.points = append(s.points, plotter.XY{X: x, Y: y})
	s.errors = append(s.errors, struct{ Low, High float64 }{y - max(low, floor), high - y})
}

func newPlot(s *overhead.Summary) (*plot.Plot, error) {
	low, high := bounds(s)
	p := plot.New()
	p.Title.Text = "What monitoring one VM costs (memory, registers, GDT, IDT, system call table)"
	p.Title.Padding = vg.Points(8)
	p.Title.TextStyle.Font.Size = vg.Points(13)
	p.X.Label.Text = "period between two checks"
	p.Y.Label.Text = "CPU cost, % of one CPU"
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		axis.Scale = plot.LogScale{}
		axis.Label.TextStyle.Font.Size = vg.Points(12)
		axis.Tick.Label.Font.Size = vg.Points(10)
		axis.Label.Padding = vg.Points(4)
	}
	p.X.Min, p.X.Max = 0.0008, 1.4
	p.Y.Min, p.Y.Max = low, high
	p.X.Tick.Marker = plot.ConstantTicks(decades(p.X.Min, p.X.Max, func(v float64) string {
		if v < 0.9999 {
			return fmt.Sprintf("%g ms", math.Round(v*1e6)/1e3)
		}
		return fmt.Sprintf("%g s", math.Round(v*1e6)/1e6)
	}))
	p.Y.Tick.Marker = plot.ConstantTicks(decades(p.Y.Min, p.Y.Max, func(v float64) string {
		return fmt.Sprintf("%g%%", math.Round(v*1e9)/1e9)
	}))
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = colourGrid, colourGrid
	p.Add(grid)

	line, err := plotter.NewLine(plotter.XYs{{X: p.X.Min, Y: s.PaperPercent}, {X: p.X.Max, Y: s.PaperPercent}})
	if err != nil {
		return nil, err
	}
	line.Color, line.Width, line.Dashes = colourPaper, vg.Points(1), []vg.Length{vg.Points(5), vg.Points(4)}
	p.Add(line)
	if err := addIso(p, s); err != nil {
		return nil, err
	}

	// Drawn from the back to the front; the legend has the claim first.
	claim, soaker := curveSeries(&s.Curve, low)
	all := []*series{
		claim.styled("instruction clock: the product's account", draw.CircleGlyph{}, 3.2, colourClaim, true),
		soaker.styled("instruction clock: counting loop", draw.RingGlyph{}, 6, colourSoaker, false),
	}
	if s.Check != nil {
		claim, soaker := curveSeries(s.Check, low)
		all = append(all,
			claim.styled("wall-clock check: the product's account", draw.BoxGlyph{}, 2.8, colourCheck, true),
			soaker.styled("wall-clock check: counting loop", draw.TriangleGlyph{}, 5, colourNoisy, false))
	}
	for _, series := range slices.Backward(all) {
		if err := series.draw(p); err != nil {
			return nil, err
		}
	}
	for _, series := range all {
		if series.Len() > 0 {
			p.Legend.Add(series.name, series.thumbs...)
		}
	}
	paper, err := plotter.NewScatter(plotter.XYs{{X: 1, Y: s.PaperPercent}})
	if err != nil {
		return nil, err
	}
	paper.GlyphStyle = draw.GlyphStyle{Color: colourPaper, Radius: vg.Points(6), Shape: draw.PyramidGlyph{}}
	p.Add(paper)
	p.Legend.Add(fmt.Sprintf("the paper (2011): %g%% at 1 s", s.PaperPercent), line, paper)

	p.Legend.Top = true
	p.Legend.Padding = vg.Points(3)
	p.Legend.XOffs, p.Legend.YOffs = -vg.Points(6), -vg.Points(6)
	p.Legend.TextStyle.Font.Size = vg.Points(10)
	return p, nil
}

// curveSeries returns the two measures of a curve as series.
func curveSeries(c *overhead.Curve, floor float64) (account, soaker *series) {
	account, soaker = new(series), new(series)
	for _, p := range c.Periods {
		account.add(p.PeriodS, p.CPUPercent, p.CILow, p.CIHigh, floor)
		soaker.add(p.PeriodS, p.SoakerPercent, p.SoakerCILow, p.SoakerCIHigh, floor)
	}
	return account, soaker
}

// styled says how the series is drawn; joined has a line along its points.
func (s *series) styled(name string, shape draw.GlyphDrawer, radius vg.Length, colour color.Color, joined bool) *series {
	s.name, s.joined = name, joined
	s.glyph = draw.GlyphStyle{Color: colour, Radius: radius, Shape: shape}
	return s
}

// draw adds the series to the plot, and to thumbs what stands for it in the
// legend.
func (s *series) draw(p *plot.Plot) error {
	if s.Len() == 0 {
		return nil
	}
	if s.joined {
		line, err := plotter.NewLine(s.points)
		if err != nil {
			return err
		}
		line.Color, line.Width = s.glyph.Color, vg.Points(1.5)
		p.Add(line)
		s.thumbs = append(s.thumbs, line)
	}
	bars, err := plotter.NewYErrorBars(s)
	if err != nil {
		return err
	}
	bars.Color, bars.Width, bars.CapWidth = s.glyph.Color, vg.Points(1), vg.Points(6)
	points, err := plotter.NewScatter(s.points)
	if err != nil {
		return err
	}
	points.GlyphStyle = s.glyph
	p.Add(bars, points)
	s.thumbs = append(s.thumbs, points)
	return nil
}

// addIso marks the period at which the claim's curve costs what the paper's did.
func addIso(p *plot.Plot, s *overhead.Summary) error {
	if s.IsoCostPeriodS == nil {
		return nil
	}
	iso := *s.IsoCostPeriodS
	line, err := plotter.NewLine(plotter.XYs{{X: iso, Y: p.Y.Min}, {X: iso, Y: s.PaperPercent}})
	if err != nil {
		return err
	}
	line.Color, line.Width, line.Dashes = colourClaim, vg.Points(1), []vg.Length{vg.Points(2), vg.Points(3)}
	label, err := plotter.NewLabels(plotter.XYLabels{
		XYs:    plotter.XYs{{X: iso, Y: p.Y.Min}},
		Labels: []string{fmt.Sprintf("%g%% at %.3g ms", s.PaperPercent, iso*1e3)},
	})
	if err != nil {
		return err
	}
	label.TextStyle[0].Color = colourClaim
	label.TextStyle[0].Font.Size = vg.Points(11)
	label.TextStyle[0].XAlign = text.XRight
	label.Offset.X, label.Offset.Y = -vg.Points(5), vg.Points(8)
	p.Add(line, label)
	return nil
}

// bounds are the ends of the cost axis: whole decades around all there is to
// draw, but no more than five of them.
func bounds(s *overhead.Summary) (low, high float64) {
	least, most := s.PaperPercent, s.PaperPercent
	curves := []*overhead.Curve{&s.Curve}
	if s.Check != nil {
		curves = append(curves, s.Check)
	}
	for _, c := range curves {
		for _, p := range c.Periods {
			for _, v := range []float64{p.CPUPercent, p.SoakerPercent} {
				if v > 0 {
					least, most = min(least, v), max(most, v)
				}
			}
		}
	}
	high = math.Pow(10, math.Ceil(math.Log10(most*1.2)))
	low = math.Pow(10, math.Floor(math.Log10(least)))
	return max(low, high/1e5), high
}

// decades are ticks at 1, 2 and 5 times each power of ten, with text, and
// minor ones between.
func decades(low, high float64, text func(float64) string) []plot.Tick {
	var ticks []plot.Tick
	for exponent := math.Floor(math.Log10(low)); ; exponent++ {
		for digit := 1.0; digit < 10; digit++ {
			value := digit * math.Pow(10, exponent)
			if value > high*1.0001 {
				return ticks
			}
			if value < low*0.9999 {
				continue
			}
			tick := plot.Tick{Value: value}
			if digit == 1 || digit == 2 || digit == 5 {
				tick.Label = text(value)
			}
			ticks = append(ticks, tick)
		}
	}
}
