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
func (k *Kernel) readBases(ctx context.Context, text, physical uint64) {
	b := bases4
	if k.Space.Mode.Format == Format5Level {
		b = bases5
	}
	for name, base := range map[string]*uint64{"page_offset_base": &b.DirectMap, "vmalloc_base": &b.Vmalloc, "vmemmap_base": &b.Vmemmap} {
		at, ok := k.Image.Lookup(name)
		if !ok {
			continue
		}
		v, err := k.Space.Pointer(ctx, at)
		switch {
		case err != nil:
			k.doubt(name, "it cannot be read: %v", err)
		case v&(1<<30-1) != 0 || !k.Space.Mode.Kernel(v):
			k.doubt(name, "%#x is no base of a region of kernel memory", v)
		default:
			*base = v
		}
	}
	b.Text, b.Physical = text-linkedText, physical
	k.Bases = b
	at := b.DirectMap + physical
	if t, err := Translate(ctx, k.Space.Memory, k.Space.Mode, k.Space.Root, at); err != nil {
		k.doubt("page_offset_base", "the kernel's text is not mapped at %#x, where it would have it: %v", at, err)
	} else if t.GPA != physical {
		k.doubt("page_offset_base", "%#x maps guest-physical %#x, not the kernel's text at %#x", at, t.GPA, physical)
	}
}
