// SPDX-License-Identifier: MIT

package integrity

import "slices"

// Accepted is a change that a guest may make, and that was taken over by a rule.
// That a guest runs another kernel, or the same one anew, is a finding of
// KindRestarted.
type Accepted struct {
	Rule string // why it may
	What string
}

// maxAccepted bounds those that nobody takes.
const maxAccepted = 256

func (m *Monitor) accept(rule, what string) {
	if len(m.accepted) < maxAccepted {
		m.accepted = append(m.accepted, Accepted{rule, what})
	}
}

// Accepted returns what was accepted since it was last asked.
func (m *Monitor) Accepted() []Accepted {
	all := slices.Clone(m.accepted)
	m.accepted = m.accepted[:0]
	return all
}
