// SPDX-License-Identifier: MIT

package attach

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// PeerFile is the image of cache.Peer's root in a host's payload, PeerDebug
// that of a guest kernel's debug info.
const PeerFile = "peer/root"

// PeerDebug is where a payload has the debug info of a guest's kernel.
func PeerDebug(kernel string) string { return "peer/debug/" + kernel }

//go:embed peer.py
var script string

// peer is drgn on this host, which is to read one kernel's guest.
type peer struct {
	dir, root string
	undo      []func() error
}

// openPeer makes drgn's root and the debug info of a kernel accessible; nil:
// the payload has none.
func openPeer(kernel string) (_ *peer, err error) {
	payload := os.Getenv(host.Env)
	debug := filepath.Join(payload, PeerDebug(kernel))
	if _, err := os.Stat(debug); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if out, err := exec.Command("modprobe", "loop").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("modprobe loop: %w: %s", err, out)
	}
	p := &peer{}
	if p.dir, err = os.MkdirTemp("", "peer-"); err != nil {
		return nil, err
	}
	p.root = filepath.Join(p.dir, "root")
	p.undo = append(p.undo, func() error { return os.RemoveAll(p.dir) })
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	shared := filepath.Join(p.dir, "shared")
	if err := errors.Join(os.Mkdir(p.root, 0o755), os.Mkdir(shared, 0o755)); err != nil {
		return nil, err
	}
	if err := p.mountImage(filepath.Join(payload, PeerFile), p.root); err != nil {
		return nil, err
	}
	if err := p.mountImage(debug, filepath.Join(p.root, "usr/lib/debug")); err != nil {
		return nil, err
	}
	if err := p.mount("proc", filepath.Join(p.root, "proc"), "proc", 0); err != nil {
		return nil, err
	}
	return p, p.mount(shared, filepath.Join(p.root, "tmp"), "", unix.MS_BIND)
}

func (p *peer) mount(source, dir, kind string, flags uintptr) error {
	if err := unix.Mount(source, dir, kind, flags, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, dir, err)
	}
	p.undo = append(p.undo, func() error { return unix.Unmount(dir, 0) })
	return nil
}

// mountImage mounts a file with a file system by a loop device, which goes with
// the mount.
func (p *peer) mountImage(file, dir string) error {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return fmt.Errorf("free loop device: %w", err)
	}
	image, err := os.Open(file)
	if err != nil {
		return err
	}
	defer image.Close()
	name := fmt.Sprintf("/dev/loop%d", n)
	device, err := os.Open(name)
	if err != nil {
		return err
	}
	defer device.Close()
	config := unix.LoopConfig{Fd: uint32(image.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR}}
	if err := unix.IoctlLoopConfigure(int(device.Fd()), &config); err != nil {
		return fmt.Errorf("%s with %s: %w", name, file, err)
	}
	return p.mount(name, dir, "squashfs", unix.MS_RDONLY)
}

// Close undoes all that openPeer did.
func (p *peer) Close() error {
	var errs []error
	for len(p.undo) > 0 {
		last := len(p.undo) - 1
		errs = append(errs, p.undo[last]())
		p.undo = p.undo[:last]
	}
	return errors.Join(errs...)
}

// noteName is the file with the guest's note in what the peer's root has as /tmp.
const noteName = "vmcoreinfo"

// answer is what peer.py says.
type answer struct {
	Version string   `json:"version"`
	Release string   `json:"release"`
	VFSRead uint64   `json:"vfs_read"`
	PID     uint64   `json:"pid"`
	Tasks   int      `json:"tasks"`
	Modules []string `json:"modules"`
	Without []string `json:"without"` // modules whose debug info was not found
	Load    float64  `json:"load_s"`  // seconds
	Attach  float64  `json:"attach_s"`
	List    float64  `json:"tasks_s"`

	process time.Duration // from its start to its end
}

// note leaves the kernel's own note for crash dumps where the peer reads it: it
// does not look for it in memory.
func (p *peer) note(ctx context.Context, g *fixture.Guest, mem guest.Memory) error {
	text, err := g.Read(ctx, "/sys/kernel/vmcoreinfo")
	if err != nil {
		return err
	}
	var at, size uint64
	if _, err := fmt.Sscanf(strings.TrimSpace(string(text)), "%v %x", &at, &size); err != nil || size < 12 || size > 1<<20 {
		return fmt.Errorf("/sys/kernel/vmcoreinfo is %q: %v", text, err)
	}
	raw := make([]byte, size)
	if err := mem.ReadPhysical(ctx, at, raw); err != nil {
		return err
	}
	name, desc := binary.LittleEndian.Uint32(raw), binary.LittleEndian.Uint32(raw[4:])
	start := 12 + (uint64(name)+3)&^3
	if start+uint64(desc) > size || !bytes.HasPrefix(raw[12:], []byte("VMCOREINFO\x00")) {
		return fmt.Errorf("the note at guest-physical %#x is no VMCOREINFO", at)
	}
	return os.WriteFile(filepath.Join(p.dir, "shared", noteName), raw[start:start+uint64(desc)], 0o644)
}

// attach lets the peer do it once, and checks that it found the same kernel.
func (p *peer) attach(ctx context.Context, vmm int, slots []kvmaccess.Memslot, k *guest.Kernel) (a answer, err error) {
	args := []string{"-c", script, strconv.Itoa(vmm), "/tmp/" + noteName}
	for _, s := range slots {
		if s.AS == 0 {
			for _, n := range []uint64{s.GPA, s.Size, s.HVA} {
				args = append(args, strconv.FormatUint(n, 10))
			}
		}
	}
	cmd := exec.CommandContext(ctx, "/usr/bin/python3", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: p.root}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8"}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return a, fmt.Errorf("drgn: %w: %s", err, stderr.Bytes())
	}
	a.process = time.Since(start)
	if err := json.Unmarshal(stdout.Bytes(), &a); err != nil {
		return a, fmt.Errorf("drgn: %w: %q", err, stdout.Bytes())
	}
	want, _ := k.Image.Lookup("vfs_read")
	s, err := k.Types.Struct("task_struct")
	if err != nil {
		return a, err
	}
	pid, err := s.Field("pid")
	switch {
	case err != nil:
		return a, err
	case a.Release != k.Fingerprint.Release || a.VFSRead != want || a.PID != uint64(pid.Offset) || a.Tasks == 0:
		return a, fmt.Errorf("drgn found another kernel: %s, vfs_read at %#x, pid at %d, %d tasks; want %s, %#x, %d",
			a.Release, a.VFSRead, a.PID, a.Tasks, k.Fingerprint.Release, want, pid.Offset)
	case len(a.Without) > 0:
		return a, fmt.Errorf("drgn has no debug info of %v", a.Without)
	}
	return a, nil
}
