// SPDX-License-Identifier: MIT

package integrity

import (
	"cmp"
	"fmt"
	"slices"
	"time"
	"unsafe"
)

// BaselineVersion is the format that this package writes and takes.
const BaselineVersion = 1

// Baseline is what a Monitor compares with. It marshals to JSON and back
// without loss, so that changes made between two runs of a daemon are found.
type Baseline struct {
	Version int       `json:"version"` // 0: there is no baseline
	Taken   time.Time `json:"taken"`
	VM      VM        `json:"vm"`
	Boot    Hex       `json:"boot,omitempty"` // differs from boot to boot; 0: unknown
	Items   []Item    `json:"items"`          // by key
	Open    []Open    `json:"open,omitempty"` // by key
}

// Open is a finding that held when the baseline was saved, and what of.
type Open struct {
	Finding Finding `json:"finding"`
	Item    Item    `json:"item"`
}

// check says whether the baseline can be resumed from.
func (b *Baseline) check() error {
	if b.Version != BaselineVersion {
		return fmt.Errorf("baseline of version %d: only version %d can be resumed from; remove it to take a new one", b.Version, BaselineVersion)
	}
	seen := make(map[itemKey]bool, len(b.Items))
	for i := range b.Items {
		k := b.Items[i].key()
		if seen[k] {
			return fmt.Errorf("baseline is damaged: item %d, %s %s, is there twice; remove it to take a new one", i, k.check, k.object)
		}
		seen[k] = true
	}
	return nil
}

func (k itemKey) compare(o itemKey) int {
	return cmp.Or(
		cmp.Compare(k.check, o.check),
		cmp.Compare(k.object, o.object),
		cmp.Compare(k.vcpu, o.vcpu),
		cmp.Compare(k.entry, o.entry),
		cmp.Compare(k.name, o.name),
	)
}

// Baseline returns what the Monitor compares with; its Version is 0 while
// there is none (see StateWaiting). Items must not be changed: it is the same
// slice for as long as none of them is another one.
func (m *Monitor) Baseline() Baseline {
	if !m.based {
		return Baseline{VM: m.vm}
	}
	if m.listed == nil {
		m.listed = m.list()
	}
	b := Baseline{Version: BaselineVersion, Taken: m.taken, VM: m.vm, Boot: m.boot, Items: m.listed}
	for _, t := range m.open {
		b.Open = append(b.Open, Open{*t.open, t.last})
	}
	slices.SortFunc(b.Open, func(x, y Open) int { return x.Item.key().compare(y.Item.key()) })
	return b
}

// list is what all items are compared with, by key.
func (m *Monitor) list() []Item {
	keys := make([]itemKey, 0, len(m.items))
	for k, t := range m.items {
		if t.base != nil {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, itemKey.compare)
	items := make([]Item, len(keys))
	for i, k := range keys {
		items[i] = *m.items[k].base
	}
	return items
}

// SameItems says whether two Baselines have the same Items because one Monitor
// returned both and has changed none between.
func (b *Baseline) SameItems(o *Baseline) bool {
	return len(b.Items) == len(o.Items) && unsafe.SliceData(b.Items) == unsafe.SliceData(o.Items)
}

// setOpen takes down that a finding about an item holds; nil: none does.
func (m *Monitor) setOpen(k itemKey, t *tracked, f *Finding) {
	t.open = f
	if f == nil {
		delete(m.open, k)
	} else {
		m.open[k] = t
	}
}

// setBase takes over what an item is compared with; nil: its next sight.
func (m *Monitor) setBase(t *tracked, base *Item) {
	t.base = base
	m.listed = nil
}

// drop forgets an item.
func (m *Monitor) drop(k itemKey) {
	delete(m.items, k)
	delete(m.open, k)
	m.listed = nil
}

// resume takes over a stored baseline.
func (m *Monitor) resume(b *Baseline) {
	m.based, m.taken, m.boot = true, b.Taken, b.Boot
	for i := range b.Items {
		it := b.Items[i]
		m.items[it.key()] = &tracked{base: &it, last: it}
	}
	for i := range b.Open {
		o := b.Open[i]
		k := o.Item.key()
		t := m.items[k]
		if t == nil {
			t = &tracked{}
			m.items[k] = t
		}
		t.last = o.Item
		m.setOpen(k, t, &o.Finding)
	}
}

// Findings returns those that hold now, in the order of their keys.
func (m *Monitor) Findings() []Finding {
	var open []Finding
	for _, t := range m.open {
		open = append(open, *t.open)
	}
	slices.SortFunc(open, func(x, y Finding) int { return cmp.Compare(x.Key(), y.Key()) })
	return open
}
