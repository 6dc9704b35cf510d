// SPDX-License-Identifier: MIT

// Package sample holds what one measurement of the monitoring overhead gives,
// and how a series of them is planned and kept.
package sample

import (
	"fmt"
	"time"
)

// Clock is the clock of the host on which a sample was taken.
type Clock string

const (
	// Icount is a clock that counts instructions: one instruction is one
	// nanosecond, idle time is skipped (QEMU's -icount shift=0,sleep=off).
	Icount Clock = "icount"
	// Wall is the emulator's own clock: time as it passes outside.
	Wall Clock = "wall"
)

// Window is a stretch of time with what the counting loops got of it.
type Window struct {
	Elapsed time.Duration // by CLOCK_MONOTONIC of the host
	Loops   uint64        // turns of the counting loops, all CPUs together
}

// Add returns both windows as one.
func (w Window) Add(other Window) Window {
	return Window{Elapsed: w.Elapsed + other.Elapsed, Loops: w.Loops + other.Loops}
}

// rate is in turns a nanosecond, all CPUs together.
func (w Window) rate() float64 { return float64(w.Loops) / float64(w.Elapsed.Nanoseconds()) }

// Account is what the product says that it used between two looks at it.
type Account struct {
	Elapsed   time.Duration // between the two looks
	Daemon    time.Duration // CPU of the daemon's process, user and system
	Worker    time.Duration // CPU of the module's worker thread
	Interrupt time.Duration // CPU of the module's interrupts
	Longest   time.Duration // check so far, since the daemon started
	Ticks     uint64        // checks of the guest that were done
	Missed    uint64        // checks that the daemon says it left out
	Switches  uint64        // times that a thread of the daemon was put on a CPU
}

// CPU is all the CPU time of the account.
func (a Account) CPU() time.Duration { return a.Daemon + a.Worker + a.Interrupt }

// Sample is one repetition at one period: a monitored window between two
// unmonitored ones.
type Sample struct {
	Clock      Clock
	Repetition int           // from 1
	Order      int           // from 1, in which the samples of a run were taken
	Period     time.Duration // between two checks
	CPUs       int           // of the host
	Off        Window        // both unmonitored windows together
	On         Window        // the monitored window
	Account    Account       // the product's own, over the monitored window
}

// CPUPercent is the product's account of itself, in percent of one CPU.
func (s Sample) CPUPercent() float64 {
	return 100 * float64(s.Account.CPU()) / float64(s.Account.Elapsed)
}

// SoakerPercent is what the counting loops lack while the guest is monitored,
// in percent of one CPU. What they lack without monitoring (the host's timer
// tick, the guest itself) is not in it. Noise can make it negative.
func (s Sample) SoakerPercent() float64 {
	return 100 * float64(s.CPUs) * (1 - s.On.rate()/s.Off.rate())
}

// Expected is how many ticks the product's account should have. One more or
// less is a matter of where in a period the account begins.
func (s Sample) Expected() uint64 {
	return uint64((s.Account.Elapsed + s.Period/2) / s.Period)
}

// Unaccounted is how many of the expected ticks the daemon neither did nor
// said it had missed, beyond what the ends of the account may cost: one tick,
// and those that fall due while a check runs, which are known as missed only
// when it is over.
func (s Sample) Unaccounted() uint64 {
	open := 1 + uint64((s.Account.Longest+s.Period-1)/s.Period)
	if told := s.Account.Ticks + s.Account.Missed + open; told < s.Expected() {
		return s.Expected() - told
	}
	return 0
}

// Validate says what makes a sample unfit to compute with.
func (s Sample) Validate() error {
	switch {
	case s.Clock != Icount && s.Clock != Wall:
		return fmt.Errorf("sample %d: unknown clock %q", s.Order, s.Clock)
	case s.Repetition < 1 || s.Order < 1:
		return fmt.Errorf("sample %d: repetition %d: both count from 1", s.Order, s.Repetition)
	case s.Period <= 0:
		return fmt.Errorf("sample %d: period %v", s.Order, s.Period)
	case s.CPUs < 1:
		return fmt.Errorf("sample %d: %d CPUs", s.Order, s.CPUs)
	case s.Off.Elapsed <= 0 || s.On.Elapsed <= 0 || s.Account.Elapsed <= 0:
		return fmt.Errorf("sample %d: an empty window (off %v, on %v, account %v)",
			s.Order, s.Off.Elapsed, s.On.Elapsed, s.Account.Elapsed)
	case s.Off.Loops == 0:
		return fmt.Errorf("sample %d: the counting loop did not count without monitoring", s.Order)
	case s.Account.Daemon < 0 || s.Account.Worker < 0 || s.Account.Interrupt < 0:
		return fmt.Errorf("sample %d: negative CPU time", s.Order)
	}
	return nil
}
