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
	// Symbols of this very kernel, as a symbol file gives them, to be used
	// instead of those in its memory; nil: the guest's own.
	Symbols *Symbols
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
		k, err := l.kernel(ctx, opts)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if reason == nil || errors.Is(err, ErrNoTables) && !errors.Is(reason, ErrNoTables) {
				reason = err
			}
			continue
		}
		k.CPUs = cpus
		if err := k.complete(ctx, opts); err != nil {
			return nil, err
		}
		k.Space.Memory, l.space.Memory = src, src // what was cached is not kept
		return k, nil
	}
	return nil, reason
}

// mostSection bounds how much of an image is looked through at once, in bytes:
// more than all of a distribution's kernel, which is one run early in boot.
const mostSection = 96 << 20

// findTables finds the symbol table in the image, first where no kernel of
// these days lets it be written or executed.
func (l *location) findTables(ctx context.Context) (*kallsyms, *section, error) {
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
	linux, lost := false, 0
	for _, m := range parts {
		if m.Size < 64<<10 || m.Size > mostSection {
			continue
		}
		s := l.section(ctx, Extent{m.GVA, m.GVA + m.Size})
		k, err := findKallsyms(s, l.fits)
		switch {
		case err == nil:
			return k, s, nil
		case s.err != nil:
			return nil, nil, s.err
		}
		if reason == errNoKallsyms {
			reason = err
		}
		lost += s.lost
		linux = linux || bytes.Contains(s.data, []byte(bannerStart))
	}
	if lost > 0 {
		return nil, nil, fmt.Errorf("no symbol table is in what can be read of the kernel's image: %d KiB of it are in no memory: %w", lost>>10, kvmaccess.ErrNoMemslot)
	}
	if !linux {
		return nil, nil, fmt.Errorf("%w: what lies at %#x-%#x, where Linux has its kernel, says nowhere that it is one", ErrNotLinux, l.extent.Start, l.extent.End)
	}
	return nil, nil, fmt.Errorf("%w: %w", ErrNoTables, reason)
}

// Until a kernel has set up its own handlers, all exceptions go to entries of a
// row of stubs (arch/x86/kernel/head_64.S), of 9 or 13 bytes each.
const (
	earlyHandlers     = "early_idt_handler_array"
	mostEarlyHandlers = 32 * 13
)

// fits says why a symbol table is not that of the image: by it the image's
// bounds are not where page tables have them, or exceptions' handlers are
// nothing that it knows.
func (l *location) fits(k *kallsyms) error {
	at := k.find("_text", "_stext", "_etext", earlyHandlers, startBTF, stopBTF)
	text, stext, etext, early := at[0], at[1], at[2], at[3]
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
		if k.has(h) || early != 0 && h-early < mostEarlyHandlers {
			known++
		}
	}
	if 2*known < len(l.handlers) {
		return fmt.Errorf("%d of %d exceptions' handlers are at no symbol", len(l.handlers)-known, len(l.handlers))
	}
	l.btf = Extent{at[4], at[5]}
	return nil
}

// kernel makes of a location a Kernel with symbols.
func (l *location) kernel(ctx context.Context, opts AttachOptions) (*Kernel, error) {
	k := &Kernel{Space: l.space.View(), Seal: &Seal{}, cache: opts.Cache, found: l}
	if opts.Symbols != nil {
		text, ok := opts.Symbols.Lookup("_text")
		if !ok || !opts.Symbols.Long() {
			return nil, fmt.Errorf("%w: they have no _text of a 64-bit kernel", ErrSymbolsMismatch)
		}
		k.Image = NewImage(opts.Symbols, l.extent.Start-text.Address)
		if !k.named() {
			return nil, fmt.Errorf("%w: by them the exceptions' handlers are nothing of the kind", ErrSymbolsMismatch)
		}
	} else {
		tables, s, err := l.findTables(ctx)
		if err != nil {
			return nil, err
		}
		if !opts.NoTypes {
			k.decodeTypes(ctx, l.btf)
		}
		text := l.extent.Start // as fits has seen
		d, digest, err := opts.Cache.decode(tables, text)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoTables, err)
		}
		k.Image = NewImage(d.symbols, text-linkedText)
		k.Doubts = slices.Clone(d.doubts)
		k.Fingerprint.Symbols = digest
		for _, x := range tables.parts {
			k.Seal.add(DoubtSymbols, x.Start, s.data[x.Start-s.gva:x.End-s.gva])
		}
		if !k.named() {
			k.doubt(DoubtSymbols, "most exceptions' handlers have other names than an exception's handler has")
		}
	}
	k.Text = k.Image.Text()
	k.Rodata = k.Image.between("__start_rodata", "__end_rodata")
	return k, nil
}

// named says whether at least half of the exceptions' handlers are called what
// Linux calls them.
func (k *Kernel) named() bool {
	good, of := 0, 0
	for _, g := range k.found.gates {
		if names := Handlers(g.Vector); len(names) > 0 && k.found.extent.Contains(g.Handler) {
			of++
			early, ok := k.Image.Lookup(earlyHandlers)
			if k.Image.Is(g.Handler, names...) || ok && g.Handler-early < mostEarlyHandlers {
				good++
			}
		}
	}
	return 2*good >= of
}

// complete finds out about a kernel of which the symbols are known.
func (k *Kernel) complete(ctx context.Context, opts AttachOptions) error {
	k.fixRoot(ctx)
	if !opts.Early {
		if err := k.booted(ctx); err != nil {
			return err
		}
	}
	k.TypesErr = errNoTypesAsked
	if !opts.NoTypes {
		k.Types, k.TypesErr = ReadTypes(ctx, k)
		switch {
		case k.Types != nil:
			if x := k.Image.between(startBTF, stopBTF); x.Size() == uint64(len(k.Types.Raw())) {
				k.Seal.add(DoubtTypes, x.Start, k.Types.Raw())
			}
			k.checkExports(ctx)
		case !errors.Is(k.TypesErr, ErrNoTypes):
			k.doubt(DoubtTypes, "%v", k.TypesErr)
		}
	}
	k.Refresh(ctx)
	return nil
}

// Refresh reads anew what changes while a kernel runs or boots: its modules,
// its regions of memory, its command line and when it booted.
func (k *Kernel) Refresh(ctx context.Context) {
	doubtful := k.doubtful(DoubtTables)
	k.undoubt(DoubtModules, DoubtBases, DoubtBanner, DoubtTables)
	if doubtful {
		k.fixRoot(ctx) // it was in early boot, perhaps
	}
	memory := k.Space.Memory
	k.Space.Memory = NewPageCache(memory)
	defer func() { k.Space.Memory = memory }()
	k.readBases(ctx)
	k.readFingerprint(ctx)
	if k.Types == nil {
		return
	}
	k.readBootTime(ctx)
	if err := k.ReadModules(ctx); err != nil {
		k.doubt(DoubtModules, "%v", err)
	}
}

// Runs says whether the vCPUs still, or again, run this kernel at this place: a
// nil error. It reads little: the interrupt tables and the page tables that
// lead there, and the banner. Where the kernel was started anew meanwhile,
// Refresh reads what is not as it was. A kernel that was found before it had
// its own page tables is read through those that it has now.
func (k *Kernel) Runs(ctx context.Context, cpus []kvmaccess.VCPU) error {
	memory := k.Space.Memory
	found, err := locate(ctx, NewPageCache(memory), cpus, nil)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(found, func(l *location) bool {
		return l.extent.Start == k.found.extent.Start && l.physical == k.found.physical
	})
	if at < 0 {
		return fmt.Errorf("a kernel runs at %#x, not at %#x", found[0].extent.Start, k.found.extent.Start)
	}
	if k.doubtful(DoubtTables) {
		k.found = found[at]
		k.found.space.Memory = memory
		k.Space.Root = k.found.space.Root
		k.undoubt(DoubtTables)
		k.fixRoot(ctx)
	}
	fresh := *k
	fresh.Fingerprint, fresh.Doubts = Fingerprint{}, nil
	fresh.readFingerprint(ctx)
	if fresh.Fingerprint.Version != k.Fingerprint.Version {
		return fmt.Errorf("another kernel runs: %q", fresh.Fingerprint.Version)
	}
	return nil
}

func (k *Kernel) doubtful(object string) bool {
	return slices.ContainsFunc(k.Doubts, func(d Doubt) bool { return d.Object == object })
}

var errNoTypesAsked = errors.New("types were not asked for")

// fixRoot changes over to the kernel's own page tables, which unlike a
// process' ones stay.
func (k *Kernel) fixRoot(ctx context.Context) {
	l := k.found
	at, ok := k.Image.Lookup("init_top_pgt")
	if !ok || !l.extent.Contains(at) {
		k.doubt(DoubtTables, "the symbols have no init_top_pgt in the kernel's image: page tables of a process are used")
		return
	}
	own := *k.Space
	own.Root = l.gpa(at)
	probes := append([]uint64{at, k.Text.Start, k.Text.End - 1}, l.handlers...)
	for _, gva := range probes {
		want := l.gpa(gva)
		if t, err := Translate(ctx, own.Memory, own.Mode, own.Root, gva); err != nil {
			k.doubt(DoubtTables, "what the symbols call the kernel's page tables are none: %v", err)
			return
		} else if t.GPA != want {
			k.doubt(DoubtTables, "what the symbols call the kernel's page tables have %#x at guest-physical %#x, those in use at %#x", gva, t.GPA, want)
			return
		}
	}
	k.Space.Root = own.Root
}

// checkExports doubts symbols that are not where the kernel's table of what it
// exports to modules has them: that one was made apart from kallsyms.
func (k *Kernel) checkExports(ctx context.Context) {
	s, err := k.Types.Struct("kernel_symbol")
	if err != nil || s.Size == 0 {
		return // nothing can be exported
	}
	of, wrong, example := 0, 0, ""
	var elsewhere uint64
	for _, table := range [][2]string{{"__start___ksymtab", "__stop___ksymtab"}, {"__start___ksymtab_gpl", "__stop___ksymtab_gpl"}} {
		x := k.Image.between(table[0], table[1])
		count := x.Size() / uint64(s.Size)
		if count == 0 {
			continue
		}
		if count > mostExports {
			k.doubt(DoubtSymbols, "from %s to %s are %d exported symbols", table[0], table[1], count)
			return
		}
		err := k.exports(ctx, x.Start, int(count), func(name []byte, at uint64) {
			of++
			if k.found.extent.Contains(at) && !k.Image.Symbols.has(string(name), at-k.Image.Slide) { // not CPUs' own data
				if wrong++; wrong == 1 {
					example, elsewhere = string(name), at
				}
			}
		})
		if err != nil {
			k.doubt(DoubtSymbols, "what the kernel exports at %s cannot be read: %v", table[0], err)
			return
		}
	}
	if wrong > 0 {
		has, _ := k.Image.Lookup(example)
		k.doubt(DoubtSymbols, "%d of %d exported symbols are elsewhere by the table of exports, for example %s, at %#x by that and at %#x by the symbol table", wrong, of, clip([]byte(example)), elsewhere, has)
	}
}

// booted says whether the kernel is through with setting itself up.
func (k *Kernel) booted(ctx context.Context) error {
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
	if state < 2 && !k.found.booted {
		return fmt.Errorf("%w: its kernel still boots (system_state %d)", ErrNotBooted, state)
	}
	return nil
}
