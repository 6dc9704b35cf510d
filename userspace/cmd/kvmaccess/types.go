// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

type fieldJSON struct {
	Name      string `json:"name"` // STRUCT.FIELD
	Type      string `json:"type"`
	Offset    uint32 `json:"offset"` // bytes
	Size      uint32 `json:"size"`   // bytes
	BitOffset uint32 `json:"bit_offset,omitempty"`
	BitSize   uint32 `json:"bit_size,omitempty"`
}

type typeJSON struct {
	Name        string `json:"name"`
	Module      string `json:"module,omitempty"` // that declares it; empty: the kernel
	Declaration string `json:"declaration"`      // in C, offsets and sizes in comments
}

func (a *app) types() *cobra.Command {
	return a.ofKernel(&cobra.Command{
		Use:   "types",
		Short: "Show a type of a guest's kernel",
		Long: `Show a struct, union, enum or typedef of a guest's kernel, or of one of its
modules, as its own BTF has it, with offsets and sizes in bytes; of STRUCT.FIELD
(and deeper) that field.`,
		Example: `  kvmaccess types web1 task_struct
  kvmaccess types --dump core.elf task_struct.se.vruntime`,
	}, guest.AttachOptions{}, func(ctx context.Context, t *target, k *guest.Kernel, args []string) error {
		if k.Types == nil {
			return fmt.Errorf("%s: its kernel has no types: %w", t, k.TypesErr)
		}
		a.doubts(k)
		name, path, isField := strings.Cut(args[0], ".")
		types, module, err := k.FindTypes(ctx, name)
		switch {
		case gone(err):
			return err
		case err != nil:
			return &kernelError{t.String(), "", err}
		}
		if !isField {
			text, err := types.Declaration(name)
			if err != nil {
				return fmt.Errorf("%s: %w", t, err)
			}
			if a.output == "json" {
				return a.json(typeJSON{name, module, text})
			}
			_, err = io.WriteString(a.out, strings.TrimRight(text, "\n")+"\n")
			return err
		}
		s, err := types.Struct(name)
		if err != nil {
			return fmt.Errorf("%s: %w", t, err)
		}
		f, err := s.Field(path)
		if err != nil {
			return fmt.Errorf("%s: %w", t, err)
		}
		if a.output == "json" {
			return a.json(fieldJSON{args[0], f.Type(), f.Offset, f.Size, f.BitOffset, f.BitSize})
		}
		w := a.table("FIELD", "TYPE", "OFFSET", "SIZE", "BITS")
		bits := "-"
		if f.BitSize != 0 {
			bits = fmt.Sprintf("%d at %d", f.BitSize, f.BitOffset)
		}
		w.row(args[0], f.Type(), f.Offset, f.Size, bits)
		return w.flush()
	}, "NAME")
}
