// SPDX-License-Identifier: MIT

package kvmaccess

// The wire contract, kept in kmod/uapi/kvmaccess.h. Each name is the header's
// without the prefix KVMACCESS_ and in Go's spelling; a test compares header,
// YNL spec and this file.
const (
	genlName    = "kvmaccess"
	mcgrpVM     = "vm"
	genlVersion = 1
)

const (
	// MaxRanges is how many ranges one request to the module may have. The
	// client splits larger reads.
	MaxRanges = 64

	// MaxBytes is how many bytes of guest memory one request to the module
	// may ask for. The client splits larger reads.
	MaxBytes = 28672
)

// Limits of watches.
const (
	MaxWatches      = 8192              // of all programs together
	WatchMinPeriod  = 500_000           // ns
	WatchMaxPeriod  = 3_600_000_000_000 // ns
	WatchMaxItems   = 16384             // after splitting, see Watch.Add
	WatchMaxMemory  = 64 << 20          // bytes of expected data, 24 for each digest
	WatchMaxBudget  = 16 << 20          // bytes of digests in a tick
	WatchMaxDigests = 4096              // pages of one Item
	WatchEventBytes = 64                // of data in a WatchEvent

	watchKeyBytes = 16
)

// Commands: enum kvmaccess_cmd.
const (
	cmdUnspec = iota
	cmdInfo
	cmdVMGet
	cmdMemslotGet
	cmdVCPUGet
	cmdTableGet
	cmdMemRead
	cmdStats
	cmdVMCreated
	cmdVMDestroyed
	cmdWatchNew
	cmdWatchAdd
	cmdWatchDel
	cmdWatchGet
	cmdWatchEvent
)

// Attributes of INFO: enum kvmaccess_a_info.
const (
	aInfoUnspec = iota
	aInfoVersion
	aInfoVendor
	aInfoCaps
	aInfoMissing
	aInfoMaxRanges
	aInfoMaxBytes
)

// Attributes of VM_GET and the notifications: enum kvmaccess_a_vm.
const (
	aVMUnspec = iota
	aVMPad
	aVMID
	aVMPID
	aVMVCPUs
	aVMMemslots
	aVMMemory
	aVMSeen
	aVMFlags
)

// Attributes of MEMSLOT_GET: enum kvmaccess_a_memslot.
const (
	aMemslotUnspec = iota
	aMemslotPad
	aMemslotVMID
	aMemslotASID
	aMemslotSlot
	aMemslotGPA
	aMemslotSize
	aMemslotHVA
	aMemslotFlags
)

// Attributes inside a segment: enum kvmaccess_a_segment.
const (
	aSegmentUnspec = iota
	aSegmentPad
	aSegmentSelector
	aSegmentBase
	aSegmentLimit
	aSegmentAttrs
)

// Attributes of VCPU_GET: enum kvmaccess_a_vcpu.
const (
	aVCPUUnspec = iota
	aVCPUPad
	aVCPUVMID
	aVCPUID
	aVCPUTID
	aVCPUCondition
	aVCPUMethod
	aVCPUCPU
	aVCPUTime
	aVCPUDuration
	aVCPUHandler
	aVCPURetries
	aVCPUFlags
	aVCPUCPL
	aVCPURAX
	aVCPURBX
	aVCPURCX
	aVCPURDX
	aVCPURSI
	aVCPURDI
	aVCPURBP
	aVCPURSP
	aVCPUR8
	aVCPUR9
	aVCPUR10
	aVCPUR11
	aVCPUR12
	aVCPUR13
	aVCPUR14
	aVCPUR15
	aVCPURIP
	aVCPURFLAGS
	aVCPUCR0
	aVCPUCR2
	aVCPUCR3
	aVCPUCR4
	aVCPUCR8
	aVCPUEFER
	aVCPUCS
	aVCPUDS
	aVCPUES
	aVCPUFS
	aVCPUGS
	aVCPUSS
	aVCPUTR
	aVCPULDTR
	aVCPUGDTR
	aVCPUIDTR
	aVCPUDR0
	aVCPUDR1
	aVCPUDR2
	aVCPUDR3
	aVCPUDR6
	aVCPUDR7
	aVCPUSTAR
	aVCPULSTAR
	aVCPUCSTAR
	aVCPUSFMASK
	aVCPUSysenterCS
	aVCPUSysenterESP
	aVCPUSysenterEIP
	aVCPUKernelGSBase
	aVCPUPAT
)

// Attributes of TABLE_GET: enum kvmaccess_a_table.
const (
	aTableUnspec = iota
	aTablePad
	aTableVMID
	aTableVCPUID
	aTableKind
	aTableOffset
	aTableLength
	aTableBase
	aTableLimit
	aTableData
	aTableCondition
)

// Attributes inside a range: enum kvmaccess_a_range.
const (
	aRangeUnspec = iota
	aRangePad
	aRangeAddress
	aRangeLength
	aRangeData
	aRangeError
	aRangeFault
)

// Attributes of MEM_READ: enum kvmaccess_a_mem.
const (
	aMemUnspec = iota
	aMemPad
	aMemVMID
	aMemVCPUID
	aMemRoot
	aMemRange
)

// Attributes inside a command's account: enum kvmaccess_a_op.
const (
	aOpUnspec = iota
	aOpPad
	aOpCmd
	aOpCount
	aOpErrors
	aOpTime
	aOpBytes
)

// Attributes of STATS: enum kvmaccess_a_stats.
const (
	aStatsUnspec = iota
	aStatsPad
	aStatsVMID
	aStatsWorker
	aStatsInterrupt
	aStatsCaptures
	aStatsRetries
	aStatsInterrupts
	aStatsEvents
	aStatsOp
)

// Attributes inside an item of a watch: enum kvmaccess_a_item.
const (
	aItemUnspec = iota
	aItemPad
	aItemCookie
	aItemKind
	aItemGPA
	aItemData
	aItemValue
	aItemMask
	aItemRegister
	aItemVCPUID
)

// Attributes of WATCH_NEW, WATCH_ADD, WATCH_DEL and WATCH_GET: enum kvmaccess_a_watch.
const (
	aWatchUnspec = iota
	aWatchPad
	aWatchID
	aWatchVMID
	aWatchPeriod
	aWatchBudget
	aWatchKey
	aWatchItem
	aWatchCookie
	aWatchFlags
	aWatchPortid
	aWatchEffective
	aWatchItems
	aWatchMemory
	aWatchBytes
	aWatchDigested
	aWatchTicks
	aWatchMissed
	aWatchLate
	aWatchLatest
	aWatchTime
	aWatchLongest
	aWatchCompared
	aWatchPasses
	aWatchCaptures
	aWatchSkipped
	aWatchUnsettled
	aWatchFailed
	aWatchDifferent
	aWatchNotResident
	aWatchNoMemslot
	aWatchEvents
	aWatchCoalesced
	aWatchLost
)

// Attributes of WATCH_EVENT: enum kvmaccess_a_event.
const (
	aEventUnspec = iota
	aEventPad
	aEventWatchID
	aEventVMID
	aEventState
	aEventTime
	aEventTick
	aEventCoalesced
	aEventLost
	aEventCookie
	aEventKind
	aEventGPA
	aEventOffset
	aEventExpected
	aEventData
	aEventVCPUID
	aEventRegister
	aEventCondition
)
