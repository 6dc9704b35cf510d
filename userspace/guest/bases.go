// SPDX-License-Identifier: MIT

package guest

import "context"

// Where regions are without CONFIG_RANDOMIZE_MEMORY
// (Documentation/arch/x86/x86_64/mm.rst).
var (
	bases4 = Bases{DirectMap: 0xffff888000000000, Vmalloc: 0xffffc90000000000, Vmemmap: 0xffffea0000000000}
	bases5 = Bases{DirectMap: 0xff11000000000000, Vmalloc: 0xffa0000000000000, Vmemmap: 0xffd4000000000000}
)

// Bases are where a kernel has its regions of virtual memory in this boot.
type Bases struct {
	Text      uint64 `json:"text"`       // KASLR slide of the image, against 0xffffffff81000000
	Physical  uint64 `json:"physical"`   // guest-physical address of _text
	DirectMap uint64 `json:"direct_map"` // of all physical memory: page_offset_base
	Vmalloc   uint64 `json:"vmalloc"`    // vmalloc_base
	Vmemmap   uint64 `json:"vmemmap"`    // vmemmap_base: struct page of each frame
}

// readBases reads the bases, and doubts a direct map that does not lead to the
// image. A base of which there is no variable is where the kernel's
// documentation has it.
func (k *Kernel) readBases(ctx context.Context) {
	b := bases4
	if k.Space.Mode.Format == Format5Level {
		b = bases5
	}
	for _, v := range []struct {
		name string
		base *uint64
	}{{"page_offset_base", &b.DirectMap}, {"vmalloc_base", &b.Vmalloc}, {"vmemmap_base", &b.Vmemmap}} {
		name, base := v.name, v.base
		at, ok := k.Image.Lookup(name)
		if !ok {
			continue
		}
		v, err := k.Space.Pointer(ctx, at)
		switch {
		case err != nil:
			k.doubt(DoubtBases, "%s cannot be read: %v", name, err)
		case v&(1<<30-1) != 0 || !k.Space.Mode.Kernel(v):
			k.doubt(DoubtBases, "%s is %#x, no base of a region of kernel memory", name, v)
		default:
			*base = v
		}
	}
	physical := k.found.physical
	b.Text, b.Physical = k.found.extent.Start-linkedText, physical
	k.Bases = b
	at := b.DirectMap + physical
	if t, err := Translate(ctx, k.Space.Memory, k.Space.Mode, k.Space.Root, at); err != nil {
		k.doubt(DoubtBases, "the kernel's text is not mapped at %#x, where it would have it: %v", at, err)
	} else if t.GPA != physical {
		k.doubt(DoubtBases, "%#x maps guest-physical %#x, not the kernel's text at %#x", at, t.GPA, physical)
	}
}
