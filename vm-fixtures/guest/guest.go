// SPDX-License-Identifier: MIT

// Package guest starts guests by QEMU and KVM on the machine it runs on, an
// emulated host or a real one, out of the payload of package host, and asks
// their agents to do things inside.
package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// Config says which guest to start. The zero value of each field but Name
// has a default.
type Config struct {
	Name   string
	UUID   string // default: none is given to QEMU
	CPUs   int    // default 1
	Memory int    // MiB; default 256
	Append string // to the kernel's command line
	Kernel string // one of the payload's host.KernelDir; default: the suite's own
	CPU    string // QEMU's model; default "host", or of an emulated guest "max"
	Args   []string

	Payload  string     // directory; default: the host's own
	Emulator *host.QEMU // nil: the QEMU and KVM of the machine this runs on
}

// Guest is a running guest.
type Guest struct {
	Name string
	PID  int // of QEMU

	dir  string
	cmd  *exec.Cmd
	out  bytes.Buffer
	exit chan struct{} // closed when QEMU has ended
	err  error         // of QEMU, once exit is closed
	quit atomic.Bool   // somebody ended it

	mu    sync.Mutex // one request at a time
	conn  net.Conn
	reply *bufio.Reader
	qmp   *qmp
}

// Kernels are those that the payload has besides the suite's own, for
// Config.Kernel.
func Kernels() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(os.Getenv(host.Env), host.KernelDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// Start boots a guest and returns once its agent answers.
func Start(ctx context.Context, c Config) (*Guest, error) {
	g, err := Launch(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := g.Up(ctx); err != nil {
		return nil, errors.Join(err, g.Kill())
	}
	return g, nil
}

// Launch starts a guest and returns as soon as its QEMU answers; with "-S" in
// Config.Args no vCPU has run by then.
func Launch(ctx context.Context, c Config) (_ *Guest, err error) {
	payload := c.Payload
	if payload == "" {
		payload = os.Getenv(host.Env)
	}
	if payload == "" {
		return nil, fmt.Errorf("%s is not set: this runs under 'vmfixture run'", host.Env)
	}
	dir, err := os.MkdirTemp("", "guest-"+c.Name+"-")
	if err != nil {
		return nil, err
	}
	g := &Guest{Name: c.Name, dir: dir, exit: make(chan struct{})}
	args := arguments(payload, dir, c)
	if c.Emulator != nil {
		g.cmd = c.Emulator.Command(context.Background(), args...)
	} else {
		g.cmd = exec.Command("qemu-system-x86_64", args...)
	}
	g.cmd.Stdout, g.cmd.Stderr = &g.out, &g.out
	// No guest outlives its owner.
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := startPinned(g.cmd); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	g.PID = g.cmd.Process.Pid
	go func() {
		g.err = g.cmd.Wait()
		close(g.exit)
	}()
	defer func() {
		if err != nil {
			err = errors.Join(g.failed(err), g.Kill())
		}
	}()
	if g.qmp, err = dialQMP(ctx, g, filepath.Join(dir, "qmp")); err != nil {
		return nil, err
	}
	if g.conn, err = g.dial(ctx, filepath.Join(dir, "agent")); err != nil {
		return nil, err
	}
	g.reply = bufio.NewReaderSize(g.conn, 1<<16)
	return g, nil
}

// failed adds to an error what the guest and its QEMU said.
func (g *Guest) failed(err error) error {
	qemu := ""
	console := g.Console()
	select {
	case <-g.exit:
		qemu = g.out.String()
		if g.err == nil && !g.quit.Load() && !lastWords.MatchString(console) {
			err = fmt.Errorf("%w: %s", err, host.SilentGuest)
		}
	default:
	}
	return fmt.Errorf("guest %s: %w\nQEMU: %s\nits console:\n%s", g.Name, err, qemu, console)
}

// lastWords are what Linux says before it ends, or lets another kernel begin.
var lastWords = regexp.MustCompile(`Kernel panic|Oops|BUG:|double fault|reboot: |sysrq: |Starting new kernel`)

// Ended is an error, with what the guest said, of one whose QEMU has ended.
func (g *Guest) Ended() error {
	select {
	case <-g.exit:
		return g.failed(errors.New("it has ended"))
	default:
		return nil
	}
}

// Up waits until the guest's agent answers.
func (g *Guest) Up(ctx context.Context) error {
	// What is sent before the guest's driver is there waits in the socket.
	_, err := g.Ask(ctx, agent.Request{Op: agent.OpPing})
	return err
}

// startPinned starts a command from a thread that never ends: the kernel
// takes the death of a parent's thread for that of the parent
// (PR_SET_PDEATHSIG(2const)).
func startPinned(cmd *exec.Cmd) error {
	starts.once.Do(func() {
		starts.requests = make(chan func())
		go func() {
			lockThread()
			for f := range starts.requests {
				f()
			}
		}()
	})
	err := make(chan error)
	starts.requests <- func() { err <- cmd.Start() }
	return <-err
}

var starts struct {
	once     sync.Once
	requests chan func()
}

// quickExit makes a guest end each of its interrupts by an exit, and first of all.
// QEMU, where it emulates the host, may deliver an interrupt of a guest's twice, as
// long as the guest has not left by then: see host.SilentGuest. With KVM's
// paravirtual end of interrupt that can be thousands of instructions.
const quickExit = "kvm-pv-eoi=off"

func arguments(payload, dir string, c Config) []string {
	name := "guest=" + c.Name + ",debug-threads=on"
	accel, cpu, bus := "kvm", "host", "device"
	machine := "microvm,pic=on,pit=on,rtc=on,isa-serial=on"
	if c.Emulator != nil {
		// Without KVM's clock Linux needs a timer that a microvm lacks.
		accel, cpu, bus, machine = "tcg", "max", "pci", "pc"
	}
	if c.CPU != "" {
		cpu = c.CPU
	}
	if c.Emulator == nil {
		cpu += "," + quickExit
	}
	memory := c.Memory
	if memory == 0 {
		memory = 256
	}
	kernel, initrd := host.GuestKernel, host.GuestInitramfs
	if c.Kernel != "" {
		dir := filepath.Join(host.KernelDir, c.Kernel)
		kernel, initrd = filepath.Join(dir, filepath.Base(kernel)), filepath.Join(dir, filepath.Base(initrd))
	}
	// Tests of the kernel's ciphers are most of its boot under an emulator.
	line := "console=ttyS0 loglevel=4 panic=-1 cryptomgr.notests rdinit=" + agent.Init + " " + c.Append
	if c.Emulator != nil {
		// A busy machine's timer is late, which Linux takes for a broken one.
		line += " no_timer_check"
	}
	args := []string{
		"-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", accel, "-cpu", cpu, "-smp", strconv.Itoa(max(1, c.CPUs)), "-m", strconv.Itoa(memory),
		"-machine", machine,
		"-kernel", filepath.Join(payload, kernel),
		"-initrd", filepath.Join(payload, initrd),
		"-append", strings.TrimSpace(line),
		"-serial", "file:" + filepath.Join(dir, "console"),
		"-qmp", "unix:" + filepath.Join(dir, "qmp") + ",server=on,wait=off",
		"-device", "virtio-serial-" + bus,
		"-chardev", "socket,id=agent,server=on,wait=off,path=" + filepath.Join(dir, "agent"),
		"-device", "virtserialport,chardev=agent,name=" + agent.Port,
	}
	if c.UUID != "" {
		args = append(args, "-uuid", c.UUID)
	}
	return append(args, c.Args...)
}

// dial connects to a socket of QEMU as soon as it is there.
func (g *Guest) dial(ctx context.Context, path string) (net.Conn, error) {
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			return conn, nil
		}
		select {
		case <-g.exit:
			return nil, fmt.Errorf("QEMU ended: %v", g.err)
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Ask lets the guest's agent do something and waits until it has. The error of
// a guest that ended meanwhile, or never came up, has what it said last. A guest
// that is found stuck is ended.
func (g *Guest) Ask(ctx context.Context, q agent.Request) (agent.Reply, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	go g.giveUp(ctx, stop)
	p, err := g.ask(ctx, q)
	if errors.Is(err, errStuck) {
		err = errors.Join(g.failed(err), g.cmd.Process.Kill())
		<-g.exit
	} else if err != nil && (g.ended(err) || q.Op == agent.OpPing) {
		err = g.failed(err)
	}
	return p, err
}

func (g *Guest) ask(ctx context.Context, q agent.Request) (agent.Reply, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	// A request that is given up leaves its reply behind: no more after it.
	stop := context.AfterFunc(ctx, func() { g.conn.Close() })
	p, err := agent.Ask(g.conn, g.reply, q)
	if !stop() && err != nil {
		err = errors.Join(err, context.Cause(ctx))
	}
	if err != nil {
		err = fmt.Errorf("guest %s: %s: %w", g.Name, q.Op, err)
	}
	return p, err
}

// ended says whether an error of the connection is that QEMU ended, by itself.
func (g *Guest) ended(err error) bool {
	if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return false
	}
	select {
	case <-g.exit:
		return true
	case <-time.After(5 * time.Second):
		return false
	}
}

// Console is what the guest's kernel wrote so far.
func (g *Guest) Console() string {
	text, err := os.ReadFile(filepath.Join(g.dir, "console"))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Done is closed when the guest's QEMU has ended.
func (g *Guest) Done() <-chan struct{} { return g.exit }

// Stop ends the guest as its owner would, by QMP, and waits until it is gone.
func (g *Guest) Stop(ctx context.Context) error {
	g.quit.Store(true)
	if _, err := g.QMP(ctx, "quit", nil); err != nil {
		return errors.Join(err, g.Kill())
	}
	return g.gone()
}

// Kill ends the guest's QEMU by SIGKILL and waits until it is gone.
func (g *Guest) Kill() error {
	if err := g.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return g.gone()
}

func (g *Guest) gone() error {
	<-g.exit
	if g.conn != nil {
		g.conn.Close()
	}
	if g.qmp != nil {
		g.qmp.conn.Close()
	}
	return os.RemoveAll(g.dir)
}
