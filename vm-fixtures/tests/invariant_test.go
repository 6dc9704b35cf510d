// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// samples is how often TestInvariants looks at each program under each kind of
// stress; there are 72 such pairs.
var samples = flag.Int("samples", 60, "captures of each program under each stress in TestInvariants")

// stress is what happens to a vCPU's thread while it is sampled.
type stress struct {
	name string
	// begin starts it; the vCPUs' threads run on CPU 1 and the caller on any.
	// End is called when all samples are taken, pause after each of them: a
	// requester that never rests may interrupt the guest faster than that can
	// execute an instruction.
	begin func(t *testing.T, k *tinyvm.KVM, threads []*tinyvm.Thread) (pause, end func())
	// want is a condition or method that must have been seen if the program
	// does not do anything but count; zero: any.
	condition kvmaccess.Condition
	method    kvmaccess.Method
}

// vcpuCPU is where vCPUs run, unless a test moves them.
const vcpuCPU = 1

var stresses = []stress{
	{
		name: "alone", condition: kvmaccess.ConditionGuest, method: kvmaccess.MethodInterrupt,
		begin: func(t *testing.T, _ *tinyvm.KVM, _ []*tinyvm.Thread) (pause, end func()) {
			return rest, onCPU(t, 0)
		},
	},
	{
		name: "migrated",
		begin: func(t *testing.T, _ *tinyvm.KVM, threads []*tinyvm.Thread) (pause, end func()) {
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() {
				for cpu := 0; ctx.Err() == nil; cpu ^= 1 {
					for _, th := range threads {
						if err := th.Pin(cpu); err != nil {
							t.Error(err)
							return
						}
					}
					runtime.Gosched()
				}
			})
			return rest, func() { cancel(); wg.Wait() }
		},
	},
	{
		name: "preempted", condition: kvmaccess.ConditionPreempted, method: kvmaccess.MethodInterrupt,
		begin: func(t *testing.T, k *tinyvm.KVM, _ []*tinyvm.Thread) (pause, end func()) {
			// Another VM's vCPU on the same CPU.
			g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
			if err != nil {
				t.Fatal(err)
			}
			started(t, g, vcpuCPU)
			back := onCPU(t, 0)
			return rest, func() {
				back()
				if err := g.Close(); err != nil {
					t.Error(err)
				}
			}
		},
	},
	{
		name: "beside the requester", condition: kvmaccess.ConditionPreempted, method: kvmaccess.MethodLocal,
		begin: func(t *testing.T, _ *tinyvm.KVM, _ []*tinyvm.Thread) (pause, end func()) {
			// The vCPU gets on only while the requester sleeps.
			return rest, onCPU(t, vcpuCPU)
		},
	},
}

// rest lets others run.
func rest() { time.Sleep(20 * time.Microsecond) }

// onCPU keeps the calling goroutine on a CPU until back is called.
func onCPU(t *testing.T, cpu int) (back func()) {
	t.Helper()
	runtime.LockOSThread()
	if err := tinyvm.Pin(0, cpu); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := tinyvm.Pin(0, 0, 1); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	}
}

// tally is what was seen of a program.
type tally struct {
	samples, unsettled, retries int
	conditions                  map[kvmaccess.Condition]int
	methods                     map[kvmaccess.Method]int
	flagged                     map[kvmaccess.Condition]int // amid an instruction, by its flag
	amid                        map[kvmaccess.Condition]int // of those no state of the program
}

func newTally() *tally {
	return &tally{
		conditions: map[kvmaccess.Condition]int{}, methods: map[kvmaccess.Method]int{},
		flagged: map[kvmaccess.Condition]int{}, amid: map[kvmaccess.Condition]int{},
	}
}

func (a *tally) add(b *tally) {
	a.samples += b.samples
	a.unsettled += b.unsettled
	a.retries += b.retries
	for _, m := range []struct{ to, from map[kvmaccess.Condition]int }{
		{a.conditions, b.conditions}, {a.flagged, b.flagged}, {a.amid, b.amid},
	} {
		for c, n := range m.from {
			m.to[c] += n
		}
	}
	for c, n := range b.methods {
		a.methods[c] += n
	}
}

func (a *tally) String() string {
	return fmt.Sprintf("%d captures, %d unsettled, %d retries; %v; %v; flagged as amid an instruction %v, of which such %v",
		a.samples, a.unsettled, a.retries, a.conditions, a.methods, a.flagged, a.amid)
}

// amidFlags say that a state may be that of a half-executed instruction.
const amidFlags = kvmaccess.VCPUEmulating | kvmaccess.VCPUUnsettled

// Each state that is captured is one that the guest really had between two
// instructions, or is flagged as one that may not be.
func TestInvariants(t *testing.T) {
	needCPUs(t, 2)
	c, k := newClient(t), openKVM(t)
	total := newTally()
	byProgram := map[string]*tally{}
	start := time.Now()
	for _, p := range programs {
		byProgram[p.name] = newTally()
		for _, s := range stresses {
			t.Run(p.name+"/"+s.name, func(t *testing.T) {
				one := sampleProgram(t, c, k, p, s)
				t.Log(one)
				byProgram[p.name].add(one)
				total.add(one)
				// What this combination is for.
				if s.condition != 0 && p.exits == nil && !p.config.IRQChip && one.conditions[s.condition] == 0 {
					t.Errorf("never seen %v", s.condition)
				}
				if s.method != 0 && one.methods[s.method] == 0 {
					t.Errorf("never taken by method %v", s.method)
				}
			})
		}
	}
	for _, p := range programs {
		if byProgram[p.name].samples > 0 {
			t.Logf("%s: %v", p.name, byProgram[p.name])
		}
	}
	t.Logf("all, in %.1f s: %v", time.Since(start).Seconds(), total)
}

func sampleProgram(t *testing.T, c *kvmaccess.Client, k *tinyvm.KVM, p program, s stress) *tally {
	g, vm := tinyGuest(t, k, c, p.config)
	for _, v := range g.VCPUs {
		if err := counters(v); err != nil {
			t.Fatal(err)
		}
	}
	models := p.build(t, g)
	var threads []*tinyvm.Thread
	for i, m := range models {
		m.load(t, g, g.VCPUs[i])
	}
	for i, v := range g.VCPUs {
		h := tinyvm.Handler(func(e *tinyvm.Exit) (bool, error) { return false, fmt.Errorf("the guest ended: %v", e) })
		if p.exits != nil {
			h = p.exits(i)
		}
		th, err := v.Start(h, vcpuCPU)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := th.Stop(); err != nil {
				t.Errorf("vCPU %d: %v", i, err)
			}
		}()
		threads = append(threads, th)
	}
	pause, end := s.begin(t, k, threads)
	defer end()

	sum := newTally()
	seen := make([]position, len(models))
	failures := 0
	for n := 0; n < *samples || !advanced(seen); n++ {
		if n > *samples+20000 {
			t.Fatalf("after %d captures a vCPU stands still at %+v", n, seen)
		}
		which := n % len(models)
		select {
		case <-threads[which].Done():
			t.Fatalf("vCPU %d ended: %v", which, threads[which].Err())
		default:
		}
		got, err := c.VCPU(t.Context(), vm.ID, uint32(which))
		pause()
		if errors.Is(err, kvmaccess.ErrUnsettled) {
			sum.unsettled++
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		sum.samples++
		sum.retries += got.Retries
		sum.conditions[got.Condition]++
		sum.methods[got.Method]++
		flagged := got.Flags&amidFlags != 0
		if flagged {
			sum.flagged[got.Condition]++
		}
		pos, want, ok := models[which].find(got.Registers, seen[which])
		switch {
		case ok:
			seen[which] = pos
		case flagged:
			sum.amid[got.Condition]++
		default:
			t.Errorf("sample %d, vCPU %d: %v by %v, %d retries, flags %v: after %+v, no state of the guest; the nearest is %+v, expected (-), captured (+):\n%s",
				n, which, got.Condition, got.Method, got.Retries, got.Flags, seen[which], pos, cmp.Diff(want, got.Registers))
			if failures++; failures == 5 {
				t.Fatal("giving up on this one")
			}
		}
		if cpl := int(got.SS.Attrs >> 5 & 3); got.CPL != cpl {
			t.Fatalf("sample %d: CPL %d, that of SS is %d", n, got.CPL, cpl)
		}
		if got.Condition == kvmaccess.ConditionNew && seen[which] != (position{}) {
			t.Fatalf("sample %d: %v after it ran", n, got.Condition)
		}
	}
	return sum
}

// advanced reports whether each vCPU was seen in later rounds than the first.
func advanced(seen []position) bool {
	for _, p := range seen {
		if p.round < 2 {
			return false
		}
	}
	return true
}
