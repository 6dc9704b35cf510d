// SPDX-License-Identifier: MIT

package integrity

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// WatchItem is one thing that the kernel module is to compare, so that a
// Monitor need not look while it stays the same: it is expected to be as the
// Monitor saw it last, so that what is found, and what is in order again, are
// both told.
type WatchItem struct {
	kvmaccess.Item        // without a Cookie; Data is not to be written to
	What           string // what it is of, in words
	key            *WatchKey
}

// WatchKey tells WatchItems apart: those with the same key are the same.
type WatchKey struct {
	WatchPlace
	value, mask uint64
	data        string // or digests
}

// WatchPlace is where a WatchItem looks.
type WatchPlace struct {
	kind     kvmaccess.ItemKind
	gpa      uint64
	register kvmaccess.Register
	vcpu     int64 // -1: each
}

// Register says whether it is a register.
func (p WatchPlace) Register() bool { return p.kind == kvmaccess.KindRegister }

// Place is where the item looks.
func (w *WatchItem) Place() WatchPlace {
	p := WatchPlace{w.Kind, w.GPA, w.Register, -1}
	if w.VCPU != nil {
		p.vcpu = int64(*w.VCPU)
	}
	return p
}

// Key is where the item looks, and what it expects there.
func (w *WatchItem) Key() WatchKey {
	if w.key != nil {
		return *w.key
	}
	data := w.Data
	for _, d := range w.Digests {
		data = binary.LittleEndian.AppendUint64(data, d)
	}
	return WatchKey{w.Place(), w.Value, w.Mask, string(data)}
}

// WatchList is all that the module is to compare of a guest.
type WatchList struct {
	Items []WatchItem
	// Again is when the next Tick is to follow whatever the module finds: a
	// vCPU just came up, or something could not be read. 0: not before that.
	Again time.Duration
}

// unseenAgain is how soon a Monitor is to try again what it could not read.
const unseenAgain = retryEvery

// WatchedRegister is a register that a kernel loads once on each vCPU.
type WatchedRegister struct {
	Register kvmaccess.Register
	Mask     uint64 // the bits that it leaves as they are then; 0: all
}

var watchedRegisters = [...]WatchedRegister{
	{kvmaccess.RegisterCR0, guest.CR0PE | guest.CR0WP | guest.CR0PG},
	{kvmaccess.RegisterCR4, guest.CR4PAE | guest.CR4LA57 | guest.CR4SMEP | guest.CR4SMAP | guest.CR4UMIP | guest.CR4FSGSBASE | guest.CR4CET},
	{kvmaccess.RegisterEFER, guest.EFERSCE | guest.EFERLMA | guest.EFERNXE},
	{kvmaccess.RegisterGDTRBase, 0},
	{kvmaccess.RegisterGDTRLimit, 0},
	{kvmaccess.RegisterIDTRBase, 0},
	{kvmaccess.RegisterIDTRLimit, 0},
	{kvmaccess.RegisterTRBase, 0},
	{kvmaccess.RegisterTRSelector, 0},
	{kvmaccess.RegisterSTAR, 0},
	{kvmaccess.RegisterLSTAR, 0},
	{kvmaccess.RegisterCSTAR, 0},
	{kvmaccess.RegisterSFMASK, 0},
	{kvmaccess.RegisterSysenterCS, 0},
	{kvmaccess.RegisterSysenterESP, 0},
	{kvmaccess.RegisterSysenterEIP, 0},
}

// WatchedRegisters returns those that a Monitor watches.
func WatchedRegisters() []WatchedRegister {
	return watchedRegisters[:len(watchedRegisters):len(watchedRegisters)]
}

// Item has the module compare the register with what it is in r.
func (w WatchedRegister) Item(r *kvmaccess.Registers) kvmaccess.Item {
	return kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: w.Register, Value: w.of(r), Mask: w.Mask}
}

// of is the register's value in r, without the bits that change.
func (w WatchedRegister) of(r *kvmaccess.Registers) uint64 {
	v := r.Get(w.Register)
	if w.Mask != 0 {
		v &= w.Mask
	}
	return v
}

// watched are the values of watchedRegisters.
type watched [len(watchedRegisters)]uint64

func watch(v *kvmaccess.VCPU) (w watched) {
	for i, r := range watchedRegisters {
		w[i] = r.of(&v.Registers)
	}
	return w
}

// WatchItems lists what the module is to compare now: all registers and memory
// that the checks of the last Tick were made of, and the page-table entries by
// which that memory was read, without their accessed and dirty bits. It is
// empty while there is nothing to compare with. What it reads of the guest are
// page tables; an error is one of reading.
func (m *Monitor) WatchItems(ctx context.Context) (WatchList, error) {
	var list WatchList
	m.places = m.places[:0]
	if m.g == nil {
		return list, nil
	}
	list.Items = m.watchRegisters()
	if err := m.watchMemory(ctx, &list); err != nil {
		return WatchList{}, err
	}
	switch {
	case m.unseen:
		list.Again = unseenAgain
	case m.status.State == StateRegisters:
		list.Again = m.unread.every
	}
	for _, c := range m.cpus {
		if c.ready && !c.settled {
			list.Again = settleVCPU
		}
	}
	return list, nil
}

// watchRegisters lists registers: once for all vCPUs where these agree, which
// is less to compare. Those of vCPUs that do not run the kernel are there, too:
// that they change says that one comes up.
func (m *Monitor) watchRegisters() []WatchItem {
	items := make([]WatchItem, 0, len(watchedRegisters)+4*len(m.cpus)+len(m.watched[0])) // with memory behind
	vms := slices.ContainsFunc(m.cpus, func(c *cpu) bool { return hasVMs(&c.state.Registers) })
	for i, r := range watchedRegisters {
		same := true
		for _, c := range m.cpus {
			same = same && c.ready && c.watch[i] == m.cpus[0].watch[i]
		}
		for _, c := range m.cpus {
			if c.watch == (watched{}) {
				continue // with a nested guest since it was first seen
			}
			it := WatchItem{Item: r.Item(&c.state.Registers), What: r.Register.String()}
			if vms {
				loosen(&it.Item)
			}
			if same {
				items = append(items, it)
				break
			}
			it.VCPU, it.What = ref(c.state.ID), fmt.Sprintf("%v of vCPU %d", r.Register, c.state.ID)
			items = append(items, it)
		}
	}
	return items
}

// place is where a stretch of a range lies in guest-physical memory.
type place struct {
	gpa, size uint64
	index     int    // in Monitor.ranges
	offset    uint64 // in that
}

func (p place) has(gpa uint64) bool { return gpa >= p.gpa && gpa-p.gpa < p.size }

// watchMemory lists the ranges as they were read last, and the way to them.
func (m *Monitor) watchMemory(ctx context.Context, list *WatchList) error {
	root := m.root
	if !m.rootFixed {
		root = m.currentRoot()
	}
	if m.tables == nil {
		m.tables = guest.NewPageCache(m.mem)
	} else if m.tables != m.mem {
		m.tables.Renew()
	}
	walk := walkRecorder{mem: m.tables}
	// What is as it was is listed as it was: mostly all of it.
	seen, before := m.watched.next()
	add := func(it WatchItem, data []byte) {
		p := it.Place()
		if _, ok := seen[p]; ok {
			return
		}
		l, ok := before[p]
		if !ok || l.key.value != it.Value || l.key.mask != it.Mask || !bytes.Equal(l.data, data) {
			it.Data = bytes.Clone(data)
			l = listed{it.Data, ref(it.Key())}
		}
		it.Data, it.key = l.data, l.key
		seen[p] = l
		list.Items = append(list.Items, it)
	}
	for i, r := range m.ranges {
		what := m.rangeName(i)
		tablesOf := "page tables of " + what
		for offset := uint64(0); offset < uint64(r.Length); {
			gva := r.Address + offset
			n := min(4096-gva&4095, uint64(r.Length)-offset)
			walk.entries = walk.entries[:0]
			t, err := guest.Translate(ctx, &walk, m.g.Mode, root, gva)
			if err != nil && !guestError(err) {
				if !rangeError(err) {
					return fmt.Errorf("page tables of guest %v: %w", m.vm, err)
				}
				m.unseen = true
			}
			if !m.rootFixed && len(walk.entries) > 0 {
				walk.entries = walk.entries[1:] // a process' own
			}
			for _, e := range walk.entries {
				add(e.item(tablesOf), nil)
			}
			if err == nil && m.data[i] != nil {
				for _, part := range m.parts(i, offset, n) {
					add(WatchItem{Item: kvmaccess.Item{
						Kind: kvmaccess.KindBytes, GPA: t.GPA + part.Start - offset,
					}, What: what}, m.data[i][part.Start:part.End])
				}
				m.places = append(m.places, place{t.GPA, n, i, offset})
			}
			offset += n
		}
	}
	return nil
}

// listed is what there is to keep of a WatchItem for the next list.
type listed struct {
	data []byte
	key  *WatchKey
}

// watchedMemory is what was listed last of memory, by place, and before.
type watchedMemory [2]map[WatchPlace]listed

// next begins a new list; before is the last one.
func (w *watchedMemory) next() (now, before map[WatchPlace]listed) {
	w[0], w[1] = w[1], w[0]
	if w[0] == nil {
		w[0] = map[WatchPlace]listed{}
	}
	clear(w[0])
	return w[0], w[1]
}

// parts splits what a range has from offset on into what changes as programs
// come and go and what does not, so that the former can be told apart.
func (m *Monitor) parts(index int, offset, n uint64) []guest.Extent {
	cuts := []uint64{offset, offset + n}
	for i := range m.objects {
		if o := &m.objects[i]; o.index == index && o.Volatile.End != 0 {
			for _, at := range []uint64{o.Volatile.Start, o.Volatile.End} {
				if at > offset && at < offset+n {
					cuts = append(cuts, at)
				}
			}
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	out := make([]guest.Extent, 0, len(cuts)-1)
	for i := range cuts[:len(cuts)-1] {
		out = append(out, guest.Extent{Start: cuts[i], End: cuts[i+1]})
	}
	return out
}

func (m *Monitor) rangeName(index int) string {
	for i := range m.objects {
		if o := &m.objects[i]; o.index == index {
			if o.VCPU != nil {
				return fmt.Sprintf("%s of vCPU %d", o.Name, *o.VCPU)
			}
			return o.Name
		}
	}
	return "memory"
}

// walkRecorder takes down which page-table entries a translation reads.
type walkRecorder struct {
	mem     guest.Memory
	entries []tableEntry
}

// tableEntry is the 8 bytes that an entry of 4 or 8 bytes is in.
type tableEntry struct {
	gpa   uint64
	value uint64
	mask  uint64
}

// ReadPhysical implements guest.Memory.
func (w *walkRecorder) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	var word [8]byte
	if err := w.mem.ReadPhysical(ctx, gpa&^7, word[:]); err != nil {
		return err
	}
	copy(p, word[gpa&7:])
	// The processor sets these (Intel SDM vol. 3, "Accessed and Dirty Flags").
	const changing = 1<<5 | 1<<6
	mask := uint64(1<<(8*len(p)-1))<<1 - 1
	mask = (mask &^ changing) << (8 * (gpa & 7))
	w.entries = append(w.entries, tableEntry{gpa &^ 7, binary.LittleEndian.Uint64(word[:]) & mask, mask})
	return nil
}

func (e tableEntry) item(what string) WatchItem {
	return WatchItem{Item: kvmaccess.Item{Kind: kvmaccess.KindEntry, GPA: e.gpa, Value: e.value, Mask: e.mask}, What: what}
}

// mostPlaces bounds what Reread reads; the Tick after it reads the rest.
const mostPlaces = 16

// Reread reads again the memory that events of the module are of, and nothing
// else, and returns what is to be said of that: it is soon done, and says what
// the Tick that is to follow would say of that memory. Where it takes more than
// that memory to tell, it says nothing: when registers changed as well, which may
// be a restart, or when something cannot be read. told, which may be shorter than
// events, says which of them are of a change that was there.
func (m *Monitor) Reread(ctx context.Context, events []kvmaccess.WatchEvent) (findings []Finding, told []bool, err error) {
	if m.g == nil || m.status.State != StateWatching {
		return nil, nil, nil
	}
	places := m.eventPlaces(events)
	if len(places) == 0 || !m.still(ctx, places) {
		return nil, nil, nil
	}
	root := m.root
	if !m.rootFixed {
		root = m.currentRoot()
	}
	ranges := make([]kvmaccess.Range, len(places))
	for i, p := range places {
		ranges[i] = kvmaccess.Range{Address: m.ranges[p.index].Address + p.offset, Length: uint32(p.size)}
	}
	out, err := m.src.ReadVirtual(ctx, m.vm.ID, m.leader.state.ID, root, ranges...)
	if err != nil || len(out) != len(ranges) {
		return nil, nil, nil // Tick tries more, and says what is wrong
	}
	changed := false
	told = make([]bool, len(events))
	for i, p := range places {
		if out[i].Err != nil || uint64(len(out[i].Data)) != p.size {
			continue
		}
		for j := range events {
			if e := &events[j]; memoryEvent(e) && p.has(e.GPA) {
				at := e.GPA - p.gpa
				n := min(uint64(max(1, len(e.Data))), p.size-at)
				told[j] = told[j] || !bytes.Equal(out[i].Data[at:at+n], m.data[p.index][p.offset+at:][:n])
			}
		}
		changed = m.put(p.index, p.offset, out[i].Data) || changed
	}
	if !changed {
		return nil, nil, nil
	}
	m.status.Slow++
	if err := m.evaluate(ctx); err != nil {
		return nil, told, err
	}
	return m.flush(), told, nil
}

// memoryEvent says whether an event is of bytes that became others, or what they
// were.
func memoryEvent(e *kvmaccess.WatchEvent) bool {
	return e.Kind == kvmaccess.KindBytes && (e.State == kvmaccess.StateDifferent || e.State == kvmaccess.StateExpected)
}

// eventPlaces are those that events are of, each once.
func (m *Monitor) eventPlaces(events []kvmaccess.WatchEvent) []place {
	var places []place
	for i := range events {
		if !memoryEvent(&events[i]) {
			continue
		}
		for _, p := range m.places {
			if p.has(events[i].GPA) && m.data[p.index] != nil && !slices.Contains(places, p) {
				places = append(places, p)
			}
		}
		if len(places) >= mostPlaces {
			break
		}
	}
	return places
}

// still says whether the vCPUs that tell of a restart, by whose page tables
// memory is read, and whose tables are in these places are as they were.
func (m *Monitor) still(ctx context.Context, places []place) bool {
	cpus := []*cpu{m.cpus[0]}
	add := func(c *cpu) {
		if !slices.Contains(cpus, c) {
			cpus = append(cpus, c)
		}
	}
	add(m.leader)
	for i := range m.objects {
		o := &m.objects[i]
		if o.VCPU != nil && slices.ContainsFunc(places, func(p place) bool { return p.index == o.index }) {
			add(o.cpu)
		}
	}
	for _, c := range cpus {
		if !c.ready || !c.settled {
			return false
		}
		state, err := m.src.VCPU(ctx, m.vm.ID, c.state.ID)
		restoreLimits(&state.Registers, &c.state.Registers)
		if err != nil || state.Flags&(kvmaccess.VCPUNested|kvmaccess.VCPUSMM) != 0 || readyReason(&state) != "" || watch(&state) != c.watch {
			return false
		}
		c.state = state
	}
	return true
}

// See takes the guest to have been, for a moment, as an event of the module
// says, which the Tick that followed did not see any more, and returns what is
// to be said of that. The next Tick sees the guest as it is.
func (m *Monitor) See(ctx context.Context, e kvmaccess.WatchEvent) ([]Finding, error) {
	if m.g == nil || e.State != kvmaccess.StateDifferent {
		return nil, nil
	}
	layout, changed := false, false
	switch e.Kind {
	case kvmaccess.KindRegister:
		for _, c := range m.cpus {
			if c.state.ID != e.VCPU || len(e.Data) != 8 || !c.settled {
				continue
			}
			state := c.state
			if state.Set(e.Register, binary.LittleEndian.Uint64(e.Data)) {
				layout, changed = c.update(state, m.now())
			}
		}
	case kvmaccess.KindBytes:
		changed = m.seeBytes(e.GPA, e.Data)
	}
	switch {
	case layout:
		m.layout()
		if err := m.reread(ctx); err != nil {
			return nil, err
		}
	case changed:
		m.status.Slow++
		if err := m.evaluate(ctx); err != nil {
			return nil, err
		}
	}
	return m.flush(), nil
}

// seeBytes puts bytes into what was read last.
func (m *Monitor) seeBytes(gpa uint64, data []byte) (changed bool) {
	for _, p := range m.places {
		if !p.has(gpa) || m.data[p.index] == nil {
			continue
		}
		n := min(uint64(len(data)), p.size-(gpa-p.gpa))
		changed = m.put(p.index, p.offset+gpa-p.gpa, data[:n]) || changed
	}
	return changed
}

// put puts bytes into what was read last of a range.
func (m *Monitor) put(index int, offset uint64, data []byte) (changed bool) {
	old := m.data[index][offset:][:len(data)]
	if bytes.Equal(old, data) {
		return false
	}
	copy(old, data)
	for i := range m.objects {
		if m.objects[i].index == index {
			m.objects[i].dirty = true
		}
	}
	return true
}
