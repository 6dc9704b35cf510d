// SPDX-License-Identifier: MIT

package sample

import (
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"
)

// columns of the CSV form, in order. Times are in nanoseconds.
var columns = []struct {
	name string
	get  func(*Sample) string
	set  func(*Sample, string) error
}{
	{"clock",
		func(s *Sample) string { return string(s.Clock) },
		func(s *Sample, v string) error { s.Clock = Clock(v); return nil }},
	integer("repetition", func(s *Sample) *int { return &s.Repetition }),
	integer("order", func(s *Sample) *int { return &s.Order }),
	integer("period_ns", func(s *Sample) *time.Duration { return &s.Period }),
	integer("cpus", func(s *Sample) *int { return &s.CPUs }),
	integer("off_ns", func(s *Sample) *time.Duration { return &s.Off.Elapsed }),
	integer("off_loops", func(s *Sample) *uint64 { return &s.Off.Loops }),
	integer("on_ns", func(s *Sample) *time.Duration { return &s.On.Elapsed }),
	integer("on_loops", func(s *Sample) *uint64 { return &s.On.Loops }),
	integer("account_ns", func(s *Sample) *time.Duration { return &s.Account.Elapsed }),
	integer("daemon_ns", func(s *Sample) *time.Duration { return &s.Account.Daemon }),
	integer("worker_ns", func(s *Sample) *time.Duration { return &s.Account.Worker }),
	integer("interrupt_ns", func(s *Sample) *time.Duration { return &s.Account.Interrupt }),
	integer("longest_ns", func(s *Sample) *time.Duration { return &s.Account.Longest }),
	integer("ticks", func(s *Sample) *uint64 { return &s.Account.Ticks }),
	integer("missed", func(s *Sample) *uint64 { return &s.Account.Missed }),
	integer("switches", func(s *Sample) *uint64 { return &s.Account.Switches }),
}

func integer[T int | uint64 | time.Duration](name string, field func(*Sample) *T) struct {
	name string
	get  func(*Sample) string
	set  func(*Sample, string) error
} {
	return struct {
		name string
		get  func(*Sample) string
		set  func(*Sample, string) error
	}{name,
		func(s *Sample) string { return strconv.FormatInt(int64(*field(s)), 10) },
		func(s *Sample, v string) error {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				return err
			}
			if n < 0 {
				return fmt.Errorf("negative: %d", n)
			}
			*field(s) = T(n)
			return nil
		}}
}

func header() []string {
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.name
	}
	return names
}

// WriteCSV writes samples as a table with a header, times in nanoseconds.
func WriteCSV(w io.Writer, samples []Sample) error {
	table := csv.NewWriter(w)
	table.Write(header()) // the error stays with the writer until the flush
	row := make([]string, len(columns))
	for _, s := range samples {
		for i, c := range columns {
			row[i] = c.get(&s)
		}
		table.Write(row)
	}
	table.Flush()
	return table.Error()
}

// ReadCSV reads what WriteCSV wrote. Each sample is validated.
func ReadCSV(r io.Reader) ([]Sample, error) {
	table := csv.NewReader(r)
	first, err := table.Read()
	if err != nil {
		return nil, fmt.Errorf("samples: header: %w", err)
	}
	if !slices.Equal(first, header()) {
		return nil, fmt.Errorf("samples: header is %q, want %q", first, header())
	}
	var samples []Sample
	for {
		row, err := table.Read()
		if err == io.EOF {
			return samples, nil
		}
		if err != nil {
			return nil, fmt.Errorf("samples: %w", err)
		}
		line, _ := table.FieldPos(0)
		var s Sample
		for i, c := range columns {
			if err := c.set(&s, row[i]); err != nil {
				return nil, fmt.Errorf("samples: line %d: %s: %w", line, c.name, err)
			}
		}
		if err := s.Validate(); err != nil {
			return nil, fmt.Errorf("samples: line %d: %w", line, err)
		}
		samples = append(samples, s)
	}
}
