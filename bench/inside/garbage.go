// SPDX-License-Identifier: MIT

package inside

import "runtime/debug"

// garbageLimit is far more than what a thousand findings leave, in bytes, and
// little of a host's memory.
const garbageLimit = 256 << 20

// HoldGarbage keeps this program from collecting garbage until release is called,
// unless there is very much of it. On one CPU its collector, and what follows a
// collection, would take a millisecond or two of some finding's time.
func HoldGarbage() (release func()) {
	percent, limit := debug.SetGCPercent(-1), debug.SetMemoryLimit(garbageLimit)
	return func() {
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(limit)
	}
}
