// SPDX-License-Identifier: MIT

package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

type syscallEntry struct {
	Table   string        `json:"table"`
	Number  int           `json:"number"`
	Name    string        `json:"name,omitempty"`
	Handler integrity.Hex `json:"handler"`
	Symbol  string        `json:"symbol,omitempty"`
	Module  string        `json:"module,omitempty"`
	Fault   string        `json:"fault,omitempty"` // why an honest kernel does not have it
}

func (a *app) syscalls() *cobra.Command {
	var ia32 bool
	cmd := a.oneVM(&cobra.Command{
		Use:   "syscalls",
		Short: "Show the system call table of a guest",
		Long:  `Show the system call table of a guest: number, name, handler and its symbol.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withVM(ctx, args[0], func(src source, v vm) error {
				image, err := a.image(ctx, src, v, guest.AttachOptions{})
				if err != nil {
					return err
				}
				c, err := pickVCPU(ctx, src, v, -1)
				if err != nil {
					return err
				}
				g := &integrity.Guest{VM: v.integrity(), Mode: guest.ModeOf(&c.Registers), Image: image, Text: image.Text(), Linux: true, CPUs: []*kvmaccess.VCPU{&c}}
				list := []syscallEntry{}
				for _, o := range (integrity.SyscallCheck{}).Objects(g) {
					if o.Name != "sys_call_table" && !ia32 {
						continue
					}
					data := make([]byte, o.Memory.Length)
					if err := readKernel(ctx, src, v, c, o.Memory.Address, data); err != nil {
						return fmt.Errorf("%s of %s at %#x: %w", o.Name, v, o.Memory.Address, err)
					}
					for _, it := range o.Items(g, &c, data, nil) {
						e := syscallEntry{Table: o.Name, Name: it.Name, Handler: it.Value.Value, Symbol: it.Value.Symbol, Module: it.Value.Module, Fault: it.Fault}
						if it.Entry != nil {
							e.Number = *it.Entry
						}
						list = append(list, e)
					}
				}
				if len(list) == 0 {
					return fmt.Errorf("the kernel of %s has no symbol sys_call_table", v)
				}
				if a.output == "json" {
					return a.json(list)
				}
				head := []any{"NUMBER", "NAME", "HANDLER", "SYMBOL"}
				faults := slices.ContainsFunc(list, func(e syscallEntry) bool { return e.Fault != "" })
				if faults {
					head = append(head, "FAULT")
				}
				if ia32 {
					head = append([]any{"TABLE"}, head...)
				}
				w := a.table(head...)
				for _, e := range list {
					symbol := e.Symbol
					if e.Module != "" {
						symbol += " [" + e.Module + "]"
					}
					row := []any{e.Number, dash(e.Name), fmt.Sprintf("%016x", uint64(e.Handler)), dash(symbol)}
					if faults {
						row = append(row, dash(e.Fault))
					}
					if ia32 {
						row = append([]any{e.Table}, row...)
					}
					w.row(row...)
				}
				return w.flush()
			})
		},
	})
	cmd.Flags().BoolVar(&ia32, "ia32", false, "the table of 32-bit programs, too")
	return cmd
}
