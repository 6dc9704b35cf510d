// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// vm is a VM with what its VMM's command line says.
type vm struct {
	kvmaccess.VM
	Name string `json:"name"`
	UUID string `json:"uuid"`
	Comm string `json:"comm"` // of the VMM
}

// String names the VM in messages.
func (v vm) String() string { return v.integrity().String() }

func (v vm) integrity() integrity.VM {
	return integrity.VM{ID: v.ID, Name: v.Name, UUID: v.UUID, PID: v.PID}
}

func (a *app) vms() *cobra.Command {
	return &cobra.Command{
		Use:   "vms",
		Short: "List the guests",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withModule(func(src source) error {
				vms, err := a.listVMs(cmd.Context(), src)
				if err != nil {
					return err
				}
				if a.output == "json" {
					return a.json(vms)
				}
				if len(vms) == 0 {
					fmt.Fprintln(a.err, "no KVM guest runs on this host")
					return nil
				}
				t := a.table("ID", "NAME", "UUID", "PID", "VMM", "VCPUS", "MEMORY", "MEMSLOTS", "FLAGS")
				for _, v := range vms {
					t.row(v.ID, dash(v.Name), dash(v.UUID), v.PID, dash(v.Comm), v.VCPUs, bytesText(v.Memory), v.Memslots, dash(v.Flags.String()))
				}
				return t.flush()
			})
		},
	}
}

// listVMs lists the VMs by id.
func (a *app) listVMs(ctx context.Context, src source) ([]vm, error) {
	list, err := src.VMs(ctx)
	if err != nil {
		return nil, err
	}
	vms := make([]vm, 0, len(list))
	for _, v := range list {
		vmm, err := a.identify(v.PID)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		// A VMM that has just ended has no name any more.
		vms = append(vms, vm{VM: v, Name: vmm.Name, UUID: vmm.UUID, Comm: vmm.Comm})
	}
	return vms, nil
}

// findVM finds the VM that arg names: by id (also as #ID), name, UUID or the
// beginning of a UUID. The error lists what there is.
func (a *app) findVM(ctx context.Context, src source, arg string) (vm, error) {
	vms, err := a.listVMs(ctx, src)
	if err != nil {
		return vm{}, err
	}
	match := matchVMs(vms, arg)
	switch {
	case len(match) == 1:
		return match[0], nil
	case len(vms) == 0:
		return vm{}, fmt.Errorf("there is no guest %q: no KVM guest runs on this host", arg)
	case len(match) == 0:
		return vm{}, fmt.Errorf("there is no guest %q; there are:\n%s", arg, describe(vms))
	}
	return vm{}, fmt.Errorf("%q may be any of these; name one by #ID or UUID:\n%s", arg, describe(match))
}

// uuidPrefix is how much of a UUID must be given.
const uuidPrefix = 4

func matchVMs(vms []vm, arg string) []vm {
	var exact, prefix []vm
	id, onlyID := strings.CutPrefix(arg, "#")
	n, err := strconv.ParseUint(id, 10, 64)
	for _, v := range vms {
		switch {
		case err == nil && v.ID == kvmaccess.VMID(n),
			!onlyID && arg != "" && v.Name == arg,
			!onlyID && arg != "" && strings.EqualFold(v.UUID, arg):
			exact = append(exact, v)
		case len(arg) >= uuidPrefix && strings.HasPrefix(v.UUID, strings.ToLower(arg)):
			prefix = append(prefix, v)
		}
	}
	if len(exact) > 0 {
		return exact
	}
	return prefix
}

func describe(vms []vm) string {
	var sb strings.Builder
	for _, v := range vms {
		fmt.Fprintf(&sb, "  #%d", v.ID)
		if v.Name != "" {
			fmt.Fprintf(&sb, "  %s", v.Name)
		}
		if v.UUID != "" {
			fmt.Fprintf(&sb, "  %s", v.UUID)
		}
		fmt.Fprintf(&sb, "  (%s, process %d)\n", dash(v.Comm), v.PID)
	}
	return strings.TrimRight(sb.String(), "\n")
}

// completeVMs offers names, or ids of VMs without one that is unique.
func (a *app) completeVMs(ctx context.Context) ([]string, cobra.ShellCompDirective) {
	if ctx == nil {
		ctx = context.Background()
	}
	var words []string
	err := a.withModule(func(src source) error {
		vms, err := a.listVMs(ctx, src)
		if err != nil {
			return err
		}
		for _, v := range vms {
			word := v.Name
			if word == "" || len(matchVMs(vms, word)) > 1 || strings.ContainsAny(word, "\t\n") {
				word = strconv.FormatUint(uint64(v.ID), 10)
			}
			words = append(words, fmt.Sprintf("%s\tid %d, %s, %s", word, v.ID, plural(v.VCPUs, "vCPU"), bytesText(v.Memory)))
		}
		return nil
	})
	if err != nil {
		return cobra.AppendActiveHelp(nil, explain(err)), cobra.ShellCompDirectiveNoFileComp
	}
	return words, cobra.ShellCompDirectiveNoFileComp
}
