// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// countedMemory served what it says.
type countedMemory struct {
	stats  kvmaccess.MemoryStats
	closed int
}

func (*countedMemory) ReadPhysical(context.Context, uint64, []byte) error { return nil }
func (m *countedMemory) Stats() kvmaccess.MemoryStats                     { return m.stats }
func (m *countedMemory) Close() error                                     { m.closed++; return nil }

// Reads are counted through all the memories that a VM's watch had one after
// the other, and summed up over VMs.
func TestAccountOfReads(t *testing.T) {
	var a account
	if diff := cmp.Diff(kvmaccess.MemoryStats{}, a.snapshot().Reads); diff != "" {
		t.Errorf("nothing read (-want +got):\n%s", diff)
	}
	first := &countedMemory{stats: kvmaccess.MemoryStats{
		Netlink: kvmaccess.PathStats{Reads: 1, Bytes: 2}, Bulk: kvmaccess.PathStats{Reads: 3, Bytes: 4}, Cold: kvmaccess.PathStats{Reads: 5, Bytes: 6},
	}}
	a.count(first)
	second := &countedMemory{stats: kvmaccess.MemoryStats{Netlink: kvmaccess.PathStats{Reads: 10, Bytes: 20}, Barred: "so"}}
	a.count(second)
	a.count(&coldMemory{}) // does not count
	want := kvmaccess.MemoryStats{
		Netlink: kvmaccess.PathStats{Reads: 11, Bytes: 22}, Bulk: first.stats.Bulk, Cold: first.stats.Cold, Barred: "so",
	}
	got := a.snapshot()
	if diff := cmp.Diff(want, got.Reads); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if first.closed != 1 || second.closed != 1 {
		t.Errorf("closed %d and %d times", first.closed, second.closed)
	}
	if sum := got.add(got).Reads; sum.Netlink.Bytes != 44 || sum.Cold.Reads != 10 {
		t.Errorf("sum: %+v", sum)
	}
}
