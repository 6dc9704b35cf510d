// SPDX-License-Identifier: MIT

// Record makes this folder's test data of a live guest: NAME.snapshot with all
// that a Monitor looks at, with and without symbols, and NAME.kallsyms.gz with
// the symbols that it looks up, out of a copy of the guest's /proc/kallsyms
// taken as root. The kernel module must be loaded:
//
//	go run ./userspace/integrity/testdata/record -vm 1 -symbols kallsyms -note "Debian 12, linux-image-6.1.0-56-cloud-amd64" -o debian12
package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

func main() {
	id := flag.Uint64("vm", 1, "id of the VM")
	symbols := flag.String("symbols", "", "copy of the guest's /proc/kallsyms")
	note := flag.String("note", "", "what guest it is")
	out := flag.String("o", "", "name of the files to write, without endings")
	flag.Parse()
	if *symbols == "" || *out == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(kvmaccess.VMID(*id), *symbols, *note, *out); err != nil {
		log.Fatal(err)
	}
}

func run(id kvmaccess.VMID, symbols, note, out string) error {
	ctx := context.Background()
	client, err := kvmaccess.New()
	if err != nil {
		return err
	}
	defer client.Close()
	vm, err := client.VM(ctx, id)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(symbols)
	if err != nil {
		return err
	}
	s, err := guest.ParseSymbols(strings.NewReader(string(text)))
	if err != nil {
		return fmt.Errorf("%s: %w", symbols, err)
	}
	ranges := []integrity.MemoryRange{{Symbol: "entry_SYSCALL_64", Length: 4096}}
	snapshot := &guest.Snapshot{VM: vm, Pages: guest.Pages{}}
	if snapshot.CPUs, err = client.VCPUs(ctx, id); err != nil {
		return err
	}
	for _, symbols := range []*guest.Symbols{s, nil} {
		for _, half := range []uint64{0, userHalf} {
			next, err := integrity.Record(ctx, states{client, snapshot.CPUs, half}, vm, integrity.Options{Ranges: ranges, Symbols: symbols})
			if err != nil && half == 0 {
				return err
			} else if err != nil {
				continue // the guest has no page-table isolation
			}
			for frame, page := range next.Pages {
				snapshot.Pages[frame] = page
			}
		}
	}
	snapshot.Notes = map[string]string{"guest": note, "recorder": "userspace/integrity/testdata/record"}
	f, err := os.Create(out + ".snapshot")
	if err != nil {
		return err
	}
	if err := snapshot.Write(f); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return trim(string(text), out+".kallsyms.gz")
}

// userHalf is the bit of CR3 with which a program's page tables are used under
// page-table isolation.
const userHalf = 1 << 12

// states is a client that gives the vCPUs' states of one instant again, in
// the kernel's or in a program's page tables.
type states struct {
	integrity.Source
	cpus []kvmaccess.VCPU
	half uint64
}

func (s states) VCPUs(context.Context, kvmaccess.VMID) ([]kvmaccess.VCPU, error) {
	cpus := slices.Clone(s.cpus)
	for i := range cpus {
		c := &cpus[i]
		c.CR3 |= s.half
		if s.half != 0 && c.CPL == 0 {
			c.CPL, c.KernelGSBase, c.GS.Base = 3, c.GS.Base, c.KernelGSBase
		}
	}
	return cpus, nil
}

// wanted are the symbols that checks look up.
var wanted = regexp.MustCompile(`^(__x64_sys_|asm_|entry_SY|entry_INT|ignore_sysret$|early_idt_handler_array$|irq_entries_start$|spurious_entries_start$|(_text|_stext|_etext|_end)$|(ia32_)?sys_call_table$|gdt_page$|init_top_pgt$|swapper_pg_dir$|system_state$|cr4_pinned_bits$|page_offset_base$|get_cpu_entry_area$|x64_sys_call$|do_syscall_64$)`)

// trim writes the wanted symbols, and the one that follows each, which tells
// how long a table is.
func trim(text, name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	z, err := gzip.NewWriterLevel(f, gzip.BestCompression)
	if err != nil {
		return err
	}
	in := bufio.NewScanner(strings.NewReader(text))
	follows := false
	for in.Scan() {
		fields := strings.Fields(in.Text())
		if len(fields) < 3 {
			continue
		}
		match := len(fields) == 3 && wanted.MatchString(fields[2])
		if match || follows {
			fmt.Fprintln(z, in.Text())
		}
		follows = match
	}
	if err := in.Err(); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	return f.Close()
}
