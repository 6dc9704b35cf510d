// SPDX-License-Identifier: MIT

package vmlinux

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// alternative is a struct alt_instr: other code for processors that have a
// feature, or do not (arch/x86/include/asm/alternative.h).
type alternative struct {
	instr, repl         uint64 // addresses in the file
	feature             int
	not, direct         bool
	instrLen, replaceBy int // bytes
}

// Flags of an alternative: within its feature to 6.2, beside it later.
const (
	flagNotOld = 1 << 15
	flagNot    = 1 << 0
	flagDirect = 1 << 1 // the call goes where the indirect one would have
)

// maxAlternatives bounds the table.
const maxAlternatives = 1 << 18

// readAlternatives decodes the table. Its layout is in the kernel's types.
func (b *boot) readAlternatives() ([]alternative, error) {
	s := b.image.section(".altinstructions")
	if s == nil {
		return nil, nil
	}
	if b.k.Types == nil {
		return nil, fmt.Errorf("struct alt_instr: %w", guest.ErrNoTypes)
	}
	layout, err := b.k.Types.Struct("alt_instr")
	if err != nil {
		return nil, err
	}
	field := func(name string) (int, error) {
		f, err := layout.Field(name)
		return int(f.Offset + f.BitOffset/8), err
	}
	var at [6]int
	for i, name := range []string{"instr_offset", "repl_offset", "cpuid", "instrlen", "replacementlen"} {
		if at[i], err = field(name); err != nil {
			return nil, err
		}
	}
	wide := layout.Has("flags")
	if wide {
		if at[5], err = field("flags"); err != nil {
			return nil, err
		}
	}
	size := int(layout.Size)
	for _, offset := range at {
		if size == 0 || offset+4 > size+3 || offset >= size {
			return nil, fmt.Errorf("struct alt_instr: %w", guest.ErrBadTypes)
		}
	}
	if len(s.data)%size != 0 || len(s.data)/size > maxAlternatives {
		return nil, fmt.Errorf("the file's alternatives have %d bytes, not a number of entries of %d", len(s.data), size)
	}
	var all []alternative
	for off := 0; off < len(s.data); off += size {
		p := append(s.data[off:off+size:off+size], 0, 0, 0, 0)
		relative := func(i int) uint64 {
			return s.addr + uint64(off+at[i]) + uint64(int64(int32(binary.LittleEndian.Uint32(p[at[i]:]))))
		}
		a := alternative{instr: relative(0), repl: relative(1), instrLen: int(p[at[3]]), replaceBy: int(p[at[4]])}
		feature := binary.LittleEndian.Uint16(p[at[2]:])
		if wide {
			flags := binary.LittleEndian.Uint16(p[at[5]:])
			a.not, a.direct = flags&flagNot != 0, flags&flagDirect != 0
		} else {
			a.not = feature&flagNotOld != 0
			feature &^= flagNotOld
		}
		a.feature = int(feature)
		all = append(all, a)
	}
	return all, nil
}

// alternatives finds, for each place, the code that the processor's features
// ask for (apply_alternatives()): of several the last one.
func (b *boot) alternatives(ctx context.Context) error {
	all, err := b.readAlternatives()
	if err != nil || len(all) == 0 {
		return err
	}
	at, ok := b.k.Image.Lookup("boot_cpu_data")
	if !ok {
		return fmt.Errorf("boot_cpu_data: %w", guest.ErrNoSymbol)
	}
	o, err := b.k.Part(ctx, "cpuinfo_x86", at, "x86_capability")
	if err != nil {
		return err
	}
	features, err := o.Bytes("x86_capability")
	if err != nil {
		return err
	}
	has := func(feature int) bool {
		return feature/8 < len(features) && features[feature/8]>>(feature%8)&1 != 0
	}
	for i := 0; i < len(all); {
		first := all[i]
		size := 0
		var pick *alternative
		for ; i < len(all) && all[i].instr == first.instr; i++ {
			size = max(size, all[i].instrLen)
			if has(all[i].feature) != all[i].not {
				pick = &all[i]
			}
		}
		if size > 0 {
			b.alternative(ctx, first.instr, size, pick)
		}
	}
	return nil
}

// alternative adds a place, with the code that is to be there; nil: the file's,
// in which what does nothing may be written otherwise.
func (b *boot) alternative(ctx context.Context, instr uint64, size int, a *alternative) {
	want := make([]byte, size)
	for i := range want {
		want[i] = 0x90
	}
	source := instr
	detail := "as in the file"
	switch {
	case a == nil:
		file := b.image.at(instr, size)
		if file == nil {
			return
		}
		copy(want, file)
	case a.direct:
		call := b.directCall(ctx, a)
		if call == nil {
			return
		}
		detail = "direct call"
		copy(want, call)
	default:
		file := b.image.at(a.repl, a.replaceBy)
		if file == nil || a.replaceBy > size {
			return
		}
		detail = fmt.Sprintf("feature %d*32+%d", a.feature/32, a.feature%32)
		if a.not {
			detail = "no " + detail
		}
		copy(want, file)
		source = a.repl
	}
	b.add(TableAlternative, instr+b.delta, size, detail, func(now []byte) bool {
		return same(want, now, uint32(source-instr))
	})
}

// directCall is the call that an indirect one through a variable becomes, or
// nothing, where the function does nothing (alt_replace_call()); nil: it is no
// such call.
func (b *boot) directCall(ctx context.Context, a *alternative) []byte {
	file := b.image.at(a.instr, 6)
	if file == nil || file[0] != 0xff || file[1] != 0x15 {
		return nil
	}
	variable := a.instr + b.delta + 6 + uint64(int64(int32(binary.LittleEndian.Uint32(file[2:]))))
	target, err := b.k.Space.Pointer(ctx, variable)
	if err != nil {
		return nil
	}
	if at, ok := b.k.Image.Lookup("nop_func"); ok && at == target {
		return []byte{}
	}
	if target == 0 {
		if target, _ = b.k.Image.Lookup("BUG_func"); target == 0 {
			return nil
		}
	}
	distance := target - (a.instr + b.delta + 5)
	return binary.LittleEndian.AppendUint32([]byte{0xe8}, uint32(distance))
}

// same says whether code is what is wanted, as it becomes when it is copied:
// distances to places outside grow by moved, jumps that then fit into two bytes
// become so, and what does nothing may be written otherwise.
func same(want, now []byte, moved uint32) bool {
	for i := 0; i < len(want); {
		if want[i] == now[i] && nop(want[i:]) == 0 {
			i++
			continue
		}
		if n := idleRun(want[i:]); n > 0 && idle(now[i:i+n]) {
			i += n
			continue
		}
		if want[i] == now[i] {
			i++
			continue
		}
		if n := shortened(want[i:], now[i:], moved); n > 0 {
			i += n
			continue
		}
		n := movedBy(want, now, i, moved)
		if n == 0 {
			return false
		}
		i += n
	}
	return true
}

// idleRun is how many bytes at the start of code do nothing.
func idleRun(code []byte) int {
	n := 0
	for n < len(code) {
		step := nop(code[n:])
		if step == 0 {
			break
		}
		n += step
	}
	return n
}

// movedBy is how many bytes on from i a distance goes on that differs by moved,
// of four bytes around i; 0: there is none.
func movedBy(want, now []byte, i int, moved uint32) int {
	if moved == 0 {
		return 0
	}
	for start := max(0, i-3); start <= i; start++ {
		if start+4 > len(want) {
			break
		}
		if binary.LittleEndian.Uint32(want[start:])+moved == binary.LittleEndian.Uint32(now[start:]) {
			return start + 4 - i
		}
	}
	return 0
}

// shortened is 5 if a jump of five bytes became one of two to the same place,
// and breakpoints or nothing behind it; else 0.
func shortened(want, now []byte, moved uint32) int {
	if len(want) < 5 || want[0] != 0xe9 || now[0] != 0xeb {
		return 0
	}
	distance := binary.LittleEndian.Uint32(want[1:]) + moved + 3
	if uint32(int32(int8(now[1]))) != distance {
		return 0
	}
	for _, c := range now[2:5] {
		if c != 0xcc {
			if idle(now[2:5]) {
				break
			}
			return 0
		}
	}
	return 5
}
