// SPDX-License-Identifier: MIT

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/bench/overhead"
	"github.com/kvmaccess/kvmaccess/bench/sample"
)

func curve(clock sample.Clock, agreement overhead.Agreement, unaccounted uint64) *overhead.Curve {
	return &overhead.Curve{Clock: clock, CPUs: 1, IsoCostNote: "no crossing", Periods: []overhead.Period{
		{PeriodS: 1, CPUPercent: 0.01, SoakerPercent: 0.02, Agreement: overhead.AgreementNotRequired},
		{PeriodS: 0.1, CPUPercent: 0.1, SoakerPercent: 0.2, Agreement: agreement, UnaccountedTicks: unaccounted},
	}}
}

func TestJudge(t *testing.T) {
	for _, test := range []struct {
		name   string
		curves []*overhead.Curve
		want   []string // in the error; none: no error
	}{
		{"fine", []*overhead.Curve{curve(sample.Icount, overhead.AgreementYes, 0), curve(sample.Wall, overhead.AgreementYes, 0)}, nil},
		{"the claim disagrees", []*overhead.Curve{curve(sample.Icount, overhead.AgreementNo, 0)}, []string{"icount at 0.1s", "more than 10% apart"}},
		{"the claim is not resolved", []*overhead.Curve{curve(sample.Icount, overhead.AgreementUnresolved, 0)}, []string{"icount at 0.1s"}},
		{"the check disagrees", []*overhead.Curve{curve(sample.Icount, overhead.AgreementYes, 0), curve(sample.Wall, overhead.AgreementNo, 0)}, []string{"wall at 0.1s"}},
		{"noise of the check", []*overhead.Curve{curve(sample.Icount, overhead.AgreementYes, 0), curve(sample.Wall, overhead.AgreementUnresolved, 0)}, nil},
		{"ticks lost", []*overhead.Curve{curve(sample.Icount, overhead.AgreementYes, 3)}, []string{"3 ticks were neither done nor reported"}},
	} {
		err := judge(test.curves)
		if len(test.want) == 0 {
			if err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
			continue
		}
		for _, want := range test.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %v, want one with %q", test.name, err, want)
			}
		}
	}
}

func TestShow(t *testing.T) {
	c := curve(sample.Icount, overhead.AgreementYes, 0)
	iso := 0.0423
	c.IsoCostPeriodS = &iso
	var out bytes.Buffer
	if err := show(&out, []*overhead.Curve{c, curve(sample.Wall, overhead.AgreementYes, 0)}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"icount, 1 CPUs", "100ms", "0.1000", "0.35% at a period of 42.3 ms", "no crossing"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it lacks %q:\n%s", want, out.String())
		}
	}
}

func TestParse(t *testing.T) {
	full0 := parse(nil)
	if full0.out != "results/overhead" || full0.seed == 0 || full0.mode.quick || full0.command != "go run ./bench/cmd/bench" {
		t.Errorf("%+v", full0)
	}
	o := parse([]string{"-quick", "-seed", "7", "-out", "elsewhere"})
	if !o.mode.quick || o.seed != 7 || o.out != "elsewhere" || o.command != "go run ./bench/cmd/bench -quick -seed 7 -out elsewhere" {
		t.Errorf("%+v", o)
	}
	if d := parse([]string{"-demo"}); len(d.mode.plans(1)) != 1 {
		t.Errorf("the demonstration has a check: %+v", d.mode)
	}
}

// What a full run has to have, and that all of it is valid.
func TestPlans(t *testing.T) {
	plans := full.plans(42)
	if len(plans) != 2 || plans[0].Clock != sample.Icount || plans[1].Clock != sample.Wall {
		t.Fatalf("%+v", plans)
	}
	for _, p := range plans {
		if diff := cmp.Diff(sample.Periods, p.Periods); diff != "" {
			t.Errorf("%s: periods -want +got\n%s", p.Clock, diff)
		}
		if p.Repetitions < 10 || p.MinTicks < 10 || p.Seed != 42 {
			t.Errorf("%s: %+v", p.Clock, p)
		}
	}
	for _, m := range []mode{full, fast, short} {
		for _, p := range m.plans(1) {
			for _, s := range p.Steps() {
				if s.Ticks < 10 || s.Ticks > max(p.MinTicks, p.MaxTicks) || s.Period < time.Millisecond {
					t.Errorf("%s: %+v", p.Clock, s)
				}
			}
			// 95% intervals need six values.
			if p.Repetitions < 6 {
				t.Errorf("%s: %d repetitions", p.Clock, p.Repetitions)
			}
		}
	}
}
