// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"fmt"
	"math"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

type symbolJSON struct {
	Address integrity.Hex `json:"address"`
	Type    string        `json:"type"` // as nm(1) has it
	Name    string        `json:"name"`
	Module  string        `json:"module,omitempty"`
	Offset  uint64        `json:"offset,omitempty"` // how far behind the symbol ADDR is
}

func (a *app) symbolsOf() *cobra.Command {
	return a.ofKernel(&cobra.Command{
		Use:   "symbols",
		Short: "Show symbols of a guest's kernel",
		Long: `Show the symbols of a guest's kernel and its modules out of its memory, where
they are now: all, those of a NAME, or those at or before an ADDRess.`,
		Example: `  kvmaccess symbols web1 sys_call_table
  kvmaccess symbols web1 0xffffffff81000123
  kvmaccess symbols --dump core.elf`,
	}, guest.AttachOptions{}, func(ctx context.Context, t *target, k *guest.Kernel, args []string) error {
		list := []symbolJSON{}
		add := func(s guest.Symbol, offset uint64) {
			list = append(list, symbolJSON{integrity.Hex(s.Address), string(s.Type), s.Name, s.Module, offset})
		}
		switch {
		case len(args) == 0:
			for s := range k.Image.All() {
				add(s, 0)
			}
		default:
			addr, err := parseNumber(args[0], math.MaxUint64)
			if err == nil {
				all, offset := k.Image.At(addr)
				if len(all) == 0 {
					return fmt.Errorf("%s: no symbol lies at or shortly before %#x", t, addr)
				}
				for _, s := range all {
					s.Address = addr - offset
					add(s, offset)
				}
				break
			}
			for s := range k.Image.All() {
				if s.Name == args[0] {
					add(s, 0)
				}
			}
			if len(list) == 0 {
				return fmt.Errorf("%s: its kernel has no symbol %q", t, args[0])
			}
		}
		a.doubts(k)
		if a.output == "json" {
			return a.json(list)
		}
		w := a.table("ADDRESS", "TYPE", "NAME", "MODULE")
		for _, s := range list {
			name := s.Name
			if s.Offset != 0 {
				name = fmt.Sprintf("%s+%#x", name, s.Offset)
			}
			w.row(fmt.Sprintf("%016x", uint64(s.Address)), s.Type, name, dash(s.Module))
		}
		return w.flush()
	}, "[NAME|ADDR]")
}
