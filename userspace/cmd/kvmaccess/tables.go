// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// tableJSON is a descriptor table for programs.
type tableJSON[T any] struct {
	VM        kvmaccess.VMID      `json:"vm"`
	Name      string              `json:"name"` // of the VM
	VCPU      uint32              `json:"vcpu"`
	Base      integrity.Hex       `json:"base"`
	Limit     uint16              `json:"limit"` // bytes - 1
	Condition kvmaccess.Condition `json:"condition"`
	Entries   []T                 `json:"entries"`
}

type gdtEntry struct {
	Index    int           `json:"index"` // selector >> 3
	Kind     string        `json:"kind"`
	Raw      integrity.Hex `json:"raw"`
	High     integrity.Hex `json:"high,omitempty"` // second half of a 16-byte descriptor
	Base     integrity.Hex `json:"base"`           // of a gate: its target
	Limit    uint32        `json:"limit"`
	DPL      uint8         `json:"dpl"`
	Present  bool          `json:"present"`
	Selector uint16        `json:"selector,omitempty"` // of a gate's target
	Symbol   string        `json:"symbol,omitempty"`   // of a gate's target
	text     string
}

type idtEntry struct {
	Vector   int           `json:"vector"`
	Name     string        `json:"name"`
	Kind     string        `json:"kind"`
	Raw      integrity.Hex `json:"raw"`
	High     integrity.Hex `json:"high,omitempty"`
	Handler  integrity.Hex `json:"handler"`
	Selector uint16        `json:"selector"`
	IST      uint8         `json:"ist"`
	DPL      uint8         `json:"dpl"`
	Present  bool          `json:"present"`
	Symbol   string        `json:"symbol,omitempty"`
}

// loadTable reads a table for a command of that name.
func (a *app) loadTable(ctx context.Context, src source, v vm, vcpu int, kind kvmaccess.TableKind) (kvmaccess.Table, bool, *guest.Image, error) {
	c, err := pickVCPU(ctx, src, v, vcpu)
	if err != nil {
		return kvmaccess.Table{}, false, nil, err
	}
	image, err := a.names(ctx, src, v)
	if err != nil {
		return kvmaccess.Table{}, false, nil, err
	}
	t, err := a.readTable(ctx, src, v, c, kind)
	if err != nil {
		return t, false, nil, fmt.Errorf("the %v of %s vCPU %d at %#x: %w", kind, v, c.ID, t.Base, err)
	}
	return t, guest.ModeOf(&c.Registers).Long(), image, nil
}

func (a *app) printTableHead(v vm, t kvmaccess.Table) {
	fmt.Fprintf(a.out, "%s vCPU %d: %v at %#x, limit %#x\n", printable(v.String()), t.VCPU, t.Kind, t.Base, t.Limit)
}

func (a *app) gdt() *cobra.Command {
	var vcpu int
	var all bool
	cmd := a.oneVM(&cobra.Command{
		Use:   "gdt",
		Short: "Show the global descriptor table of a guest's vCPU",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withVM(ctx, args[0], func(src source, v vm) error {
				t, long, image, err := a.loadTable(ctx, src, v, vcpu, kvmaccess.TableGDT)
				if err != nil {
					return err
				}
				out := tableJSON[gdtEntry]{VM: v.ID, Name: v.Name, VCPU: t.VCPU, Base: integrity.Hex(t.Base), Limit: t.Limit, Condition: t.Condition, Entries: []gdtEntry{}}
				for _, d := range guest.ParseGDT(t.Data, long) {
					if d.Raw == 0 && d.High == 0 && !all {
						continue
					}
					e := gdtEntry{Index: d.Index, Kind: d.Kind(), Raw: integrity.Hex(d.Raw), High: integrity.Hex(d.High), Base: integrity.Hex(d.Base),
						Limit: d.Limit, DPL: d.DPL, Present: d.Present, Selector: d.Selector, text: d.String()}
					if d.Gate() {
						e.Symbol = name(image, d.Base)
					}
					out.Entries = append(out.Entries, e)
				}
				if a.output == "json" {
					return a.json(out)
				}
				a.printTableHead(v, t)
				w := a.table("ENTRY", "SELECTOR", "RAW", "DESCRIPTOR", "SYMBOL")
				for _, e := range out.Entries {
					raw := fmt.Sprintf("%016x", uint64(e.Raw))
					if e.High != 0 {
						raw = fmt.Sprintf("%016x:%s", uint64(e.High), raw)
					}
					w.row(e.Index, fmt.Sprintf("%#04x", e.Index<<3), raw, e.text, dash(e.Symbol))
				}
				return w.flush()
			})
		},
	})
	vcpuFlag(cmd, &vcpu, "of this vCPU (default the first)")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "unused entries, too")
	return cmd
}

func (a *app) idt() *cobra.Command {
	var vcpu int
	var all bool
	cmd := a.oneVM(&cobra.Command{
		Use:   "idt",
		Short: "Show the interrupt descriptor table of a guest's vCPU",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withVM(ctx, args[0], func(src source, v vm) error {
				t, long, image, err := a.loadTable(ctx, src, v, vcpu, kvmaccess.TableIDT)
				if err != nil {
					return err
				}
				out := tableJSON[idtEntry]{VM: v.ID, Name: v.Name, VCPU: t.VCPU, Base: integrity.Hex(t.Base), Limit: t.Limit, Condition: t.Condition, Entries: []idtEntry{}}
				for _, g := range guest.ParseIDT(t.Data, long) {
					if g.Raw == 0 && g.High == 0 && !all {
						continue
					}
					out.Entries = append(out.Entries, idtEntry{Vector: g.Vector, Name: guest.VectorName(g.Vector), Kind: g.Kind(),
						Raw: integrity.Hex(g.Raw), High: integrity.Hex(g.High), Handler: integrity.Hex(g.Handler), Selector: g.Selector, IST: g.IST,
						DPL: g.DPL, Present: g.Present, Symbol: name(image, g.Handler)})
				}
				if a.output == "json" {
					return a.json(out)
				}
				a.printTableHead(v, t)
				w := a.table("VECTOR", "NAME", "GATE", "HANDLER", "CS", "DPL", "IST", "SYMBOL")
				for _, e := range out.Entries {
					kind := e.Kind
					if !e.Present {
						kind += ", not present"
					}
					w.row(e.Vector, e.Name, kind, fmt.Sprintf("%016x", uint64(e.Handler)), fmt.Sprintf("%#04x", e.Selector), e.DPL, e.IST, dash(e.Symbol))
				}
				return w.flush()
			})
		},
	})
	vcpuFlag(cmd, &vcpu, "of this vCPU (default the first)")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "unused vectors, too")
	return cmd
}
