// SPDX-License-Identifier: MIT

package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// Main is the first process of an emulated host. It does not return.
func Main() {
	port, err := setUp()
	if err != nil {
		fmt.Fprintln(os.Stderr, "host:", err)
	}
	if port != nil {
		out := &recorder{w: json.NewEncoder(port)}
		if err == nil {
			err = runSpec(out)
		}
		if err != nil {
			out.send(record{Kind: kindError, Data: []byte(err.Error())})
		}
		if err := port.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "host:", err)
		}
	}
	boot.PowerOff()
}

// setUp goes from the initramfs to the root file system. The port is not nil
// as soon as there is one, even beside an error.
func setUp() (port *os.File, err error) {
	if err := boot.MountKernel("/"); err != nil {
		return nil, err
	}
	if err := boot.LoadModules("/" + cache.ModuleList); err != nil {
		return nil, err
	}
	if port, err = openPort(); err != nil {
		return nil, err
	}
	system, err := findDisk(rootDisk, time.Minute)
	if err != nil {
		return port, err
	}
	payload, err := findDisk(payloadDisk, time.Minute)
	if err != nil {
		return port, err
	}
	const root = "/newroot"
	for _, m := range []struct {
		source, dir, kind string
		flags             uintptr
		data              string
	}{
		{system, "/lower", "squashfs", unix.MS_RDONLY, ""},
		{"tmpfs", "/upper", "tmpfs", 0, "size=75%"},
		{"overlay", root, "overlay", 0, "lowerdir=/lower,upperdir=/upper/root,workdir=/upper/work"},
		{payload, root + Payload, "squashfs", unix.MS_RDONLY, ""},
		{"tmpfs", root + "/run", "tmpfs", 0, ""},
		{"tmpfs", root + "/tmp", "tmpfs", 0, ""},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return port, err
		}
		if err := unix.Mount(m.source, m.dir, m.kind, m.flags, m.data); err != nil {
			return port, fmt.Errorf("mount %s on %s: %w", m.source, m.dir, err)
		}
		if m.dir == "/upper" {
			if err := errors.Join(os.Mkdir("/upper/root", 0o755), os.Mkdir("/upper/work", 0o755)); err != nil {
				return port, err
			}
		}
	}
	for _, dir := range []string{"proc", "sys", "dev"} {
		if err := unix.Mount("/"+dir, filepath.Join(root, dir), "", unix.MS_MOVE, ""); err != nil {
			return port, fmt.Errorf("move /%s: %w", dir, err)
		}
	}
	if err := errors.Join(
		os.Chmod(filepath.Join(root, "tmp"), 0o777|os.ModeSticky),
		os.Chdir(root),
		unix.Mount(".", "/", "", unix.MS_MOVE, ""),
		unix.Chroot("."),
		os.Chdir("/"),
		os.MkdirAll(Out, 0o755),
		unix.Sethostname([]byte("kvmhost")),
		loopbackUp(),
	); err != nil {
		return port, err
	}
	return port, nil
}

// openPort opens what records go out by.
func openPort() (*os.File, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	for arg := range strings.FieldsSeq(string(line)) {
		if name, ok := strings.CutPrefix(arg, portArg); ok {
			return boot.OpenSerial(name)
		}
	}
	return boot.OpenPort(Port, time.Minute)
}

// findDisk returns the device of the disk of this name, once it is there: a
// virtio disk has a serial number, an ATA disk a model.
func findDisk(name string, limit time.Duration) (string, error) {
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		for _, attribute := range []string{"serial", "device/model"} {
			files, err := filepath.Glob("/sys/block/*/" + attribute)
			if err != nil {
				return "", err
			}
			for _, file := range files {
				text, err := os.ReadFile(file)
				if err == nil && strings.TrimSpace(string(text)) == name {
					return "/dev/" + strings.Split(file, "/")[3], nil
				}
			}
		}
		if time.Now().After(end) {
			return "", fmt.Errorf("no disk %q after %v", name, limit)
		}
	}
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// recorder writes records from several goroutines.
type recorder struct {
	mu sync.Mutex
	w  *json.Encoder
}

func (r *recorder) send(rec record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.w.Encode(rec); err != nil {
		fmt.Fprintln(os.Stderr, "host: port:", err)
	}
}

// relay sends all that comes out of a pipe.
func (r *recorder) relay(kind string, from *os.File) {
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			r.send(record{Kind: kind, Data: buf[:n]})
		}
		if err != nil {
			return
		}
	}
}

// runSpec runs the payload's command, relays what it says, and sends the
// files it left, and the end.
func runSpec(out *recorder) error {
	text, err := os.ReadFile(filepath.Join(Payload, specName))
	if err != nil {
		return err
	}
	var s spec
	if err := json.Unmarshal(text, &s); err != nil {
		return fmt.Errorf("%s: %w", specName, err)
	}
	for _, kv := range append([]string{"PATH=" + Path(Payload), "HOME=/root", "TERM=dumb"}, s.Env...) {
		for i := range kv {
			if kv[i] == '=' {
				if err := os.Setenv(kv[:i], kv[i+1:]); err != nil {
					return err
				}
				break
			}
		}
	}
	// An initial KVM is part of every host; which one is the CPU's affair.
	if err := loadKVM(); err != nil {
		return err
	}
	if s.Pulse {
		go func() {
			for range time.Tick(pulse) {
				out.send(record{Kind: kindPulse})
			}
		}()
	}
	code, err := runCommand(out, s.Args)
	if err != nil {
		return err
	}
	if s.Sanitizers {
		if err := checkSanitizers(); err != nil {
			return err
		}
	}
	if err := sendFiles(out, Out); err != nil {
		return fmt.Errorf("send files: %w", err)
	}
	out.send(record{Kind: kindDone, Code: code})
	return nil
}

// Path is the search path of commands in a host with the payload in dir.
func Path(dir string) string {
	return filepath.Join(dir, "bin") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

// runCommand runs args and returns its exit code; one ended by a signal has
// 128 + the signal, as in a shell. Orphans are reaped meanwhile.
func runCommand(out *recorder, args []string) (int, error) {
	path, err := exec.LookPath(args[0])
	if err != nil {
		return 0, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	out.send(record{Kind: kindReady})
	child, err := os.StartProcess(path, args, &os.ProcAttr{Dir: "/tmp", Files: []*os.File{null, outW, errW}})
	if err != nil {
		return 0, err
	}
	null.Close()
	outW.Close()
	errW.Close()
	var wg sync.WaitGroup
	wg.Go(func() { out.relay(kindStdout, outR) })
	wg.Go(func() { out.relay(kindStderr, errR) })

	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, err
		}
		if pid != child.Pid {
			continue
		}
		// What the command left behind must not hold its pipes open.
		if err := unix.Kill(-1, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return 0, err
		}
		wg.Wait()
		if status.Signaled() {
			return 128 + int(status.Signal()), nil
		}
		return status.ExitStatus(), nil
	}
}

// sendFiles sends every file below dir, in pieces.
func sendFiles(out *recorder, dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		buf := make([]byte, 256<<10)
		for first := true; ; first = false {
			n, err := f.Read(buf)
			if n > 0 || first {
				out.send(record{Kind: kindFile, Name: name, Mode: info.Mode().Perm(), Data: buf[:n]})
			}
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
}
