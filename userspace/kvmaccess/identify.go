// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// VMM is what a VM's process says about itself.
type VMM struct {
	Name  string `json:"name"`  // QEMU's -name guest=, or ""
	UUID  string `json:"uuid"`  // QEMU's -uuid in lower case, or ""
	Comm  string `json:"comm"`  // of /proc/PID/comm
	Start uint64 `json:"start"` // clock ticks after boot: field 22 of /proc/PID/stat
}

// Identify reads name and UUID of a VM from its VMM's command line. The error
// wraps os.ErrNotExist if there is no such process (any more).
func Identify(pid int) (VMM, error) { return identify("/proc", pid) }

func identify(proc string, pid int) (VMM, error) {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	read := func(name string) ([]byte, error) {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, unix.ESRCH) { // it ended between open and read
			err = os.ErrNotExist
		}
		if err != nil {
			return nil, fmt.Errorf("kvmaccess: process %d: %w", pid, err)
		}
		return b, nil
	}
	stat, err := read("stat")
	if err != nil {
		return VMM{}, err
	}
	start, err := parseStart(stat)
	if err != nil {
		return VMM{}, fmt.Errorf("kvmaccess: process %d: %w", pid, err)
	}
	comm, err := read("comm")
	if err != nil {
		return VMM{}, err
	}
	cmdline, err := read("cmdline")
	if err != nil {
		return VMM{}, err
	}
	v := parseCmdline(cmdline)
	v.Comm = strings.TrimSuffix(string(comm), "\n")
	v.Start = start
	return v, nil
}

// parseStart finds field 22 (proc(5)) of stat. The command name, field 2, is
// in parentheses and may itself have any character.
func parseStart(stat []byte) (uint64, error) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, errors.New("stat has no command name")
	}
	const start = 22 - 3 // fields from 3 on are left
	fields := bytes.Fields(stat[i+1:])
	if len(fields) <= start {
		return 0, fmt.Errorf("stat has %d fields", len(fields)+2)
	}
	return strconv.ParseUint(string(fields[start]), 10, 64)
}

// parseCmdline finds QEMU's options, of which the last counts.
func parseCmdline(cmdline []byte) VMM {
	var v VMM
	args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	for i := 1; i+1 < len(args); i++ {
		switch args[i] {
		case "-name", "--name":
			i++
			v.Name = guestName(args[i])
		case "-uuid", "--uuid":
			i++
			v.UUID = strings.ToLower(args[i])
		}
	}
	return v
}

// guestName finds the name in QEMU's "-name [guest=]NAME,key=value...", where
// a comma in a value is doubled.
func guestName(opts string) string {
	name := ""
	for i, opt := range splitOptions(opts) {
		key, value, ok := strings.Cut(opt, "=")
		switch {
		case ok && key == "guest":
			name = value
		case i == 0 && (!ok || key != "process" && key != "debug-threads"):
			name = opt
		}
	}
	return name
}

func splitOptions(s string) []string {
	var opts []string
	var cur strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			cur.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == ',':
			cur.WriteByte(',')
			i++
		default:
			opts = append(opts, cur.String())
			cur.Reset()
		}
	}
	return append(opts, cur.String())
}
