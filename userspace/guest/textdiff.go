// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
)

// TextCopy is code of a guest's kernel at one time.
type TextCopy struct {
	Address uint64 // guest-virtual, of the first byte
	Data    []byte
}

// maxText bounds the code that is copied at once.
const maxText = 256 << 20

// CopyText reads code: the kernel's text is k.Text.
func (k *Kernel) CopyText(ctx context.Context, x Extent) (*TextCopy, error) {
	if x.End <= x.Start || x.Size() > maxText {
		return nil, &ObjectError{"code", x.Start, fmt.Errorf("it ends at %#x: 1 to %d bytes are copied", x.End, maxText)}
	}
	c := &TextCopy{Address: x.Start, Data: make([]byte, x.Size())}
	if err := k.Space.Read(ctx, x.Start, c.Data); err != nil {
		return nil, &ObjectError{"code", x.Start, err}
	}
	return c, nil
}

// PatchSet is all places that a kernel changes while it runs, by what its
// tables say at one time.
type PatchSet struct {
	patches []Patch // by ascending address
}

// Patches reads all tables of a running kernel. What could be read is returned
// beside an error; each error names its object.
func (k *Kernel) Patches(ctx context.Context) (*PatchSet, error) {
	k = k.View()
	var errs problems
	var all []Patch
	take := func(patches []Patch, err error) {
		errs.add(err)
		all = append(all, patches...)
	}
	f, err := k.Ftrace(ctx)
	errs.add(err)
	if f != nil {
		all = append(all, f.Patches()...)
	}
	take(k.ftraceCalls(ctx))
	probes, err := k.Kprobes(ctx)
	errs.add(err)
	take(k.KprobePatches(ctx, probes))
	jumps, err := k.JumpSites(ctx)
	errs.add(err)
	take(k.JumpPatches(ctx, jumps))
	calls, err := k.StaticCalls(ctx)
	errs.add(err)
	trampolines, err := k.StaticTrampolines(ctx)
	errs.add(err)
	take(k.StaticCallPatches(ctx, calls, trampolines))
	b := &BPF{}
	errs.add(k.bpfDispatchers(ctx, b))
	take(k.DispatcherPatches(ctx, b.Dispatchers))
	return NewPatchSet(all), errs.err()
}

// NewPatchSet makes a set of patches. Where a dispatcher is entered is a site
// of ftrace, too: either may be there.
func NewPatchSet(patches []Patch) *PatchSet {
	s := &PatchSet{slices.Clone(patches)}
	slices.SortStableFunc(s.patches, func(a, b Patch) int {
		if c := cmp.Compare(a.Address, b.Address); c != 0 {
			return c
		}
		return cmp.Compare(rank(a), rank(b))
	})
	for i := 1; i < len(s.patches); i++ {
		d, p := &s.patches[i-1], &s.patches[i]
		if d.Table == TableDispatcher && p.Table == TableFtrace && d.Address == p.Address {
			p.Want = slices.Concat(p.Want, d.Want)
		}
	}
	return s
}

// rank orders patches of one place: the first one that fits explains it.
func rank(p Patch) int {
	if p.Table == TableDispatcher {
		return 0
	}
	return 1
}

// All are the patches by ascending address. They must not be changed.
func (s *PatchSet) All() []Patch { return s.patches }

// at are the patches that may reach to or across an address.
func (s *PatchSet) at(addr uint64) []Patch {
	low, _ := slices.BinarySearchFunc(s.patches, addr-min(addr, maxPatch-1), func(p Patch, a uint64) int { return cmp.Compare(p.Address, a) })
	high := low
	for high < len(s.patches) && s.patches[high].Address <= addr {
		high++
	}
	return s.patches[low:high]
}

// Explain finds the patch that a byte of code is of, if what is there now is
// what must be; nil: there is none.
func (s *PatchSet) Explain(now *TextCopy, addr uint64) *Patch {
	candidates := s.at(addr)
	for i := range candidates {
		p := &candidates[i]
		if p.Address < now.Address || p.Address-now.Address >= uint64(len(now.Data)) {
			continue // it begins before the code that is at hand
		}
		code := now.Data[p.Address-now.Address:]
		if n, ok := p.fits(code); ok && addr-p.Address < uint64(n) && p.mayChange(code, addr-p.Address) {
			return p
		}
	}
	return nil
}

// TextChange is a run of bytes of code that is not as it was.
type TextChange struct {
	Address  uint64
	Old, New []byte // of the same length
	// Why is what explains each of the bytes; nil: nothing does.
	Why *Patch
}

// String describes the change in a line.
func (c TextChange) String() string {
	why := "unexplained"
	if c.Why != nil {
		why = fmt.Sprintf("%s (%s)", c.Why.Table, c.Why.Detail)
	}
	return fmt.Sprintf("%#x: % x -> % x: %s", c.Address, c.Old, c.New, why)
}

// Changes compares code with an earlier copy of it, byte for byte: each run of
// bytes that differ is explained by one place of the set, where what is there
// now is what must be, or by none.
func (s *PatchSet) Changes(before, now *TextCopy) ([]TextChange, error) {
	return Compare(before, now, func(addr uint64) *Patch { return s.Explain(now, addr) })
}

// Compare compares two copies of code byte for byte. explain is asked for each
// byte that differs, by ascending address.
func Compare(before, now *TextCopy, explain func(addr uint64) *Patch) ([]TextChange, error) {
	if before.Address != now.Address || len(before.Data) != len(now.Data) {
		return nil, fmt.Errorf("code at %#x of %d bytes cannot be compared with that at %#x of %d",
			now.Address, len(now.Data), before.Address, len(before.Data))
	}
	var changes []TextChange
	eachDifference(before.Data, now.Data, func(i int) {
		addr := now.Address + uint64(i)
		why := explain(addr)
		if n := len(changes); n > 0 {
			last := &changes[n-1]
			if last.Address+uint64(len(last.New)) == addr && last.Why == why {
				last.Old, last.New = append(last.Old, before.Data[i]), append(last.New, now.Data[i])
				return
			}
		}
		changes = append(changes, TextChange{addr, []byte{before.Data[i]}, []byte{now.Data[i]}, why})
	})
	return changes, nil
}

// eachDifference calls f with the index of each byte in which two runs of the
// same length differ.
func eachDifference(a, b []byte, f func(i int)) {
	const chunk = 4096
	for start := 0; start < len(a); start += chunk {
		end := min(start+chunk, len(a))
		if bytes.Equal(a[start:end], b[start:end]) {
			continue
		}
		for i := start; i < end; i++ {
			if a[i] != b[i] {
				f(i)
			}
		}
	}
}
