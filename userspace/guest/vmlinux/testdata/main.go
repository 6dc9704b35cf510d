// SPDX-License-Identifier: MIT

// Testdata cuts this folder's test data out of a guest: of its kernel's file and
// of a memory dump of it, what is of one part of its text.
//
//	NAME.vmlinux.gz   the part of the text, and of the tables what is of it
//	NAME.snapshot     the same part in memory, and the kernel's own tables
//	NAME.btf.gz       the kernel's BTF, cut down to what is used
//	NAME.kallsyms.gz  the symbols that are looked up
//
//	go run ./userspace/guest/vmlinux/testdata -vmlinuz vmlinuz-6.1.0-56-cloud-amd64 -dump mem.elf -note "Debian 12, ..." -o debian12
package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/testdata/prune"
	"github.com/kvmaccess/kvmaccess/userspace/guest/vmlinux"
)

// part is how much of the text is kept, and step where it may begin.
const (
	part = 256 << 10
	step = 64 << 10
)

func main() {
	file := flag.String("vmlinuz", "", "the kernel's boot image")
	name := flag.String("dump", "", "memory dump of the guest")
	note := flag.String("note", "", "what guest it is")
	out := flag.String("o", "", "name of the files to write, without endings")
	flag.Parse()
	if *file == "" || *name == "" || *out == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*file, *name, *note, *out); err != nil {
		log.Fatal(err)
	}
}

func run(file, name, note, out string) error {
	ctx := context.Background()
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if raw, err = vmlinux.Extract(raw); err != nil {
		return err
	}
	f, err := vmlinux.Parse(raw)
	if err != nil {
		return err
	}
	k, err := prune.Attach(ctx, name, out, strings.Fields(kept), "FTRACE_")
	if err != nil {
		return err
	}
	start, err := choose(ctx, f, k)
	if err != nil {
		return err
	}
	k.Text = guest.Extent{Start: start, End: start + part}
	cut, err := cut(raw, start-k.Bases.Text)
	if err != nil {
		return err
	}
	if err := prune.Pack(out+".vmlinux.gz", cut); err != nil {
		return err
	}
	if f, err = vmlinux.Parse(cut); err != nil {
		return err
	}
	whole := k.Space.Memory
	r := guest.NewRecorder(whole)
	k.Space.Memory = r
	changes, err := f.Changes(ctx, k)
	if err != nil {
		return err
	}
	counts := map[guest.Table]int{}
	for _, c := range changes {
		if c.Why == nil {
			return fmt.Errorf("not explained: %v", c)
		}
		counts[c.Why.Table]++
	}
	bases, err := json.Marshal(k.Bases)
	if err != nil {
		return err
	}
	s := &guest.Snapshot{CPUs: k.CPUs, Pages: r.Pages, Notes: map[string]string{
		"guest": note, "release": k.Fingerprint.Release, "build-id": k.Fingerprint.BuildID, "bases": string(bases),
		"root": fmt.Sprintf("%#x", k.Space.Root), "text": fmt.Sprintf("%#x", start),
	}}
	if err := prune.Write(out+".snapshot", s); err != nil {
		return err
	}
	fmt.Println(out, counts)
	return prune.Pack(out+".kallsyms.gz", symbols(k))
}

// choose finds a part of the text that has changes by as many tables as can be.
func choose(ctx context.Context, f *vmlinux.File, k *guest.Kernel) (uint64, error) {
	changes, err := f.Changes(ctx, k)
	if err != nil {
		return 0, err
	}
	tables := map[uint64]map[guest.Table]int{}
	for _, c := range changes {
		if c.Why == nil {
			return 0, fmt.Errorf("not explained: %v", c)
		}
		for i := range uint64(part / step) {
			begin := c.Address&^(step-1) - i*step
			if begin < k.Text.Start || begin+part > k.Text.End {
				continue
			}
			if tables[begin] == nil {
				tables[begin] = map[guest.Table]int{}
			}
			tables[begin][c.Why.Table]++
		}
	}
	var best uint64
	for _, begin := range slices.Sorted(maps.Keys(tables)) {
		if len(tables[begin]) > len(tables[best]) {
			best = begin
		}
	}
	return best, nil
}

// cut makes an ELF file of what is of the part of the text that begins at an
// address of the file: entries of others are zero, and so are sections that
// are not read.
func cut(raw []byte, start uint64) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	relative := regexp.MustCompile(`^(\.retpoline_sites|\.return_sites|\.ibt_endbr_seal|\.smp_locks|runtime_.*)$`)
	inside := func(addr uint64) bool { return addr >= start && addr < start+part }
	var replacement *elf.Section
	if replacement = f.Section(".altinstr_replacement"); replacement == nil {
		return nil, fmt.Errorf("the file has no .altinstr_replacement")
	}
	keep := func(addr uint64) bool {
		return inside(addr) || addr >= replacement.Addr && addr < replacement.Addr+replacement.Size
	}
	kept := append([]byte{}, raw...)
	end := uint64(0)
	for i, s := range f.Sections {
		if s.Type == elf.SHT_NOBITS || s.Type == elf.SHT_NULL {
			continue
		}
		end = max(end, s.Offset+s.FileSize)
		data := kept[s.Offset : s.Offset+s.FileSize]
		switch {
		case relative.MatchString(s.Name):
			for at := 0; at+4 <= len(data); at += 4 {
				if !keep(s.Addr + uint64(at) + uint64(int64(int32(binary.LittleEndian.Uint32(data[at:]))))) {
					clear(data[at : at+4])
				}
			}
		case s.Name == ".parainstructions":
			for at := 0; at+12 <= len(data); at += 16 {
				if !inside(binary.LittleEndian.Uint64(data[at:])) {
					clear(data[at : at+12])
				}
			}
		case s.Name == ".altinstructions" || s.Name == ".altinstr_replacement" || s.Name == ".notes" || s.Type == elf.SHT_STRTAB:
		case s.Name == ".text":
			// The part is all that the file has.
			copy(data, append([]byte{}, data[start-s.Addr:start-s.Addr+part]...))
			clear(data[part:])
			header := kept[binary.LittleEndian.Uint64(raw[0x28:])+64*uint64(i):]
			binary.LittleEndian.PutUint64(header[0x10:], start)
			binary.LittleEndian.PutUint64(header[0x20:], part)
		default:
			clear(data)
		}
	}
	// Behind the sections' headers are the places to change when the kernel is
	// moved.
	end = max(end, binary.LittleEndian.Uint64(raw[0x28:])+64*uint64(len(f.Sections)))
	out := kept[:end:end]
	para := f.Section(".parainstructions")
	for at := end; at+4 <= uint64(len(raw)); at += 4 {
		word := binary.LittleEndian.Uint32(raw[at:])
		addr := 0xffffffff<<32 | uint64(word)
		if word == 0 || keep(addr) || para != nil && addr >= para.Addr && addr < para.Addr+para.Size {
			out = binary.LittleEndian.AppendUint32(out, word)
		}
	}
	return out, nil
}

// kept are the types that code reads, by the kernels that have them.
const kept = `list_head ftrace_ops ftrace_ops_hash ftrace_hash ftrace_func_entry ftrace_page dyn_ftrace
	kprobe kretprobe optimized_kprobe jump_entry static_key static_call_site static_call_key module
	bpf_dispatcher alt_instr cpuinfo_x86`

// wanted are the symbols that code looks up.
var wanted = regexp.MustCompile(`^(_text|_stext|_etext|_end|ideal_nops|x86_nops|` +
	`ftrace_(caller|regs_caller|call|regs_call|graph_call|graph_caller|stub|ops_list|list_end|pages_start|trace_function)|direct_functions|` +
	`kprobe_table|aggr_pre_handler|pre_handler_kretprobe|kprobes_all_disarmed|` +
	`__(start|stop)___jump_table|arch_jump_entry_size|__(start|stop)_static_call_sites|__static_call_return|__static_call_return0|__WARN_trap|` +
	`(__|its_)?(x86_)?return_thunk|__x86_return_thunk|modules|bpf_dispatcher_.*|boot_cpu_data|pv_ops|_?paravirt_nop|nop_func|BUG_func|__x86_indirect_thunk_array|native_.*)$`)

// symbols writes those that are wanted and those of the part of the text.
func symbols(k *guest.Kernel) []byte {
	var out bytes.Buffer
	for sym := range k.Image.All() {
		if sym.Module == "" && (wanted.MatchString(sym.Name) || k.Text.Contains(sym.Address)) {
			fmt.Fprintf(&out, "%016x %c %s\n", sym.Address, sym.Type, sym.Name)
		}
	}
	return out.Bytes()
}
