// SPDX-License-Identifier: MIT

package integrity

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

//go:generate go run gen_syscalls.go

const (
	tableSyscalls   = "sys_call_table"
	tableSyscalls32 = "ia32_sys_call_table"
	maxSyscalls     = 1024
)

// renamed are the system calls whose entry point has another name than the
// number (arch/x86/entry/syscalls/syscall_64.tbl).
var renamed = map[string][]string{
	"stat":     {"newstat"},
	"fstat":    {"newfstat"},
	"lstat":    {"newlstat"},
	"sendfile": {"sendfile64"},
	"uname":    {"newuname"},
	"umount2":  {"umount"},
	"_sysctl":  {"sysctl"},
}

// SyscallName names an x86-64 system call; empty: the number has none.
func SyscallName(nr int) string {
	if nr < 0 || nr >= len(syscallNames) {
		return ""
	}
	return syscallNames[nr]
}

// SyscallCheck watches sys_call_table and, where there is one,
// ia32_sys_call_table. It needs symbols: nothing else tells where they are.
type SyscallCheck struct{}

// Name implements Check.
func (SyscallCheck) Name() string { return checkSyscalls }

// Objects implements Check.
func (SyscallCheck) Objects(g *Guest) []Object {
	if g.Image == nil || len(g.CPUs) == 0 {
		return nil
	}
	var objects []Object
	for _, table := range []string{tableSyscalls, tableSyscalls32} {
		memory, ok := syscallTable(g, table)
		if !ok {
			continue
		}
		objects = append(objects, Object{
			Name:   table,
			CPU:    g.CPUs[0].ID,
			Memory: memory,
			Items: func(g *Guest, _ *kvmaccess.VCPU, data []byte, err error) []Item {
				return syscallItems(g, table, data, err)
			},
			Changed: func(g *Guest, old, now []byte) ([]Item, bool) { return changedSyscalls(g, table, old, now) },
		})
	}
	return objects
}

// syscallTable finds the table from its symbol to the next one.
func syscallTable(g *Guest, table string) (kvmaccess.Range, bool) {
	start, ok := g.Image.Lookup(table)
	if !ok || !g.Mode.Kernel(start) {
		return kvmaccess.Range{}, false
	}
	size := uint64(pointerSize(g))
	length := size * maxSyscalls
	if next, ok := g.Image.Next(start); ok && next-start < length {
		length = (next - start) / size * size
	}
	return kvmaccess.Range{Address: start, Length: uint32(length)}, length > 0
}

func pointerSize(g *Guest) int {
	if g.Mode.Long() {
		return 8
	}
	return 4
}

func syscallItems(g *Guest, table string, data []byte, err error) []Item {
	if data == nil {
		return []Item{unreadable(checkSyscalls, table, nil, err)}
	}
	items := make([]Item, syscallCount(g, data))
	for i := range items {
		items[i] = syscallItem(g, table, i, syscallEntry(g, data, i))
	}
	return items
}

// changedSyscalls makes the items of entries that are others than before.
func changedSyscalls(g *Guest, table string, old, now []byte) ([]Item, bool) {
	n := syscallCount(g, now)
	if n != syscallCount(g, old) {
		return nil, false // entries came or went
	}
	var items []Item
	for i := range n {
		if addr := syscallEntry(g, now, i); addr != syscallEntry(g, old, i) {
			items = append(items, syscallItem(g, table, i, addr))
		}
	}
	return items, true
}

// syscallCount is how many entries the table has.
func syscallCount(g *Guest, data []byte) int {
	n := len(data) / pointerSize(g)
	for n > 0 && syscallEntry(g, data, n-1) == 0 { // padding up to the next symbol
		n--
	}
	return n
}

func syscallEntry(g *Guest, data []byte, i int) uint64 {
	if pointerSize(g) == 4 {
		return uint64(binary.LittleEndian.Uint32(data[i*4:]))
	}
	return binary.LittleEndian.Uint64(data[i*8:])
}

func syscallItem(g *Guest, table string, i int, addr uint64) Item {
	it := Item{Check: checkSyscalls, Object: table, Entry: ref(i), Scope: ScopeImage}
	if table == tableSyscalls && g.Mode.Long() {
		it.Name = SyscallName(i)
	}
	it.Value = g.value(addr)
	if it.Fault = g.outside(addr); it.Fault == "" {
		it.Fault = wrongSyscall(g, table, it.Name, addr, &it.Value)
	}
	return it
}

// wrongSyscall says why addr is not the entry point of the named system call.
// Of several symbols at addr it puts the one that fits into v.
func wrongSyscall(g *Guest, table, name string, addr uint64, v *Value) string {
	all, offset := g.Image.At(addr)
	if len(all) == 0 || offset != 0 {
		return "not the start of a function"
	}
	for _, sym := range all {
		if sym.Module == "" && fitsSyscall(table, name, sym.Name, g.Mode.Long()) {
			v.Symbol, v.Module = sym.Name, ""
			return ""
		}
	}
	if name != "" {
		return "not the entry point of " + name
	}
	return "not the entry point of a system call"
}

// fitsSyscall says whether a system call's entry point may have the symbol:
// __x64_sys_NAME since 4.17, sys_NAME before.
func fitsSyscall(table, name, symbol string, long bool) bool {
	symbol, _, _ = strings.Cut(symbol, "/") // __x64_sys_clone/ptregs of 4.17
	if table == tableSyscalls32 || !long {
		for _, prefix := range []string{"__ia32_sys_", "__ia32_compat_sys_", "__ia32_x86_sys_", "__ia32_ni_sys", "compat_sys_", "__x64_sys_ni_syscall", "sys_"} {
			if strings.HasPrefix(symbol, prefix) {
				return true
			}
		}
		return symbol == "stub32_clone"
	}
	var call string
	for _, prefix := range []string{"__x64_sys_", "__x32_compat_sys_", "__x64_compat_sys_", "ptregs_sys_", "stub_", "sys_"} {
		if rest, ok := strings.CutPrefix(symbol, prefix); ok {
			call = rest
			break
		}
	}
	if call == "" {
		return false
	}
	if call == "ni_syscall" || name == "" || call == name {
		return true
	}
	for _, other := range renamed[name] {
		if call == other {
			return true
		}
	}
	return false
}

// unreadable is the item of an object whose memory cannot be read.
func unreadable(check, object string, vcpu *uint32, err error) Item {
	it := Item{Check: check, Object: object, VCPU: vcpu, Name: "memory of " + object, Raw: "unreadable"}
	it.Value.Detail = "unreadable"
	it.Fault = "its memory cannot be read"
	if err != nil {
		it.Fault = fmt.Sprintf("%s: %v", it.Fault, err)
	}
	return it
}
