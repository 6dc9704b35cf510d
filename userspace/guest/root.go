// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"fmt"
)

// userHalf is the bit of CR3 that tells the user's from the kernel's page
// tables under page-table isolation: the two roots are neighbouring pages
// (PTI_USER_PGTABLE_BIT in arch/x86/include/asm/pgtable.h).
const userHalf = 1 << 12

// KernelRoot returns the guest-physical address of page tables that map the
// kernel text at probe. That is CR3's own or, where page-table isolation has
// the vCPU on the user's tables, its neighbour. Under isolation LSTAR itself is
// mapped in both: probe with kernel text elsewhere, or read-only data. The
// error says what both roots gave.
func KernelRoot(ctx context.Context, mem Memory, m Mode, cr3, probe uint64) (uint64, error) {
	root := m.RootOf(cr3)
	_, err := Translate(ctx, mem, m, root, probe)
	if err == nil {
		return root, nil
	}
	if m.Format == FormatNone || m.Format == Format32 || root&userHalf == 0 {
		return 0, fmt.Errorf("page tables at %#x: %w", root, err)
	}
	kernel := root &^ userHalf
	if _, err2 := Translate(ctx, mem, m, kernel, probe); err2 != nil {
		return 0, fmt.Errorf("page tables at %#x: %w; at %#x: %w", root, err, kernel, err2)
	}
	return kernel, nil
}

// KernelHalf is the root of the page tables in CR3 or, with isolated, of the
// kernel's ones of the pair that CR3 is of.
func (m Mode) KernelHalf(cr3 uint64, isolated bool) uint64 {
	root := m.RootOf(cr3)
	if isolated && (m.Long() || m.Format == FormatPAE) {
		root &^= userHalf
	}
	return root
}
