// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// blindGuest is a guest whose memory its VMM takes away and gives back, and
// whose registers it changes.
type blindGuest struct {
	*tinyvm.Guest
	t     *testing.T
	vm    kvmaccess.VM
	user  bool
	slots []tinyvm.Slot
	blind bool // its memory is gone
}

const (
	blindTable   = 0xfffff80000000000 // not Linux's: nothing is expected of the guest
	blindHandler = blindTable + 0x1000
	userCode     = 1<<30 + tinyvm.Code
)

// newBlindGuest makes a guest that is up as far as its registers tell. Its vCPU
// is halted in the kernel, or runs a program, and is stopped then while there is
// no memory.
func newBlindGuest(t *testing.T, k *tinyvm.KVM, c *kvmaccess.Client, user bool) *blindGuest {
	t.Helper()
	code, in := tinyvm.Halt(), kvmaccess.ConditionHalted
	if user {
		code, in = tinyvm.Spin(tinyvm.Long), kvmaccess.ConditionGuest
	}
	g, vm := tinyGuest(t, k, c, tinyvm.Config{Mode: tinyvm.Long, Code: code, IRQChip: true})
	b := &blindGuest{Guest: g, t: t, vm: vm, user: user, slots: g.Slots()}
	gates(t, g, blindTable, blindHandler, 16, 0)
	if err := g.VCPUs[0].SetMSRs(
		tinyvm.MSR{Index: tinyvm.MSRSTAR, Value: 0x23<<48 | 0x10<<32},
		tinyvm.MSR{Index: tinyvm.MSRLSTAR, Value: blindHandler},
		tinyvm.MSR{Index: tinyvm.MSRCSTAR, Value: blindHandler + 0x40},
		tinyvm.MSR{Index: tinyvm.MSRSFMASK, Value: 0x257fd5},
	); err != nil {
		t.Fatal(err)
	}
	if user {
		if err := g.Tables.Map(userCode, tinyvm.Code, tinyvm.Page4K, tinyvm.Page4K, tinyvm.EntryUser); err != nil {
			t.Fatal(err)
		}
		if err := g.VCPUs[0].EnterUser(); err != nil {
			t.Fatal(err)
		}
		r, err := g.VCPUs[0].Regs()
		if err != nil {
			t.Fatal(err)
		}
		r.RIP = userCode
		if err := g.VCPUs[0].SetRegs(r); err != nil {
			t.Fatal(err)
		}
	}
	started(t, g)
	until(t, c, vm.ID, 0, "up", inCondition(in))
	return b
}

// enter sets where system calls enter the kernel.
func (b *blindGuest) enter(at uint64) {
	b.t.Helper()
	b.change(func(v *tinyvm.VCPU) error { return v.SetMSRs(tinyvm.MSR{Index: tinyvm.MSRLSTAR, Value: at}) })
}

// protect sets or clears CR0.WP.
func (b *blindGuest) protect(on bool) {
	b.t.Helper()
	b.change(func(v *tinyvm.VCPU) error {
		s, err := v.SRegs()
		if err != nil {
			return err
		}
		if s.CR0 &^= tinyvm.CR0WP; on {
			s.CR0 |= tinyvm.CR0WP
		}
		return v.SetSRegs(s)
	})
}

// change changes the vCPU while it does not run. If there is memory it goes on
// in the guest: what was changed counts from then on, and the module does not
// look at a vCPU that has not been there.
func (b *blindGuest) change(change func(*tinyvm.VCPU) error) {
	b.t.Helper()
	stopped(b.t, b.Guest)
	err := change(b.VCPUs[0])
	if err == nil && !b.blind {
		err = b.VCPUs[0].SetRunnable()
	}
	if err != nil {
		b.t.Fatal(err)
	}
	b.goOn()
}

// condition is the vCPU's, without memory.
func (b *blindGuest) condition() kvmaccess.Condition {
	if b.user {
		return kvmaccess.ConditionUser
	}
	return kvmaccess.ConditionHalted
}

func (b *blindGuest) goOn() {
	b.t.Helper()
	if !b.user || !b.blind {
		started(b.t, b.Guest)
	}
}

// lose takes the memory away; recall gives it back as it was.
func (b *blindGuest) lose() {
	b.t.Helper()
	stopped(b.t, b.Guest)
	b.blind = true
	defer b.goOn()
	for _, s := range b.slots {
		s.Size = 0
		setSlot(b.t, b.Guest, s)
	}
}

func (b *blindGuest) recall() {
	b.t.Helper()
	for _, s := range b.slots {
		setSlot(b.t, b.Guest, s)
	}
	stopped(b.t, b.Guest)
	b.blind = false
	b.goOn()
}

func (b *blindGuest) status(d *monitor.Daemon) (daemon.VMStatus, error) {
	vms, err := d.Client.VMs(testContext(b.t))
	for _, vm := range vms {
		if vm.ID == b.vm.ID {
			return vm, nil
		}
	}
	return daemon.VMStatus{}, errors.Join(err, fmt.Errorf("no VM %d in %+v", b.vm.ID, vms))
}

// becomes waits until the daemon says that the guest is so.
func (b *blindGuest) becomes(d *monitor.Daemon, state daemon.State, says string) (s daemon.VMStatus) {
	b.t.Helper()
	eventually(b.t, 2*time.Minute, func() error {
		var err error
		if s, err = b.status(d); err == nil && (s.State != state || !strings.Contains(s.Reason, says)) {
			err = fmt.Errorf("it is %q (%s), not %q (%s)", s.State, s.Reason, state, says)
		}
		return err
	})
	b.t.Logf("VM %d: %s: %s", b.vm.ID, s.State, s.Reason)
	return s
}

// told waits until these, as kind and key, are all findings of the guest.
func (b *blindGuest) told(d *monitor.Daemon, want ...string) {
	b.t.Helper()
	eventually(b.t, 20*time.Second, func() error {
		got := []string{}
		for _, r := range findings(b.t, d, daemon.Query{VM: strconv.Itoa(int(b.vm.ID))}) {
			got = append(got, string(r.Kind)+" "+r.Key())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			return fmt.Errorf("findings of VM %d: -want +got\n%s", b.vm.ID, diff)
		}
		return nil
	})
}

// A guest whose memory is all gone has its registers watched, and that is said;
// all of it is watched when it has memory again, and registers go on to be when
// that goes another time.
func TestRegistersOnly(t *testing.T) {
	c, k := newClient(t), openKVM(t)
	for _, mode := range []daemon.Mode{daemon.ModeWatch, daemon.ModePoll} {
		t.Run(string(mode), func(t *testing.T) {
			guests := map[string]*blindGuest{"a program": newBlindGuest(t, k, c, true)}
			names := []string{"a program"}
			if mode == daemon.ModeWatch { // half a minute
				guests["halted"] = newBlindGuest(t, k, c, false)
				names = append(names, "halted")
			}
			for _, b := range guests {
				b.lose()
			}
			d := startDaemon(t, t.TempDir(), "--mode", string(mode), "--period", "100ms")
			want := map[string][]string{}
			expect := func(name string, more ...string) {
				t.Helper()
				want[name] = append(want[name], more...)
				guests[name].told(d, want[name]...)
			}
			for _, name := range names {
				b := guests[name]
				s := b.becomes(d, daemon.StateRegisters, "memory is not looked at, only registers are")
				if s.Baseline == nil {
					t.Errorf("%s: %+v", name, s)
				}
				b.enter(blindHandler + 0x80)
				expect(name, "changed msr/lstar@0/LSTAR")
				b.protect(false)
				expect(name, "changed control/cr0@0/CR0.WP")
				b.protect(true)
				expect(name, "cleared control/cr0@0/CR0.WP")
				b.becomes(d, daemon.StateRegisters, "cannot be read")
				if mode == daemon.ModeWatch {
					// A finding is told before the module is given what to expect
					// from then on.
					eventually(t, 20*time.Second, func() error {
						s, err := b.status(d)
						if err == nil && (s.Watch == nil || s.Watch.Ticks == 0 || s.Watch.Items < 16 || s.Watch.Bytes != 0) {
							err = fmt.Errorf("%s: not registers, all and only, by the module: %+v", name, s.Watch)
						}
						if err == nil {
							t.Logf("%s: %d ticks of the module, %d items, %d events", name, s.Watch.Ticks, s.Watch.Items, s.Watch.Events)
						}
						return err
					})
				}
			}
			out, errs, code := cli(t, "check", strconv.Itoa(int(guests["a program"].vm.ID)))
			if code != 1 || !strings.Contains(out, "the registers of 1 vCPU") || !strings.Contains(out, "memory is not looked at") {
				t.Errorf("kvmaccess check: exit code %d\n%s%s", code, out, errs)
			}
			for name, b := range guests {
				b.recall()
				if s := b.becomes(d, daemon.StateWatching, ""); s.Accepted == 0 || strings.Contains(s.Reason, "not looked at") {
					t.Errorf("%s: %+v", name, s)
				}
				eventually(t, 10*time.Second, func() error {
					if !strings.Contains(d.Output(), `rule="memory readable"`) {
						return fmt.Errorf("no record in the log:\n%s", d.Output())
					}
					return nil
				})
				b.enter(blindHandler)
				expect(name, "cleared msr/lstar@0/LSTAR")
				gate, err := b.Bytes(tinyvm.DefaultMemory-0x2000+14*16, 2)
				if err != nil {
					t.Fatal(err)
				}
				gate[0] ^= 0x40
				expect(name, "changed idt/idt/14")
				gate[0] ^= 0x40
				expect(name, "cleared idt/idt/14")
				b.lose()
				b.becomes(d, daemon.StateRegisters, "cannot be read")
				b.protect(false)
				expect(name, "changed control/cr0@0/CR0.WP")
				until(t, c, b.vm.ID, 0, "as it was left", func(v kvmaccess.VCPU) bool {
					return v.Condition == b.condition() && v.CR0&guest.CR0WP == 0
				})
			}
			if err := d.Stop(testContext(t)); err != nil {
				t.Error(err)
			}
			for name, b := range guests {
				if all := watchesOf(t, c, b.vm.ID); len(all) != 0 {
					t.Errorf("%s: watches are left: %+v", name, all)
				}
			}
		})
	}
}
