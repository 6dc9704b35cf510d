// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"errors"
	"net"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// source is the kernel module as the daemon asks it; *kvmaccess.Client is one.
type source interface {
	integrity.Source
	Info(ctx context.Context) (kvmaccess.Info, error)
	VMs(ctx context.Context) ([]kvmaccess.VM, error)
	Stats(ctx context.Context) (kvmaccess.Stats, error)
	Watches(ctx context.Context) ([]kvmaccess.WatchStats, error)
	Close() error
}

// watchSource makes watches and tells their events; a *kvmaccess.Watcher is one.
type watchSource interface {
	New(ctx context.Context, vm kvmaccess.VMID, c kvmaccess.WatchConfig) (watch, error)
	Receive(ctx context.Context) (kvmaccess.WatchEvent, error)
	Close() error
}

// watch is one of the module's; a *kvmaccess.Watch is one.
type watch interface {
	Ident() kvmaccess.WatchID
	Add(ctx context.Context, items ...kvmaccess.Item) (kvmaccess.WatchStats, error)
	Remove(ctx context.Context, cookie uint64) (kvmaccess.WatchStats, error)
	Close(ctx context.Context) (kvmaccess.WatchStats, error)
	Stats(ctx context.Context) (kvmaccess.WatchStats, error)
}

// subscription tells of VMs that come and go; *kvmaccess.Subscription is one.
type subscription interface {
	Receive(ctx context.Context) (kvmaccess.Event, error)
	Close() error
}

// monitor watches one VM; *integrity.Monitor is one.
type monitor interface {
	Tick(ctx context.Context) ([]integrity.Finding, error)
	State() integrity.State
	Baseline() integrity.Baseline
	Status() integrity.Status
	// For the watch mode.
	WatchItems(ctx context.Context) (integrity.WatchList, error)
	Reread(ctx context.Context, events []kvmaccess.WatchEvent) (findings []integrity.Finding, told []bool, err error)
	See(ctx context.Context, e kvmaccess.WatchEvent) ([]integrity.Finding, error)
	StartText(ctx context.Context, d *kvmaccess.Digester) (*integrity.TextLook, error)
	FinishText(ctx context.Context, l *integrity.TextLook) ([]integrity.Finding, error)
	WatchText() integrity.WatchList
	Accepted() []integrity.Accepted
}

// moduleWatcher is a *kvmaccess.Watcher as a watchSource.
type moduleWatcher struct{ *kvmaccess.Watcher }

type moduleWatch struct{ *kvmaccess.Watch }

func (w moduleWatcher) New(ctx context.Context, vm kvmaccess.VMID, c kvmaccess.WatchConfig) (watch, error) {
	x, err := w.Watcher.New(ctx, vm, c)
	if err != nil {
		return nil, err
	}
	return moduleWatch{x}, nil
}

func (w moduleWatch) Ident() kvmaccess.WatchID { return w.ID }

// host is where the daemon runs.
type host struct {
	open       func() (source, error)
	subscribe  func(ctx context.Context) (subscription, error)
	watch      func() (watchSource, error)
	identify   func(pid int) (kvmaccess.VMM, error)
	memory     func(source, kvmaccess.VM) guest.Memory
	newMonitor func(source, integrity.VM, integrity.Options) (monitor, error)
	bootID     func() (string, error)
	newClock   func() (clock, error)
}

func thisHost() host {
	return host{
		open: func() (source, error) { return kvmaccess.New() },
		subscribe: func(ctx context.Context) (subscription, error) {
			return kvmaccess.Subscribe(ctx)
		},
		watch: func() (watchSource, error) {
			w, err := kvmaccess.NewWatcher()
			if err != nil {
				return nil, err
			}
			return moduleWatcher{w}, nil
		},
		identify: kvmaccess.Identify,
		memory: func(s source, vm kvmaccess.VM) guest.Memory {
			c, ok := s.(*kvmaccess.Client)
			if !ok {
				return nil
			}
			return kvmaccess.NewMemory(c, vm)
		},
		newMonitor: func(s source, vm integrity.VM, opts integrity.Options) (monitor, error) {
			return integrity.NewMonitor(s, vm, opts)
		},
		bootID:   bootID,
		newClock: func() (clock, error) { return newTimer() },
	}
}

// isGone says that a VM is no more, which is nobody's fault.
func isGone(err error) bool {
	return errors.Is(err, kvmaccess.ErrNoVM) || errors.Is(err, kvmaccess.ErrDying) ||
		errors.Is(err, unix.ESRCH) // its VMM has ended
}

// isModuleGone says that the module does not answer to this connection.
func isModuleGone(err error) bool {
	var version *kvmaccess.VersionError
	return errors.Is(err, kvmaccess.ErrNoModule) || errors.Is(err, kvmaccess.ErrReloaded) ||
		errors.Is(err, net.ErrClosed) || errors.As(err, &version)
}

// coldMemory is a VM's memory by way of its VMM, which may take as long as the
// host's disk to bring a page back. On the lane that all VMs share it does not
// even try.
type coldMemory struct {
	memory guest.Memory
	shared bool        // the reader is on the shared lane
	asked  atomic.Bool // since this was last set to false
}

// ReadPhysical implements guest.Memory.
func (m *coldMemory) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	m.asked.Store(true)
	if m.shared {
		return kvmaccess.ErrNotResident
	}
	return m.memory.ReadPhysical(ctx, gpa, p)
}
