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
)

var capNames = []string{"memory", "vcpu", "events"}

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
