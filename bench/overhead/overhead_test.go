// SPDX-License-Identifier: MIT

package overhead

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/bench/sample"
)

func TestSummarize(t *testing.T) {
	for _, test := range []struct {
		name   string
		values []float64
		want   Statistic
		err    error
	}{
		// The 95% interval of a median by order statistics: with n = 10 from
		// the 2nd to the 9th value (97.9%), with n = 20 from the 6th to the
		// 15th (95.9%), with n = 6 the range (96.9%).
		{"ten", []float64{10, 9, 8, 7, 6, 5, 4, 3, 2, 1}, Statistic{5.5, 2, 9, 10}, nil},
		{"twenty", count(20), Statistic{10.5, 6, 15, 20}, nil},
		{"six", count(6), Statistic{3.5, 1, 6, 6}, nil},
		{"an outlier does not move it", append(count(9), 1e9), Statistic{5.5, 2, 9, 10}, nil},
		{"all the same", []float64{3, 3, 3, 3, 3, 3, 3}, Statistic{3, 3, 3, 7}, nil},
		{"five", count(5), Statistic{3, 1, 5, 5}, ErrTooFew},
		{"one", []float64{7}, Statistic{7, 7, 7, 1}, ErrTooFew},
		{"none", nil, Statistic{}, ErrTooFew},
	} {
		given := slices.Clone(test.values)
		got, err := Summarize(test.values)
		if !errors.Is(err, test.err) {
			t.Errorf("%s: error %v, want %v", test.name, err, test.err)
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: -want +got\n%s", test.name, diff)
		}
		if !slices.Equal(given, test.values) {
			t.Errorf("%s: the values were reordered", test.name)
		}
	}
	if _, err := Summarize([]float64{1, math.NaN()}); err == nil || errors.Is(err, ErrTooFew) {
		t.Errorf("NaN: error %v", err)
	}
}

func count(n int) []float64 {
	values := make([]float64, n)
	for i := range values {
		values[i] = float64(i + 1)
	}
	return values
}

func TestIsoPeriod(t *testing.T) {
	for _, test := range []struct {
		name  string
		curve []Point
		want  float64
		err   error
	}{
		// A constant cost of 70 µs a check.
		{"between", []Point{{1, 0.007}, {0.1, 0.07}, {0.01, 0.7}, {0.001, 7}}, 0.02, nil},
		{"in another order", []Point{{0.01, 0.7}, {0.001, 7}, {1, 0.007}, {0.1, 0.07}}, 0.02, nil},
		{"on a point", []Point{{1, 0.1}, {0.5, 0.35}, {0.1, 2}}, 0.5, nil},
		{"on the longest", []Point{{1, 0.35}, {0.1, 2}}, 1, nil},
		{"a bent line", []Point{{1, 0.175}, {0.25, 0.7}}, 0.5, nil},
		{"several crossings: the longest period", []Point{{1, 0.1}, {0.1, 0.4}, {0.01, 0.2}, {0.001, 9}},
			0.1 * math.Pow(10, math.Log(0.35/0.4)/math.Log(0.1/0.4)), nil},
		{"nothing to draw a line to", []Point{{1, -0.001}, {0.1, 0.5}}, 0.1, nil},
		{"never so dear", []Point{{1, 0.01}, {0.001, 0.3}}, 0, ErrAlwaysCheaper},
		{"never so cheap", []Point{{1, 0.5}, {0.001, 30}}, 0, ErrAlwaysDearer},
		{"one point, cheaper", []Point{{1, 0.1}}, 0, ErrAlwaysCheaper},
		{"one point, dearer", []Point{{1, 1}}, 0, ErrAlwaysDearer},
		{"no points", nil, 0, ErrAlwaysCheaper},
	} {
		got, err := IsoPeriod(test.curve, 0.35)
		if !errors.Is(err, test.err) || math.Abs(got-test.want) > 1e-9 {
			t.Errorf("%s: %v, %v; want %v, %v", test.name, got, err, test.want, test.err)
		}
	}
}

// samples are ten repetitions at each period, of a product whose account of a
// check is account and which takes taken from the counting loop.
func samples(account, taken time.Duration, periods ...time.Duration) []sample.Sample {
	const window = 10 * time.Second
	var out []sample.Sample
	for repetition := 1; repetition <= 10; repetition++ {
		for _, period := range periods {
			ticks := uint64(window / period)
			out = append(out, sample.Sample{
				Clock: sample.Icount, Repetition: repetition, Order: len(out) + 1, Period: period, CPUs: 1,
				Off: sample.Window{Elapsed: window, Loops: 10_000_000_000},
				On:  sample.Window{Elapsed: window, Loops: 10_000_000_000 - ticks*uint64(taken.Nanoseconds())},
				Account: sample.Account{
					Elapsed: window, Ticks: ticks,
					Daemon:    time.Duration(ticks) * account / 2,
					Worker:    time.Duration(ticks) * account / 4,
					Interrupt: time.Duration(ticks) * account / 4,
				},
			})
		}
	}
	return out
}

func TestNewCurve(t *testing.T) {
	// 70 µs a check by the account, 76 µs by the loop.
	in := samples(70*time.Microsecond, 76*time.Microsecond, time.Second, 100*time.Millisecond, 10*time.Millisecond)
	in = append(in, sample.Sample{Clock: sample.Wall}) // of the other clock: none of this curve's business
	curve, err := NewCurve(sample.Icount, in)
	if err != nil {
		t.Fatal(err)
	}
	if len(curve.Periods) != 3 || curve.CPUs != 1 || len(curve.Notes) != 0 {
		t.Fatalf("%+v", curve)
	}
	for i, want := range []struct {
		period, cost, soaker float64
		agreement            Agreement
		ticks, least         uint64
	}{
		{1, 0.007, 0.0076, AgreementNotRequired, 100, 10},
		{0.1, 0.07, 0.076, AgreementYes, 1000, 100},
		{0.01, 0.7, 0.76, AgreementYes, 10000, 1000},
	} {
		p := curve.Periods[i]
		if p.PeriodS != want.period || !near(p.CPUPercent, want.cost) || !near(p.SoakerPercent, want.soaker) ||
			!near(p.CILow, want.cost) || !near(p.CIHigh, want.cost) || p.N != 10 ||
			p.Agreement != want.agreement || p.Ticks != want.ticks || p.MinTicks != want.least ||
			!near(p.NanosecondsPerTick, 70_000) || !near(p.Difference, -6.0/76) {
			t.Errorf("%+v, want %+v", p, want)
		}
	}
	if curve.IsoCostPeriodS == nil || !near(*curve.IsoCostPeriodS, 0.02) {
		t.Errorf("iso-cost period %v, want 0.02", curve.IsoCostPeriodS)
	}
	if curve.IsoCostSoakerPeriodS == nil || !near(*curve.IsoCostSoakerPeriodS, 0.02*76/70) {
		t.Errorf("by the loop %v, want %v", curve.IsoCostSoakerPeriodS, 0.02*76/70)
	}
	if n := len(curve.With(AgreementNo, AgreementUnresolved)); n != 0 {
		t.Errorf("%d disagreements", n)
	}
}

func near(got, want float64) bool { return math.Abs(got-want) <= 1e-6*math.Abs(want) }

func TestNewCurveDisagrees(t *testing.T) {
	for _, test := range []struct {
		name    string
		account time.Duration
		taken   time.Duration
		want    Agreement
	}{
		{"less", 70 * time.Microsecond, 80 * time.Microsecond, AgreementNo},
		{"more", 90 * time.Microsecond, 80 * time.Microsecond, AgreementNo},
		{"just within", 72_100 * time.Nanosecond, 80 * time.Microsecond, AgreementYes},
		{"nothing taken", 70 * time.Microsecond, 0, AgreementNo},
		{"nothing accounted", 0, 80 * time.Microsecond, AgreementNo},
		{"neither", 0, 0, AgreementNotRequired},
	} {
		curve, err := NewCurve(sample.Icount, samples(test.account, test.taken, 100*time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		if got := curve.Periods[0].Agreement; got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
	// An interval that has room for agreement leaves it open.
	noisy := samples(70*time.Microsecond, 80*time.Microsecond, 100*time.Millisecond)
	for i := range noisy {
		noisy[i].On.Loops += uint64(i%2) * 1_500_000
		noisy[i].On.Loops -= uint64((i+1)%2) * 1_500_000
	}
	curve, err := NewCurve(sample.Icount, noisy)
	if err != nil {
		t.Fatal(err)
	}
	if got := curve.Periods[0].Agreement; got != AgreementUnresolved {
		t.Errorf("noise: %q, want %q: %+v", got, AgreementUnresolved, curve.Periods[0])
	}
}

// Ticks that are not there show up, whether the daemon owned up to them or not.
func TestNewCurveMissingTicks(t *testing.T) {
	in := samples(70*time.Microsecond, 76*time.Microsecond, time.Second, 10*time.Millisecond)
	in[1].Account.Ticks -= 300
	in[1].Account.Missed = 200
	curve, err := NewCurve(sample.Icount, in)
	if err != nil {
		t.Fatal(err)
	}
	p := curve.Periods[1]
	if p.MissedTicks != 200 || p.UnaccountedTicks != 99 || p.MinTicks != 700 || curve.Unaccounted() != 99 {
		t.Errorf("missed %d, unaccounted %d, least %d", p.MissedTicks, p.UnaccountedTicks, p.MinTicks)
	}
	notes := strings.Join(curve.Notes, "\n")
	for _, want := range []string{"10ms: 200 of 9900 ticks missed", "10ms: 99 ticks were neither done nor reported"} {
		if !strings.Contains(notes, want) {
			t.Errorf("the notes lack %q:\n%s", want, notes)
		}
	}
	in[0].Account.Ticks = 0
	if _, err := NewCurve(sample.Icount, in); err == nil || !strings.Contains(err.Error(), "no tick at all") {
		t.Errorf("a sample without a tick: %v", err)
	}
}

func TestNewCurveTrouble(t *testing.T) {
	if _, err := NewCurve(sample.Wall, samples(1, 1, time.Second)); err == nil {
		t.Error("a curve without samples")
	}
	mixed := samples(1, 1, time.Second)
	mixed[3].CPUs = 2
	if _, err := NewCurve(sample.Icount, mixed); err == nil {
		t.Error("a curve of two hosts")
	}
	bad := samples(1, 1, time.Second)
	bad[3].Off.Loops = 0
	if _, err := NewCurve(sample.Icount, bad); err == nil {
		t.Error("a curve with a bad sample")
	}
	few, err := NewCurve(sample.Icount, samples(1, 1, time.Second)[:3])
	if err != nil {
		t.Fatal(err)
	}
	if len(few.Notes) != 1 || !strings.Contains(few.Notes[0], "too few") || few.IsoCostPeriodS != nil || few.IsoCostNote == "" {
		t.Errorf("three samples: %+v", few)
	}
}
