// SPDX-License-Identifier: MIT

package host

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLocksChecked(t *testing.T) {
	for text, want := range map[string]bool{
		" lock-classes:  1200 [max: 8192]\n debug_locks:                             1\n": true,
		" lock-classes:  1200 [max: 8192]\n debug_locks:                             0\n": false,
		" max locking depth: 1\n": false,
		"":                        false,
	} {
		if got := locksChecked([]byte(text)); got != want {
			t.Errorf("%q: %t, want %t", text, got, want)
		}
	}
}

func TestLeaksOf(t *testing.T) {
	const theirs = `unreferenced object 0xffff888003a2c000 (size 64):
  comm "swapper/0", pid 1, jiffies 4294667296
  backtrace (crc 0):
    kmalloc_trace+0x30/0x60
    acpi_init+0x20/0x40
`
	const ours = `unreferenced object 0xffff888003a2d000 (size 512):
  comm "stress", pid 99, jiffies 4294699999
  backtrace (crc 1a2b3c4d):
    kmalloc_trace+0x30/0x60
    vm_doit+0x20/0x40 [kvmaccess]
`
	if diff := cmp.Diff([]string{ours[:len(ours)-1]}, leaksOf([]byte(theirs+ours+theirs), "kvmaccess")); diff != "" {
		t.Error(diff)
	}
	if got := leaksOf([]byte(theirs), "kvmaccess"); got != nil {
		t.Errorf("leaks of others: %q", got)
	}
}
