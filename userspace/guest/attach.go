// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Why Attach does not find a kernel that can be read. Errors wrap one of them
// and say more.
var (
	// ErrNotLinux: another operating system, or firmware that stays.
	ErrNotLinux = errors.New("the guest does not run Linux")
	// ErrNotBooted: firmware, a boot loader or a kernel in early boot runs;
	// attach again.
	ErrNotBooted = errors.New("the guest has not booted yet")
	// Err32Bit: a 32-bit kernel runs.
	Err32Bit = errors.New("the guest runs a 32-bit kernel, of which symbols are not found in memory")
	// ErrConfidential: state and memory are encrypted.
	ErrConfidential = errors.New("the guest's memory is encrypted (SEV, TDX): nothing of it can be read")
	// ErrNoMemory: no page of the guest can be read.
	ErrNoMemory = errors.New("none of the guest's memory can be read")
	// ErrNoTables: it is Linux, and its symbol table is not there or damaged.
	// No kernel does that to itself.
	ErrNoTables = errors.New("the kernel's own symbol table is missing or damaged")
)

// AttachOptions of Attach; the zero value works.
type AttachOptions struct {
	// NoTypes leaves out types, and with them the modules' symbols.
	NoTypes bool
	// Early attaches to a kernel that still boots.
	Early bool
	// Cache shares what was decoded before, of this guest or of others; nil:
	// none.
	Cache *Cache
}

// Attach finds the Linux kernel of a guest that was never seen before: where
// it lies, its own page tables, its symbols and its types, all out of the
// guest's memory. vCPUs may be in any condition; a Source without any is to
// implement Regions. The error wraps ErrNotLinux, ErrNotBooted, Err32Bit,
// ErrConfidential, ErrNoMemory or ErrNoTables where it is one of these.
//
// What the guest says is believed as far as independent parts of it agree;
// where they do not, Doubts tell.
func Attach(ctx context.Context, src Source, opts AttachOptions) (*Kernel, error) {
	k, err := attach(ctx, src, opts)
	if errors.Is(err, kvmaccess.ErrProtected) {
		err = fmt.Errorf("%w: %w", ErrConfidential, err)
	}
	return k, err
}

func attach(ctx context.Context, src Source, opts AttachOptions) (*Kernel, error) {
	cpus, err := src.VCPUs(ctx)
	if err != nil {
		return nil, fmt.Errorf("vCPUs: %w", err)
	}
	var regions []Region
	if r, ok := src.(Regions); ok && len(cpus) == 0 {
		if regions, err = r.Regions(ctx); err != nil {
			return nil, fmt.Errorf("regions of memory: %w", err)
		}
	}
	found, err := locate(ctx, NewPageCache(src), cpus, regions)
	if err != nil {
		return nil, err
	}
	var reason error
	for _, l := range found {
		tables, err := l.findTables(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if reason == nil || errors.Is(err, ErrNoTables) && !errors.Is(reason, ErrNoTables) {
				reason = err
			}
			continue
		}
		return newKernel(ctx, src, cpus, l, tables, opts)
	}
	return nil, reason
}

// mostSection bounds how much of an image is looked through at once.
const mostSection = 256 << 20

// findTables finds the symbol table in the image, first where no kernel of
// these days lets it be written or executed.
func (l *location) findTables(ctx context.Context) (*kallsyms, error) {
	rank := func(m Mapping) int {
		switch {
		case !m.Writable && !m.Executable:
			return 0
		case !m.Executable:
			return 1
		}
		return 2
	}
	// Early in boot rights have not been set up, and one run holds all.
	parts := slices.Clone(l.parts)
	slices.SortStableFunc(parts, func(a, b Mapping) int { return rank(a) - rank(b) })
	reason := error(errNoKallsyms)
	linux := false
	for _, m := range parts {
		if m.Size < 64<<10 || m.Size > mostSection {
			continue
		}
		s, err := l.section(ctx, Extent{m.GVA, m.GVA + m.Size})
		if err != nil {
			return nil, err
		}
		k, err := findKallsyms(s, l.fits)
		if err == nil {
			return k, nil
		}
		if reason == errNoKallsyms {
			reason = err
		}
		linux = linux || bytes.Contains(s.data, []byte(bannerStart))
	}
	if !linux {
		return nil, fmt.Errorf("%w: what lies at %#x-%#x, where Linux has its kernel, says nowhere that it is one", ErrNotLinux, l.extent.Start, l.extent.End)
	}
	return nil, fmt.Errorf("%w: %w", ErrNoTables, reason)
}

// fits says why a symbol table is not that of the image: by it the image's
// bounds are not where page tables have them, or exceptions' handlers are
// nothing that it knows.
func (l *location) fits(k *kallsyms) error {
	at := k.find("_text", "_stext", "_etext")
	text, stext, etext := at[0], at[1], at[2]
	switch {
	case stext == 0 || etext <= stext:
		return fmt.Errorf("_stext is %#x and _etext %#x", stext, etext)
	case text != l.extent.Start:
		return fmt.Errorf("_text is %#x, but the image begins at %#x", text, l.extent.Start)
	}
	for _, gva := range []uint64{stext, etext - 1} {
		if m, ok := l.mapped(gva); !ok || !m.Executable {
			return fmt.Errorf("the kernel's text would be %#x-%#x, but %#x is not executable", stext, etext, gva)
		}
	}
	known := 0
	for _, h := range l.handlers {
		if k.has(h) {
			known++
		}
	}
	if 2*known < len(l.handlers) {
		return fmt.Errorf("%d of %d exceptions' handlers are at no symbol", len(l.handlers)-known, len(l.handlers))
	}
	return nil
}

// newKernel makes of what was found a Kernel.
func newKernel(ctx context.Context, src Source, cpus []kvmaccess.VCPU, l *location, tables *kallsyms, opts AttachOptions) (*Kernel, error) {
	text := tables.find("_text")[0]
	symbols, digest, err := opts.Cache.symbols(tables, text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoTables, err)
	}
	k := &Kernel{
		Space: l.space.View(),
		Image: NewImage(symbols, text-linkedText),
		CPUs:  cpus, Tables: tables.parts,
	}
	k.Fingerprint.Symbols = digest
	k.Text = k.Image.Text()
	k.Rodata = k.Image.between("__start_rodata", "__end_rodata")
	k.fixRoot(ctx, l)
	if !opts.Early {
		if err := k.booted(ctx, l); err != nil {
			return nil, err
		}
	}
	k.readBases(ctx, text, l.gpa(text))
	k.readFingerprint(ctx)
	k.TypesErr = errNoTypesAsked
	if !opts.NoTypes {
		if k.Types, k.TypesErr = opts.Cache.types(ctx, k); k.Types != nil {
			k.readBootTime(ctx)
			if err := k.ReadModules(ctx); err != nil {
				k.doubt("modules", "%v", err)
			}
		}
	}
	k.Space.Memory = src
	return k, nil
}

var errNoTypesAsked = errors.New("types were not asked for")

// fixRoot changes over to the kernel's own page tables, which unlike a
// process' ones stay.
func (k *Kernel) fixRoot(ctx context.Context, l *location) {
	at, ok := k.Image.Lookup("init_top_pgt")
	if !ok {
		k.doubt("init_top_pgt", "the symbols do not have it: page tables of a process are used")
		return
	}
	own := *k.Space
	own.Root = l.gpa(at)
	probes := append([]uint64{at, k.Text.Start, k.Text.End - 1, k.Tables[0].Start}, l.handlers...)
	for _, gva := range probes {
		want := l.gpa(gva)
		if t, err := Translate(ctx, own.Memory, own.Mode, own.Root, gva); err != nil {
			k.doubt("init_top_pgt", "what the symbols call the kernel's page tables are none: %v", err)
			return
		} else if t.GPA != want {
			k.doubt("init_top_pgt", "what the symbols call the kernel's page tables have %#x at guest-physical %#x, those in use at %#x", gva, t.GPA, want)
			return
		}
	}
	k.Space.Root = own.Root
}

// booted says whether the kernel is through with setting itself up.
func (k *Kernel) booted(ctx context.Context, l *location) error {
	at, ok := k.Image.Lookup("system_state")
	if !ok {
		return nil
	}
	state, err := k.Space.Uint(ctx, at, 4)
	if err != nil {
		return fmt.Errorf("system_state: %w", err)
	}
	// SYSTEM_BOOTING, SYSTEM_SCHEDULING (include/linux/kernel.h, since 4.13);
	// what follows these changed since, and is late enough.
	if state < 2 && !l.booted {
		return fmt.Errorf("%w: its kernel still boots (system_state %d)", ErrNotBooted, state)
	}
	return nil
}
