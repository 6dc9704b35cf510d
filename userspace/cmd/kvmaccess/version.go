// SPDX-License-Identifier: MIT

package main

import (
	"fmt"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

type versionJSON struct {
	Program     string          `json:"program"`
	Module      *kvmaccess.Info `json:"module"`                 // null: it cannot be asked
	ModuleError string          `json:"module_error,omitempty"` // why not
}

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the versions of program and module, and what works on this host",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versionJSON{Program: programVersion()}
			err := a.withModule(func(src source) error {
				info, err := src.Info(cmd.Context())
				if err == nil {
					v.Module = &info
				}
				return err
			})
			if err != nil {
				v.ModuleError = explain(err)
			}
			if a.output == "json" {
				return a.json(v)
			}
			fmt.Fprintf(a.out, "kvmaccess %s\n", v.Program)
			if v.Module == nil {
				_, err := fmt.Fprintf(a.out, "module: %s\n", v.ModuleError)
				return err
			}
			i := v.Module
			fmt.Fprintf(a.out, "module %s, %v host, works: %s; %d ranges and %s a request\n",
				i.Version, i.Vendor, dash(i.Caps.String()), i.MaxRanges, bytesText(uint64(i.MaxBytes)))
			if len(i.Missing) > 0 {
				fmt.Fprintf(a.out, "missing in this kernel: %s\n", strings.Join(i.Missing, ", "))
			}
			return nil
		},
	}
}

func programVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
