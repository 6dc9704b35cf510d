// SPDX-License-Identifier: MIT

// Objects makes this folder's test data out of a memory dump of a guest, and
// copies of what its /proc said about the same time:
//
//	NAME.snapshot  the memory that is read of tasks, modules, descriptor tables
//	               and system calls, and the vCPUs' states; /proc in the notes
//	NAME.btf.gz    the kernel's BTF, cut down to the structs that are used: what
//	               these point to is left out
//	NAME.kallsyms.gz  the symbols that are looked up or lead to
//
// ps.tsv has the columns tgid, tid, ppid, comm, state, uid, euid, gid,
// starttime, flags of /proc/PID/task/TID/{stat,status}; it is given twice, from
// before and from after the dump, since kernel threads rename themselves.
//
//	go run ./userspace/guest/testdata/objects -dump mem.elf -ps ps -ps-after after_ps -modules modules -note "Debian 12, ..." -o debian12
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/guest/testdata/prune"
)

func main() {
	name := flag.String("dump", "", "memory dump of the guest")
	before := flag.String("ps", "", "its threads before the dump")
	after := flag.String("ps-after", "", "its threads after the dump")
	modules := flag.String("modules", "", "its /proc/modules, as root")
	note := flag.String("note", "", "what guest it is")
	out := flag.String("o", "", "name of the files to write, without endings")
	flag.Parse()
	if *name == "" || *out == "" || *before == "" || *after == "" || *modules == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	proc := map[string]string{"ps": *before, "ps-after": *after, "modules": *modules}
	if err := run(*name, proc, *note, *out); err != nil {
		log.Fatal(err)
	}
}

func run(name string, proc map[string]string, note, out string) error {
	ctx := context.Background()
	k, err := prune.Attach(ctx, name, out, strings.Fields(kept))
	if err != nil {
		return err
	}
	s := &guest.Snapshot{CPUs: k.CPUs, Notes: map[string]string{
		"guest": note, "release": k.Fingerprint.Release, "root": fmt.Sprintf("%#x", k.Space.Root),
	}}
	for key, file := range proc {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		s.Notes[key] = string(text)
	}
	r := guest.NewRecorder(k.Space.Memory)
	k.Space.Memory = r
	if err := prune.Look(ctx, k); err != nil {
		return err
	}
	s.Pages = r.Pages
	if err := prune.Write(out+".snapshot", s); err != nil {
		return err
	}
	return prune.Pack(out+".kallsyms.gz", symbols(k.Image))
}

// wanted are the symbols that code looks up, or that handlers have.
var wanted = regexp.MustCompile(`^(_text|_stext|_etext|_end|init_task|init_pid_ns|runqueues|modules|mod_tree|module_kset|` +
	`__per_cpu_offset|__cpu_(possible|online)_mask|gdt_page|cpu_tss_rw|cea_exception_stacks|idt_table|` +
	`(ia32_|x32_)?sys_call_table|(x64|ia32|x32)_sys_call|entry_(SYS|INT80).*|ignore_sysret|asm_exc_.*|asm_sysvec_.*|asm_int80_emulation|` +
	`(irq|spurious)_entries_start|early_idt_handler_array|__(x64|ia32|ia32_compat)_sys_.*|__do_sys_(ni_syscall|restart_syscall))$`)

// symbols writes those that are wanted, and to each the next one, where it ends.
func symbols(m *guest.Image) []byte {
	var out bytes.Buffer
	end := uint64(0)
	for sym := range m.All() {
		if sym.Module != "" {
			continue
		}
		keep := wanted.MatchString(sym.Name)
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
const kept = `task_struct signal_struct cred kthread worker workqueue_struct pid upid pid_namespace idr xarray xa_node
	pid_type rq cfs_rq rt_rq dl_rq sched_entity sched_rt_entity sched_dl_entity cpumask
	module module_state module_use module_kobject module_layout module_memory mod_mem_type mod_tree_root mod_tree_node
	latch_tree_node kset kobject list_head mm_struct gdt_page tss_struct x86_hw_tss cpu_entry_area cea_exception_stacks
	desc_struct btf btf_module kernel_cap_t spinlock_t`
