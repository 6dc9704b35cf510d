// SPDX-License-Identifier: MIT

package integrity

import "time"

// Baseline is what a Monitor compares with. It marshals to JSON and back
// without loss, so that changes made between two runs of a daemon are found.
type Baseline struct {
	Version int       `json:"version"` // of this format
	Taken   time.Time `json:"taken"`
	VM      VM        `json:"vm"`
	Anchor  Hex       `json:"anchor"` // address of the kernel image that Items lie relative to
	Items   []Item    `json:"items"`
}
