// SPDX-License-Identifier: MIT

// Package boot holds what the first process of an emulated host and that of
// a guest have in common: mounts, modules, virtio ports, and the end.
package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// MountKernel mounts /proc, /sys and /dev below root.
func MountKernel(root string) error {
	for _, m := range []struct{ kind, dir string }{{"proc", "proc"}, {"sysfs", "sys"}, {"devtmpfs", "dev"}} {
		dir := filepath.Join(root, m.dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	return nil
}

// LoadModule loads a kernel module from a file, with parameters. A module
// that is loaded already is no error.
func LoadModule(name, params string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), params, 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", name, err)
	}
	return nil
}

// LoadModules loads the modules that a file names, one path a line, in order.
func LoadModules(list string) error {
	text, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(text)) {
		if err := LoadModule(name, ""); err != nil {
			return err
		}
	}
	return nil
}

// OpenPort opens the virtio port that its owner gave this name, as soon as
// it is there.
func OpenPort(name string, limit time.Duration) (*os.File, error) {
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, file := range names {
			text, err := os.ReadFile(file)
			if err == nil && strings.TrimSpace(string(text)) == name {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(file)), os.O_RDWR, 0)
			}
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("no virtio port %q after %v", name, limit)
		}
	}
}

// OpenSerial opens a serial line so that it passes on every byte as it is.
func OpenSerial(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t := unix.Termios{Cflag: unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200, Ispeed: unix.B115200, Ospeed: unix.B115200}
	t.Cc[unix.VMIN] = 1
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &t); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return f, nil
}

// PowerOff ends the machine; it does not return.
func PowerOff() {
	unix.Sync()
	for {
		if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
			fmt.Fprintln(os.Stderr, "power off:", err)
		}
		time.Sleep(time.Second)
	}
}
