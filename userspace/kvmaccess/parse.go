// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// Parsers of replies. Each takes the attributes of one message and refuses
// what breaks the contract: wrong sizes, repetitions, omissions. Attributes
// that it does not know are passed over, so that a newer module can add some.

func parseInfo(b []byte) (Info, error) {
	var v Info
	a := attrs{set: "info", b: b}
	for a.next() {
		switch a.typ {
		case aInfoVersion:
			if a.once() {
				v.Version = a.text()
			}
		case aInfoVendor:
			v.Vendor = Vendor(a.u32())
		case aInfoCaps:
			v.Caps = Caps(a.u32())
		case aInfoMissing:
			v.Missing = append(v.Missing, a.text())
		case aInfoMaxRanges:
			v.MaxRanges = a.number(math.MaxInt32)
		case aInfoMaxBytes:
			v.MaxBytes = a.number(math.MaxInt32)
		}
	}
	return v, a.finish(aInfoVersion, aInfoMaxBytes, aInfoMissing)
}

func parseVM(b []byte) (VM, error) {
	var v VM
	a := attrs{set: "vm", b: b}
	for a.next() {
		switch a.typ {
		case aVMID:
			v.ID = VMID(a.u64())
		case aVMPID:
			v.PID = a.number(math.MaxInt32)
		case aVMVCPUs:
			v.VCPUs = a.number(math.MaxInt32)
		case aVMMemslots:
			v.Memslots = a.number(math.MaxInt32)
		case aVMMemory:
			v.Memory = a.u64()
		case aVMSeen:
			v.Seen = a.duration()
		case aVMFlags:
			v.Flags = VMFlags(a.u32())
		}
	}
	return v, a.finish(aVMID, aVMFlags)
}

func parseMemslot(b []byte) (Memslot, error) {
	var v Memslot
	a := attrs{set: "memslot", b: b}
	for a.next() {
		switch a.typ {
		case aMemslotVMID:
			v.VM = VMID(a.u64())
		case aMemslotASID:
			v.AS = a.u32()
		case aMemslotSlot:
			v.Slot = a.u32()
		case aMemslotGPA:
			v.GPA = a.u64()
		case aMemslotSize:
			v.Size = a.u64()
		case aMemslotHVA:
			v.HVA = a.u64()
		case aMemslotFlags:
			v.Flags = a.u32()
		}
	}
	return v, a.finish(aMemslotVMID, aMemslotFlags)
}

func parseVCPU(b []byte) (VCPU, error) {
	v := VCPU{CPU: -1}
	a := attrs{set: "vcpu", b: b}
	for a.next() {
		switch a.typ {
		case aVCPUVMID:
			v.VM = VMID(a.u64())
		case aVCPUID:
			v.ID = a.u32()
		case aVCPUTID:
			v.TID = a.number(math.MaxInt32)
		case aVCPUCondition:
			v.Condition = Condition(a.u32())
		case aVCPUMethod:
			v.Method = Method(a.u32())
		case aVCPUCPU:
			v.CPU = a.number(math.MaxInt32)
		case aVCPUTime:
			v.Time = a.duration()
		case aVCPUDuration:
			v.Duration = a.duration()
		case aVCPUHandler:
			v.Handler = a.duration()
		case aVCPURetries:
			v.Retries = a.number(math.MaxInt32)
		case aVCPUFlags:
			v.Flags = VCPUFlags(a.u32())
		case aVCPUCPL:
			v.CPL = a.number(3)
		case aVCPURAX:
			v.RAX = a.u64()
		case aVCPURBX:
			v.RBX = a.u64()
		case aVCPURCX:
			v.RCX = a.u64()
		case aVCPURDX:
			v.RDX = a.u64()
		case aVCPURSI:
			v.RSI = a.u64()
		case aVCPURDI:
			v.RDI = a.u64()
		case aVCPURBP:
			v.RBP = a.u64()
		case aVCPURSP:
			v.RSP = a.u64()
		case aVCPUR8:
			v.R8 = a.u64()
		case aVCPUR9:
			v.R9 = a.u64()
		case aVCPUR10:
			v.R10 = a.u64()
		case aVCPUR11:
			v.R11 = a.u64()
		case aVCPUR12:
			v.R12 = a.u64()
		case aVCPUR13:
			v.R13 = a.u64()
		case aVCPUR14:
			v.R14 = a.u64()
		case aVCPUR15:
			v.R15 = a.u64()
		case aVCPURIP:
			v.RIP = a.u64()
		case aVCPURFLAGS:
			v.RFLAGS = a.u64()
		case aVCPUCR0:
			v.CR0 = a.u64()
		case aVCPUCR2:
			v.CR2 = a.u64()
		case aVCPUCR3:
			v.CR3 = a.u64()
		case aVCPUCR4:
			v.CR4 = a.u64()
		case aVCPUCR8:
			v.CR8 = a.u64()
		case aVCPUEFER:
			v.EFER = a.u64()
		case aVCPUCS:
			v.CS = a.segment()
		case aVCPUDS:
			v.DS = a.segment()
		case aVCPUES:
			v.ES = a.segment()
		case aVCPUFS:
			v.FS = a.segment()
		case aVCPUGS:
			v.GS = a.segment()
		case aVCPUSS:
			v.SS = a.segment()
		case aVCPUTR:
			v.TR = a.segment()
		case aVCPULDTR:
			v.LDTR = a.segment()
		case aVCPUGDTR:
			v.GDTR = a.tableRegister()
		case aVCPUIDTR:
			v.IDTR = a.tableRegister()
		case aVCPUDR0:
			v.DR0 = a.u64()
		case aVCPUDR1:
			v.DR1 = a.u64()
		case aVCPUDR2:
			v.DR2 = a.u64()
		case aVCPUDR3:
			v.DR3 = a.u64()
		case aVCPUDR6:
			v.DR6 = a.u64()
		case aVCPUDR7:
			v.DR7 = a.u64()
		case aVCPUSTAR:
			v.STAR = a.u64()
		case aVCPULSTAR:
			v.LSTAR = a.u64()
		case aVCPUCSTAR:
			v.CSTAR = a.u64()
		case aVCPUSFMASK:
			v.SFMASK = a.u64()
		case aVCPUSysenterCS:
			v.SysenterCS = a.u64()
		case aVCPUSysenterESP:
			v.SysenterESP = a.u64()
		case aVCPUSysenterEIP:
			v.SysenterEIP = a.u64()
		case aVCPUKernelGSBase:
			v.KernelGSBase = a.u64()
		case aVCPUPAT:
			v.PAT = a.u64()
		}
	}
	// Where the module did not find KVM's reader of it (INFO's MISSING), CR8
	// is left out.
	return v, a.finish(aVCPUVMID, aVCPUPAT, aVCPUCPU, aVCPUCR8)
}

// parseTable's Data belongs to b and begins asked bytes into the table.
func parseTable(b []byte, asked uint32) (Table, error) {
	var v Table
	var length uint32
	offset := asked
	a := attrs{set: "table", b: b}
	for a.next() {
		switch a.typ {
		case aTableVMID:
			v.VM = VMID(a.u64())
		case aTableVCPUID:
			v.VCPU = a.u32()
		case aTableKind:
			v.Kind = TableKind(a.u32())
		case aTableOffset:
			offset = a.u32()
		case aTableLength:
			length = a.u32()
		case aTableBase:
			v.Base = a.u64()
		case aTableLimit:
			v.Limit = uint16(a.number(math.MaxUint16))
		case aTableData:
			v.Data = a.bytes()
		case aTableCondition:
			v.Condition = Condition(a.u32())
		}
	}
	if err := a.finish(aTableVMID, aTableCondition, aTableOffset, aTableLength); err != nil {
		return Table{}, err
	}
	switch {
	case offset != asked:
		return Table{}, wireError("table: data from byte %d, asked for byte %d", offset, asked)
	case len(v.Data) == 0:
		return Table{}, wireError("table: no data")
	case a.has(aTableLength) && int64(length) != int64(len(v.Data)):
		return Table{}, wireError("table: %d bytes of data, length says %d", len(v.Data), length)
	case uint64(offset)+uint64(len(v.Data)) > uint64(v.Limit)+1:
		return Table{}, wireError("table: %d bytes at %d exceed the limit %d", len(v.Data), offset, v.Limit)
	}
	return v, nil
}

// parseRanges puts what was read into want, in order; Data is appended to
// what want has, within its capacity if that suffices.
func parseRanges(b []byte, vm VMID, want []RangeData) error {
	n := 0
	a := attrs{set: "mem", b: b}
	for a.next() {
		if a.typ != aMemRange {
			continue
		}
		if n == len(want) {
			return wireError("mem: more than the %d ranges asked for", n)
		}
		nest := a.nest("range")
		a.check(parseRange(&nest, vm, &want[n]))
		n++
	}
	if a.err != nil {
		return a.err
	}
	if n != len(want) {
		return wireError("mem: %d ranges, asked for %d", n, len(want))
	}
	return nil
}

func parseRange(a *attrs, vm VMID, want *RangeData) error {
	var data []byte
	var errno uint32
	var fault uint64
	for a.next() {
		switch a.typ {
		case aRangeAddress:
			if v := a.u64(); a.err == nil && v != want.Address {
				return wireError("range: address %#x, asked for %#x", v, want.Address)
			}
		case aRangeLength:
			if v := a.u32(); a.err == nil && v != want.Length {
				return wireError("range: length %d, asked for %d", v, want.Length)
			}
		case aRangeData:
			data = a.bytes()
		case aRangeError:
			errno = a.u32()
		case aRangeFault:
			fault = a.u64()
		}
	}
	if a.err != nil {
		return a.err
	}
	switch {
	case a.has(aRangeData) && a.has(aRangeError):
		return wireError("range: both data and an error")
	case a.has(aRangeData):
		if int64(len(data)) != int64(want.Length) {
			return wireError("range: %d bytes of data, asked for %d", len(data), want.Length)
		}
		want.Data = append(want.Data, data...)
		want.Err = nil
	case a.has(aRangeError):
		if errno == 0 || errno > maxErrno {
			return wireError("range: error %d is no errno", errno)
		}
		if !a.has(aRangeFault) {
			return wireError("range: attribute %d is missing", aRangeFault)
		}
		want.Err = &Error{Op: commandNames[cmdMemRead], VM: vm, Errno: unix.Errno(errno), Address: fault}
	default:
		return wireError("range: neither data nor an error")
	}
	return nil
}

// maxErrno is MAX_ERRNO of include/linux/err.h.
const maxErrno = 4095

func parseStats(b []byte) (Stats, error) {
	var v Stats
	a := attrs{set: "stats", b: b}
	for a.next() {
		switch a.typ {
		case aStatsVMID:
			v.VM = VMID(a.u64())
		case aStatsWorker:
			v.Worker = a.duration()
		case aStatsInterrupt:
			v.Interrupt = a.duration()
		case aStatsCaptures:
			v.Captures = a.u64()
		case aStatsRetries:
			v.Retries = a.u64()
		case aStatsInterrupts:
			v.Interrupts = a.u64()
		case aStatsEvents:
			v.Events = a.u64()
		case aStatsOp:
			nest := a.nest("op")
			op, err := parseOp(&nest)
			a.check(err)
			v.Ops = append(v.Ops, op)
		}
	}
	return v, a.finish(aStatsWorker, aStatsOp, aStatsEvents, aStatsOp)
}

func parseOp(a *attrs) (Op, error) {
	var v Op
	for a.next() {
		switch a.typ {
		case aOpCmd:
			v.Command = enumString(a.u32(), commandNames)
		case aOpCount:
			v.Count = a.u64()
		case aOpErrors:
			v.Errors = a.u64()
		case aOpTime:
			v.Time = a.duration()
		case aOpBytes:
			v.Bytes = a.u64()
		}
	}
	return v, a.finish(aOpCmd, aOpBytes)
}

func (a *attrs) duration() time.Duration {
	v := a.u64()
	if a.err == nil && v > math.MaxInt64 {
		a.err = wireError("%s: attribute %d is %d ns, more than 292 years", a.set, a.typ, v)
		return 0
	}
	return time.Duration(v)
}

func (a *attrs) segment() Segment {
	var v Segment
	if !a.once() {
		return v
	}
	n := attrs{set: "segment", b: a.data}
	for n.next() {
		switch n.typ {
		case aSegmentSelector:
			v.Selector = uint16(n.number(math.MaxUint16))
		case aSegmentBase:
			v.Base = n.u64()
		case aSegmentLimit:
			v.Limit = n.u32()
		case aSegmentAttrs:
			v.Attrs = n.u32()
		}
	}
	a.check(n.finish(aSegmentSelector, aSegmentAttrs))
	return v
}

func (a *attrs) tableRegister() TableRegister {
	var v TableRegister
	if !a.once() {
		return v
	}
	n := attrs{set: "segment", b: a.data}
	for n.next() {
		switch n.typ {
		case aSegmentBase:
			v.Base = n.u64()
		case aSegmentLimit:
			v.Limit = uint16(n.number(math.MaxUint16))
		}
	}
	a.check(n.finish(aSegmentBase, aSegmentLimit))
	return v
}
