// SPDX-License-Identifier: MIT

// Package attach measures what it takes to find a guest's kernel, its symbols
// and its types in its memory, and holds them against what the guest itself
// says.
package attach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/truth"
)

// Kind says what was done, and what was known of the guest's kernel before.
type Kind string

// Values of Kind.
const (
	Cold    Kind = "cold"         // an attachment; nothing was known
	Cached  Kind = "cached"       // an attachment; another one to the same kernel, which is checked all the same
	Process Kind = "process"      // "kvmaccess ps", from its start to its end
	Peer    Kind = "peer"         // drgn's attachment, its debug info at hand
	PeerAll Kind = "peer process" // drgn, from its start to its end, its tasks listed
)

// Sample is one measurement.
type Sample struct {
	Guest   string  `json:"guest"` // Row.Guest
	Kind    Kind    `json:"kind"`
	Seconds float64 `json:"seconds"` // of the host's clock
	Bytes   uint64  `json:"bytes"`   // of guest memory that were read
	Reads   uint64  `json:"reads"`   // system calls that read them
}

// Row is what was found of one guest.
type Row struct {
	Guest        string  `json:"guest"` // name of its kernel, and how it was booted
	Kernel       string  `json:"guest_kernel"`
	KASLR        bool    `json:"kaslr"`
	KPTI         bool    `json:"kpti"`
	Levels       int     `json:"levels"` // of page tables
	CPUs         int     `json:"cpus"`
	Modules      int     `json:"modules"`
	Symbols      int     `json:"symbols_guest"` // in its /proc/kallsyms
	SymbolsEqual int     `json:"symbols_equal"`
	Offsets      int     `json:"offsets_checked"` // of members of structs in its /sys/kernel/btf/vmlinux
	OffsetsEqual int     `json:"offsets_equal"`
	Tasks        int     `json:"tasks_guest"` // in its /proc
	TasksEqual   int     `json:"tasks_equal"`
	ModulesEqual int     `json:"modules_equal"`
	AttachCold   float64 `json:"attach_cold_s"`  // median
	AttachFirst  float64 `json:"attach_first_s"` // the first of the cold ones
	AttachCached float64 `json:"attach_cached_s"`
	BytesRead    uint64  `json:"bytes_read"` // to attach cold
	BytesCached  uint64  `json:"bytes_read_cached"`
	Process      float64 `json:"process_s"`                // all of "kvmaccess ps", median
	Attachments  int     `json:"attachments"`              // of each kind
	Peer         string  `json:"peer"`                     // empty: none was measured
	PeerSeconds  float64 `json:"peer_s,omitempty"`         // its attachment, median
	PeerFirst    float64 `json:"peer_first_s,omitempty"`   // its first attachment, which reads its debug info from disk
	PeerProcess  float64 `json:"peer_process_s,omitempty"` // all of the peer's process, its tasks listed
}

// Run is what was measured on one host.
type Run struct {
	Host    string   `json:"host"` // its kernel
	Rows    []Row    `json:"rows"`
	Samples []Sample `json:"samples"`
}

// variant is a way to boot a guest.
type variant struct {
	name, line, cpu string
	cpus            int
}

// Variants are how each kernel is booted, on a host that has page tables of 5
// levels.
var variants = []variant{
	{"pti=on, 4 levels", "pti=on", "host,la57=off", 1},
	{"nopti, 5 levels, 4 CPUs", "nopti", "host", 4},
}

// Options of Measure.
type Options struct {
	Kernels []string // of guests
	Ways    int      // how many ways to boot each, from 1 on
	N       int      // attachments of each kind
	Every   int      // compare each so many-th struct
}

// Measure attaches to guests of each kernel. Where the payload has what drgn
// needs for one of them, drgn does as well, in turn with it, to the one that is
// booted first: the others make no difference to it.
func Measure(ctx context.Context, o Options, progress func(string)) (*Run, error) {
	if err := inside.LoadModule(); err != nil {
		return nil, err
	}
	c, err := kvmaccess.New()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	r := &Run{Host: strings.TrimSpace(string(release))}
	for _, kernel := range o.Kernels {
		for i, v := range variants[:min(o.Ways, len(variants))] {
			name := kernel + ", " + v.name
			progress(name)
			row, samples, err := v.measure(ctx, c, kernel, i == 0, o)
			if err != nil {
				return nil, fmt.Errorf("guest %s: %w", name, err)
			}
			row.Guest = name
			for i := range samples {
				samples[i].Guest = name
			}
			r.Rows, r.Samples = append(r.Rows, row), append(r.Samples, samples...)
		}
	}
	return r, nil
}

// live is a VM as guest.Attach reads it.
type live struct {
	*kvmaccess.Memory
	client *kvmaccess.Client
	id     kvmaccess.VMID
}

func (l live) VCPUs(ctx context.Context) ([]kvmaccess.VCPU, error) {
	return l.client.VCPUs(ctx, l.id)
}

func (v variant) measure(ctx context.Context, c *kvmaccess.Client, kernel string, peers bool, o Options) (row Row, samples []Sample, err error) {
	var p *peer
	if peers {
		if p, err = openPeer(kernel); err != nil {
			return row, nil, err
		}
	}
	if p != nil {
		defer func() { err = errors.Join(err, p.Close()) }()
	}
	g, err := fixture.Start(ctx, fixture.Config{Name: "bench", Kernel: kernel, CPUs: v.cpus, Append: v.line, CPU: v.cpu})
	if err != nil {
		return row, nil, err
	}
	defer func() { err = errors.Join(err, g.Kill()) }()
	vms, err := c.VMs(ctx)
	if err != nil {
		return row, nil, err
	}
	var vm kvmaccess.VM
	for _, each := range vms {
		if each.PID == g.PID {
			vm = each
		}
	}
	// Each attachment is a monitor's first look: it knows nothing of where the
	// VMM has the guest's memory.
	attach := func(opts guest.AttachOptions) (*guest.Kernel, Sample, error) {
		l := live{kvmaccess.NewMemory(c, vm), c, vm.ID}
		start := time.Now()
		k, err := guest.Attach(ctx, l, opts)
		took := time.Since(start)
		s := l.Stats()
		return k, Sample{
			Seconds: took.Seconds(),
			Bytes:   s.Netlink.Bytes + s.Bulk.Bytes + s.Cold.Bytes, Reads: s.Netlink.Reads + s.Bulk.Reads + s.Cold.Reads,
		}, errors.Join(err, l.Close())
	}
	known := &guest.Cache{}
	k, _, err := attach(guest.AttachOptions{Cache: known})
	if err != nil {
		return row, nil, err
	}
	mem := kvmaccess.NewMemory(c, vm)
	defer func() { err = errors.Join(err, mem.Close()) }()
	k.Space.Memory = mem
	if err := v.compare(ctx, g, k, o.Every, &row); err != nil {
		return row, nil, err
	}
	slots, err := c.Memslots(ctx, vm.ID)
	if err != nil {
		return row, nil, err
	}
	if p != nil {
		if err := p.note(ctx, g, mem); err != nil {
			return row, nil, err
		}
	}
	for range o.N {
		for kind, cache := range map[Kind]*guest.Cache{Cold: nil, Cached: known} {
			_, s, err := attach(guest.AttachOptions{Cache: cache})
			if err != nil {
				return row, nil, err
			}
			s.Kind = kind
			samples = append(samples, s)
		}
		start := time.Now()
		if out, err := exec.CommandContext(ctx, "kvmaccess", "ps", g.Name).CombinedOutput(); err != nil {
			return row, nil, fmt.Errorf("kvmaccess ps: %w: %s", err, out)
		}
		samples = append(samples, Sample{Kind: Process, Seconds: time.Since(start).Seconds()})
		if p == nil {
			continue
		}
		a, err := p.attach(ctx, g.PID, slots, k)
		if err != nil {
			return row, nil, err
		}
		row.Peer = "drgn " + a.Version
		samples = append(samples, Sample{Kind: Peer, Seconds: a.Attach}, Sample{Kind: PeerAll, Seconds: a.process.Seconds()})
	}
	return row, samples, nil
}

// compare fills in what of the kernel is what the guest says itself.
func (v variant) compare(ctx context.Context, g *fixture.Guest, k *guest.Kernel, every int, row *Row) error {
	if len(k.Doubts) > 0 || k.Types == nil {
		return fmt.Errorf("an honest kernel: doubts %+v, types %v", k.Doubts, k.TypesErr)
	}
	row.Kernel, row.CPUs = k.Fingerprint.Release, len(k.CPUs)
	row.KASLR = k.Bases.Text != 0
	row.Levels = 4
	if k.Space.Mode.Format == guest.Format5Level {
		row.Levels = 5
	}
	files := map[string][]byte{"/proc/kallsyms": nil, "/sys/kernel/btf/vmlinux": nil, "/proc/modules": nil, "/proc/cpuinfo": nil}
	for name := range files {
		data, err := g.Read(ctx, name)
		if err != nil {
			return err
		}
		files[name] = data
	}
	row.KPTI = bytes.Contains(files["/proc/cpuinfo"], []byte(" pti"))
	before, err := g.Tasks(ctx)
	if err != nil {
		return err
	}
	tasks, err := k.Tasks(ctx)
	if err != nil {
		return err
	}
	after, err := g.Tasks(ctx)
	if err != nil {
		return err
	}
	c := truth.Tasks(before, after, tasks)
	row.Tasks, row.TasksEqual = c.Truth, c.Equal
	modules, err := k.Modules(ctx)
	if err != nil {
		return err
	}
	if c, err = truth.Modules(files["/proc/modules"], modules); err != nil {
		return err
	}
	row.Modules, row.ModulesEqual = c.Truth, c.Equal
	if c, err = truth.Symbols(files["/proc/kallsyms"], k.Image.All()); err != nil {
		return err
	}
	row.Symbols, row.SymbolsEqual = c.Truth, c.Equal
	if c, err = truth.Types(files["/sys/kernel/btf/vmlinux"], k.Types, every); err != nil {
		return err
	}
	row.Offsets, row.OffsetsEqual = c.Truth, c.Equal
	return nil
}
