// SPDX-License-Identifier: MIT

package daemon

import (
	"fmt"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Share is a part of the time of one CPU: 0.0035, in JSON too, is 0.35%.
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

// ParseShare takes percent, as 0.35%.
func ParseShare(text string) (Share, error) {
	number, ok := strings.CutSuffix(strings.TrimSpace(text), "%")
	v, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if err != nil || !ok || !(v >= 0) {
		return 0, fmt.Errorf("%q is no part of a CPU: write it with %%, as 0.35%%", text)
	}
	return Share(v / 100), nil
}

// MarshalYAML implements yaml.Marshaler.
func (s Share) MarshalYAML() (any, error) {
	if s == 0 {
		return "", nil
	}
	return s.String(), nil
}

// UnmarshalYAML implements yaml.Unmarshaler. Nothing is 0.
func (s *Share) UnmarshalYAML(n *yaml.Node) error {
	if *s = 0; n.Value == "" {
		return nil
	}
	var err error
	if *s, err = ParseShare(n.Value); err != nil {
		return fmt.Errorf("line %d: %w", n.Line, err)
	}
	return nil
}
