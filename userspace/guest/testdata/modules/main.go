// SPDX-License-Identifier: MIT

// Modules makes this folder's test data out of a memory dump of a guest, and
// copies of what its /proc/kallsyms and /proc/stat said, as root:
//
//	NAME.snapshot     the memory that is read of modules' symbols, of what else
//	                  has names while a kernel runs, and of its clock; in the
//	                  notes a digest of all that kallsyms has in brackets
//	NAME.btf.gz       the kernel's BTF, cut down to the structs that are used
//	NAME.kallsyms.gz  the symbols of the kernel that are looked up
//
//	go run ./userspace/guest/testdata/modules -dump mem.elf -kallsyms kallsyms -stat stat -o debian12
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/testdata/prune"
)

func main() {
	name := flag.String("dump", "", "memory dump of the guest")
	kallsyms := flag.String("kallsyms", "", "its /proc/kallsyms, as root")
	stat := flag.String("stat", "", "its /proc/stat")
	out := flag.String("o", "", "name of the files to write, without endings")
	flag.Parse()
	if *name == "" || *kallsyms == "" || *stat == "" || *out == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*name, *kallsyms, *stat, *out); err != nil {
		log.Fatal(err)
	}
}

func run(name, kallsyms, stat, out string) error {
	ctx := context.Background()
	k, err := prune.Attach(ctx, name, out, strings.Fields(kept))
	if err != nil {
		return err
	}
	s := &guest.Snapshot{CPUs: k.CPUs, Notes: map[string]string{"root": fmt.Sprintf("%#x", k.Space.Root)}}
	if err := truth(s.Notes, kallsyms, stat); err != nil {
		return err
	}
	r := guest.NewRecorder(k.Space.Memory)
	k.Space.Memory = r
	k.Refresh(ctx)
	if len(k.Doubts) > 0 {
		return fmt.Errorf("doubts %q", k.Doubts)
	}
	s.Pages = r.Pages
	if err := prune.Write(out+".snapshot", s); err != nil {
		return err
	}
	var symbols bytes.Buffer
	for sym := range k.Image.All() {
		if sym.Module == "" && slices.Contains(wanted, sym.Name) {
			fmt.Fprintf(&symbols, "%016x %c %s\n", sym.Address, sym.Type, sym.Name)
		}
	}
	return prune.Pack(out+".kallsyms.gz", symbols.Bytes())
}

// wanted are the symbols that are looked up.
var wanted = []string{"_text", "_end", "_stext", "_etext", "modules", "bpf_kallsyms", "ftrace_ops_trampoline_list",
	"kprobe_insn_slots", "kprobe_optinsn_slots", "tk_core", "timekeeper_data"}

// truth takes down what the guest says.
func truth(notes map[string]string, kallsyms, stat string) error {
	text, err := os.ReadFile(kallsyms)
	if err != nil {
		return err
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) == 4 {
			lines = append(lines, strings.Join(fields, " "))
		}
	}
	slices.Sort(lines)
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	notes["symbols"], notes["digest"] = strconv.Itoa(len(lines)), hex.EncodeToString(sum[:])
	if text, err = os.ReadFile(stat); err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if at, ok := strings.CutPrefix(line, "btime "); ok {
			notes["btime"] = strings.TrimSpace(at)
		}
	}
	return nil
}

// kept are the structs that code reads.
const kept = `module mod_kallsyms kernel_symbol list_head module_layout module_memory module_state
	bpf_ksym ftrace_ops kprobe_insn_cache kprobe_insn_page timekeeper tk_data`
