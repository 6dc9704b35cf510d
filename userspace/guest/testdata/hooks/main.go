// SPDX-License-Identifier: MIT

// Hooks makes this folder's test data out of two memory dumps of one boot of a
// guest, before and after tracers, probes and eBPF programs were set, and
// copies of what the guest itself said of these:
//
//	NAME.snapshot         the memory that is read of them, and the code that they
//	                      changed; what the guest said in the notes
//	NAME-before.snapshot  the same code before
//	NAME.btf.gz           the kernel's BTF, cut down to what is used
//	NAME.kallsyms.gz      the symbols that are looked up or lead to
//
// The folder of a guest has mem0.elf, mem.elf, kallsyms, kprobes_list (of
// debugfs), tracing_enabled_functions, bpf_progs (id=N type=T name=N tag=T
// xlated=BYTES jited=BYTES addrs=[ADDRESS ...]).
//
//	go run ./userspace/guest/testdata/hooks -guest DIR -note "Debian 12, ..." -o debian12
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/dump"
	"github.com/kvmaccess/kvmaccess/userspace/guest/testdata/prune"
)

func main() {
	dir := flag.String("guest", "", "folder of the guest")
	note := flag.String("note", "", "what guest it is")
	out := flag.String("o", "", "name of the files to write, without endings")
	flag.Parse()
	if *dir == "" || *out == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*dir, *note, *out); err != nil {
		log.Fatal(err)
	}
}

func run(dir, note, out string) error {
	ctx := context.Background()
	k, err := prune.Attach(ctx, filepath.Join(dir, "mem.elf"), out, strings.Fields(kept), "FTRACE_")
	if err != nil {
		return err
	}
	d, err := dump.Open(filepath.Join(dir, "mem0.elf"))
	if err != nil {
		return err
	}
	defer d.Close()
	k0, err := guest.Attach(ctx, d, guest.AttachOptions{})
	if err != nil {
		return err
	}
	bases, err := json.Marshal(k.Bases)
	if err != nil {
		return err
	}
	notes := map[string]string{"bases": string(bases), "guest": note, "release": k.Fingerprint.Release, "root": fmt.Sprintf("%#x", k.Space.Root)}
	for _, file := range []string{"kprobes_list", "tracing_enabled_functions", "bpf_progs"} {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return err
		}
		notes[file] = string(text)
	}
	text, err := os.ReadFile(filepath.Join(dir, "kallsyms"))
	if err != nil {
		return err
	}
	notes["generated"] = generated(string(text))

	before, after := guest.NewRecorder(k0.Space.Memory), guest.NewRecorder(k.Space.Memory)
	changed, err := code(ctx, k0, k, before, after)
	if err != nil {
		return err
	}
	k.Space.Memory = after
	if err := look(ctx, k); err != nil {
		return err
	}
	for name, pages := range map[string]guest.Pages{out + ".snapshot": after.Pages, out + "-before.snapshot": before.Pages} {
		s := &guest.Snapshot{Notes: notes, Pages: pages}
		if name == out+".snapshot" {
			s.CPUs = k.CPUs
		} else {
			s.Notes = map[string]string{"guest": note}
		}
		if err := prune.Write(name, s); err != nil {
			return err
		}
	}
	names := notes["kprobes_list"] + "\n" + notes["tracing_enabled_functions"]
	return prune.Pack(out+".kallsyms.gz", symbols(k, changed, names))
}

// generated keeps of /proc/kallsyms what is of generated code.
func generated(kallsyms string) string {
	var out strings.Builder
	for line := range strings.Lines(kallsyms) {
		if strings.Contains(line, "\t[bpf]") || strings.Contains(line, "\t[__builtin__") {
			out.WriteString(line)
		}
	}
	return out.String()
}

// code records the pages of code that changed, as they were and are, and
// returns where they did.
func code(ctx context.Context, k0, k *guest.Kernel, before, after *guest.Recorder) ([]uint64, error) {
	old, err := k0.CopyText(ctx, k.Text)
	if err != nil {
		return nil, err
	}
	now, err := k.CopyText(ctx, k.Text)
	if err != nil {
		return nil, err
	}
	none := guest.NewPatchSet(nil)
	changes, err := none.Changes(old, now)
	if err != nil {
		return nil, err
	}
	var changed []uint64
	for _, c := range changes {
		changed = append(changed, c.Address)
		for _, side := range []struct {
			*guest.Kernel
			*guest.Recorder
		}{{k0, before}, {k, after}} {
			// An instruction may reach across the start or end of a page.
			for _, at := range []uint64{max(c.Address-8, k.Text.Start), c.Address, min(c.Address+8, k.Text.End-1)} {
				t, err := guest.Translate(ctx, side.Space.Memory, side.Space.Mode, side.Space.Root, at)
				if err != nil {
					return nil, err
				}
				if err := side.ReadPhysical(ctx, t.GPA, make([]byte, 1)); err != nil {
					return nil, err
				}
			}
		}
	}
	return changed, nil
}

// look reads all that tests read.
func look(ctx context.Context, k *guest.Kernel) error {
	_, err1 := k.Patches(ctx)
	_, err2 := k.BPF(ctx)
	_, err3 := k.GeneratedCode(ctx)
	_, err4 := k.TextMappings(ctx)
	return errors.Join(err1, err2, err3, err4)
}

// wanted are the symbols that code looks up.
var wanted = regexp.MustCompile(`^(_text|_stext|_etext|_end|__(start|end)_rodata|ideal_nops|x86_nops|` +
	`ftrace_(caller|regs_caller|call|regs_call|graph_call|graph_caller|stub|ops_list|list_end|pages_start|trace_function|ops_trampoline_list)|direct_functions|` +
	`kprobe_table|aggr_pre_handler|pre_handler_kretprobe|kprobes_all_disarmed|kprobe_(opt)?insn_slots|` +
	`__(start|stop)___jump_table|arch_jump_entry_size|__(start|stop)_static_call_sites|__static_call_return|__static_call_return0|__WARN_trap|` +
	`(__)?x86_return_thunk|modules|prog_idr|bpf_kallsyms|trampoline_table|trampoline_key_table|bpf_dispatcher_.*|` +
	`(text_)?poking_(mm|addr)|text_poke_mm(_addr)?|call_direct_funcs|function_trace_call|kprobe_ftrace_(ops|handler)|global_ops|direct_ops|__SCT__.*|__SCK__.*)$`)

// symbols writes those that are wanted, those of changed code and those of
// names that occur in text, and to each the next one, where it ends.
func symbols(k *guest.Kernel, changed []uint64, text string) []byte {
	names := map[string]bool{}
	for _, word := range regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_.]*`).FindAllString(text, -1) {
		names[word] = true
	}
	of := map[uint64]bool{}
	for _, at := range changed {
		if all, _ := k.Image.At(at); len(all) > 0 {
			of[all[0].Address] = true
		}
	}
	var out bytes.Buffer
	end := uint64(0)
	for sym := range k.Image.All() {
		if sym.Module != "" {
			continue
		}
		keep := wanted.MatchString(sym.Name) || names[sym.Name] || of[sym.Address]
		if !keep && (end == 0 || sym.Address <= end) {
			continue
		}
		if end = 0; keep {
			end = sym.Address
		}
		fmt.Fprintf(&out, "%016x %c %s\n", sym.Address, sym.Type, sym.Name)
	}
	return out.Bytes()
}

// kept are the types that code reads, by the kernels that have them.
const kept = `list_head ftrace_ops ftrace_ops_hash ftrace_hash ftrace_func_entry ftrace_page dyn_ftrace
	kprobe kretprobe optimized_kprobe kprobe_insn_cache kprobe_insn_page jump_entry static_key
	static_call_site static_call_key module idr xarray xa_node bpf_prog bpf_prog_aux bpf_ksym bpf_trampoline
	bpf_tramp_image bpf_tramp_node bpf_tramp_link bpf_link bpf_dispatcher mm_struct`
