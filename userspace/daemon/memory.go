// SPDX-License-Identifier: MIT

package daemon

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
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

// liveBytes is what the last collection found to be live.
const liveBytes = "/gc/heap/live:bytes"

// adjust sets the limit anew if much has changed. It collects garbage only if that
// is not known otherwise: a collection takes milliseconds of all the CPUs that
// there are.
func (m *memoryLimit) adjust() {
	m.mu.Lock()
	defer m.mu.Unlock()
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	switch {
	case m.collections == 0:
		debug.SetGCPercent(-1)
		m.collect(&stats)
	case stats.NumGC != m.collections: // by the limit
		live := []metrics.Sample{{Name: liveBytes}}
		metrics.Read(live)
		m.live = live[0].Value.Uint64()
	case stats.HeapAlloc < m.live+m.live/2+headroom/2:
		return
	default:
		m.collect(&stats)
	}
	m.collections = stats.NumGC
	debug.SetMemoryLimit(int64(stats.Sys - stats.HeapSys + m.live + m.live/2 + headroom))
}

func (m *memoryLimit) collect(stats *runtime.MemStats) {
	debug.FreeOSMemory()
	runtime.ReadMemStats(stats)
	m.live = stats.HeapAlloc
}
