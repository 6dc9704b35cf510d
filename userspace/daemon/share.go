// SPDX-License-Identifier: MIT

package daemon

import (
	"fmt"
	"strconv"
	"strings"
)

// Share is a part of the time of one CPU: 0.0035 is 0.35%.
type Share float64

// Bounds of Config.CPUBudget.
const (
	MinBudget Share = 0.0001
	MaxBudget Share = 1
)

// String gives it in percent.
func (s Share) String() string {
	return strconv.FormatFloat(float64(s)*100, 'g', 3, 64) + "%"
}

// MarshalText implements encoding.TextMarshaler.
func (s Share) MarshalText() ([]byte, error) {
	if s == 0 {
		return nil, nil
	}
	return []byte(s.String()), nil
}

// UnmarshalText takes percent, as 0.35%.
func (s *Share) UnmarshalText(p []byte) error {
	text := strings.TrimSpace(string(p))
	if text == "" {
		*s = 0
		return nil
	}
	number, ok := strings.CutSuffix(text, "%")
	v, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if err != nil || !ok || !(v >= 0) {
		return fmt.Errorf("%q is no part of a CPU: write it with %%, as 0.35%%", text)
	}
	*s = Share(v / 100)
	return nil
}
