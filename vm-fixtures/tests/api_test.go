// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

const sampleModule = "kvmaccess_sample"

// loadSample loads the sample user of the module's API until the test ends.
func loadSample(t *testing.T) {
	t.Helper()
	if err := boot.LoadModule(payload(host.SampleFile), ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unloadSample(); err != nil && !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	})
}

func unloadSample() error { return unix.DeleteModule(sampleModule, unix.O_NONBLOCK) }

func reloadSample() error {
	if err := unloadSample(); err != nil {
		return err
	}
	return boot.LoadModule(payload(host.SampleFile), "")
}

// sampleVM and sampleVCPU are what the sample says, by the words it uses.
type sampleVM struct {
	ID     uint64
	PID    int
	VCPUs  int
	Memory uint64
	VCPU   []sampleVCPU
}

type sampleVCPU struct {
	ID             uint32
	CR3, LSTAR     uint64
	IDT, FirstGate uint64
}

// readSample parses /proc/kvmaccess_sample.
func readSample(t *testing.T) (vms []sampleVM, created, destroyed, changed int) {
	t.Helper()
	text, err := os.ReadFile("/proc/" + sampleModule)
	if err != nil {
		t.Fatal(err)
	}
	scan := func(line, format string, to ...any) {
		if _, err := fmt.Sscanf(line, format, to...); err != nil {
			t.Fatalf("line %q of\n%s: %v", line, text, err)
		}
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "vm "):
			var v sampleVM
			scan(line, "vm %d pid %d vcpus %d memory %d", &v.ID, &v.PID, &v.VCPUs, &v.Memory)
			vms = append(vms, v)
		case strings.HasPrefix(line, "vcpu "):
			var v sampleVCPU
			var condition int
			var rip uint64
			scan(line, "vcpu %d condition %d rip 0x%x cr3 0x%x lstar 0x%x idt 0x%x gate 0x%x",
				&v.ID, &condition, &rip, &v.CR3, &v.LSTAR, &v.IDT, &v.FirstGate)
			vm := &vms[len(vms)-1]
			vm.VCPU = append(vm.VCPU, v)
		default:
			scan(line, "created %d destroyed %d changed %d", &created, &destroyed, &changed)
		}
	}
	return vms, created, destroyed, changed
}

// Another module sees what a program sees.
func TestAPI(t *testing.T) {
	ctx, c := testContext(t), newClient(t)
	k := openKVM(t)
	for range 3 {
		tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	}
	loadSample(t)

	// While it uses the module, that cannot go.
	if err := unloadModule(0); !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EBUSY) {
		t.Fatalf("unloading the module under its user: %v, want a refusal", err)
	}

	got, _, _, _ := readSample(t)
	vms, err := c.VMs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var want []sampleVM
	for _, vm := range vms {
		w := sampleVM{ID: uint64(vm.ID), PID: vm.PID, VCPUs: vm.VCPUs, Memory: vm.Memory}
		for id := range uint32(vm.VCPUs) {
			v, err := c.VCPU(ctx, vm.ID, id)
			if err != nil {
				t.Fatal(err)
			}
			idt, err := c.Table(ctx, vm.ID, id, kvmaccess.TableIDT)
			if err != nil {
				t.Fatal(err)
			}
			var gate uint64
			for i, b := range idt.Data[:8] {
				gate |= uint64(b) << (8 * i)
			}
			w.VCPU = append(w.VCPU, sampleVCPU{ID: id, CR3: v.CR3, LSTAR: v.LSTAR, IDT: v.IDTR.Base, FirstGate: gate})
		}
		want = append(want, w)
	}
	// Linux guests switch their page tables all the time.
	for _, list := range [][]sampleVM{got, want} {
		for i := range list {
			for j := range list[i].VCPU {
				if list[i].Memory > 64<<20 {
					list[i].VCPU[j].CR3 = 0
				}
			}
		}
	}
	if len(want) < 3 {
		t.Fatalf("only %d VMs to be seen", len(want))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("by netlink (-) against by the module's API (+):\n%s", diff)
	}
}

// Another module hears of each VM, once in either way, and may leave while VMs
// come and go.
func TestAPINotifications(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	loadSample(t)
	const n = 20
	for range n {
		g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Halt()})
		if err != nil {
			t.Fatal(err)
		}
		// One that goes before it is seen is nobody's.
		newestVM(t, c, os.Getpid())
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
	var created, destroyed int
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, created, destroyed, _ = readSample(t); created >= n && destroyed >= n {
			break
		}
	}
	if created != n || destroyed != n {
		t.Errorf("%d VMs came and went; notified of %d and %d", n, created, destroyed)
	}

	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Halt()})
			if err == nil {
				err = g.Close()
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 20 {
		if err := reloadSample(); err != nil {
			t.Error(err)
			break
		}
		if _, err := os.ReadFile("/proc/" + sampleModule); err != nil {
			t.Error(err)
			break
		}
	}
	stop.Store(true)
	wg.Wait()

	// In this order both go.
	if err := unloadSample(); err != nil {
		t.Fatal(err)
	}
	if err := unloadModule(5 * time.Second); err != nil {
		t.Fatal(err)
	}
	if err := loadModule(); err != nil {
		t.Fatal(err)
	}
}

// Another module hears of each change that a watch's owner hears of, and may
// come and leave while changes are found.
func TestAPIWatchEvents(t *testing.T) {
	c, k, w := newClient(t), openKVM(t), newWatcher(t)
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: tinyvm.Spin(tinyvm.Long)})
	started(t, g)
	if err := g.Write(watchedBytes, make([]byte, 64)); err != nil {
		t.Fatal(err)
	}
	b, err := g.Bytes(watchedBytes, 1)
	if err != nil {
		t.Fatal(err)
	}
	loadSample(t)
	watch := newWatch(t, w, vm, kvmaccess.WatchConfig{},
		kvmaccess.Item{Cookie: 1, Kind: kvmaccess.KindBytes, GPA: watchedBytes, Data: make([]byte, 64)})
	wantQuiet(t, w, watch, 3)
	const n = 20
	for i := range n {
		b[0] = byte(i) + 1
		wantEvent(t, w, 1, kvmaccess.StateDifferent)
		b[0] = 0
		wantEvent(t, w, 1, kvmaccess.StateExpected)
	}
	changed := 0
	for end := time.Now().Add(patience * 10 * time.Second); changed < n && time.Now().Before(end); time.Sleep(time.Millisecond) {
		_, _, _, changed = readSample(t)
	}
	if changed != n {
		t.Errorf("%d changes were found, and another module was told of %d", n, changed)
	}

	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := byte(0); ctx.Err() == nil; i++ {
			b[0] = i
			time.Sleep(time.Millisecond)
		}
	})
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := w.Receive(ctx); err != nil && ctx.Err() == nil && !errors.Is(err, kvmaccess.ErrEventsLost) {
				t.Error(err)
				return
			}
		}
	})
	heard := false
	for i := 0; i < 20 || !heard && i < 1000; i++ {
		if err := reloadSample(); err != nil {
			t.Error(err)
			break
		}
		time.Sleep(10 * time.Millisecond)
		if _, _, _, changed = readSample(t); changed > 0 {
			heard = true
		}
	}
	stop()
	wg.Wait()
	if !heard {
		t.Error("a module that came while changes were found heard of none")
	}
}
