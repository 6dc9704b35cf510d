// SPDX-License-Identifier: MIT

// Package host boots a KVM host out of stock Debian packages under an
// emulator, runs one command in it and brings back what it said, its exit
// code and the files it left. The host's kernel may not say anything alarming
// meanwhile.
package host

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// File is a file of this machine that a host is given.
type File struct {
	From string // here
	To   string // relative to the payload
}

// Config says which host to boot and what to run in it.
type Config struct {
	Suite  string
	Vendor string // of the host's processor: SVM, the default, or VMX
	CPUs   int    // of the host; 1 with Icount
	Memory int    // MiB; 0: enough for tests
	Icount bool   // one instruction takes one nanosecond of the host's time
	CPU    string // the emulator's model and features; empty: DefaultCPU, or what all kernels boot on
	Append string // to the kernel's command line
	Module string // kvmaccess.ko; empty: built from the checkout
	Files  []File // for the payload
	// GuestKernels names guest kernels, as cache.GuestKernelNamed has them, to
	// take along beside the suite's own.
	GuestKernels []string
	Args         []string      // the command; the first is looked up in the payload's bin
	Env          []string      // NAME=value, for the command
	Out          string        // directory for the files that the command leaves; empty: dropped
	Timeout      time.Duration // for all of it

	Stdout, Stderr io.Writer // the command's
	Log            *slog.Logger
}

// DefaultCPU has nested paging, and what a guest's kernel protects itself with.
const DefaultCPU = "max,la57=off"

// panicArgs make a kernel that is in trouble stop at once. What waits for
// progress waits for longer than on a real machine: QEMU's thread for timers
// competes with its CPUs for one lock, and loses where these send each other
// many interrupts.
const panicArgs = "panic=-1 oops=panic panic_on_warn=1 softlockup_panic=1 hung_task_panic=1 " +
	"watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=120 workqueue.watchdog_thresh=180"

// alarm matches what a healthy kernel never says.
var alarm = regexp.MustCompile(`BUG:|WARNING:|\bOops\b|KASAN|UBSAN|KFENCE|possible circular locking|possible recursive locking|` +
	`Call Trace|general protection fault|stack segment|Kernel panic|soft lockup|blocked for more than|detected stall|scheduling while atomic|` +
	`refcount_t:|unchecked MSR access|unable to handle|double fault|list_(add|del) corruption|` +
	`trying to register non-static key|\bODEBUG:|kmemleak: (Cannot|Too many)|suspected memory leak`)

// ErrTrouble says that the host itself failed, whatever the command did.
var ErrTrouble = errors.New("the emulated host is in trouble")

// runs is how often Run begins, at most.
const runs = 3

// Run boots the host and returns the command's exit code. An error says that
// the host failed: it did not come up, its kernel complained, it ended
// without the closing record, or took too long. Where what it left proves that
// it was the emulator's fault, it came to a standstill in silence, or the command
// failed and met a SilentGuest or a StuckGuest, it is run once more, and of the
// program of "go test -v" the tests that had passed are left out.
func Run(ctx context.Context, c Config) (code int, err error) {
	if len(c.Args) == 0 {
		return 0, errors.New("no command to run")
	}
	suite, err := cache.SuiteNamed(c.Suite)
	if err != nil {
		return 0, err
	}
	root, err := cache.Open(ctx, suite, c.Log)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	stdout, stderr := c.Stdout, c.Stderr
	for n := 1; ; n++ {
		out, complaints := &listener{Writer: stdout}, &listener{Writer: stderr}
		c.Stdout, c.Stderr = out, complaints
		code, err = runOnce(ctx, root, c)
		because := err
		if heard := append(out.heard, complaints.heard...); err == nil && code != 0 && len(heard) != 0 {
			because = fmt.Errorf("%w: of a guest, %s", errContradiction, heard[0])
		}
		if n == runs || !errors.Is(because, errContradiction) {
			return code, err
		}
		c.Args = withoutPassed(c.Args, out.passed)
		c.Log.Error("once more", "because", because, "passed before", len(out.passed))
	}
}

func runOnce(ctx context.Context, root *cache.Root, c Config) (code int, err error) {
	dir, err := os.MkdirTemp("", "kvmaccess-host-")
	if err != nil {
		return 0, err
	}
	if err := prepare(ctx, dir, root, c); err != nil {
		return 0, errors.Join(err, os.RemoveAll(dir))
	}
	defer func() {
		if err != nil {
			c.Log.Error("what the host left is kept", "dir", dir)
			return
		}
		err = os.RemoveAll(dir)
	}()
	return bootAndRelay(ctx, dir, root, c)
}

// prepare makes the payload's image and the host's initramfs.
func prepare(ctx context.Context, dir string, root *cache.Root, c Config) error {
	payload := filepath.Join(dir, "payload")
	if err := stage(ctx, payload, root, c); err != nil {
		return err
	}
	env := append([]string{Env + "=" + Payload, OutEnv + "=" + Out}, c.Env...)
	text, err := json.Marshal(spec{Args: c.Args, Env: env, Sanitizers: root.Suite.Kernel != nil, Pulse: !c.Icount})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(payload, specName), text, 0o644); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "mksquashfs", payload, filepath.Join(dir, payloadName),
		"-comp", "lz4", "-noI", "-noD", "-noF", "-no-progress", "-quiet").CombinedOutput()
	if err != nil {
		return fmt.Errorf("mksquashfs: %w: %s", err, out)
	}
	if err := os.RemoveAll(payload); err != nil {
		return err
	}
	me, err := self()
	if err != nil {
		return err
	}
	return initramfs(filepath.Join(dir, initramfsName), root.HostInitramfs(), "/init", me, nil)
}

// kernelLine is the command line of the host's kernel.
func kernelLine(c Config, more ...string) string {
	return strings.Join(strings.Fields("console=ttyS0 loglevel=5 "+panicArgs+" "+strings.Join(more, " ")+" "+c.Append), " ")
}

// Files in a host's directory.
const (
	consoleName   = "console"
	portName      = "port"
	resetsName    = "resets" // the emulator's log of them, if it has one
	payloadName   = "payload.squashfs"
	initramfsName = "initramfs.cpio"
)

func bootAndRelay(ctx context.Context, dir string, root *cache.Root, c Config) (int, error) {
	emulator, err := emulatorOf(c.Vendor)
	if err != nil {
		return 0, err
	}
	port, err := openPipe(filepath.Join(dir, portName))
	if err != nil {
		return 0, err
	}
	defer port.Close()
	m, err := emulator.machine(ctx, dir, root, c)
	if err != nil {
		return 0, err
	}
	defer m.ended()
	cmd := m.cmd
	c.Log.Info("booting the host", "suite", root.Suite.Name, "kernel", root.Kernel, "command", quote(cmd.Args))
	start := time.Now()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Cancel = func() error { return cmd.Process.Kill() }
	// The emulator goes when this process goes, however it does.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	m.started()
	if err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return 0, fmt.Errorf("%w: run 'make deps' first", err)
		}
		return 0, err
	}

	type result struct {
		code int
		err  error
	}
	done := make(chan result, 1)
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	watchdog := time.AfterFunc(1<<62, func() {
		stop(errStandstill)
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			c.Log.Error("the emulator cannot be ended", "error", err)
		}
	})
	defer watchdog.Stop()
	go func() {
		code, err := receive(port.r, c, start, func() { watchdog.Reset(standstill) })
		done <- result{code, err}
	}()

	exit := cmd.Wait()
	port.w.Close() // nobody else writes any more: what is read ends
	r := <-done

	console, err := os.ReadFile(filepath.Join(dir, consoleName))
	trouble := []error{r.err, err}
	if ctx.Err() != nil {
		why := context.Cause(ctx)
		if errors.Is(why, errStandstill) && alarm.Match(console) {
			why = errors.New("it came to a standstill") // after it had said why
		}
		trouble = append(trouble, fmt.Errorf("stopped after %v: %w", time.Since(start).Round(time.Second), why))
	} else if exit != nil && !(m.anyExit && r.err == nil) {
		trouble = append(trouble, fmt.Errorf("%s: %w: %s", cmd.Args[0], exit, strings.TrimSpace(stderr.String())))
	}
	if m := alarm.Find(console); m != nil {
		trouble = append(trouble, fmt.Errorf("its console says %q", m))
	}
	if err := errors.Join(trouble...); err != nil {
		resets, lost := os.ReadFile(filepath.Join(dir, resetsName))
		if errors.Is(lost, fs.ErrNotExist) {
			lost = nil
		}
		err = errors.Join(err, lost, contradiction(console), silentReset(resets, console), strayWrite(console, root.Suite.Kernel != nil))
		return 0, fmt.Errorf("%w: %w\nend of its console:\n%s", ErrTrouble, err, tail(console, 60))
	}
	c.Log.Info("the host is done", "exit", r.code, "seconds", int(time.Since(start).Seconds()))
	return r.code, nil
}

// receive handles the host's records up to the last, and calls alive when there
// is a pulse.
func receive(from io.Reader, c Config, start time.Time, alive func()) (int, error) {
	d := json.NewDecoder(bufio.NewReaderSize(from, 1<<16))
	seen := map[string]bool{}
	for {
		var r record
		if err := d.Decode(&r); err != nil {
			return 0, fmt.Errorf("ended without its closing record: %w", err)
		}
		var err error
		switch r.Kind {
		case kindPulse:
			alive()
		case kindReady:
			c.Log.Info("the host is up", "seconds", fmt.Sprintf("%.1f", time.Since(start).Seconds()))
		case kindStdout:
			_, err = c.Stdout.Write(r.Data)
		case kindStderr:
			_, err = c.Stderr.Write(r.Data)
		case kindFile:
			if c.Out != "" {
				err = appendFile(c.Out, r, !seen[r.Name])
				seen[r.Name] = true
			}
		case kindError:
			return 0, errors.New(string(r.Data))
		case kindDone:
			return r.Code, nil
		default:
			return 0, fmt.Errorf("unknown record %q", r.Kind)
		}
		if err != nil {
			return 0, err
		}
	}
}

// appendFile stores a piece of a file that the host left, within dir.
func appendFile(dir string, r record, first bool) error {
	if !filepath.IsLocal(r.Name) {
		return fmt.Errorf("file %q is not below %s", r.Name, Out)
	}
	name := filepath.Join(dir, r.Name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND
	if first {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(name, flags, r.Mode)
	if err != nil {
		return err
	}
	_, err = f.Write(r.Data)
	return errors.Join(err, f.Close())
}

// tail is the last n lines of text.
func tail(text []byte, n int) string {
	lines := strings.Split(strings.TrimRight(strings.ReplaceAll(string(text), "\r", ""), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// quote is a command line that a shell takes.
func quote(args []string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		if strings.ContainsAny(a, " \t\"'\\$*?;&|<>()#~`") || a == "" {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		quoted[i] = a
	}
	return strings.Join(quoted, " ")
}
