// SPDX-License-Identifier: MIT

package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// Vendors of an emulated host's processor, as Config.Vendor names them.
const (
	SVM = "svm" // AMD, under QEMU
	VMX = "vmx" // Intel, under Bochs
)

// emulator makes machines. In the directory that one is given, the named pipe
// portName takes the host's records, payloadName and initramfsName are there,
// and the host's console goes to consoleName.
type emulator interface {
	machine(ctx context.Context, dir string, root *cache.Root, c Config) (*machine, error)
}

// machine is one that is ready to boot.
type machine struct {
	cmd *exec.Cmd
	// anyExit says that the emulator cannot tell a machine that was switched
	// off from trouble by its own exit code.
	anyExit bool
	// given is closed here once the emulator has it, held when it has ended.
	given, held io.Closer
}

// started gives up what the emulator now has.
func (m *machine) started() {
	if m.given != nil {
		m.given.Close()
	}
}

// ended gives up what the emulator needed.
func (m *machine) ended() {
	if m.held != nil {
		m.held.Close()
	}
}

// emulatorOf returns the emulator that has a vendor's processors.
func emulatorOf(vendor string) (emulator, error) {
	switch vendor {
	case "", SVM:
		return qemu{}, nil
	case VMX:
		return bochs{}, nil
	}
	return nil, fmt.Errorf("no vendor %q: there are %s and %s", vendor, SVM, VMX)
}

// pipe is a named pipe that another process writes to. Reading waits for it
// to come and to go, until w is closed.
type pipe struct{ r, w *os.File }

func openPipe(name string) (pipe, error) {
	if err := unix.Mkfifo(name, 0o600); err != nil {
		return pipe{}, fmt.Errorf("make %s: %w", name, err)
	}
	// fifo(7): opening one end waits for the other, but for a reader that
	// does not want to.
	r, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return pipe{}, err
	}
	w, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return pipe{}, errors.Join(err, r.Close())
	}
	return pipe{r, w}, nil
}

func (p pipe) Close() error { return errors.Join(p.r.Close(), p.w.Close()) }
