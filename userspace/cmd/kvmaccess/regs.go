// SPDX-License-Identifier: MIT

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// vcpuJSON is a vCPU for programs.
type vcpuJSON struct {
	VM        kvmaccess.VMID      `json:"vm"`
	Name      string              `json:"name"` // of the VM
	ID        uint32              `json:"id"`
	TID       int                 `json:"tid"`
	Condition kvmaccess.Condition `json:"condition"`
	Method    kvmaccess.Method    `json:"method"`
	CPU       int                 `json:"cpu"`      // -1: none
	Time      int64               `json:"time"`     // ns of CLOCK_MONOTONIC
	Duration  int64               `json:"duration"` // ns
	Handler   int64               `json:"handler"`  // ns
	Retries   int                 `json:"retries"`
	Flags     kvmaccess.VCPUFlags `json:"flags"`
	CPL       int                 `json:"cpl"`
	Registers hexed               `json:"registers"`
	Symbols   map[string]string   `json:"symbols,omitempty"` // by register
}

func (a *app) regs() *cobra.Command {
	var vcpu int
	cmd := a.oneVM(&cobra.Command{
		Use:   "regs",
		Short: "Show the registers of a guest's vCPUs",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withVM(ctx, args[0], func(src source, v vm) error {
				image, err := a.names(ctx, src, v)
				if err != nil {
					return err
				}
				var vcpus []kvmaccess.VCPU
				if vcpu >= 0 {
					c, err := pickVCPU(ctx, src, v, vcpu)
					if err != nil {
						return err
					}
					vcpus = append(vcpus, c)
				} else if vcpus, err = src.VCPUs(ctx, v.ID); err != nil {
					return err
				}
				if a.output == "json" {
					list := make([]vcpuJSON, len(vcpus))
					for i, c := range vcpus {
						list[i] = newVCPUJSON(v, c, image)
					}
					return a.json(list)
				}
				for i, c := range vcpus {
					if i > 0 {
						fmt.Fprintln(a.out)
					}
					if err := a.printVCPU(v, c, image); err != nil {
						return err
					}
				}
				return nil
			})
		},
	})
	vcpuFlag(cmd, &vcpu, "only this vCPU (default all)")
	return cmd
}

func vcpuFlag(cmd *cobra.Command, vcpu *int, usage string) {
	*vcpu = -1
	cmd.Flags().Var(&vcpuValue{vcpu}, "vcpu", usage)
	_ = cmd.RegisterFlagCompletionFunc("vcpu", cobra.NoFileCompletions)
}

// vcpuValue is the number of a vCPU.
type vcpuValue struct{ v *int }

func (f *vcpuValue) Type() string { return "number" }

func (f *vcpuValue) String() string {
	if f.v == nil || *f.v < 0 {
		return ""
	}
	return fmt.Sprint(*f.v)
}

func (f *vcpuValue) Set(s string) error {
	n, err := parseNumber(s, 1<<31-1)
	if err != nil {
		return err
	}
	*f.v = int(n)
	return nil
}

// entries are the registers that hold addresses of code.
func entries(r *kvmaccess.Registers) []struct {
	name  string
	value uint64
} {
	return []struct {
		name  string
		value uint64
	}{
		{"rip", r.RIP}, {"lstar", r.LSTAR}, {"cstar", r.CSTAR}, {"sysenter_eip", r.SysenterEIP},
	}
}

func newVCPUJSON(v vm, c kvmaccess.VCPU, image *guest.Image) vcpuJSON {
	j := vcpuJSON{
		VM: c.VM, Name: v.Name, ID: c.ID, TID: c.TID, Condition: c.Condition, Method: c.Method, CPU: c.CPU,
		Time: c.Time.Nanoseconds(), Duration: c.Duration.Nanoseconds(), Handler: c.Handler.Nanoseconds(),
		Retries: c.Retries, Flags: c.Flags, CPL: c.CPL, Registers: hexed{c.Registers},
	}
	for _, e := range entries(&c.Registers) {
		if s := name(image, e.value); s != "" {
			if j.Symbols == nil {
				j.Symbols = map[string]string{}
			}
			j.Symbols[e.name] = s
		}
	}
	return j
}

func (a *app) printVCPU(v vm, c kvmaccess.VCPU, image *guest.Image) error {
	where := "on no CPU yet"
	if c.CPU >= 0 {
		where = fmt.Sprintf("CPU %d", c.CPU)
	}
	flags := ""
	if c.Flags != 0 {
		flags = ", " + c.Flags.String()
	}
	fmt.Fprintf(a.out, "%s vCPU %d: %s%s, CPL %d, thread %d, %s; captured by %s in %v\n",
		printable(v.String()), c.ID, c.Condition, flags, c.CPL, c.TID, where, c.Method, c.Duration)

	t := a.table()
	grid := func(cells ...any) {
		row := []any{""}
		for i := 0; i < len(cells); i += 2 {
			row = append(row, fmt.Sprintf("%-6s %016x", cells[i], cells[i+1]))
		}
		t.row(row...)
	}
	grid("RAX", c.RAX, "RBX", c.RBX, "RCX", c.RCX, "RDX", c.RDX)
	grid("RSI", c.RSI, "RDI", c.RDI, "RBP", c.RBP, "RSP", c.RSP)
	grid("R8", c.R8, "R9", c.R9, "R10", c.R10, "R11", c.R11)
	grid("R12", c.R12, "R13", c.R13, "R14", c.R14, "R15", c.R15)
	grid("DR0", c.DR0, "DR1", c.DR1, "DR2", c.DR2, "DR3", c.DR3)
	grid("DR6", c.DR6, "DR7", c.DR7, "CR2", c.CR2, "CR3", c.CR3)
	if err := t.flush(); err != nil {
		return err
	}

	t = a.table()
	one := func(name string, value uint64, note string) {
		t.row("", name, fmt.Sprintf("%016x", value), note)
	}
	one("RIP", c.RIP, name(image, c.RIP))
	one("RFLAGS", c.RFLAGS, bits(c.RFLAGS, rflagsBits))
	one("CR0", c.CR0, bits(c.CR0, cr0Bits))
	one("CR4", c.CR4, bits(c.CR4, cr4Bits))
	one("CR8", c.CR8, "")
	one("EFER", c.EFER, bits(c.EFER, eferBits))
	one("STAR", c.STAR, "")
	one("LSTAR", c.LSTAR, name(image, c.LSTAR))
	one("CSTAR", c.CSTAR, name(image, c.CSTAR))
	one("SFMASK", c.SFMASK, bits(c.SFMASK, rflagsBits))
	one("SYSENTER_CS", c.SysenterCS, "")
	one("SYSENTER_ESP", c.SysenterESP, "")
	one("SYSENTER_EIP", c.SysenterEIP, name(image, c.SysenterEIP))
	one("KERNEL_GS_BASE", c.KernelGSBase, "")
	one("PAT", c.PAT, "")
	if err := t.flush(); err != nil {
		return err
	}

	t = a.table("", "SEGMENT", "SELECTOR", "BASE", "LIMIT", "ATTRIBUTES")
	for _, s := range []struct {
		name string
		kvmaccess.Segment
	}{{"CS", c.CS}, {"DS", c.DS}, {"ES", c.ES}, {"FS", c.FS}, {"GS", c.GS}, {"SS", c.SS}, {"TR", c.TR}, {"LDTR", c.LDTR}} {
		t.row("", s.name, fmt.Sprintf("%04x", s.Selector), fmt.Sprintf("%016x", s.Base), fmt.Sprintf("%08x", s.Limit), attributes(s.Attrs))
	}
	for _, r := range []struct {
		name string
		kvmaccess.TableRegister
	}{{"GDTR", c.GDTR}, {"IDTR", c.IDTR}} {
		t.row("", r.name, "", fmt.Sprintf("%016x", r.Base), fmt.Sprintf("%08x", r.Limit), "")
	}
	return t.flush()
}

// bit is a flag of a register.
type bit struct {
	n    int
	name string
}

// Flags of registers (Intel SDM vol. 3, 2.3 and 2.5; AMD APM vol. 2, 3.1).
var (
	rflagsBits = []bit{{0, "CF"}, {2, "PF"}, {4, "AF"}, {6, "ZF"}, {7, "SF"}, {8, "TF"}, {9, "IF"}, {10, "DF"}, {11, "OF"},
		{14, "NT"}, {16, "RF"}, {17, "VM"}, {18, "AC"}, {19, "VIF"}, {20, "VIP"}, {21, "ID"}}
	cr0Bits = []bit{{0, "PE"}, {1, "MP"}, {2, "EM"}, {3, "TS"}, {4, "ET"}, {5, "NE"}, {16, "WP"}, {18, "AM"}, {29, "NW"}, {30, "CD"}, {31, "PG"}}
	cr4Bits = []bit{{0, "VME"}, {1, "PVI"}, {2, "TSD"}, {3, "DE"}, {4, "PSE"}, {5, "PAE"}, {6, "MCE"}, {7, "PGE"}, {8, "PCE"},
		{9, "OSFXSR"}, {10, "OSXMMEXCPT"}, {11, "UMIP"}, {12, "LA57"}, {13, "VMXE"}, {16, "FSGSBASE"}, {17, "PCIDE"}, {18, "OSXSAVE"},
		{20, "SMEP"}, {21, "SMAP"}, {22, "PKE"}, {23, "CET"}, {24, "PKS"}}
	eferBits = []bit{{0, "SCE"}, {8, "LME"}, {10, "LMA"}, {11, "NXE"}, {12, "SVME"}, {13, "LMSLE"}, {14, "FFXSR"}, {15, "TCE"}}
)

func bits(v uint64, names []bit) string {
	var words []string
	for _, b := range names {
		if v&(1<<b.n) != 0 {
			words = append(words, b.name)
		}
	}
	return strings.Join(words, " ")
}

// attributes decodes access rights as in a VMCS.
func attributes(v uint32) string {
	if v&(1<<16) != 0 {
		return "unusable"
	}
	words := []string{fmt.Sprintf("type %x", v&15)}
	if v&(1<<4) == 0 {
		words = append(words, "system")
	} else if v&(1<<3) != 0 {
		words = append(words, "code")
	} else {
		words = append(words, "data")
	}
	words = append(words, fmt.Sprintf("DPL %d", v>>5&3))
	for _, b := range []bit{{7, "P"}, {12, "AVL"}, {13, "L"}, {14, "DB"}, {15, "G"}} {
		if v&(1<<b.n) != 0 {
			words = append(words, b.name)
		}
	}
	return strings.Join(words, " ")
}
