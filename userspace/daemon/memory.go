// SPDX-License-Identifier: MIT

package daemon

import (
	"runtime"
	"runtime/debug"
	"sync"
)

// memoryLimit keeps the garbage collector out of the way. Ticks leave next to
// nothing behind, but what is live (symbols, mostly) may be large, and the
// runtime would go over all of it every two minutes. It is switched off
// instead up to a limit that follows what is live.
type memoryLimit struct {
	mu          sync.Mutex
	collections uint32
	live        uint64 // bytes
}

// headroom is what garbage may take, in bytes.
const headroom = 32 << 20

// adjust collects garbage and sets the limit anew if much has changed.
func (m *memoryLimit) adjust() {
	m.mu.Lock()
	defer m.mu.Unlock()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	if m.collections == 0 {
		debug.SetGCPercent(-1)
	} else if stats.NumGC == m.collections && stats.HeapAlloc < m.live+m.live/2+headroom/2 {
		return
	}
	debug.FreeOSMemory()
	runtime.ReadMemStats(&stats)
	m.collections, m.live = stats.NumGC, stats.HeapAlloc
	debug.SetMemoryLimit(int64(stats.Sys - stats.HeapSys + m.live + m.live/2 + headroom))
}
