// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// FuzzMonitor lets a hostile guest change its memory and registers under a
// Monitor: whatever it does, there is no panic, what is read stays bounded,
// each finding is well formed, and the baseline can be stored.
func FuzzMonitor(f *testing.F) {
	f.Add(true, true, uint64(1), []byte{0, 1, 2, 3})
	f.Add(true, false, uint64(2), []byte{0x10, 0xff, 0x20, 0x80, 0x33})
	f.Add(false, true, uint64(3), []byte{0x11, 0x22, 0x44, 0x55, 0x66, 0x77})
	f.Add(false, false, uint64(4), []byte{0xff, 0xfe, 0xfd})
	f.Fuzz(func(t *testing.T, long, symbols bool, seed uint64, script []byte) {
		w := made(t, long, 0x400000, 2)
		opts := Options{Settle: -1, Ranges: entryRange, MaxFindings: 50}
		if symbols {
			opts.Symbols = w.symbols
		}
		m := w.monitor(opts)
		rnd := rand.New(rand.NewPCG(seed, 1))
		if len(script) > 64 {
			script = script[:64]
		}
		w.tick(m)
		for _, b := range script {
			w.spoil(rnd, b)
			found := w.tick(m)
			if len(found) > 50 {
				t.Fatalf("%d findings at once", len(found))
			}
			for _, f := range found {
				if f.Message == "" || f.Key() == "" || f.Kind == "" {
					t.Fatalf("%+v", f)
				}
			}
			if s := m.Status(); s.Bytes > 2*(4096+maxGDT)+8*maxSyscalls+4096 {
				t.Fatalf("%d bytes a tick", s.Bytes)
			}
		}
		b := m.Baseline()
		text, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		var back Baseline
		if err := json.Unmarshal(text, &back); err != nil {
			t.Fatal(err)
		}
		if b.Version != 0 {
			opts.Baseline = &back
			w.tick(w.monitor(opts))
		}
	})
}

// spoil changes the guest as one byte says.
func (w *world) spoil(rnd *rand.Rand, b byte) {
	v := &w.CPUs[int(b)%len(w.CPUs)]
	value := rnd.Uint64()
	switch b >> 4 & 3 { // near to honest values, too
	case 1:
		value = 0xffffffff80000000 | value&0xffffffff
	case 2:
		value = value & 0xffff
	case 3:
		value = entryArea + value&0xffff
	}
	switch b & 15 {
	case 0:
		v.LSTAR = value
	case 1:
		v.IDTR = kvmaccess.TableRegister{Base: value, Limit: uint16(rnd.Uint64())}
	case 2:
		v.GDTR = kvmaccess.TableRegister{Base: value, Limit: uint16(rnd.Uint64())}
	case 3:
		v.CR0 = value
	case 4:
		v.CR4 = value
	case 5:
		v.EFER = value
	case 6:
		v.CR3 = value
	case 7:
		v.TR = kvmaccess.Segment{Selector: uint16(value), Base: value}
	case 8:
		v.CSTAR, v.SysenterEIP, v.SysenterCS = value, value>>1, value>>2
	case 9:
		v.CPL, v.GS.Base, v.KernelGSBase = int(value&3), value, value>>3
	case 10:
		v.Flags, v.Condition = kvmaccess.VCPUFlags(value&7), kvmaccess.Condition(value%7)
	default: // some of memory
		for frame := range w.pages {
			if rnd.IntN(8) != 0 {
				continue
			}
			var p [8]byte
			binary.LittleEndian.PutUint64(p[:], value)
			w.pages.WritePhysical(frame+uint64(rnd.IntN(511)*8), p[:])
			if b&15 == 15 {
				delete(w.pages, frame)
			}
			break
		}
	}
}

// FuzzBaseline: a damaged baseline is refused or used, never a panic.
func FuzzBaseline(f *testing.F) {
	w := made(f, true, 0, 1)
	m := w.monitor(Options{Symbols: w.symbols})
	w.tick(m)
	b := m.Baseline()
	b.Items = b.Items[:40]
	text, err := json.Marshal(b)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"version":1,"items":[{"check":"idt","object":"idt","entry":14,"value":{"value":"0x10"}}]}`))
	f.Add([]byte(`{"version":1,"open":[{"item":{"check":"memory","object":"x"}}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var b Baseline
		if json.Unmarshal(text, &b) != nil {
			return
		}
		w := made(t, true, 0x200000, 1)
		m, err := NewMonitor(w, VM{ID: 7}, Options{Symbols: w.symbols, Baseline: &b, Ranges: entryRange})
		if err != nil {
			return
		}
		if _, err := m.Attach(context.Background()); err != nil {
			t.Fatal(err)
		}
		w.put(w.at("sys_call_table"), 1)
		w.tick(m)
	})
}

var _ Source = (*kvmaccess.Client)(nil)
var _ Source = (*guest.Machine)(nil)
