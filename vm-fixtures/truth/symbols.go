// SPDX-License-Identifier: MIT

package truth

import (
	"fmt"
	"iter"
	"strconv"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// Symbols compares symbols with the guest's /proc/kallsyms as root reads it:
// address, type, name and module of each. What the kernel itself adds for
// code that it made, as if it were a module's ("[bpf]", "[__builtin__kprobes]",
// "[__builtin__ftrace]"), comes and goes and is left out.
func Symbols(kallsyms []byte, found iter.Seq[guest.Symbol]) (Comparison, error) {
	var c Comparison
	counts := map[guest.Symbol]int{}
	for line := range strings.Lines(string(kallsyms)) {
		f := strings.Fields(line)
		if len(f) < 3 || len(f) > 4 || len(f[1]) != 1 {
			return c, fmt.Errorf("kallsyms: malformed line %q", line)
		}
		at, err := strconv.ParseUint(f[0], 16, 64)
		if err != nil {
			return c, fmt.Errorf("kallsyms: %w", err)
		}
		s := guest.Symbol{Name: f[2], Address: at, Type: f[1][0]}
		if len(f) == 4 {
			s.Module = strings.Trim(f[3], "[]")
		}
		if generated(s.Module) {
			continue
		}
		counts[s]++
		c.Truth++
	}
	for s := range found {
		if generated(s.Module) {
			continue
		}
		if counts[s] == 0 {
			c.Extra++
			c.differs("found besides: %#x %c %s [%s]", s.Address, s.Type, s.Name, s.Module)
			continue
		}
		counts[s]--
		c.Equal++
	}
	for s, n := range counts {
		if n > 0 {
			c.differs("not found: %#x %c %s [%s]", s.Address, s.Type, s.Name, s.Module)
		}
	}
	return c, nil
}

func generated(module string) bool {
	return module == "bpf" || strings.HasPrefix(module, "__builtin__")
}
