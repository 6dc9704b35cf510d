// SPDX-License-Identifier: MIT

package guest

import (
	"errors"
	"io"
)

// Symbols are a kernel's, of a file in the format of /proc/kallsyms or
// System.map.
type Symbols struct{}

// ParseSymbols reads such a file.
func ParseSymbols(r io.Reader) (*Symbols, error) { return nil, errors.New("TODO") }
