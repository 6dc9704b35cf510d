// SPDX-License-Identifier: MIT

package inside

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/kvmaccess/kvmaccess/bench/objects"
	"github.com/kvmaccess/kvmaccess/userspace/daemon"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// System calls that no kernel has had for long, of x86-64: nobody misses them
// while their entries are others.
const firstGone, lastGone = 180, 185 // nfsservctl to security

// findingLimit is how long a finding may take before it counts as missed.
const findingLimit = 2 * time.Second

// quiet is between two changes, at least.
const quiet = 50 * time.Millisecond

// TimeFindings has kvmaccessd watch an idle Linux guest, changes an entry of its
// system call table n times at random times, and returns how long each change
// took to come out of the daemon's stream as a finding, and after how long that
// says that it was made.
func TimeFindings(ctx context.Context, period time.Duration, n int, random *rand.Rand, alive func(string)) (found, dated []time.Duration, missed int, err error) {
	if err := LoadModule(); err != nil {
		return nil, nil, 0, err
	}
	dir, err := os.MkdirTemp("", "findings-")
	if err != nil {
		return nil, nil, 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	g, err := guest.Start(ctx, guest.Config{Name: guestName})
	if err != nil {
		return nil, nil, 0, err
	}
	defer func() { err = errors.Join(err, g.Kill()) }()
	alive("the guest is up")
	text, err := g.Symbols(ctx)
	if err != nil {
		return nil, nil, 0, err
	}
	symbols := filepath.Join(dir, "kallsyms")
	if err := os.WriteFile(symbols, brief(text), 0o600); err != nil {
		return nil, nil, 0, err
	}
	c, err := kvmaccess.New()
	if err != nil {
		return nil, nil, 0, err
	}
	defer c.Close()
	table, err := tableOf(ctx, c, g.PID)
	if err != nil {
		return nil, nil, 0, err
	}
	memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", g.PID), os.O_RDWR, 0)
	if err != nil {
		return nil, nil, 0, err
	}
	defer memory.Close()
	d := &daemonRun{mode: daemon.ModeWatch, dir: filepath.Join(dir, "daemon"), symbols: symbols, period: period}
	if err := d.start(ctx); err != nil {
		return nil, nil, 0, err
	}
	alive("the guest is watched")
	following, end := context.WithCancel(ctx)
	defer end()
	type arrival struct {
		at     time.Duration
		record daemon.Record
		err    error
	}
	arrivals := make(chan arrival, 64)
	go func() {
		for r, err := range d.client.Follow(following, daemon.Query{}) {
			now, clockErr := Monotonic()
			arrivals <- arrival{now, r, errors.Join(err, clockErr)}
		}
	}()
	// next is the next finding that says that the table was changed, or is as
	// before.
	next := func(cleared bool) (*arrival, error) {
		limit := time.After(findingLimit)
		for {
			select {
			case a := <-arrivals:
				if a.err != nil {
					return nil, d.explain(a.err)
				}
				if (a.record.Kind == integrity.KindCleared) == cleared {
					return &a, nil
				}
			case <-limit:
				return nil, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}
	defer HoldGarbage()()
	for i := range n {
		if err := Sleep(ctx, quiet+time.Duration(random.Int64N(int64(2*period)))); err != nil {
			return nil, nil, 0, err
		}
		for len(arrivals) > 0 {
			<-arrivals
		}
		at := int64(table) + 8*int64(firstGone+random.IntN(lastGone-firstGone+1))
		var was, is [1]byte
		if _, err := memory.ReadAt(was[:], at); err != nil {
			return nil, nil, 0, err
		}
		is[0] = was[0] ^ byte(1+random.IntN(255))
		changed, err := Monotonic()
		if err != nil {
			return nil, nil, 0, err
		}
		wall := time.Now()
		if _, err := memory.WriteAt(is[:], at); err != nil {
			return nil, nil, 0, err
		}
		a, err := next(false)
		if err != nil {
			return nil, nil, 0, err
		}
		if a != nil {
			found, dated = append(found, a.at-changed), append(dated, a.record.Time.Sub(wall))
		} else {
			missed++
		}
		if _, err := memory.WriteAt(was[:], at); err != nil {
			return nil, nil, 0, err
		}
		if back, err := next(true); err != nil || a != nil && back == nil {
			return nil, nil, 0, errors.Join(errors.New("the table is as before, and no finding says so"), err)
		}
		if i%20 == 0 {
			alive(fmt.Sprintf("findings: %d of %d", i, n))
		}
	}
	end()
	return found, dated, missed, d.stop(ctx)
}

// tableOf is where QEMU has the guest's system call table.
func tableOf(ctx context.Context, c *kvmaccess.Client, pid int) (hva uint64, err error) {
	o, err := objects.Find(ctx, c, pid)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, o.Memory.Close()) }()
	slots, err := c.Memslots(ctx, o.VM.ID)
	if err != nil {
		return 0, err
	}
	for _, r := range o.Regions {
		if r.Name != objects.SyscallTable {
			continue
		}
		p := r.Parts[0]
		if p.Length < 8*(lastGone+1) {
			return 0, fmt.Errorf("the system call table's first %d bytes are in one page, and no more", p.Length)
		}
		for _, s := range slots {
			if s.AS == 0 && p.GPA >= s.GPA && p.GPA-s.GPA < s.Size {
				return s.HVA + p.GPA - s.GPA, nil
			}
		}
	}
	return 0, errors.New("the system call table is in no memslot")
}
