// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Pages is sparse guest-physical memory: 4 KiB pages by their address.
type Pages map[uint64]*[4096]byte

// ReadPhysical implements Memory; an absent page is kvmaccess.ErrNoMemslot.
func (m Pages) ReadPhysical(_ context.Context, gpa uint64, p []byte) error {
	for len(p) > 0 {
		page := m[gpa&^4095]
		if page == nil {
			return fmt.Errorf("guest-physical %#x: %w", gpa, kvmaccess.ErrNoMemslot)
		}
		n := copy(p, page[gpa&4095:])
		p = p[n:]
		gpa += uint64(n)
	}
	return nil
}

// Regions implements Regions.
func (m Pages) Regions(context.Context) ([]Region, error) {
	var out []Region
	for _, frame := range slices.Sorted(maps.Keys(m)) {
		if n := len(out); n > 0 && out[n-1].GPA+out[n-1].Size == frame {
			out[n-1].Size += 4096
			continue
		}
		out = append(out, Region{GPA: frame, Size: 4096})
	}
	return out, nil
}

// WritePhysical copies p to guest-physical address gpa on, adding pages.
func (m Pages) WritePhysical(gpa uint64, p []byte) {
	for len(p) > 0 {
		page := m[gpa&^4095]
		if page == nil {
			page = new([4096]byte)
			m[gpa&^4095] = page
		}
		n := copy(page[gpa&4095:], p)
		p = p[n:]
		gpa += uint64(n)
	}
}

// Recorder is a Memory that keeps each page that is read through it.
type Recorder struct {
	Memory Memory
	Pages  Pages
}

// NewRecorder records what is read of mem.
func NewRecorder(mem Memory) *Recorder { return &Recorder{Memory: mem, Pages: Pages{}} }

// ReadPhysical implements Memory.
func (r *Recorder) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	end := gpa + uint64(len(p))
	for frame := gpa &^ 4095; frame < end; frame += 4096 {
		if r.Pages[frame] != nil {
			continue
		}
		page := new([4096]byte)
		if err := r.Memory.ReadPhysical(ctx, frame, page[:]); err != nil {
			return err
		}
		r.Pages[frame] = page
	}
	return r.Pages.ReadPhysical(ctx, gpa, p)
}
