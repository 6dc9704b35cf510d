// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"fmt"
)

// JumpSite is a struct jump_entry: a place in code that is a jump or not, as a
// static key says (include/linux/jump_label.h).
type JumpSite struct {
	Entry   uint64 `json:"entry"`   // address of the struct
	Address uint64 `json:"address"` // of the instruction
	Target  uint64 `json:"target"`  // of the jump
	Key     uint64 `json:"key"`     // address of the struct static_key
	Branch  bool   `json:"branch"`  // the jump is there while the key is off, instead of on
	Init    bool   `json:"init"`    // it was in code that is freed after boot
	On      bool   `json:"on"`      // the key is
	Module  string `json:"module,omitempty"`
}

// Jump says whether the jump is to be there.
func (s *JumpSite) Jump() bool { return s.On != s.Branch }

// maxJumpSites bounds the static-key sites of the kernel, or a module.
const maxJumpSites = 1 << 18

// The bits of jump_entry.key that are no address.
const (
	jumpEntryBranch = 1
	jumpEntryInit   = 2
)

// JumpSites reads the static-key sites of the kernel, then those of its
// modules, each in its table's order. What could be read is returned beside an
// error; each error names its object.
func (k *Kernel) JumpSites(ctx context.Context) ([]JumpSite, error) {
	k = k.View()
	entry, err := k.layout("jump_entry", "code", "target", "key")
	if err != nil {
		return nil, err
	}
	if f := entry.fields; !f[0].Signed || f[0].Size != 4 || !f[1].Signed || f[1].Size != 4 || !f[2].Signed {
		return nil, fmt.Errorf("struct jump_entry: its fields are no relative addresses: %w", ErrBadTypes)
	}
	key, err := k.layout("static_key", "enabled.counter")
	if err != nil {
		return nil, err
	}
	start, n, err := k.between("__start___jump_table", "__stop___jump_table", entry.size, maxJumpSites)
	if err != nil {
		return nil, err
	}
	w := jumpWalk{Kernel: k, entry: entry, key: key, on: map[uint64]bool{}}
	var errs problems
	errs.add(w.sites(ctx, "", start, n))
	modules, err := k.moduleTables(ctx, "jump_entries", "num_jump_entries")
	errs.add(err)
	for _, m := range modules {
		if m.n > maxJumpSites {
			errs.add(&ObjectError{"module " + m.name, m.at, fmt.Errorf("%d static-key sites", m.n)})
			continue
		}
		if err := w.sites(ctx, m.name, m.start, m.n); err != nil {
			errs.add(fmt.Errorf("module %s: %w", m.name, err))
		}
	}
	return w.found, errs.err()
}

type jumpWalk struct {
	*Kernel
	entry, key *layout
	on         map[uint64]bool // by key
	found      []JumpSite
}

func (w *jumpWalk) sites(ctx context.Context, module string, start, n uint64) error {
	return w.array(ctx, "jump_entry", start, w.entry.size, n, func(at uint64, p []byte) error {
		place := func(i int) uint64 { return at + uint64(w.entry.fields[i].Offset) }
		raw := w.entry.uint(p, 2)
		s := JumpSite{
			Entry:   at,
			Module:  module,
			Address: place(0) + w.entry.uint(p, 0),
			Target:  place(1) + w.entry.uint(p, 1),
			Key:     place(2) + raw&^(jumpEntryBranch|jumpEntryInit),
			Branch:  raw&jumpEntryBranch != 0,
			Init:    raw&jumpEntryInit != 0,
		}
		if !s.Init {
			on, ok := w.on[s.Key]
			if !ok {
				data := make([]byte, w.key.size)
				if err := w.fill(ctx, "static_key", s.Key, data); err != nil {
					return fmt.Errorf("jump_entry at %#x: %w", at, err)
				}
				// Less than 0 is a key that is being turned on.
				on = int32(w.key.uint(data, 0)) != 0
				w.on[s.Key] = on
			}
			s.On = on
		}
		w.found = append(w.found, s)
		return nil
	})
}

// JumpPatches says what must be at each static-key site: a jump or an
// instruction that does nothing, of two bytes where the jump is short
// (arch_jump_entry_size() in arch/x86/kernel/jump_label.c; before 5.14 always
// of five). Sites in code that was freed after boot are left out.
func (k *Kernel) JumpPatches(ctx context.Context, sites []JumpSite) ([]Patch, error) {
	nop, err := k.idealNop(ctx)
	nops := [][]byte{nop, nop2}
	short := k.shortJumps()
	patches := make([]Patch, 0, len(sites))
	for i := range sites {
		s := &sites[i]
		if s.Init {
			continue
		}
		p := Patch{Address: s.Address, Table: TableStaticKey, Object: s.Entry, Detail: "off"}
		near := branch8(s.Address, s.Target)
		switch {
		case s.Jump():
			p.Detail = fmt.Sprintf("jump to %#x", s.Target)
			for _, code := range [][]byte{branch(opcodeJmp32, s.Address, s.Target), near} {
				if code != nil && (short || len(code) == 5) {
					p.Want = append(p.Want, code)
				}
			}
		case near != nil && short:
			p.Want = nops
		default:
			p.Want = nops[:1]
		}
		patches = append(patches, p)
	}
	return patches, err
}

// shortJumps says whether the kernel knows jumps of two bytes at sites.
func (k *Kernel) shortJumps() bool {
	_, ok := k.Image.Lookup("arch_jump_entry_size")
	return ok
}
