// SPDX-License-Identifier: MIT

package integrity

import (
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// KernelCheck finds what contradicts itself in what a kernel says of itself,
// in its symbol table, its types and its page tables, and whether that was
// overwritten since. All other checks build on it.
type KernelCheck struct{}

// Name implements Check.
func (KernelCheck) Name() string { return checkKernel }

// Objects implements Check.
func (KernelCheck) Objects(g *Guest) []Object {
	if len(g.CPUs) == 0 || g.Kernel == nil && len(g.Doubts) == 0 {
		return nil
	}
	return []Object{{Name: "kernel", CPU: g.CPUs[0].ID,
		Items: func(g *Guest, _ *kvmaccess.VCPU, _ []byte, _ error) []Item { return kernelItems(g) }}}
}

func kernelItems(g *Guest) []Item {
	var items []Item
	for _, object := range guest.DoubtObjects() {
		if object == guest.DoubtModules {
			continue // modules come and go while they are read
		}
		var reasons []string
		for _, d := range g.Doubts {
			if d.Object == object {
				reasons = append(reasons, d.Reason)
			}
		}
		it := Item{Check: checkKernel, Object: object, Value: Value{Detail: "consistent"}}
		if reasons != nil {
			const most = 3
			if more := len(reasons) - most; more > 0 {
				reasons = append(reasons[:most], "and more")
			}
			it.Fault = strings.Join(reasons, "; ")
			it.Raw, it.Value = it.Fault, Value{Value: 1, Detail: "not to be trusted"}
		}
		items = append(items, it)
	}
	return items
}
