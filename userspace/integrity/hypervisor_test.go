// SPDX-License-Identifier: MIT

package integrity

import (
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// A guest that has VMs of its own on a processor of Intel has limits of its tables
// that exits from these leave, now and then: no finding, and no event but the first.
func TestGuestWithVMs(t *testing.T) {
	for _, first := range []bool{false, true} {
		w := debian(t)
		exits := func(on bool) {
			for i := range w.CPUs {
				w.CPUs[i].GDTR.Limit, w.CPUs[i].IDTR.Limit = gdtEntries64*8-1, 256*16-1
				if on {
					w.CPUs[i].GDTR.Limit, w.CPUs[i].IDTR.Limit = exitLimit, exitLimit
				}
			}
		}
		vms := func(on bool) {
			for i := range w.CPUs {
				w.CPUs[i].CR4 &^= guest.CR4VMXE
				if on {
					w.CPUs[i].CR4 |= guest.CR4VMXE
				}
			}
		}
		vms(first)
		exits(first)
		m := w.monitor(Options{Symbols: w.symbols, Settle: -1})
		w.quiet(m)
		w.watching(m)
		vms(true)
		w.quiet(m)
		for _, on := range []bool{true, false, true} {
			list := w.items(m)
			exits(on)
			if e := w.differing(list); len(e) > 0 {
				t.Errorf("at first sight %t, exits %t: %+v", first, on, e)
			}
			w.quiet(m)
			// An event that came before the round is no finding either.
			for _, e := range w.differing(WatchList{Items: []WatchItem{{Item: watchedRegisters[4].Item(&m.cpus[0].state.Registers)}}}) {
				if f, err := m.See(t.Context(), e); err != nil || len(f) > 0 {
					t.Errorf("%+v: %v, %v", e, f, err)
				}
			}
		}
		// Any other limit is.
		w.CPUs[0].IDTR.Limit = exitLimit - 1
		if e := w.differing(w.items(m)); len(e) == 0 {
			t.Error("no event of another limit")
		}
		if f := w.tick(m); len(f) == 0 {
			t.Error("no finding of another limit")
		}
		exits(true)
		w.tick(m)
		// And this one where there are no VMs.
		vms(false)
		if f := w.tick(m); len(f) == 0 {
			t.Error("no finding of this limit without VMs")
		}
	}
}
