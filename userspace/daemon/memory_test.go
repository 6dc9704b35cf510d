// SPDX-License-Identifier: MIT

package daemon

import (
	"math"
	"runtime"
	"runtime/debug"
	"testing"
)

// TestMemoryLimit leaves garbage behind, as rounds do.
func TestMemoryLimit(t *testing.T) {
	percent, limit := debug.SetGCPercent(100), debug.SetMemoryLimit(math.MaxInt64)
	t.Cleanup(func() {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	})
	collections := func() uint32 {
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return s.NumGC
	}
	leave := func(bytes int) {
		for range bytes >> 10 {
			garbage = make([]byte, 1<<10)
		}
	}
	runtime.GC() // one may be under way
	var m memoryLimit
	before := collections()
	m.tidy()
	if n := collections() - before; n != 0 {
		t.Errorf("%d collections before a limit was set", n)
	}
	m.adjust()
	set := debug.SetMemoryLimit(-1)
	if set == math.MaxInt64 || set < int64(m.live+headroom) {
		t.Errorf("a limit of %d bytes, with %d live", set, m.live)
	}
	most := int(m.live/2 + headroom)
	before = collections()
	leave(most / 8)
	m.tidy()
	m.adjust()
	if n := collections() - before; n != 0 {
		t.Errorf("%d collections of little", n)
	}
	leave(most / 2)
	m.tidy()
	if n := collections() - before; n != 1 {
		t.Errorf("%d collections of much", n)
	}
	m.tidy()
	m.adjust()
	if n := collections() - before; n != 1 {
		t.Errorf("%d collections, with nothing left", n)
	}
	leave(2 * most)
	if n := collections() - before; n < 2 {
		t.Error("no collection by the limit")
	}
}

// garbage is a variable, so that what it is set to is allocated.
var garbage []byte
