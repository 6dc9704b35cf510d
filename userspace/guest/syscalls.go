// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
)

// SyscallTable is one of the kernel's tables of system calls, or what its code
// does instead of one.
type SyscallTable struct {
	Name    string    `json:"name"` // of the table or function
	Address uint64    `json:"address"`
	Code    bool      `json:"code"`  // a function that picks the handler, not a table
	Calls   []Syscall `json:"calls"` // by number
}

// Syscall is what the kernel calls for a number.
type Syscall struct {
	Number  int    `json:"number"`
	Handler uint64 `json:"handler"`
	Symbol  string `json:"symbol,omitempty"` // "name" or "name+0x10 [module]"
}

// maxSyscalls bounds the numbers of system calls; x32 has its own from 512 on.
const maxSyscalls = 1024

// SyscallTables reads each table of system calls that the kernel has. Since
// 6.9, and in kernels with the fix for branch history injection, system calls
// go through code instead, and only tracing looks at the tables: see
// Dispatchers. The error is an *ObjectError, or several; what could be read is
// returned all the same.
func (k *Kernel) SyscallTables(ctx context.Context) ([]SyscallTable, error) {
	var all []SyscallTable
	var errs []error
	for _, name := range []string{"sys_call_table", "ia32_sys_call_table", "x32_sys_call_table"} {
		at, ok := k.Image.Lookup(name)
		if !ok {
			continue
		}
		t := SyscallTable{Name: name, Address: at}
		length := uint64(8 * maxSyscalls)
		if next, ok := k.Image.Next(at); ok {
			length = min(length, next-at)
		}
		raw := make([]byte, length&^7)
		if err := k.Space.Read(ctx, at, raw); err != nil {
			errs = append(errs, &ObjectError{name, at, err})
			continue
		}
		for i := 0; i+8 <= len(raw); i += 8 {
			handler := binary.LittleEndian.Uint64(raw[i:])
			t.Calls = append(t.Calls, Syscall{i / 8, handler, k.Image.Name(handler)})
		}
		for n := len(t.Calls); n > 0 && t.Calls[n-1].Handler == 0; n-- { // up to the next symbol
			t.Calls = t.Calls[:n-1]
		}
		all = append(all, t)
	}
	if len(all) == 0 && len(errs) == 0 {
		return nil, &ObjectError{"sys_call_table", 0, ErrNoSymbol}
	}
	return all, errors.Join(errs...)
}

// Entry is a register that says where a CPU enters the kernel.
type Entry struct {
	Register string   `json:"register"` // "LSTAR", "CSTAR", "SYSENTER_EIP"
	Value    uint64   `json:"value"`
	Symbol   string   `json:"symbol,omitempty"`
	Want     []string `json:"want"` // what an honest kernel may have there
	Fits     bool     `json:"fits"` // it is one of these, or not in use
}

// ErrNoMSRs: the source of the guest has no model-specific registers, as most
// dumps, or the kernel did not set up system calls yet.
var ErrNoMSRs = errors.New("its model-specific registers are not known, or not set yet")

// Entries says where a vCPU, an index into CPUs, enters the kernel for system
// calls, and whether that is where Linux has it (syscall_init in
// arch/x86/kernel/cpu/common.c). The error is ErrNoMSRs where the registers are
// not known.
func (k *Kernel) Entries(vcpu int) ([]Entry, error) {
	if vcpu < 0 || vcpu >= len(k.CPUs) {
		return nil, fmt.Errorf("vCPU %d: the guest has %d", vcpu, len(k.CPUs))
	}
	state := &k.CPUs[vcpu]
	if state.STAR == 0 && state.LSTAR == 0 && state.SFMASK == 0 {
		return nil, fmt.Errorf("vCPU %d: %w", state.ID, ErrNoMSRs)
	}
	entry := func(register string, value uint64, want ...string) Entry {
		e := Entry{Register: register, Value: value, Want: want}
		if value == 0 { // processors without 32-bit SYSCALL, or SYSENTER
			e.Fits = register != "LSTAR"
			return e
		}
		e.Symbol = k.Image.Name(value)
		e.Fits = k.Image.Is(value, want...)
		if e.Fits {
			for _, name := range want {
				if k.Image.Is(value, name) {
					e.Symbol = name
				}
			}
		}
		return e
	}
	all := []Entry{
		entry("LSTAR", state.LSTAR, "entry_SYSCALL_64"),
		entry("CSTAR", state.CSTAR, "entry_SYSCALL_compat", "entry_SYSCALL32_ignore", "ignore_sysret"),
		entry("SYSENTER_EIP", state.SysenterEIP, "entry_SYSENTER_compat"),
	}
	// AMD processors keep 32 bits of it, and do not use it in long mode.
	if e := &all[2]; !e.Fits && e.Value>>32 == 0 {
		if at, ok := k.Image.Lookup(e.Want[0]); ok && at&0xffffffff == e.Value {
			e.Symbol, e.Fits = e.Want[0], true
		}
	}
	return all, nil
}
