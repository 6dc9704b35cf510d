// SPDX-License-Identifier: MIT

package vmlinux

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// Tables of a kernel's file, by which it changes itself once, at boot.
const (
	TableAlternative guest.Table = "alternative"      // instructions by the processor's features
	TableParavirt    guest.Table = "paravirt"         // calls by the hypervisor
	TableRetpoline   guest.Table = "retpoline"        // indirect calls and jumps
	TableReturn      guest.Table = "return"           // ends of functions
	TableLock        guest.Table = "lock prefix"      // where there is one processor
	TableEndbr       guest.Table = "endbr"            // entries of functions that are not called indirectly
	TableConstant    guest.Table = "runtime constant" // a variable's value within instructions
)

// ErrOtherKernel: the file is of another kernel than the guest's.
var ErrOtherKernel = errors.New("the file is not of the guest's kernel")

// Changes compares a running kernel's text with the file's, byte for byte. Each
// run of bytes that differ is explained by one table of the kernel or of the
// file, if what is there is what that says, or by none: then Why is nil. The
// move to where the kernel lies is no change. What could be told is returned
// beside an error that says which of the kernel's own tables cannot be read.
func (f *File) Changes(ctx context.Context, k *guest.Kernel) ([]guest.TextChange, error) {
	if k.Fingerprint.BuildID != "" && f.BuildID != "" && k.Fingerprint.BuildID != f.BuildID {
		return nil, fmt.Errorf("%w: its build id is %s, the guest's %s", ErrOtherKernel, f.BuildID, k.Fingerprint.BuildID)
	}
	delta := k.Bases.Text
	m, err := f.moved(delta)
	if err != nil {
		return nil, err
	}
	now, err := k.CopyText(ctx, k.Text)
	if err != nil {
		return nil, err
	}
	file := m.at(now.Address-delta, len(now.Data))
	if file == nil {
		return nil, fmt.Errorf("%w: it has no code for %#x to %#x", ErrOtherKernel, k.Text.Start-delta, k.Text.End-delta)
	}
	set, errSet := k.Patches(ctx)
	b := &boot{k: k, image: m, delta: delta, now: now}
	if err := b.read(ctx); err != nil {
		return nil, err
	}
	slices.SortStableFunc(b.places, func(x, y *place) int { return cmp.Compare(x.patch.Address, y.patch.Address) })
	before := &guest.TextCopy{Address: now.Address, Data: file}
	changes, err := guest.Compare(before, now, func(addr uint64) *guest.Patch {
		if p := set.Explain(now, addr); p != nil {
			return p
		}
		return b.explain(addr)
	})
	return changes, errors.Join(err, errSet)
}

// boot is what the kernel did to its text at boot.
type boot struct {
	k      *guest.Kernel
	image  *image // the file, moved; addresses are the file's
	delta  uint64
	now    *guest.TextCopy
	places []*place // by address, once all were added
}

// place is a run of code that one entry of a table is of.
type place struct {
	patch guest.Patch
	size  int
	fits  func(now []byte) bool
	known bool
	ok    bool
}

// maxPlace is how long a place can be, in bytes: an alternative's length has
// eight bits.
const maxPlace = 255

// explain finds what is of a byte and as it must be.
func (b *boot) explain(addr uint64) *guest.Patch {
	low, _ := slices.BinarySearchFunc(b.places, addr-maxPlace, func(p *place, a uint64) int { return cmp.Compare(p.patch.Address, a) })
	for _, p := range b.places[low:] {
		if p.patch.Address > addr {
			break
		}
		if addr-p.patch.Address >= uint64(p.size) {
			continue
		}
		if !p.known {
			p.known = true
			code := b.code(p.patch.Address, p.size)
			p.ok = code != nil && p.fits(code)
		}
		if p.ok {
			return &p.patch
		}
	}
	return nil
}

// code is what is there now; nil: it is not in the text.
func (b *boot) code(addr uint64, n int) []byte {
	offset := addr - b.now.Address
	if addr < b.now.Address || offset > uint64(len(b.now.Data)) || uint64(n) > uint64(len(b.now.Data))-offset {
		return nil
	}
	return b.now.Data[offset : offset+uint64(n)]
}

// add adds what an entry says of running addresses.
func (b *boot) add(table guest.Table, addr uint64, size int, detail string, fits func(now []byte) bool) {
	b.places = append(b.places, &place{patch: guest.Patch{Address: addr, Table: table, Detail: detail}, size: size, fits: fits})
}

func (b *boot) read(ctx context.Context) error {
	b.locks()
	b.endbrs()
	b.returns(ctx)
	b.retpolines(ctx)
	b.paravirt(ctx)
	b.constants()
	return b.alternatives(ctx)
}

// relative reads a table of 32-bit distances from each entry itself to a place.
func (b *boot) relative(name string) []uint64 {
	s := b.image.section(name)
	if s == nil {
		return nil
	}
	var places []uint64
	for at := 0; at+4 <= len(s.data); at += 4 {
		distance := int64(int32(binary.LittleEndian.Uint32(s.data[at:])))
		if distance != 0 {
			places = append(places, s.addr+uint64(at)+uint64(distance))
		}
	}
	return places
}

// most is the key that occurs most often.
func most[K cmp.Ordered](votes map[K]int) K {
	var best K
	for key, n := range votes {
		if n > votes[best] || n == votes[best] && key < best {
			best = key
		}
	}
	return best
}

// locks are lock prefixes, all of which are another one, that does nothing,
// where there is one processor (alternatives_smp_unlock()).
func (b *boot) locks() {
	const lock, ds = 0xf0, 0x3e
	places := b.relative(".smp_locks")
	votes := map[byte]int{}
	for _, at := range places {
		if now := b.code(at+b.delta, 1); now != nil {
			votes[now[0]]++
		}
	}
	if most(votes) != ds {
		return
	}
	for _, at := range places {
		if file := b.image.at(at, 1); file != nil && file[0] == lock {
			b.add(TableLock, at+b.delta, 1, "one processor", func(now []byte) bool { return now[0] == ds })
		}
	}
}

// poisons are what is written instead of endbr64, of 6.0 and of 6.14 on
// (gen_endbr_poison()).
var poisons = [][]byte{{0x66, 0x0f, 0x1f, 0x00}, {0x0f, 0x1f, 0x40, 0xd6}}

// endbrs are the places of endbr64 that is not needed.
func (b *boot) endbrs() {
	endbr := []byte{0xf3, 0x0f, 0x1e, 0xfa}
	places := b.relative(".ibt_endbr_seal")
	votes := map[string]int{}
	for _, at := range places {
		if now := b.code(at+b.delta, 4); now != nil {
			votes[string(now)]++
		}
	}
	poison := []byte(most(votes))
	if !slices.ContainsFunc(poisons, func(p []byte) bool { return bytes.Equal(p, poison) }) {
		return
	}
	for _, at := range places {
		if file := b.image.at(at, 4); bytes.Equal(file, endbr) {
			b.add(TableEndbr, at+b.delta, 4, "sealed", func(now []byte) bool { return bytes.Equal(now, poison) })
		}
	}
}

// returns are the ends of functions: a jump to a thunk in the file
// (apply_returns()). All become alike, but on processors with the ITS bug,
// where only those in one half of a cache line need a thunk.
func (b *boot) returns(ctx context.Context) {
	plain := []byte{0xc3, 0xcc, 0xcc, 0xcc, 0xcc}
	var current uint64
	if at, ok := b.k.Image.Lookup("x86_return_thunk"); ok {
		current, _ = b.k.Space.Pointer(ctx, at)
	}
	its, _ := b.k.Image.Lookup("its_return_thunk")
	sites := b.relative(".return_sites")
	votes := map[uint64]int{} // for each thunk, 0: none
	for _, at := range sites {
		file := b.image.at(at, 5)
		if file == nil || file[0] != 0xe9 {
			continue
		}
		switch now := b.code(at+b.delta, 5); {
		case now == nil:
		case bytes.Equal(now, plain):
			votes[0]++
		case now[0] == 0xe9:
			to, _ := guest.BranchTarget(at+b.delta, now)
			votes[to]++
		}
	}
	thunk := most(votes)
	for _, at := range sites {
		to := thunk
		if its != 0 && current == its { // cpu_wants_rethunk_at()
			if to = its; (at+b.delta)&0x20 != 0 {
				to = 0
			}
		}
		code := plain
		if to != 0 {
			code = binary.LittleEndian.AppendUint32([]byte{0xe9}, uint32(to-(at+b.delta+5)))
		}
		b.replacement(at, code)
		b.add(TableReturn, at+b.delta, 5, "return", func(now []byte) bool { return bytes.Equal(now, code) })
	}
}

// replacement changes code that alternatives, which are applied last, copy to
// elsewhere.
func (b *boot) replacement(at uint64, code []byte) {
	s := b.image.section(".altinstr_replacement")
	if s != nil && at >= s.addr && at+uint64(len(code)) <= s.addr+uint64(len(s.data)) {
		copy(s.data[at-s.addr:], code)
	}
}

// retpolines are calls and jumps to thunks, one for each register, which become
// indirect ones (patch_retpoline()) or lead to other thunks.
func (b *boot) retpolines(ctx context.Context) {
	array, known := b.k.Image.Lookup("__x86_indirect_thunk_array")
	for _, at := range b.relative(".retpoline_sites") {
		file := b.image.at(at, 6)
		if file == nil {
			continue
		}
		size, skip, op := 5, 0, file[0]
		switch {
		case file[0] == 0x2e:
			size, skip, op = 6, 1, file[1]
		case file[0] == 0x0f && file[1]&0xf0 == 0x80:
			size, op = 6, 0xe9
		}
		target, ok := guest.BranchTarget(at+b.delta+uint64(skip), file[skip:size])
		if !ok {
			continue
		}
		reg := -1
		if from := target - array; known && from%32 == 0 && from/32 < 16 {
			reg = int(from / 32)
		}
		jcc := file[0] == 0x0f
		b.add(TableRetpoline, at+b.delta, size, "indirect branch", func(now []byte) bool {
			rest := now
			if jcc {
				if rest[0] != 0x70|file[1]&0xf^1 || int(rest[1]) != size-2 {
					return false
				}
				rest = rest[2:]
			}
			return indirect(rest, op, reg) || !jcc && b.otherThunk(ctx, at+b.delta, now, op, skip, reg)
		})
	}
}

// indirect says whether code is a call or jump by a register, after an lfence
// or not, and nothing else.
func indirect(code []byte, op byte, reg int) bool {
	code = bytes.TrimPrefix(code, []byte{0x0f, 0xae, 0xe8})
	high := 0
	if len(code) > 0 && code[0] == 0x41 {
		high, code = 8, code[1:]
	}
	kind := byte(0xd0)
	if op == 0xe9 {
		kind = 0xe0
	}
	if len(code) < 2 || code[0] != 0xff || code[1]&0xf8 != kind || reg >= 0 && int(code[1]&7)+high != reg {
		return false
	}
	rest := code[2:]
	if op == 0xe9 { // a breakpoint behind, against speculation
		rest = bytes.TrimPrefix(rest, []byte{0xcc})
	}
	return idle(rest) || bytes.Count(rest, []byte{0xcc}) == len(rest)
}

// otherThunk says whether a branch goes to code that jumps by the register and
// does nothing else, as the kernel makes it for processors with the ITS bug.
func (b *boot) otherThunk(ctx context.Context, at uint64, now []byte, op byte, skip, reg int) bool {
	if skip == 1 && now[0] != 0x2e || now[skip] != op {
		return false
	}
	to, ok := guest.BranchTarget(at+uint64(skip), now[skip:])
	if !ok {
		return false
	}
	var thunk [4]byte
	if err := b.k.Space.Read(ctx, to, thunk[:]); err != nil {
		return false
	}
	code := thunk[:3]
	if thunk[0] == 0x41 {
		code = thunk[:4]
	}
	return code[len(code)-1] == 0xcc && indirect(code[:len(code)-1], 0xe9, reg)
}

// natives are what some calls become that need not be calls at all
// (arch/x86/kernel/paravirt_patch.c, to 5.17).
var natives = map[string]bool{
	"\xfa": true, "\xfb": true, "\x9c\x58": true, "\x57\x9d": true, "\x0f\x09": true,
	"\x0f\x20\xd0": true, "\x0f\x20\xd8": true, "\x0f\x22\xdf": true,
	"\x48\x89\xf8": true, "\x31\xc0": true, "\xc6\x07\x00": true, "\x0f\x0b": true,
}

// paravirt are the indirect calls by pv_ops, to 6.7 in a table of their own
// (apply_paravirt()). They become direct ones, or what a function would do
// that is known, the same for all of one kind.
func (b *boot) paravirt(ctx context.Context) {
	s := b.image.section(".parainstructions")
	if s == nil {
		return
	}
	const entry = 16 // a pointer, kind, length, and padding
	ops, ok := b.k.Image.Lookup("pv_ops")
	if !ok {
		return
	}
	nothing := map[uint64]bool{}
	for _, name := range []string{"_paravirt_nop", "paravirt_nop"} {
		if at, ok := b.k.Image.Lookup(name); ok {
			nothing[at] = true
		}
	}
	type site struct {
		at   uint64
		kind byte
		size int
	}
	var sites []site
	native := map[byte]map[string]int{} // by kind: what is there instead of a call
	for at := 0; at+10 <= len(s.data); at += entry {
		p := s.data[at:]
		x := site{binary.LittleEndian.Uint64(p), p[8], int(p[9])} // the pointer was moved
		now := b.code(x.at, x.size)
		if x.size < 1 || now == nil {
			continue
		}
		sites = append(sites, x)
		for text := range natives {
			if rest, ok := bytes.CutPrefix(now, []byte(text)); ok && idle(rest) {
				if native[x.kind] == nil {
					native[x.kind] = map[string]int{}
				}
				native[x.kind][text]++
			}
		}
	}
	targets := map[byte]uint64{}
	for _, x := range sites {
		target, ok := targets[x.kind]
		if !ok {
			var err error
			if target, err = b.k.Space.Pointer(ctx, ops+8*uint64(x.kind)); err != nil {
				continue
			}
			targets[x.kind] = target
		}
		instead := most(native[x.kind])
		b.add(TableParavirt, x.at, x.size, fmt.Sprintf("operation %d, %s", x.kind, b.k.Image.Name(target)), func(now []byte) bool {
			if nothing[target] && idle(now) {
				return true
			}
			if rest, ok := bytes.CutPrefix(now, []byte(instead)); ok && instead != "" && idle(rest) {
				return true
			}
			to, ok := guest.BranchTarget(x.at, now)
			return ok && len(now) >= 5 && (now[0] == 0xe8 || now[0] == 0xe9) && to == target && idle(now[5:])
		})
	}
}

// constants are variables' values within instructions (runtime-const.h). The
// value is the same in all places of one variable.
func (b *boot) constants() {
	for i := range b.image.sections {
		name, ok := strings.CutPrefix(b.image.sections[i].name, "runtime_")
		kind, variable, ok2 := strings.Cut(name, "_")
		size := map[string]int{"ptr": 8, "shift": 1}[kind]
		if !ok || !ok2 || size == 0 {
			continue
		}
		votes := map[string]int{}
		places := b.relative(b.image.sections[i].name)
		for _, at := range places {
			if now := b.code(at+b.delta, size); now != nil {
				votes[string(now)]++
			}
		}
		value := []byte(most(votes))
		for _, at := range places {
			b.add(TableConstant, at+b.delta, size, variable, func(now []byte) bool { return bytes.Equal(now, value) })
		}
	}
}
