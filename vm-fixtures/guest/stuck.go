// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// A guest that has not answered for stuckAfter is looked at stuckLooks times,
// stuckEvery apart. Linux starts with interrupts off, and under Bochs takes some
// ten seconds to have them on.
const (
	stuckAfter = time.Minute
	stuckLooks = 30
	stuckEvery = time.Second
)

var errStuck = errors.New(host.StuckGuest)

// giveUp calls stop once the guest is found stuck, and looks again and again
// until ctx ends.
func (g *Guest) giveUp(ctx context.Context, stop context.CancelCauseFunc) {
	for sleep(ctx, stuckAfter) == nil {
		cpus, text, err := g.stuck(ctx)
		if err != nil {
			return // QEMU has ended, or ctx: either is seen elsewhere
		}
		if len(cpus) != 0 {
			stop(fmt.Errorf("%w: of %d looks in %v, each at %v:\n%s", errStuck, stuckLooks, stuckLooks*stuckEvery, cpus, text))
			return
		}
	}
}

// stuck returns the vCPUs that did not halt and had interrupts off in the guest's
// kernel at each of some looks, and the registers that the last one saw. None are
// of a guest that is paused.
func (g *Guest) stuck(ctx context.Context) (cpus []int, text string, err error) {
	for look := range stuckLooks {
		if look != 0 {
			if err := sleep(ctx, stuckEvery); err != nil {
				return nil, "", err
			}
		}
		// A command that is given up takes the connection with it.
		whole, cancel := context.WithTimeout(context.WithoutCancel(ctx), stuckAfter)
		status, err := g.Monitor(whole, "info status")
		if err == nil {
			text, err = g.Monitor(whole, "info registers -a")
		}
		cancel()
		if err != nil {
			return nil, "", err
		}
		off := interruptsOff(text)
		if !strings.Contains(status, "running") {
			off = nil
		}
		if look == 0 {
			cpus = slices.Sorted(maps.Keys(off))
		} else {
			cpus = slices.DeleteFunc(cpus, func(cpu int) bool { return !off[cpu] })
		}
		if len(cpus) == 0 {
			return nil, "", nil
		}
	}
	return cpus, text, nil
}

var (
	cpuHead = regexp.MustCompile(`(?m)^CPU#(\d+)`)
	state   = regexp.MustCompile(`RIP=([0-9a-f]{16}) RFL=([0-9a-f]{8}) .* HLT=([01])`)
)

const flagIF = 1 << 9

// interruptsOff reads out of QEMU's "info registers -a" which vCPUs do not halt and
// have interrupts off in the kernel's half of the address space.
func interruptsOff(text string) map[int]bool {
	off := map[int]bool{}
	heads := cpuHead.FindAllStringSubmatchIndex(text, -1)
	for i, h := range heads {
		end := len(text)
		if i+1 < len(heads) {
			end = heads[i+1][0]
		}
		m := state.FindStringSubmatch(text[h[0]:end])
		if m == nil {
			continue // not in 64-bit mode
		}
		cpu, _ := strconv.Atoi(text[h[2]:h[3]])
		rip, _ := strconv.ParseUint(m[1], 16, 64)
		flags, _ := strconv.ParseUint(m[2], 16, 64)
		if rip>>63 != 0 && flags&flagIF == 0 && m[3] == "0" {
			off[cpu] = true
		}
	}
	return off
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
