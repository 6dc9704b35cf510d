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

const (
	// liveBytes is what the last collection found to be live.
	liveBytes = "/gc/heap/live:bytes"
	// objectBytes is that and what was allocated since.
	objectBytes = "/memory/classes/heap/objects:bytes"
)

// metric reads one of these, without stopping anything.
func metric(name string) uint64 {
	s := []metrics.Sample{{Name: name}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// tidy collects garbage if there is half as much as there may be. It is called when
// there is time: when what an event asks for is done, and the next tick is still to
// come. A collection by the limit comes while there is something to do.
func (m *memoryLimit) tidy() {
	if !m.mu.TryLock() {
		return
	}
	defer m.mu.Unlock()
	if m.collections == 0 || metric(objectBytes) < m.live+(m.live/2+headroom)/2 {
		return
	}
	runtime.GC()
	m.live = metric(liveBytes)
}

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
		m.live = metric(liveBytes)
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
