// SPDX-License-Identifier: MIT

package soaker

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/arch/x86/x86asm"
	"golang.org/x/sys/unix"
)

// The counting loop is what LoopInstructions says, lies in one page, and jumps
// to its own start.
func TestImage(t *testing.T) {
	image := Image()
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Progs) != 1 || f.Entry != imageBase+headerSize {
		t.Fatalf("%d segments, entry %#x", len(f.Progs), f.Entry)
	}

	next := func(offset int) (x86asm.Inst, int) {
		t.Helper()
		inst, err := x86asm.Decode(image[offset:], 64)
		if err != nil {
			t.Fatalf("offset %#x: %v", offset, err)
		}
		return inst, offset + inst.Len
	}
	offset, syscalls := headerSize, 0
	for offset < headerSize+len(setup) {
		var inst x86asm.Inst
		inst, offset = next(offset)
		switch inst.Op {
		case x86asm.SYSCALL:
			syscalls++
		case x86asm.JNS:
			if target := offset + int(inst.Args[0].(x86asm.Rel)); target != loopOffset {
				t.Errorf("set-up goes on at %#x, the loop is at %#x", target, loopOffset)
			}
		}
	}
	if syscalls != 2 {
		t.Errorf("%d system calls in the set-up, want mmap and exit", syscalls)
	}

	offset = loopOffset
	for n := 1; ; n++ {
		var inst x86asm.Inst
		inst, offset = next(offset)
		switch {
		case n == 1 && inst.Op != x86asm.INC:
			t.Fatalf("the loop starts with %v", inst)
		case n > 1 && n < LoopInstructions && inst.Op != x86asm.NOP:
			t.Fatalf("instruction %d of the loop is %v", n, inst)
		case n == LoopInstructions:
			if inst.Op != x86asm.JMP || offset+int(inst.Args[0].(x86asm.Rel)) != loopOffset {
				t.Fatalf("the loop ends with %v", inst)
			}
			if offset != len(image) || offset-loopOffset > pageSize {
				t.Fatalf("the loop ends at %#x of %#x", offset, len(image))
			}
			return
		}
	}
}

func TestCounts(t *testing.T) {
	s, err := Start(0)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop()
	attr, err := unix.SchedGetAttr(s.cmd.Process.Pid, 0)
	if err != nil || attr.Policy != unix.SCHED_IDLE {
		t.Errorf("policy %d, %v; want SCHED_IDLE", attr.Policy, err)
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(s.cmd.Process.Pid, &set); err != nil || set.Count() != 1 || !set.IsSet(s.CPU()) {
		t.Errorf("affinity %v, %v; want CPU %d alone", set, err, s.CPU())
	}
	for last, deadline := s.Count(), time.Now().Add(10*time.Second); ; {
		time.Sleep(time.Millisecond)
		now := s.Count()
		if now > last {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no count in 10 s")
		}
	}
}

// Without its file the program gives up rather than counting nowhere.
func TestRefused(t *testing.T) {
	program, err := memfd("soaker", Image())
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	p, err := os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", program.Fd()), []string{"soaker"},
		&os.ProcAttr{Files: []*os.File{nil, nil, nil, null}})
	if err != nil {
		t.Fatal(err)
	}
	state, err := p.Wait()
	if err != nil || state.ExitCode() != 1 {
		t.Errorf("exit %v, %v; want 1", state, err)
	}
}
