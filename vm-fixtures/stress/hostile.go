// SPDX-License-Identifier: MIT

package stress

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/tinyvm"
)

// HostileConfig says what Hostile does.
type HostileConfig struct {
	Duration time.Duration
	Seed     uint64 // of the guest's and the readers' random numbers
}

// Where a hostile guest has its things, guest-physical: all of it is mapped to
// itself by entry 0 of each of its topmost tables, the one that stays.
const (
	hostileRAM    = 4 << 20
	hostileTables = 0x200000 // 32 pages, of which the first 16 are topmost tables
	hostilePages  = 32
	hostileData   = 0x9000 // the operand of LGDT and LIDT
)

// hostileCode never ends. R8 is the state of a random number generator
// (xorshift), R9 counts rounds, RBX is hostileTables, RSI the number of
// entries there less one, RBP hostileData, R10 a mask. Each round it writes
// one entry, a pointer to any of the tables, to the table that it is in, or
// at random; loads GDTR, with a limit below 256, and IDTR at random; and switches
// to any of the topmost tables. Once in 65536 rounds it loads a CR3 out of nowhere, which is its
// last deed: no instruction can be fetched then.
var hostileCode = []byte{
	0x49, 0xff, 0xc1, // loop: inc r9
	0x4c, 0x89, 0xc0, 0x48, 0xc1, 0xe0, 0x0d, 0x49, 0x31, 0xc0, // r8 ^= r8 << 13
	0x4c, 0x89, 0xc0, 0x48, 0xc1, 0xe8, 0x07, 0x49, 0x31, 0xc0, // r8 ^= r8 >> 7
	0x4c, 0x89, 0xc0, 0x48, 0xc1, 0xe0, 0x11, 0x49, 0x31, 0xc0, // r8 ^= r8 << 17
	0x4c, 0x89, 0xc7, // mov rdi, r8
	0x48, 0x21, 0xf7, // and rdi, rsi
	0xf7, 0xc7, 0xff, 0x01, 0x00, 0x00, // test edi, 0x1ff
	0x74, 0x3a, // jz table
	0x4c, 0x89, 0xc0, // mov rax, r8
	0x48, 0xc1, 0xe8, 0x14, // shr rax, 20
	0x4c, 0x89, 0xc1, // mov rcx, r8
	0x48, 0xc1, 0xe9, 0x3c, // shr rcx, 60
	0xf6, 0xc1, 0x03, // test cl, 3
	0x74, 0x12, // jz own
	0x80, 0xf9, 0x0c, // cmp cl, 12
	0x73, 0x1e, // jae store
	0x25, 0x00, 0xf0, 0x01, 0x00, // and eax, 0x1f000
	0x48, 0x01, 0xd8, // add rax, rbx
	0x83, 0xc8, 0x07, // or eax, 7
	0xeb, 0x11, // jmp store
	0x48, 0x89, 0xf8, // own: mov rax, rdi
	0x48, 0xc1, 0xe8, 0x09, // shr rax, 9
	0x48, 0xc1, 0xe0, 0x0c, // shl rax, 12
	0x48, 0x01, 0xd8, // add rax, rbx
	0x83, 0xc8, 0x07, // or eax, 7
	0x48, 0x89, 0x04, 0xfb, // store: mov [rbx + rdi*8], rax
	0x41, 0x0f, 0xb6, 0xc0, // table: movzx eax, r8b
	0x66, 0x89, 0x45, 0x00, // mov [rbp], ax
	0x4c, 0x89, 0xc0, // mov rax, r8
	0x48, 0xc1, 0xf8, 0x11, // sar rax, 17
	0x48, 0x89, 0x45, 0x02, // mov [rbp + 2], rax
	0x0f, 0x01, 0x55, 0x00, // lgdt [rbp]
	0x4c, 0x89, 0xc0, // mov rax, r8
	0x48, 0xc1, 0xc8, 0x17, // ror rax, 23
	0x66, 0x89, 0x45, 0x00, // mov [rbp], ax
	0x48, 0xc1, 0xf8, 0x11, // sar rax, 17
	0x48, 0x89, 0x45, 0x02, // mov [rbp + 2], rax
	0x0f, 0x01, 0x5d, 0x00, // lidt [rbp]
	0x4c, 0x89, 0xc0, // mov rax, r8
	0x48, 0xc1, 0xe8, 0x21, // shr rax, 33
	0x25, 0x00, 0xf0, 0x00, 0x00, // and eax, 0xf000
	0x48, 0x01, 0xd8, // add rax, rbx
	0x0f, 0x22, 0xd8, // mov cr3, rax
	0x66, 0x45, 0x85, 0xc9, // test r9w, r9w
	0x0f, 0x85, 0x4d, 0xff, 0xff, 0xff, // jnz loop
	0x4c, 0x89, 0xc0, // mov rax, r8
	0x4c, 0x21, 0xd0, // and rax, r10
	0x0f, 0x22, 0xd8, // mov cr3, rax
	0xe9, 0x3f, 0xff, 0xff, 0xff, // jmp loop
}

// hostile is a guest that runs hostileCode.
type hostile struct {
	*tinyvm.Guest
	vcpu   *tinyvm.VCPU
	random *rand.Rand
	deaths atomic.Int64

	stop   chan struct{}
	ended  chan struct{} // closed once err is the outcome of it all
	err    error
	thread *tinyvm.Thread
}

func newHostile(k *tinyvm.KVM, random *rand.Rand) (*hostile, error) {
	g, err := k.NewGuest(tinyvm.Config{Mode: tinyvm.Long, Code: hostileCode, Memory: hostileRAM, IRQChip: true})
	if err != nil {
		return nil, err
	}
	h := &hostile{
		Guest: g, vcpu: g.VCPUs[0], random: random,
		stop: make(chan struct{}), ended: make(chan struct{}),
	}
	if err = h.begin(); err != nil {
		return nil, errors.Join(err, g.Close())
	}
	go func() {
		h.err = h.revive()
		close(h.ended)
	}()
	return h, nil
}

func (h *hostile) begin() error {
	if err := h.reset(); err != nil {
		return err
	}
	var err error
	h.thread, err = h.vcpu.Start(h.exit)
	return err
}

// revive starts the guest anew whenever it has made no progress for a moment:
// one that has lost its page tables may fault for ever.
func (h *hostile) revive() error {
	var last [10]byte
	for {
		select {
		case <-h.stop:
			return h.thread.Stop()
		case <-h.thread.Done():
			return fmt.Errorf("the hostile guest's thread has ended: %w", h.thread.Err())
		case <-time.After(50 * time.Millisecond):
		}
		now, err := h.Bytes(hostileData, uint64(len(last)))
		if err != nil {
			return errors.Join(err, h.thread.Stop())
		}
		if bytes.Equal(now, last[:]) {
			h.deaths.Add(1)
			if err := h.thread.Stop(); err != nil {
				return err
			}
			if err := h.begin(); err != nil {
				return err
			}
		}
		copy(last[:], now)
	}
}

// end stops the guest; it is an error if that had ended by itself.
func (h *hostile) end() error {
	close(h.stop)
	<-h.ended
	return h.err
}

// reset gives the guest tables that point to each other, with the entry 0
// that stays, and the registers that it begins with.
func (h *hostile) reset() error {
	first, err := h.Bytes(h.Tables.Root, 8)
	if err != nil {
		return err
	}
	tables, err := h.Bytes(hostileTables, hostilePages<<12)
	if err != nil {
		return err
	}
	for i := 0; i < len(tables); i += 8 {
		if i%tinyvm.Page4K == 0 {
			copy(tables[i:], first)
			continue
		}
		binary.NativeEndian.PutUint64(tables[i:], hostileTables+h.random.Uint64N(hostilePages)<<12|
			tinyvm.EntryPresent|tinyvm.EntryWrite|tinyvm.EntryUser)
	}
	if err := h.vcpu.Enter(tinyvm.Long, hostileTables, tinyvm.Code); err != nil {
		return err
	}
	r, err := h.vcpu.Regs()
	if err != nil {
		return err
	}
	r.R8 = h.random.Uint64() | 1
	r.R9 = 1
	// A CR3 below 2^36, in the memory or not; bits 3 and 4 are its caching.
	r.R10 = 1<<36 - 1<<12 | 1<<3 | 1<<4
	r.RBX, r.RSI, r.RBP = hostileTables, hostilePages*512-1, hostileData
	return h.vcpu.SetRegs(r)
}

// exit lets a guest that had a triple fault lie for a moment, as it died, and
// starts it anew.
func (h *hostile) exit(e *tinyvm.Exit) (bool, error) {
	if e.Reason != tinyvm.ExitShutdown {
		return false, fmt.Errorf("the guest ended otherwise: %v", e)
	}
	h.deaths.Add(1)
	time.Sleep(time.Millisecond)
	return true, h.reset()
}

// Hostile reads, at the highest rate, registers, descriptor tables and memory
// by the page tables of a guest that rewrites all of these in a loop, and
// watches all of them.
func Hostile(ctx context.Context, c HostileConfig) (*Report, error) {
	r := newReport(fmt.Sprintf("hostile guest with seed %d", c.Seed))
	k, err := tinyvm.Open()
	if err != nil {
		return r, err
	}
	defer k.Close()
	client, err := kvmaccess.New()
	if err != nil {
		return r, err
	}
	defer client.Close()
	h, err := newHostile(k, rand.New(rand.NewPCG(c.Seed, 0)))
	if err != nil {
		return r, err
	}
	err = sampleHostile(ctx, c, r, client, h)
	err = errors.Join(err, h.end())
	r.Add("deaths of the guest", h.deaths.Load())
	return r, errors.Join(err, h.Close())
}

func sampleHostile(ctx context.Context, c HostileConfig, r *Report, client *kvmaccess.Client, h *hostile) error {
	vms, err := own(ctx, client)
	if err != nil {
		return err
	}
	if len(vms) != 1 {
		return fmt.Errorf("%d VMs, want the hostile one alone", len(vms))
	}
	vm := vms[0].ID
	warm := newReport("")
	if err := samples(ctx, c.Duration/10, c.Seed+1, warm, client, vm, h); err != nil {
		return err
	}
	flat, err := newFlat(r)
	if err != nil {
		return err
	}
	if err := samples(ctx, c.Duration, c.Seed, r, client, vm, h); err != nil {
		return err
	}
	if err := checkHostile(r, c.Duration); err != nil {
		return err
	}
	for _, what := range []string{"registers", "tables", "ranges of memory"} {
		if r.Count(what) == 0 {
			return fmt.Errorf("none of the %s could be read", what)
		}
	}
	return flat.check(r)
}

// samples asks in all ways at once for a time.
func samples(ctx context.Context, d time.Duration, seed uint64, r *Report, client *kvmaccess.Client, vm kvmaccess.VMID, h *hostile) error {
	end := time.Now().Add(d)
	ways := []func(context.Context, *rand.Rand) error{
		func(ctx context.Context, _ *rand.Rand) error {
			_, err := client.VCPU(ctx, vm, 0)
			return r.sampled("registers", err)
		},
		func(ctx context.Context, rng *rand.Rand) error {
			_, err := client.Table(ctx, vm, 0, pick(rng, kvmaccess.TableGDT, kvmaccess.TableIDT))
			return r.sampled("tables", err)
		},
		func(ctx context.Context, rng *rand.Rand) error {
			return readHostile(ctx, r, client, vm, rng, 0)
		},
		func(ctx context.Context, rng *rand.Rand) error {
			// A root in its tables, in its memory, or nowhere.
			root := pick(rng, hostileTables+rng.Uint64N(hostilePages)<<12, rng.Uint64N(hostileRAM), rng.Uint64())
			return readHostile(ctx, r, client, vm, rng, max(1, root))
		},
		func(ctx context.Context, rng *rand.Rand) error {
			return watchHostile(ctx, end, r, rng, vm)
		},
	}
	var wg sync.WaitGroup
	errs := make([]error, len(ways))
	for i, way := range ways {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(i+1)))
			for time.Now().Before(end) && ctx.Err() == nil && errs[i] == nil {
				select {
				case <-h.ended:
					errs[i] = h.err
				default:
					errs[i] = way(ctx, rng)
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, ctx.Err())...)
}

// sampled counts a request; errors other than those that a guest can cause
// are returned.
func (r *Report) sampled(what string, err error) error {
	switch {
	case err == nil:
		r.Add(what, 1)
	case isExplained(err):
		r.fail(err)
	default:
		return err
	}
	return nil
}

// readHostile reads at addresses that lead through the tables that the guest
// writes.
func readHostile(ctx context.Context, r *Report, client *kvmaccess.Client, vm kvmaccess.VMID, rng *rand.Rand, root uint64) error {
	ranges := make([]kvmaccess.Range, 1+rng.IntN(16))
	for i := range ranges {
		address := rng.Uint64() >> rng.IntN(20)
		// Canonical: bit 47 is repeated above it.
		address = uint64(int64(address<<16)>>16) &^ 0xfff
		ranges[i] = kvmaccess.Range{Address: address + rng.Uint64N(0x1000), Length: 1 + rng.Uint32N(64)}
		if ranges[i].Address+64 < address {
			ranges[i].Address = address
		}
	}
	got, err := client.ReadVirtual(ctx, vm, 0, root, ranges...)
	if errors.Is(err, kvmaccess.ErrInvalid) {
		// A range around the end of the lower half is not canonical.
		r.fail(err)
		return nil
	}
	if err := r.sampled("memory requests", err); err != nil {
		return err
	}
	for _, g := range got {
		if err := r.sampled("ranges of memory", g.Err); err != nil {
			return err
		}
	}
	return nil
}

// hostileWatches is how many watches a hostile guest has at once.
const hostileWatches = 2

// watchHostile watches, at the highest rate, all tables that the guest writes
// and the registers that it loads, for some seconds.
func watchHostile(ctx context.Context, end time.Time, r *Report, rng *rand.Rand, vm kvmaccess.VMID) error {
	w, err := kvmaccess.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	start := time.Now()
	var watches []*kvmaccess.Watch
	for range hostileWatches {
		key := &kvmaccess.WatchKey{byte(rng.Uint32())}
		watch, err := w.New(ctx, vm, kvmaccess.WatchConfig{Period: kvmaccess.WatchMinPeriod, Budget: hostilePages << 12, Key: key})
		if err == nil {
			_, err = watch.Add(ctx, hostileItems(rng)...)
		}
		if errors.Is(err, unix.ENOBUFS) {
			// The first watch has told too much already.
			r.fail(err)
			break
		}
		if err != nil {
			return err
		}
		watches = append(watches, watch)
	}
	// For a second at least, however long it took to set them up.
	now := time.Now()
	if later := now.Add(5 * time.Second); later.Before(end) {
		end = later
	} else if least := now.Add(time.Second); end.Before(least) {
		end = least
	}
	waiting, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	for {
		e, err := w.Receive(waiting)
		if err != nil {
			break
		}
		if e.State != kvmaccess.StateDifferent && e.State != kvmaccess.StateExpected {
			return fmt.Errorf("memory and registers that are there: %+v", e)
		}
		r.Add("findings", 1)
	}
	for _, watch := range watches {
		s, err := watch.Close(ctx)
		if errors.Is(err, unix.ENOBUFS) {
			r.fail(err)
			continue
		}
		if err != nil {
			return err
		}
		r.Add("ticks", int64(s.Ticks))
		r.Add("changes that others stand for", int64(s.Coalesced))
		if limit := 512 + uint64(time.Since(start)/time.Millisecond); s.Events > limit {
			return fmt.Errorf("%d events of a watch, want %d at most: %+v", s.Events, limit, s)
		}
	}
	return nil
}

// hostileItems are each table, once by its bytes, once by its entries, once by
// its digest; and the registers.
func hostileItems(rng *rand.Rand) []kvmaccess.Item {
	items := []kvmaccess.Item{{Kind: kvmaccess.KindDigest, GPA: hostileTables, Digests: make([]uint64, hostilePages)}}
	for page := range uint64(hostilePages) {
		gpa := hostileTables + page<<12
		items = append(items,
			kvmaccess.Item{Kind: kvmaccess.KindBytes, GPA: gpa, Data: make([]byte, kvmaccess.PageSize)},
			kvmaccess.Item{Kind: kvmaccess.KindEntry, GPA: gpa + 8*uint64(rng.IntN(512)), Mask: ^uint64(0x60)})
	}
	for _, register := range []kvmaccess.Register{
		kvmaccess.RegisterCR0, kvmaccess.RegisterCR3, kvmaccess.RegisterGDTRBase, kvmaccess.RegisterGDTRLimit,
		kvmaccess.RegisterIDTRBase, kvmaccess.RegisterLSTAR,
	} {
		items = append(items, kvmaccess.Item{Kind: kvmaccess.KindRegister, Register: register})
	}
	return items
}

// checkHostile is an error if the watches had nothing to do.
func checkHostile(r *Report, d time.Duration) error {
	if r.Count("findings") == 0 || r.Count("ticks") < int64(d/time.Second) {
		return fmt.Errorf("%d ticks of watches found %d changes", r.Count("ticks"), r.Count("findings"))
	}
	return nil
}
