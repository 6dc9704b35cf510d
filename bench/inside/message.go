// SPDX-License-Identifier: MIT

// Package inside takes samples on a KVM host: it starts a guest, watches it
// with the daemon at one period after another, and measures what that costs.
package inside

import "github.com/kvmaccess/kvmaccess/bench/sample"

// Message is one line of JSON that the run sends out. One of its fields is set.
type Message struct {
	Host   *Host          `json:"host,omitempty"`
	Guest  bool           `json:"guest,omitempty"` // the guest is up
	Sample *sample.Sample `json:"sample,omitempty"`
	Done   bool           `json:"done,omitempty"` // the last message: all of the plan is there
}

// Host describes the host that the samples come from.
type Host struct {
	Kernel      string `json:"kernel"` // uname -r
	CPUs        int    `json:"cpus"`
	Clocksource string `json:"clocksource"`
}
