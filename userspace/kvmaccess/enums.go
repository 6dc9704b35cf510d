// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"fmt"
	"strconv"
	"strings"
)

// Vendor is how this host's processors virtualize.
type Vendor uint32

// Values of Vendor.
const (
	VendorNone Vendor = iota // neither kvm-amd nor kvm-intel is in use
	VendorSVM
	VendorVMX
)

var vendorNames = []string{"none", "svm", "vmx"}

// String returns "none", "svm", "vmx", or the number of an unknown vendor.
func (v Vendor) String() string { return enumString(uint32(v), vendorNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (v Vendor) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (v *Vendor) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(v), "vendor", b, vendorNames)
}

// Caps says what works on this host.
type Caps uint32

// Bits of Caps.
const (
	CapMemory Caps = 1 << iota // guest-physical memory can be read
	CapVCPU                    // vCPU states, tables and guest-virtual memory can be read
	CapEvents                  // VM events are sent at once
	CapWatch                   // items can be watched; registers need CapVCPU
)

var capNames = []string{"memory", "vcpu", "events", "watch"}

// String returns the names of the bits, separated by commas.
func (c Caps) String() string { return flagsString(uint32(c), capNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (c Caps) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (c *Caps) UnmarshalText(b []byte) error {
	return flagsParse((*uint32)(c), "capability", b, capNames)
}

// VMFlags are properties of a VM.
type VMFlags uint32

// Bits of VMFlags.
const (
	VMProtected VMFlags = 1 << iota // state or memory is encrypted
)

var vmFlagNames = []string{"protected"}

// String returns the names of the bits, separated by commas.
func (f VMFlags) String() string { return flagsString(uint32(f), vmFlagNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (f VMFlags) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (f *VMFlags) UnmarshalText(b []byte) error {
	return flagsParse((*uint32)(f), "VM flag", b, vmFlagNames)
}

// Condition is where a vCPU was when its state was taken.
type Condition uint32

// Values of Condition.
const (
	ConditionUnknown   Condition = iota
	ConditionGuest               // executing guest code until the capture's interrupt
	ConditionHost                // on a CPU, in the host part of an ioctl (KVM_RUN)
	ConditionPreempted           // in KVM_RUN, thread preempted on the host
	ConditionHalted              // in KVM_RUN, blocked: HLT or waiting for SIPI
	ConditionUser                // out of KVM_RUN, in the VMM's user space
	ConditionNew                 // has never run
)

var conditionNames = []string{"unknown", "guest", "host", "preempted", "halted", "user", "new"}

// String returns the name of the condition, or the number of an unknown one.
func (c Condition) String() string { return enumString(uint32(c), conditionNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (c Condition) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (c *Condition) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(c), "condition", b, conditionNames)
}

// Method is how the state of a vCPU was taken.
type Method uint32

// Values of Method.
const (
	MethodUnknown   Method = iota
	MethodLocal            // on the requester's CPU, interrupts off
	MethodInterrupt        // by an interrupt to the vCPU's CPU
	MethodMemory           // in memory: the vCPU's last CPU is offline
	MethodLoaded           // by loading the vCPU: its last CPU is offline
)

var methodNames = []string{"unknown", "local", "interrupt", "memory", "loaded"}

// String returns the name of the method, or the number of an unknown one.
func (m Method) String() string { return enumString(uint32(m), methodNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (m Method) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (m *Method) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(m), "method", b, methodNames)
}

// VCPUFlags are properties of a vCPU's state.
type VCPUFlags uint32

// Bits of VCPUFlags.
const (
	VCPUNested    VCPUFlags = 1 << iota // the state is that of a nested guest (L2)
	VCPUSMM                             // in system management mode
	VCPUEmulating                       // user space is completing an instruction
	VCPUUnsettled                       // KVM may be amid an instruction: see ConditionHost
)

var vcpuFlagNames = []string{0: "nested", "smm", "emulating", "unsettled", 31: "partial"}

// String returns the names of the bits, separated by commas.
func (f VCPUFlags) String() string { return flagsString(uint32(f), vcpuFlagNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (f VCPUFlags) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (f *VCPUFlags) UnmarshalText(b []byte) error {
	return flagsParse((*uint32)(f), "vCPU flag", b, vcpuFlagNames)
}

// TableKind names a descriptor table.
type TableKind uint32

// Values of TableKind.
const (
	TableUnspec TableKind = iota
	TableGDT
	TableIDT
)

var tableNames = []string{"unspec", "gdt", "idt"}

// String returns "gdt", "idt", or the number of an unknown table.
func (k TableKind) String() string { return enumString(uint32(k), tableNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (k TableKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (k *TableKind) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(k), "table", b, tableNames)
}

// ItemKind is what a watch looks at.
type ItemKind uint32

// Values of ItemKind.
const (
	KindUnspec   ItemKind = iota
	KindBytes             // memory, byte for byte
	KindEntry             // 8 bytes under a mask, such as an entry of a page table
	KindDigest            // pages, by their digests
	KindRegister          // a register of a vCPU, or of each
)

var kindNames = []string{"unspec", "bytes", "entry", "digest", "register"}

// String returns the name, or the number of an unknown one.
func (i ItemKind) String() string { return enumString(uint32(i), kindNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (i ItemKind) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (i *ItemKind) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(i), "kind", b, kindNames)
}

// Register is one that can be watched.
type Register uint32

// Values of Register.
const (
	RegisterUnspec Register = iota
	RegisterCR0
	RegisterCR3
	RegisterCR4
	RegisterEFER
	RegisterGDTRBase
	RegisterGDTRLimit
	RegisterIDTRBase
	RegisterIDTRLimit
	RegisterTRBase
	RegisterTRSelector
	RegisterLDTRSelector
	RegisterDR0
	RegisterDR1
	RegisterDR2
	RegisterDR3
	RegisterDR7
	RegisterSTAR
	RegisterLSTAR
	RegisterCSTAR
	RegisterSFMASK
	RegisterSysenterCS
	RegisterSysenterESP
	RegisterSysenterEIP
	RegisterPAT
)

var registerNames = []string{"unspec", "cr0", "cr3", "cr4", "efer", "gdtr_base", "gdtr_limit", "idtr_base", "idtr_limit", "tr_base", "tr_selector", "ldtr_selector", "dr0", "dr1", "dr2", "dr3", "dr7", "star", "lstar", "cstar", "sfmask", "sysenter_cs", "sysenter_esp", "sysenter_eip", "pat"}

// String returns the name, or the number of an unknown one.
func (r Register) String() string { return enumString(uint32(r), registerNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (r Register) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (r *Register) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(r), "register", b, registerNames)
}

// ItemState is how an item, or a watch, is.
type ItemState uint32

// Values of ItemState.
const (
	StateExpected ItemState = iota // as it should be
	StateDifferent
	StateNotResident // the host had no page in place, twice in a row
	StateNoMemslot   // nothing is at its address
	StateEnded       // of a watch: its VM is gone, or the module
)

var stateNames = []string{"expected", "different", "not_resident", "no_memslot", "ended"}

// String returns the name, or the number of an unknown one.
func (i ItemState) String() string { return enumString(uint32(i), stateNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (i ItemState) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (i *ItemState) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(i), "state", b, stateNames)
}

// WatchFlags are properties of a watch.
type WatchFlags uint32

// Bits of WatchFlags.
const (
	WatchEnded WatchFlags = 1 << iota // its VM is gone
)

var watchFlagNames = []string{"ended"}

// String returns the names of the bits, separated by commas.
func (w WatchFlags) String() string { return flagsString(uint32(w), watchFlagNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (w WatchFlags) MarshalText() ([]byte, error) { return []byte(w.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (w *WatchFlags) UnmarshalText(b []byte) error {
	return flagsParse((*uint32)(w), "watch flag", b, watchFlagNames)
}

// EventKind is what happened to a VM. The zero value is no event.
type EventKind uint32

// Values of EventKind.
const (
	VMCreated   EventKind = cmdVMCreated
	VMDestroyed EventKind = cmdVMDestroyed
)

var eventNames = []string{VMCreated: "created", VMDestroyed: "destroyed"}

// String returns "created", "destroyed", or the number of an unknown event.
func (k EventKind) String() string { return enumString(uint32(k), eventNames) }

// MarshalText implements encoding.TextMarshaler with String's words.
func (k EventKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (k *EventKind) UnmarshalText(b []byte) error {
	return enumParse((*uint32)(k), "event", b, eventNames)
}

// commandNames are the values of Op.Command.
var commandNames = []string{
	cmdInfo:        "info",
	cmdVMGet:       "vm_get",
	cmdMemslotGet:  "memslot_get",
	cmdVCPUGet:     "vcpu_get",
	cmdTableGet:    "table_get",
	cmdMemRead:     "mem_read",
	cmdStats:       "stats",
	cmdVMCreated:   "vm_created",
	cmdVMDestroyed: "vm_destroyed",
	cmdWatchNew:    "watch_new",
	cmdWatchAdd:    "watch_add",
	cmdWatchDel:    "watch_del",
	cmdWatchGet:    "watch_get",
	cmdWatchEvent:  "watch_event",
}

func enumString(v uint32, names []string) string {
	if int64(v) < int64(len(names)) && names[v] != "" {
		return names[v]
	}
	return strconv.FormatUint(uint64(v), 10)
}

func enumParse(v *uint32, what string, text []byte, names []string) error {
	for i, n := range names {
		if n != "" && n == string(text) {
			*v = uint32(i)
			return nil
		}
	}
	n, err := strconv.ParseUint(string(text), 10, 32)
	if err != nil {
		return fmt.Errorf("kvmaccess: unknown %s %q", what, text)
	}
	*v = uint32(n)
	return nil
}

// flagsString names the bits that have names and writes the rest as one
// hexadecimal number.
func flagsString(v uint32, names []string) string {
	var words []string
	for i, n := range names {
		if n != "" && v&(1<<i) != 0 {
			words = append(words, n)
			v &^= 1 << i
		}
	}
	if v != 0 {
		words = append(words, fmt.Sprintf("%#x", v))
	}
	return strings.Join(words, ",")
}

func flagsParse(v *uint32, what string, text []byte, names []string) error {
	var sum uint32
	if len(text) > 0 {
	words:
		for word := range strings.SplitSeq(string(text), ",") {
			for i, n := range names {
				if n != "" && n == word {
					sum |= 1 << i
					continue words
				}
			}
			n, err := strconv.ParseUint(word, 0, 32)
			if err != nil {
				return fmt.Errorf("kvmaccess: unknown %s %q", what, word)
			}
			sum |= uint32(n)
		}
	}
	*v = sum
	return nil
}
