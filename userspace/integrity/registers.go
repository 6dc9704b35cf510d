// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// How often a Monitor tries whether memory that could not be read can be: at
// first, and at most where it could and the guest was not attached to for all
// that.
const (
	firstProbe = time.Second
	lastProbe  = time.Minute
)

// unread is what a Monitor knows of a guest whose memory cannot be read.
type unread struct {
	reason string
	every  time.Duration // between probes; 0: it is not such a guest
	probe  time.Time     // the next one
}

// watchRegistersOnly watches what vCPUs' registers tell alone, for the reason
// that memory cannot be read; or it leaves the Monitor waiting for these to stay
// the same, as those of a kernel that boots do not.
func (m *Monitor) watchRegistersOnly(ctx context.Context, reason string) error {
	limit := m.opts.Settle
	if delta, ok := m.entryDelta(); m.userMode() || ok && delta == 0 {
		limit = min(limit, settleTables) // it is up, or the one that the baseline is of
	}
	h := sha256.New()
	for _, c := range m.cpus {
		fmt.Fprintf(h, "registers %v %v", c.ready, c.watch)
	}
	if !m.stays([32]byte(h.Sum(nil)), limit) {
		m.wait(fmt.Sprintf("%s; registers are compared once they have stayed the same for %v", reason, limit))
		return nil
	}
	m.g = &Guest{VM: m.vm, Mode: m.g.Mode, IDT: m.leader.state.IDTR, Linux: linuxRegisters(m.g.Mode, &m.leader.state)}
	m.status.Problems, m.status.Symbols, m.status.Slide, m.status.Kernel = nil, 0, 0, nil
	if !m.g.Linux {
		m.problem(notLinux)
	}
	m.rebaseRegisters()
	m.textAt = 0
	m.unread.reason = reason
	m.unread.every = max(firstProbe, m.unread.every)
	m.unread.probe = m.now().Add(m.unread.every)
	m.status.State, m.status.Reason = StateRegisters, "memory is not looked at, only registers are: "+reason
	m.layout()
	return m.reread(ctx)
}

// linuxRegisters says whether most registers that Linux loads with the same in
// each version are so: a changed one does not make another system of it, and
// others have a few in common with it.
func linuxRegisters(mode guest.Mode, v *kvmaccess.VCPU) bool {
	const (
		imageStart = 0xffffffff80000000 // __START_KERNEL_map and
		imageEnd   = 0xffffffffc0000000 // KERNEL_IMAGE_SIZE, in arch/x86/include/asm/page_64_types.h
	)
	evidence := []bool{
		v.GDTR.Limit == gdtEntries32*8-1,
		v.IDTR.Limit == 256*8-1,
		v.TR.Selector == tss32*8,
		v.SysenterCS == 0x60,
	}
	if mode.Long() {
		evidence = []bool{
			v.GDTR.Limit == gdtEntries64*8-1,
			v.IDTR == kvmaccess.TableRegister{Base: entryArea, Limit: 256*16 - 1},
			v.TR.Selector == tss64*8,
			v.STAR>>32 == star64>>32,
			v.SFMASK&sfmaskAlways == sfmaskAlways,
			v.LSTAR >= imageStart && v.LSTAR < imageEnd,
		}
	}
	found := 0
	for _, e := range evidence {
		if e {
			found++
		}
	}
	return found > len(evidence)/2
}

// imageAlign is what kernels move by: the least that PHYSICAL_ALIGN in
// arch/x86/Kconfig may be for 64 bits.
const imageAlign = 2 << 20

// rebaseRegisters is rebase where there is no interrupt table, of the baseline or
// of now, to tell how far the kernel moved. The ways into the kernel are told
// apart from an attack on them by that they all moved together, as far as
// kernels do.
func (m *Monitor) rebaseRegisters() {
	if !m.based {
		return
	}
	delta, ok := m.entryDelta()
	switch {
	case ok && delta%imageAlign == 0 && (delta != 0 || m.restarts):
		m.moveBaseline(delta)
	case !ok && m.restarts:
		m.dropBaseline()
	}
}

// probe tries, now and then, whether memory can be read by now; if so the
// Monitor waits, to attach with all there is.
func (m *Monitor) probe(ctx context.Context, now time.Time) error {
	if m.status.State != StateRegisters || now.Before(m.unread.probe) {
		return nil
	}
	m.unread.probe = now.Add(m.unread.every)
	table := kvmaccess.Range{Address: m.g.IDT.Base, Length: idtLength(m.g, m.g.IDT)}
	m.root = m.g.Mode.RootOf(m.leader.state.CR3)
	out, err := m.src.ReadVirtual(ctx, m.vm.ID, m.leader.state.ID, m.root, table)
	if err == nil && len(out) != 1 {
		err = errors.New("the answer does not fit the request")
	}
	var data []byte
	if err == nil {
		data, err = out[0].Data, out[0].Err
	}
	if err != nil && unreadableError(err) && !guestError(err) {
		data, err = m.fetch(ctx, table.Address, table.Length) // not by the module alone
	}
	switch {
	case err != nil && !unreadableError(err):
		return fmt.Errorf("guest %v: the interrupt table: %w", m.vm, err)
	case err != nil || !complete(guest.ParseIDT(data, m.g.Mode.Long())):
		return nil
	}
	m.unread.every = min(2*m.unread.every, lastProbe) // until it is attached to
	m.wait("its memory can be read again: it is looked at anew")
	m.scanned = time.Time{}
	return nil
}

// readable takes down that the guest was attached to after all.
func (m *Monitor) readable() {
	if m.unread.every != 0 {
		m.accept("memory readable", fmt.Sprintf("its memory is looked at from now on; until now only its registers were: %s", m.unread.reason))
	}
	m.unread = unread{}
}
