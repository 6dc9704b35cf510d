// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

func (a *app) modules() *cobra.Command {
	return a.ofKernel(&cobra.Command{
		Use:   "modules",
		Short: "Show the kernel modules of a guest",
		Long: `Show the modules that a guest's kernel has loaded, by the kernel's list of them,
as lsmod in the guest does.`,
	}, guest.AttachOptions{}, func(ctx context.Context, t *target, k *guest.Kernel, _ []string) error {
		modules, failed := k.Modules(ctx)
		if failed != nil && len(modules) == 0 {
			return &kernelError{t.String(), "", failed}
		}
		a.doubts(k)
		if err := a.printModules(modules); err != nil {
			return err
		}
		if failed != nil {
			return &kernelError{t.String(), "the list of modules goes on, but", failed}
		}
		return nil
	})
}

func (a *app) printModules(modules []guest.Module) error {
	if a.output == "json" {
		return a.json(hexed{modules})
	}
	w := a.table("NAME", "SIZE", "STATE", "ADDRESS", "USED", "BY")
	for _, m := range modules {
		by := strings.Join(m.Users, ",")
		if m.Exitless {
			by = strings.TrimPrefix(by+",[permanent]", ",")
		}
		w.row(m.Name, m.Size, m.State, fmt.Sprintf("%016x", m.Base), m.Refcount, dash(by))
	}
	return w.flush()
}
