// SPDX-License-Identifier: MIT

// Package truth compares what is found of a kernel from outside with what that
// kernel says of itself to its own root: /proc/kallsyms, /sys/kernel/btf, the
// tasks and modules of /proc. What the kernel says is read here by code that
// has nothing in common with the code that it is compared with.
package truth

import (
	"fmt"
	"strings"
)

// mostExamples of differences are kept.
const mostExamples = 20

// Comparison is the outcome of one.
type Comparison struct {
	Truth int // what the guest says there is
	Equal int // of it, what was found, and found equal
	Extra int // what was found, and the guest does not say there is
	// Examples of what differs.
	Examples []string
}

func (c *Comparison) differs(format string, args ...any) {
	if len(c.Examples) < mostExamples {
		c.Examples = append(c.Examples, fmt.Sprintf(format, args...))
	}
}

// Err says what differs; nil: nothing does, and there is something.
func (c *Comparison) Err() error {
	if c.Truth > 0 && c.Equal == c.Truth && c.Extra == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d are equal, %d are found besides:\n%s", c.Equal, c.Truth, c.Extra, strings.Join(c.Examples, "\n"))
}
