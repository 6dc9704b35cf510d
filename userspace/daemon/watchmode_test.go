// SPDX-License-Identifier: MIT

package daemon

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// watchMode is the product's default.
func watchMode(c *Config) { c.Mode = ModeWatch }

func TestWatchMode(t *testing.T) {
	daemonTest(t, func(t *testing.T, h *fakeHost, dir string) {
		web := h.start(1, 10, "web")
		r := newRig(t, h, dir, watchMode)
		defer r.stop()
		settleDown()
		h.start(2, 20, "mail") // after the daemon
		settleDown()
		before := r.status(1)
		web.set(func(g *fakeGuest) { g.value = 6 })
		time.Sleep(time.Second)
		synctest.Wait()
		want := []string{"value 0 of guest web is 6, was 1"}
		if diff := cmp.Diff(want, r.findings()); diff != "" {
			t.Errorf("within a period: -want +got:\n%s", diff)
		}
		_ = before
	})
}
