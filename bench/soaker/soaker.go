// SPDX-License-Identifier: MIT

// Package soaker measures what a CPU has left over: a counting loop at the
// lowest priority takes every instruction that nobody else wants, and what its
// count lacks against an undisturbed one is what others have used.
package soaker

import (
	"fmt"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Soaker is one counting loop, pinned to one CPU.
type Soaker struct {
	cpu     int
	cmd     *exec.Cmd
	page    []byte
	counter *uint64
}

// Start puts a counting loop on a CPU, with the policy SCHED_IDLE: any other
// thread that wants to run on that CPU takes it at once (sched(7)). The loop
// ends with Stop, or with the calling process.
func Start(cpu int) (*Soaker, error) {
	memory, err := memfd("soaker-counter", nil)
	if err != nil {
		return nil, err
	}
	defer memory.Close()
	if err := memory.Truncate(pageSize); err != nil {
		return nil, fmt.Errorf("soaker: counter: %w", err)
	}
	page, err := unix.Mmap(int(memory.Fd()), 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("soaker: map counter: %w", err)
	}
	program, err := memfd("soaker", Image())
	if err != nil {
		unix.Munmap(page)
		return nil, err
	}
	defer program.Close()

	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", program.Fd()))
	cmd.ExtraFiles = []*os.File{memory}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		unix.Munmap(page)
		return nil, fmt.Errorf("soaker: start: %w", err)
	}
	s := &Soaker{cpu: cpu, cmd: cmd, page: page, counter: (*uint64)(unsafe.Pointer(&page[0]))}
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(cmd.Process.Pid, &set); err != nil {
		s.Stop()
		return nil, fmt.Errorf("soaker: pin to CPU %d: %w", cpu, err)
	}
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}
	if err := unix.SchedSetAttr(cmd.Process.Pid, &attr, 0); err != nil {
		s.Stop()
		return nil, fmt.Errorf("soaker: SCHED_IDLE: %w", err)
	}
	return s, nil
}

// memfd returns a file in memory with this content. It is closed on exec in
// programs started from here.
func memfd(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("soaker: memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, fmt.Errorf("soaker: write %s: %w", name, err)
	}
	return f, nil
}

// CPU is the number of the CPU that the loop is pinned to.
func (s *Soaker) CPU() int { return s.cpu }

// Count is how many times the loop has been around: LoopInstructions
// instructions each.
func (s *Soaker) Count() uint64 { return atomic.LoadUint64(s.counter) }

// Stop ends the loop. Count must not be called any more.
func (s *Soaker) Stop() error {
	if err := s.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("soaker: stop: %w", err)
	}
	s.cmd.Wait() // its error says only that it was killed
	return unix.Munmap(s.page)
}
