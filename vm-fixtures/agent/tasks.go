// SPDX-License-Identifier: MIT

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Task is a thread as /proc has it (proc_pid_stat(5), proc_pid_status(5)).
type Task struct {
	TGID  int    `json:"tgid"`
	TID   int    `json:"tid"`
	PPID  int    `json:"ppid"`
	Name  string `json:"name"`
	State string `json:"state"` // one letter
	UID   uint32 `json:"uid"`
	EUID  uint32 `json:"euid"`
	GID   uint32 `json:"gid"`
	Start uint64 `json:"start"` // since boot, in hundredths of a second
	Flags uint32 `json:"flags"` // PF_*
}

// tasks lists all threads there are; those that end meanwhile are left out.
func tasks() ([]Task, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		return nil, err
	}
	var all []Task
	for _, dir := range dirs {
		t, err := readTask(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, t)
	}
	return all, nil
}

func readTask(dir string) (t Task, err error) {
	var texts [3]string
	for i, name := range []string{"stat", "comm", "status"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return t, err
		}
		texts[i] = string(text)
	}
	// The second field is the name in parentheses, whatever is in it.
	f := strings.Fields(texts[0][strings.LastIndexByte(texts[0], ')')+1:])
	if len(f) < 20 {
		return t, fmt.Errorf("%s/stat: %q", dir, texts[0])
	}
	number := func(s string, bits int) uint64 {
		n, e := strconv.ParseUint(s, 10, bits)
		err = errors.Join(err, e)
		return n
	}
	part := strings.Split(dir, "/")
	t.TGID, t.TID = int(number(part[2], 31)), int(number(part[4], 31))
	t.State, t.PPID, t.Start = f[0], int(number(f[1], 31)), number(f[19], 64)
	t.Flags = uint32(number(f[6], 32))
	t.Name = strings.TrimSuffix(texts[1], "\n")
	for line := range strings.Lines(texts[2]) {
		key, value, _ := strings.Cut(line, ":")
		id := strings.Fields(value)
		switch {
		case key == "Uid" && len(id) == 4:
			t.UID, t.EUID = uint32(number(id[0], 32)), uint32(number(id[1], 32))
		case key == "Gid" && len(id) == 4:
			t.GID = uint32(number(id[0], 32))
		}
	}
	return t, err
}
