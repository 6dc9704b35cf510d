// SPDX-License-Identifier: MIT

package stress

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Report is what a part did, in numbers. It is safe for concurrent use.
type Report struct {
	Name string

	mu     sync.Mutex
	start  time.Time
	order  []string
	counts map[string]int64
	errs   map[string]int64
}

func newReport(name string) *Report {
	return &Report{Name: name, start: time.Now(), counts: map[string]int64{}, errs: map[string]int64{}}
}

// Add adds n to a number of the report.
func (r *Report) Add(what string, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.counts[what]; !ok {
		r.order = append(r.order, what)
	}
	r.counts[what] += n
}

// Count is a number of the report.
func (r *Report) Count(what string) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.counts[what]
}

// fail counts an error by its errno, or by its text where it has none.
func (r *Report) fail(err error) {
	var errno unix.Errno
	name := ""
	if errors.As(err, &errno) {
		name = unix.ErrnoName(errno)
	}
	if name == "" {
		name = err.Error()
	}
	r.failed(name, 1)
}

func (r *Report) failed(name string, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errs[name] += n
}

// String is one line: numbers in the order in which they came up, errors by
// name, seconds.
func (r *Report) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "%s:", r.Name)
	for _, what := range r.order {
		fmt.Fprintf(&b, " %d %s,", r.counts[what], what)
	}
	if len(r.errs) > 0 {
		fmt.Fprint(&b, " errors")
		for _, name := range slices.Sorted(maps.Keys(r.errs)) {
			fmt.Fprintf(&b, " %s=%d", name, r.errs[name])
		}
		fmt.Fprint(&b, ",")
	}
	fmt.Fprintf(&b, " %.0f s", time.Since(r.start).Seconds())
	return b.String()
}
