// SPDX-License-Identifier: MIT

package integrity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Scratch keeps a copy of a kernel's code; an *os.File is one.
type Scratch interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
}

// TextCheck watches the kernel's code and read-only data, if something has it
// looked at: see Monitor.StartText. What the kernel changes of its code by
// itself, its own tables say: tracing, probes, static keys and calls.
type TextCheck struct{}

// Name implements Check.
func (TextCheck) Name() string { return checkText }

// Objects implements Check.
func (TextCheck) Objects(g *Guest) []Object {
	if g.Code == nil || len(g.CPUs) == 0 {
		return nil
	}
	return []Object{{Name: "code", CPU: g.CPUs[0].ID,
		Items: func(g *Guest, _ *kvmaccess.VCPU, _ []byte, _ error) []Item { return textItems(g) }}}
}

// Code is a kernel's code and read-only data as they were looked at last.
type Code struct {
	key     string // of which kernel it is, in which boot
	areas   []area
	size    uint64
	taken   bool // the copy is there
	pages   []codePage
	entries []tableEntry // by which the pages are mapped
	changes []guest.TextChange
	by      map[guest.Table]int // places that the kernel changed itself
}

// area is a part of it. All of one area is one run in the copy.
type area struct {
	name string
	guest.Extent
}

// codePage is one page of an area; its digest is of no use if there is none.
type codePage struct {
	gpa    uint64
	digest uint64
	absent bool // not mapped
}

// Bytes is how much of the guest it is.
func (c *Code) Bytes() uint64 { return c.size }

// maxCode bounds what a guest can have looked at as its code, in bytes.
const maxCode = 256 << 20

// ErrNoText: a kernel's code cannot be looked at.
var ErrNoText = errors.New("the kernel's code is not compared")

// ErrTextWritable: the kernel does not, or not yet, write-protect its code.
var ErrTextWritable = errors.New("the kernel's code is not compared: the kernel can write it; it may still boot")

// newCode finds out what there is to look at.
func (m *Monitor) newCode() (*Code, error) {
	k := m.g.Kernel
	switch {
	case m.opts.Scratch == nil:
		return nil, fmt.Errorf("%w: there is no place for a copy", ErrNoText)
	case k == nil:
		return nil, fmt.Errorf("%w: only what is found in the guest's own memory tells what changes of it by itself", ErrNoText)
	case k.Types == nil:
		return nil, fmt.Errorf("%w: without types nothing tells what changes of it by itself (%v)", ErrNoText, k.TypesErr)
	case !m.rootFixed:
		return nil, fmt.Errorf("%w: the kernel's own page tables were not found", ErrNoText)
	}
	c := &Code{key: fmt.Sprintf("kvmaccess code %v %s %v %v", m.boot, k.Fingerprint.BuildID, k.Text, k.Rodata)}
	for _, a := range []area{{"text", k.Text}, {"rodata", k.Rodata}} {
		a.Start, a.End = a.Start&^(kvmaccess.PageSize-1), (a.End+kvmaccess.PageSize-1)&^(kvmaccess.PageSize-1)
		if a.End > a.Start {
			c.areas = append(c.areas, a)
			c.size += a.Size()
		}
	}
	if c.size == 0 || c.size > maxCode {
		return nil, fmt.Errorf("%w: it is %d bytes", ErrNoText, c.size)
	}
	return c, nil
}

// settleText is how long the kernel may take to write a piece of code: what no
// table explains is looked at another time after that.
const settleText = 50 * time.Millisecond

// TextLook is one look at all code and read-only data of a kernel. It takes
// long, and Run may go on while others use the Monitor.
type TextLook struct {
	code    *Code
	kernel  *guest.Kernel // the Monitor's
	view    *guest.Kernel // for Run
	scratch Scratch
	digest  *kvmaccess.Digester
}

// StartText prepares a look at all code and read-only data of the kernel, some
// ten megabytes, which compares it with a copy of when it was first seen, in
// this boot of the guest; for that Options.Scratch is needed. Without a kernel
// that this can be done with the error is ErrNoText; the look is nil while there
// is nothing to look at.
//
// ErrTextWritable says that the kernel may still boot: it writes what it will
// not later on.
func (m *Monitor) StartText(ctx context.Context, d *kvmaccess.Digester) (*TextLook, error) {
	switch {
	case m.g == nil:
		return nil, nil
	case m.status.State == StateRegisters:
		return nil, fmt.Errorf("%w: %s", ErrNoText, m.unread.reason)
	}
	c, err := m.newCode()
	if err != nil {
		m.g.Code, m.code = nil, nil
		return nil, err
	}
	for _, a := range c.areas {
		t, err := guest.Translate(ctx, m.mem, m.g.Mode, m.root, a.Start)
		if err != nil || t.Write {
			return nil, ErrTextWritable
		}
	}
	if m.code != nil && m.code.key == c.key {
		c.taken = m.code.taken
	} else {
		c.taken = c.isTaken(m.opts.Scratch)
	}
	view, space := *m.g.Kernel, *m.g.Kernel.Space
	view.Space = &space
	return &TextLook{c, m.g.Kernel, &view, m.opts.Scratch, d}, nil
}

// Run looks.
func (l *TextLook) Run(ctx context.Context) error {
	for try := 0; ; try++ {
		changed, err := l.code.look(ctx, l.view, l.scratch, l.digest)
		if err == nil {
			err = l.code.explain(ctx, l.view, l.scratch, changed)
		}
		if err != nil || len(l.code.changes) == 0 || try == 2 {
			return err
		}
		select {
		case <-time.After(settleText):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// FinishText takes what Run has seen without an error, and returns as findings
// what no table of the kernel explains.
func (m *Monitor) FinishText(ctx context.Context, l *TextLook) ([]Finding, error) {
	if m.g == nil || m.g.Kernel != l.kernel {
		return nil, nil // of another boot
	}
	c := l.code
	if len(c.changes) > 0 && !m.stillRuns(ctx) {
		return nil, nil // the next Tick sees what became of it
	}
	m.acceptText(c)
	added := m.g.Code == nil
	m.g.Code, m.code = c, c
	if added {
		m.layout()
		if err := m.reread(ctx); err != nil {
			return nil, err
		}
		return m.flush(), nil
	}
	for i := range m.objects {
		if m.objects[i].check == checkText {
			m.objects[i].dirty = true
		}
	}
	if err := m.evaluate(ctx); err != nil {
		return nil, err
	}
	return m.flush(), nil
}

// stillRuns says whether the kernel that was attached to does: while a guest
// restarts its memory is overwritten.
func (m *Monitor) stillRuns(ctx context.Context) bool {
	states, err := m.src.VCPUs(ctx, m.vm.ID)
	return err == nil && len(states) > 0 && readyReason(&states[0]) == "" && m.g.Kernel.Runs(ctx, states) == nil
}

// acceptText takes down what the kernel changed itself since the last look.
func (m *Monitor) acceptText(c *Code) {
	var before map[guest.Table]int
	if m.code != nil && m.code.key == c.key {
		before = m.code.by
	}
	var what []string
	for _, table := range []guest.Table{guest.TableFtrace, guest.TableFtraceCall, guest.TableKprobe, guest.TableStaticKey, guest.TableStaticCall, guest.TableDispatcher, guest.TableBPF} {
		if c.by[table] != before[table] {
			what = append(what, fmt.Sprintf("%s %d (%d before)", table, c.by[table], before[table]))
		}
	}
	if what != nil {
		m.accept("code that its tables explain", "places that are not as when they were first seen: "+strings.Join(what, ", "))
	}
}

// isTaken says whether the copy is of this very kernel. The key is behind it,
// and was written last.
func (c *Code) isTaken(s Scratch) bool {
	have := make([]byte, len(c.key)+1)
	n, err := s.ReadAt(have, int64(c.size))
	return errors.Is(err, io.EOF) && string(have[:n]) == c.key
}

// chunk is how much code is looked at at once, in bytes.
const chunk = 2 << 20

// look reads all areas, takes the copy if there is none, and returns the pages
// that differ from it.
func (c *Code) look(ctx context.Context, k *guest.Kernel, s Scratch, d *kvmaccess.Digester) (changed []uint64, err error) {
	if !c.taken {
		if err := s.Truncate(0); err != nil {
			return nil, err
		}
	}
	c.pages, c.entries = c.pages[:0], c.entries[:0]
	now, before := make([]byte, chunk), make([]byte, chunk)
	walk := walkRecorder{mem: guest.NewPageCache(k.Space.Memory)}
	at := int64(0)
	for _, a := range c.areas {
		for gva := a.Start; gva < a.End; {
			n := min(chunk, a.End-gva)
			now, before := now[:n], before[:n]
			if err := c.readPages(ctx, k, &walk, gva, now, d); err != nil {
				return nil, err
			}
			if c.taken {
				if _, err := s.ReadAt(before, at); err != nil {
					return nil, fmt.Errorf("the copy: %w", err)
				}
				for i := uint64(0); i < n; i += kvmaccess.PageSize {
					if !bytes.Equal(now[i:i+kvmaccess.PageSize], before[i:i+kvmaccess.PageSize]) {
						changed = append(changed, gva+i)
					}
				}
			} else if _, err := s.WriteAt(now, at); err != nil {
				return nil, fmt.Errorf("the copy: %w", err)
			}
			gva += n
			at += int64(n)
		}
	}
	if !c.taken {
		if _, err := s.WriteAt([]byte(c.key), at); err != nil {
			return nil, fmt.Errorf("the copy: %w", err)
		}
		c.taken = true
	}
	slices.SortFunc(walk.entries, func(x, y tableEntry) int { return int(int64(x.gpa>>1) - int64(y.gpa>>1)) })
	c.entries = slices.CompactFunc(walk.entries, func(x, y tableEntry) bool { return x.gpa == y.gpa })
	return changed, nil
}

// readPages reads a chunk, and where its pages lie. What is not mapped reads as
// zeros.
func (c *Code) readPages(ctx context.Context, k *guest.Kernel, walk *walkRecorder, gva uint64, p []byte, d *kvmaccess.Digester) error {
	first := len(c.pages)
	for i := uint64(0); i < uint64(len(p)); i += kvmaccess.PageSize {
		t, err := guest.Translate(ctx, walk, k.Space.Mode, k.Space.Root, gva+i)
		if err != nil && !guestError(err) {
			return err
		}
		c.pages = append(c.pages, codePage{gpa: t.GPA, absent: err != nil})
	}
	pages := c.pages[first:]
	for i := 0; i < len(pages); {
		n := 1
		for i+n < len(pages) && !pages[i].absent && !pages[i+n].absent && pages[i+n].gpa == pages[i].gpa+uint64(n)*kvmaccess.PageSize {
			n++
		}
		run := p[i*kvmaccess.PageSize : (i+n)*kvmaccess.PageSize]
		if pages[i].absent {
			clear(run)
		} else if err := k.Space.Memory.ReadPhysical(ctx, pages[i].gpa, run); err != nil {
			return fmt.Errorf("guest-physical %#x: %w", pages[i].gpa, err)
		}
		for j := range n {
			pages[i+j].digest, _ = d.Page(run[j*kvmaccess.PageSize:][:kvmaccess.PageSize])
		}
		i += n
	}
	return nil
}

// window is how far beyond a page a patch may reach, in bytes.
const window = 16

// explain sorts what differs on pages into what the kernel's tables explain and
// what they do not.
func (c *Code) explain(ctx context.Context, k *guest.Kernel, s Scratch, pages []uint64) error {
	c.changes, c.by = nil, map[guest.Table]int{}
	if len(pages) == 0 {
		return nil
	}
	// What could not be read of the tables explains nothing.
	set, _ := k.Patches(ctx)
	for len(pages) > 0 {
		n := 1
		for n < len(pages) && pages[n] == pages[0]+uint64(n)*kvmaccess.PageSize && n*kvmaccess.PageSize < chunk {
			n++
		}
		x, at := c.around(guest.Extent{Start: pages[0], End: pages[n-1] + kvmaccess.PageSize})
		now := &guest.TextCopy{Address: x.Start, Data: make([]byte, x.Size())}
		before := &guest.TextCopy{Address: x.Start, Data: make([]byte, x.Size())}
		if err := k.Space.Read(ctx, x.Start, now.Data); err != nil {
			if !guestError(err) {
				return err
			}
			c.changes = append(c.changes, guest.TextChange{Address: pages[0]})
			pages = pages[n:]
			continue
		}
		if _, err := s.ReadAt(before.Data, at); err != nil {
			return fmt.Errorf("the copy: %w", err)
		}
		changes, err := set.Changes(before, now)
		if err != nil {
			return err
		}
		for _, change := range changes {
			switch {
			case change.Why == nil:
				c.changes = append(c.changes, change)
			case change.Address >= pages[0]:
				c.by[change.Why.Table]++
			}
		}
		pages = pages[n:]
	}
	return nil
}

// around is an extent with a window on either side, within its area, and where
// that lies in the copy.
func (c *Code) around(x guest.Extent) (guest.Extent, int64) {
	at := int64(0)
	for _, a := range c.areas {
		if a.Contains(x.Start) {
			x.Start, x.End = max(x.Start-window, a.Start), min(x.End+window, a.End)
			return x, at + int64(x.Start-a.Start)
		}
		at += int64(a.Size())
	}
	return x, at
}

func textItems(g *Guest) []Item {
	it := Item{Check: checkText, Object: "code", Value: Value{Detail: "as it was"}}
	changes := g.Code.changes
	if len(changes) > 0 {
		const most = 3
		var where []string
		for _, c := range changes[:min(most, len(changes))] {
			where = append(where, g.describeChange(c))
		}
		if more := len(changes) - most; more > 0 {
			where = append(where, fmt.Sprintf("and %d places more", more))
		}
		it.Fault = strings.Join(where, "; ")
		it.Raw, it.Value = it.Fault, Value{Value: Hex(changes[0].Address), Detail: "overwritten"}
		if all, offset := g.Image.At(changes[0].Address); len(all) > 0 {
			it.Value.Symbol = fmt.Sprintf("%s+%#x", all[0].Name, offset)
		}
	}
	return []Item{it}
}

func (g *Guest) describeChange(c guest.TextChange) string {
	at := fmt.Sprintf("%#x", c.Address)
	if name := g.Image.Name(c.Address); name != "" {
		at += " " + name
	}
	if c.New == nil {
		return at + " cannot be read any more"
	}
	const most = 16
	side := func(p []byte) string {
		if len(p) > most {
			return fmt.Sprintf("% x ...", p[:most])
		}
		return fmt.Sprintf("% x", p)
	}
	return fmt.Sprintf("at %s is %s, was %s, which no table of the kernel explains", at, side(c.New), side(c.Old))
}

// textItem is how many pages an item of digests has at most: it is sent anew
// when one of them has another.
const textItem = 512

// maxTextEntries bounds the page-table entries that the module compares for the
// code: kernels map it by large pages.
const maxTextEntries = 512

// WatchText lists the pages that were read last, by their digests, and the
// page-table entries that map them; where these are too many, it is to be looked at
// Again without an event. It is empty if there are none.
func (m *Monitor) WatchText() WatchList {
	var list WatchList
	if m.g == nil || m.g.Code == nil {
		return list
	}
	c := m.g.Code
	for i := 0; i < len(c.pages); {
		if c.pages[i].absent {
			i++
			continue
		}
		n := 1
		for n < textItem && i+n < len(c.pages) && !c.pages[i+n].absent && c.pages[i+n].gpa == c.pages[i].gpa+uint64(n)*kvmaccess.PageSize {
			n++
		}
		digests := make([]uint64, n)
		for j := range digests {
			digests[j] = c.pages[i+j].digest
		}
		list.Items = append(list.Items, WatchItem{Item: kvmaccess.Item{Kind: kvmaccess.KindDigest, GPA: c.pages[i].gpa, Digests: digests}, What: "code"})
		i += n
	}
	if len(c.entries) <= maxTextEntries {
		for _, e := range c.entries {
			list.Items = append(list.Items, e.item("page tables of code"))
		}
	} else {
		list.Again = time.Minute
	}
	return list
}
