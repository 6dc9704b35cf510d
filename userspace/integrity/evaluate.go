// SPDX-License-Identifier: MIT

package integrity

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// evaluate makes the items of what changed and compares them with the
// baseline.
func (m *Monitor) evaluate(ctx context.Context) error {
	if !m.attaching && (m.restarted() || m.left(ctx)) {
		if m.g.Kernel != nil {
			m.wait(notRunning) // finding a kernel takes longer than a tick may
			m.scanned = time.Time{}
			return nil
		}
		return m.attach(ctx)
	}
	g := m.g
	g.modules = m.moduleNamer(ctx)
	defer func() { g.modules = nil }()
	if !m.based {
		m.taken = m.now()
	}
	for i := range m.objects {
		o := &m.objects[i]
		if !o.dirty && !(o.index < 0 && o.cpu.dirty) && !(o.VCPU != nil && o.cpu.dirty) {
			continue
		}
		var data []byte
		var err error
		if o.index >= 0 {
			data, err = m.data[o.index], m.errs[o.index]
			if data == nil && !guestError(err) {
				continue // the host's matter: not seen yet
			}
		}
		o.dirty = false
		if !m.compareChanged(o, data) {
			m.compare(o, o.Items(m.g, &o.cpu.state, data, err), o.index >= 0 && data == nil)
		}
		if o.Changed != nil {
			o.made = append(o.made[:0], data...)
		}
	}
	for _, c := range m.cpus {
		c.dirty = false
	}
	m.based = true
	return nil
}

// restarted says whether the kernel as a whole lies elsewhere than the
// baseline's, so that a comparison would find everything changed.
func (m *Monitor) restarted() bool {
	if !m.based {
		return false
	}
	for i := range m.objects {
		o := &m.objects[i]
		if o.check != checkIDT || o.Name != "idt" || o.VCPU != nil || !o.dirty || m.data[o.index] == nil {
			continue
		}
		same, of := 0, 0
		for _, g := range guest.ParseIDT(m.data[o.index], m.g.Mode.Long()) {
			t := m.items[itemKey{checkIDT, "idt", -1, g.Vector, ""}]
			if t == nil || t.base == nil {
				continue
			}
			of++
			if Hex(g.Handler) == t.base.Value.Value {
				same++
			}
		}
		return of > 0 && 2*same <= of && m.entryMoved()
	}
	return false
}

// entryMoved says whether the leader enters the kernel elsewhere, too: a guest
// of which all gates were changed is not restarted.
func (m *Monitor) entryMoved() bool {
	name, at := "lstar", m.leader.state.LSTAR
	if !m.g.Mode.Long() {
		name, at = "sysenter_eip", m.leader.state.SysenterEIP
	}
	for k, t := range m.items {
		if k.check == checkMSR && k.object == name && t.base != nil && t.base.Value.Value == Hex(at) {
			return false
		}
	}
	return true
}

// left says whether another kernel than the one that was attached to runs by
// now, in early boot perhaps. It is asked where tables moved, shrank or cannot
// be read any more.
func (m *Monitor) left(ctx context.Context) bool {
	suspect := false
	for i := range m.objects {
		o := &m.objects[i]
		switch {
		case o.index >= 0 && o.dirty && m.data[o.index] == nil && guestError(m.errs[o.index]):
			suspect = true
		case o.index >= 0 && o.dirty && o.check == checkIDT && o.VCPU == nil && m.data[o.index] != nil:
			if !complete(guest.ParseIDT(m.data[o.index], m.g.Mode.Long())) {
				return true
			}
			suspect = true
		case o.Name == "idtr" || o.Name == "gdtr":
			suspect = suspect || o.dirty || o.cpu.dirty
		}
	}
	if !suspect || m.textAt == 0 {
		return false
	}
	first := m.cpus[0]
	t, err := guest.Translate(ctx, m.mem, guest.ModeOf(&first.state.Registers), first.state.CR3, m.handler)
	return guestError(err) || err == nil && (t.GPA != m.textAt || !t.Execute)
}

// compareChanged takes over those items of an object that changed, if it can
// tell which they are.
func (m *Monitor) compareChanged(o *object, data []byte) bool {
	if o.Changed == nil || len(o.made) != len(data) || len(data) == 0 {
		return false
	}
	items, ok := o.Changed(m.g, o.made, data)
	for i := range items {
		m.track(items[i].key(), &items[i], true)
	}
	return ok
}

// compare takes over the items of an object.
func (m *Monitor) compare(o *object, items []Item, failed bool) {
	known := false
	vcpu := int64(-1)
	if o.VCPU != nil {
		vcpu = int64(*o.VCPU)
	}
	var keys []itemKey // of the object, before
	for k, t := range m.items {
		// The registers of a vCPU make items of several objects' names.
		if o.index >= 0 && k.check == o.check && k.object == o.Name && k.vcpu == vcpu {
			keys = append(keys, k)
			known = known || t.last.Raw != "unreadable"
		}
	}
	now := make(map[itemKey]bool, len(items))
	for i := range items {
		k := items[i].key()
		now[k] = true
		m.track(k, &items[i], known && !failed)
	}
	if failed {
		return
	}
	vanished := slices.DeleteFunc(keys, func(k itemKey) bool { return now[k] })
	slices.SortFunc(vanished, itemKey.compare)
	for _, k := range vanished {
		m.vanish(k)
	}
}

// track compares one item. isNew: an item that was never seen is a new one in
// an object that was.
func (m *Monitor) track(k itemKey, it *Item, isNew bool) {
	t := m.items[k]
	if t == nil {
		t = &tracked{}
		m.items[k] = t
		if isNew {
			base := &Item{Check: it.Check, Object: it.Object, VCPU: it.VCPU, Entry: it.Entry, Name: it.Name, Raw: "absent", Scope: it.Scope}
			base.Value.Detail = "absent"
			m.setBase(t, base)
		}
	}
	if t.base == nil {
		base := *it
		m.setBase(t, &base)
	}
	changed := !it.same(t.base, 0)
	if it.Fault == "" && (changed && t.base.Fault != "" || it.Flag && it.Value.Value > t.base.Value.Value) {
		// What was wrong from the start was put right, or a guard was added.
		base := *it
		m.setBase(t, &base)
		changed = false
	}
	bad := changed || it.Fault != ""
	switch {
	case bad && (t.open == nil || t.last.Value.Value != it.Value.Value || t.last.Raw != it.Raw):
		m.setOpen(k, t, m.finding(it, t.base, changed))
		m.emit(*t.open)
	case !bad && t.open != nil:
		m.emit(m.cleared(it, t))
		m.setOpen(k, t, nil)
	}
	t.last = *it
}

// vanish handles an item that its object no longer has.
func (m *Monitor) vanish(k itemKey) {
	t := m.items[k]
	if t.last.Raw == "unreadable" {
		if t.open != nil {
			f := m.cleared(&t.last, t)
			f.New = nil
			f.Message = fmt.Sprintf("%s can be read again", t.last.subject(m.vm))
			m.emit(f)
		}
		m.drop(k)
		return
	}
	if t.base == nil || t.base.Raw == "absent" {
		if t.open != nil {
			f := m.cleared(&t.last, t)
			f.New = nil
			f.Message = fmt.Sprintf("%s is gone again", t.last.subject(m.vm))
			m.emit(f)
		}
		m.drop(k)
		return
	}
	if t.last.Raw == "absent" {
		return
	}
	gone := *t.base
	gone.Raw, gone.Value, gone.Fault = "absent", Value{Detail: "absent"}, "the table has become shorter"
	m.setOpen(k, t, m.finding(&gone, t.base, true))
	m.emit(*t.open)
	t.last = gone
}

// finding explains a bad item.
func (m *Monitor) finding(it, base *Item, changed bool) *Finding {
	f := &Finding{VM: m.vm, VCPU: it.VCPU, Check: it.Check, Object: it.Object, Entry: it.Entry, Name: it.Name,
		Kind: KindInvariant, Reason: it.Fault}
	now, old, where := it.Value, base.Value, ""
	if it.Check == checkMemory && changed {
		old, now, where = explainMemory(*base, *it)
	}
	f.New = &now
	why := ""
	if it.Fault != "" {
		why = " (" + it.Fault + ")"
	}
	subject, verb := it.subject(m.vm), it.verb()
	full := !changed || it.Raw != base.Raw
	if !changed {
		f.Message = fmt.Sprintf("%s %s %s%s", subject, verb, now.text(it, full), why)
		return f
	}
	f.Kind, f.Old = KindChanged, &old
	switch {
	case where != "":
		f.Message = fmt.Sprintf("%s: %s: now %s, was %s", subject, where, now.Detail, old.Detail)
	case verb == "is":
		f.Message = fmt.Sprintf("%s is now %s%s, was %s", subject, now.text(it, full), why, old.text(base, full))
	default:
		f.Message = fmt.Sprintf("%s now %s %s%s, was %s", subject, verb, now.text(it, full), why, old.text(base, full))
	}
	return f
}

// cleared says that what was found does not hold any more.
func (m *Monitor) cleared(it *Item, t *tracked) Finding {
	now := it.Value
	f := Finding{VM: m.vm, VCPU: it.VCPU, Check: it.Check, Object: it.Object, Entry: it.Entry, Name: it.Name,
		Kind: KindCleared, Old: t.open.New, New: &now}
	if it.Check == checkMemory {
		f.Message = fmt.Sprintf("%s is as it was again", it.subject(m.vm))
		return f
	}
	f.Message = fmt.Sprintf("%s %s %s again", it.subject(m.vm), it.verb(), now.text(it, false))
	return f
}

// emit queues a finding. Of a queue that has grown beyond all reason, because
// the guest changes faster than findings are taken, the newest about each item
// is kept.
func (m *Monitor) emit(f Finding) {
	f.Time, f.VM = m.now().UTC(), m.vm
	if len(m.queue) >= maxQueue {
		key := f.Key()
		for i := len(m.queue) - 1; i >= 0; i-- {
			if m.queue[i].Key() == key {
				m.queue[i] = f
				return
			}
		}
	}
	m.queue = append(m.queue, f)
}
