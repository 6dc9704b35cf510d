// SPDX-License-Identifier: MIT

package integrity

import (
	"strings"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// What a dump did not record is not taken for zero, and not checked.
func TestPartialState(t *testing.T) {
	state := kvmaccess.VCPU{CPL: 3, Registers: kvmaccess.Registers{
		CR0: guest.CR0PE | guest.CR0WP | guest.CR0PG, CR4: guest.CR4PAE, EFER: guest.EFERLMA | guest.EFERLME,
		TR: kvmaccess.Segment{Selector: 0x40}, GDTR: kvmaccess.TableRegister{Limit: 0x7f}, IDTR: kvmaccess.TableRegister{Limit: 0xfff},
	}}
	g := &Guest{Mode: guest.ModeOf(&state.Registers), Linux: true, CPUs: []*kvmaccess.VCPU{&state}}
	efer := func() (n int) {
		for _, it := range controlItems(g, &state) {
			if strings.HasPrefix(it.Name, "EFER.") {
				n++
			}
		}
		return n
	}
	if readyReason(&state) == "" || len((MSRCheck{}).Objects(g)) == 0 || efer() == 0 {
		t.Errorf("a whole state without LSTAR: ready %q, %d objects, %d items of EFER", readyReason(&state), len((MSRCheck{}).Objects(g)), efer())
	}
	state.Flags |= kvmaccess.VCPUPartial
	if readyReason(&state) != "" || len((MSRCheck{}).Objects(g)) != 0 || efer() != 0 {
		t.Errorf("a state out of a dump: ready %q, %d objects, %d items of EFER", readyReason(&state), len((MSRCheck{}).Objects(g)), efer())
	}
}
