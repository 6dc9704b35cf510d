// SPDX-License-Identifier: MIT

package inside

import (
	"runtime"
	"runtime/debug"
)

// garbageEach is how many changes a program that times them collects no garbage.
const garbageEach = 20

// HoldGarbage keeps this program from collecting garbage until release is called,
// but between the changes that it times: between is called before each. On one CPU
// its collector would take a millisecond or two of some finding's time.
func HoldGarbage() (between func(change int), release func()) {
	percent := debug.SetGCPercent(-1)
	return func(change int) {
		if change%garbageEach == 0 {
			runtime.GC()
		}
	}, func() { debug.SetGCPercent(percent) }
}
