// SPDX-License-Identifier: MIT

// Package capture measures what it costs to take the state of a vCPU once, in
// each condition that it can be in.
package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// Sample is one capture. Times are in nanoseconds of the host's clock.
type Sample struct {
	Condition kvmaccess.Condition `json:"condition"`
	Method    kvmaccess.Method    `json:"method"`
	Retries   int                 `json:"retries"`
	Handler   int64               `json:"handler_ns"`  // with the vCPU's CPU interrupted, or interrupts off
	Duration  int64               `json:"duration_ns"` // in the module, from the first attempt to the end of the last
	Request   int64               `json:"request_ns"`  // in the requester, by way of netlink
}

// Run is what was measured on a host.
type Run struct {
	Vendor  kvmaccess.Vendor `json:"vendor"`
	Kernel  string           `json:"kernel"`
	CPUs    int              `json:"cpus"`
	MHz     float64          `json:"mhz"` // of the time stamp counter
	Samples []Sample         `json:"samples"`
}

// situation brings a vCPU into a condition.
type situation struct {
	condition kvmaccess.Condition
	cpus      int // of the host, that it needs
	code      []byte
	irqchip   bool
	run, stop bool
	cpu       int // of the vCPU; the requester's is 0
}

// port reads a port for ever, which is an exit to user space each time.
var port = []byte{
	0xe4, 0x80, // in al, 0x80
	0xeb, 0xfc, // jmp to it
}

// leaf asks for a CPUID leaf for ever, which the host's kernel answers.
var leaf = []byte{
	0x31, 0xc0, // xor eax, eax
	0x0f, 0xa2, // cpuid
	0xeb, 0xfa, // jmp to xor
}

var situations = []situation{
	{condition: kvmaccess.ConditionNew, cpus: 1, code: tinyvm.Spin(tinyvm.Long)},
	{condition: kvmaccess.ConditionUser, cpus: 1, code: port, run: true, stop: true},
	{condition: kvmaccess.ConditionHalted, cpus: 1, code: tinyvm.Halt(), irqchip: true, run: true},
	{condition: kvmaccess.ConditionPreempted, cpus: 1, code: tinyvm.Spin(tinyvm.Long), run: true},
	{condition: kvmaccess.ConditionHalted, cpus: 2, code: tinyvm.Halt(), irqchip: true, run: true, cpu: 1},
	{condition: kvmaccess.ConditionGuest, cpus: 2, code: tinyvm.Spin(tinyvm.Long), run: true, cpu: 1},
	{condition: kvmaccess.ConditionHost, cpus: 2, code: leaf, run: true, cpu: 1},
}

// Measure takes n captures in each condition that the host has CPUs enough
// for, and that needs at least cpus of them, on the host that it runs on, one
// that vmfixture booted.
func Measure(ctx context.Context, n, cpus int) (*Run, error) {
	if err := inside.LoadModule(); err != nil {
		return nil, err
	}
	c, err := kvmaccess.New()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	k, err := tinyvm.Open()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	info, err := c.Info(ctx)
	if err != nil {
		return nil, err
	}
	r := &Run{Vendor: info.Vendor, CPUs: runtime.NumCPU()}
	if r.Kernel, err = release(); err != nil {
		return nil, err
	}
	if r.MHz, err = frequency(); err != nil {
		return nil, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := tinyvm.Pin(0, 0); err != nil {
		return nil, err
	}
	for _, s := range situations {
		if s.cpus > r.CPUs || s.cpus < cpus {
			continue
		}
		samples, err := s.measure(ctx, c, k, n)
		if err != nil {
			return nil, fmt.Errorf("condition %v on CPU %d: %w", s.condition, s.cpu, err)
		}
		r.Samples = append(r.Samples, samples...)
	}
	return r, nil
}

// maxMisses is how many captures in other conditions are passed over for each
// one that is wanted, before fewer are enough: a vCPU is given as in the host
// part of KVM_RUN only if it is met there again and again.
const (
	maxMisses = 50
	enough    = 1
)

func (s situation) measure(ctx context.Context, c *kvmaccess.Client, k *tinyvm.KVM, n int) (samples []Sample, err error) {
	g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: s.code, IRQChip: s.irqchip})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	vms, err := c.VMs(ctx)
	if err != nil {
		return nil, err
	}
	vm := vms[len(vms)-1] // the newest
	if vm.PID != os.Getpid() {
		return nil, fmt.Errorf("VM %d is process %d's, not of this one", vm.ID, vm.PID)
	}
	if s.run {
		if err := g.Start(tinyvm.Ignore, s.cpu); err != nil {
			return nil, err
		}
		// It has run once when it is past its first instruction.
		for {
			v, err := c.VCPU(ctx, vm.ID, 0)
			if err != nil && !errors.Is(err, kvmaccess.ErrUnsettled) {
				return nil, err
			}
			if err == nil && v.Condition != kvmaccess.ConditionNew {
				break
			}
			time.Sleep(10 * time.Microsecond)
		}
	}
	if s.stop {
		if err := g.Stop(); err != nil {
			return nil, err
		}
	}
	for misses := 0; len(samples) < n; {
		start := now()
		v, err := c.VCPU(ctx, vm.ID, 0)
		took := now() - start
		if err != nil && !errors.Is(err, kvmaccess.ErrUnsettled) {
			return nil, err
		}
		if err != nil || v.Condition != s.condition {
			if misses++; misses > maxMisses*n && len(samples) >= enough {
				return samples, nil
			}
			if misses > 2*maxMisses*n {
				return nil, fmt.Errorf("seen %d times in %d captures", len(samples), misses+len(samples))
			}
			continue
		}
		samples = append(samples, Sample{
			Condition: v.Condition, Method: v.Method, Retries: v.Retries,
			Handler: v.Handler.Nanoseconds(), Duration: v.Duration.Nanoseconds(), Request: took,
		})
	}
	return samples, nil
}

// now is CLOCK_MONOTONIC in ns, read without entering the kernel or Go's scheduler.
func now() int64 {
	return time.Since(epoch).Nanoseconds()
}

var epoch = time.Now()

func release() (string, error) {
	var u unix.Utsname
	err := unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:]), err
}

// frequency is what the kernel takes the time stamp counter's for, in MHz.
func frequency() (float64, error) {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "cpu MHz" {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, errors.New("/proc/cpuinfo does not say the processor's frequency")
}
