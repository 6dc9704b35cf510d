// SPDX-License-Identifier: MIT

package host

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"time"
)

// errContradiction says that the emulated processor did not do what its page
// tables told it, as none on earth may: nothing that ran on it is to blame,
// and nothing that it said is of use.
var errContradiction = errors.New("the emulator is at fault")

// A page fault that the kernel does not survive, as arch/x86/mm/fault.c tells
// it: the address, the error code, and what the kernel itself found when it
// walked the page tables after that.
var fatalFault = regexp.MustCompile(`unable to handle page fault for address: ([0-9a-f]{16})\r?\n` +
	`(?:.*\n){0,2}?.*error_code\((0x[0-9a-f]+)\) - not-present page\r?\n` +
	`.*PGD ([0-9a-f]+) P4D ([0-9a-f]+) PUD ([0-9a-f]+) PMD ([0-9a-f]+) ?\r?\n`)

// Where x86-64 Linux keeps its image, mapped once and for all in large pages
// (Documentation/arch/x86/x86_64/mm.rst).
const (
	imageStart = 0xffffffff80000000
	imageEnd   = 0xffffffffc0000000
)

const (
	entryPresent = 1 << 0
	entryLarge   = 1 << 7
	faultPresent = 1 << 0
)

// tripleFault is what QEMU logs of a processor that cannot even deliver a double
// fault.
var tripleFault = []byte("Triple fault")

// silentReset looks for a host whose processor gave up while its kernel said
// nothing at all. Linux delivers a double fault on a stack of its own, by tables
// that are never written, and says so. QEMU's emulated processor was seen to end
// that way as it ran nested guests, in about one of fifteen runs.
func silentReset(resets, console []byte) error {
	if !bytes.Contains(resets, tripleFault) || alarm.Match(console) {
		return nil
	}
	return fmt.Errorf("%w: its processor ended by a triple fault, and the kernel had no word to say", errContradiction)
}

// stackEnd is what the scheduler says of a task whose stack has something else at
// its very end than the kernel wrote there.
var stackEnd = []byte("Kernel panic - not syncing: corrupted stack end detected inside scheduler")

// strayWrite looks for a host whose first and only word of trouble is stackEnd. A
// stack that grows too long meets the page below it, which is not mapped, and the
// kernel says so; this one was written to from elsewhere. QEMU was seen to do that
// once (6.12, as the thread of a guest's processor waited for another one), as it
// was seen to read page tables wrongly: see contradiction. With sanitizers the
// kernel names who writes where it must not, as it does it, and never did: there,
// nothing is excused.
func strayWrite(console []byte, sanitizers bool) error {
	if first := alarm.FindIndex(console); sanitizers || first == nil || !bytes.HasPrefix(console[first[0]:], stackEnd) {
		return nil
	}
	return fmt.Errorf("%w: the end of a task's stack was overwritten, though its stack did not grow there", errContradiction)
}

// standstill is how long a host may be without a pulse, by this machine's clock.
// Linux looks after itself: it stops when one of its CPUs does not schedule for
// 120 s, or a task waits for longer than that. Where nobody says a word, the
// emulator is likely to be at fault: QEMU was seen to interrupt a CPU that had
// interrupts off, within the lock that the interrupt's handler takes, with the
// other CPU waiting for the same lock.
const standstill = 10 * time.Minute

var errStandstill = fmt.Errorf("%w, or what ran there took all of its CPUs: its first process has not run for %v, and its kernel had no word to say", errContradiction, standstill)

// SilentGuest is in the output of a command that met a guest whose processor
// gave up while its kernel said nothing: what silentReset is for the host's. QEMU
// ends nested guests so now and then. Its helper_vmrun() leaves exception_index at
// the vector that it injected (10.0, 10.2 and 11.1). A thread of a processor that
// leaves its loop before the guest's next exit, as it does where another thread
// asks it to between its looks for interrupts and for such requests, takes that for
// an exception to deliver: the handler is entered once more at its first
// instruction, interrupts off. If it had come from user mode, the second takes the
// user's GS for the kernel's.
const SilentGuest = "its processor gave up, and its kernel had no word to say"

// StuckGuest is in the output of a command that met a guest one of whose processors
// does not halt and has interrupts off all the time, which Linux has for
// microseconds: a handler that was entered twice waits for the lock that it holds.
const StuckGuest = "a processor of it stands with interrupts off"

// tripleFaulted is in the output of a command that met a small guest of which the
// same is true: it runs a few instructions, and none that could lead there. Of 136
// whose memslots were changed 38,000 times on a busy machine one ended so, and
// kvmaccess.ko was not loaded there.
const tripleFaulted = "the guest ended: shutdown (triple fault)"

// contradiction looks for a fault on a page of the kernel's image that was
// "not present" for the processor, and is present in the page tables. QEMU's
// emulation of nested paging was seen to walk so: about once in ten runs of
// all tests the host panicked of it. A processor keeps no memory of pages that
// are not present, and Linux takes no page of its image away for a while.
func contradiction(console []byte) error {
	for _, m := range fatalFault.FindAllSubmatch(console, -1) {
		var v [6]uint64 // address, error code, PGD, P4D, PUD, PMD
		for i := range v {
			n, err := strconv.ParseUint(string(m[i+1]), 16, 64)
			if i == 1 {
				n, err = strconv.ParseUint(string(m[i+1]), 0, 64)
			}
			if err != nil {
				return nil
			}
			v[i] = n
		}
		if v[0] < imageStart || v[0] >= imageEnd || v[1]&faultPresent != 0 ||
			v[2]&v[3]&v[4]&v[5]&entryPresent == 0 || v[5]&entryLarge == 0 {
			continue
		}
		return fmt.Errorf("%w: %#x was not present for the processor, but is in its page tables (PMD %#x)", errContradiction, v[0], v[5])
	}
	return nil
}
