// SPDX-License-Identifier: MIT

package agent

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// Main is the first process of a guest. It does not return.
func Main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
	}
	boot.PowerOff()
}

func serve() error {
	if err := boot.MountKernel("/"); err != nil {
		return err
	}
	if err := boot.LoadModules("/" + cache.ModuleList); err != nil {
		return err
	}
	port, err := boot.OpenPort(Port, time.Minute)
	if err != nil {
		return err
	}
	kmsg, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, Serves)
	a := &agent{kmsg: kmsg}
	in := bufio.NewReaderSize(port, 1<<16)
	for {
		var q Request
		data, err := read(in, &q, func() int { return q.Size })
		if err != nil {
			return err
		}
		q.Data = data
		p, err := a.do(q)
		if err != nil {
			p.Error = err.Error()
		}
		p.Size = len(p.Data)
		if err := write(port, p, p.Data); err != nil {
			return err
		}
	}
}

type agent struct {
	kmsg *os.File
	stop *atomic.Bool // of the spinning threads
}

func (a *agent) do(q Request) (Reply, error) {
	switch q.Op {
	case OpPing:
		var u unix.Utsname
		err := unix.Uname(&u)
		return Reply{Log: []string{unix.ByteSliceToString(u.Release[:])}}, err
	case OpRead:
		data, err := os.ReadFile(q.Path)
		return Reply{Data: data}, err
	case OpWrite:
		return Reply{}, os.WriteFile(q.Path, q.Data, 0o644)
	case OpInsmod:
		a.drain()
		err := boot.LoadModule(q.Path, q.Params)
		return Reply{Log: a.drain()}, err
	case OpRmmod:
		a.drain()
		err := unix.DeleteModule(q.Name, unix.O_NONBLOCK)
		return Reply{Log: a.drain()}, err
	case OpMSR:
		return readMSR(q.CPU, q.Register)
	case OpSpin:
		a.spin(q.Count)
		return Reply{}, nil
	case OpExec:
		if len(q.Args) == 0 {
			return Reply{}, errors.New("exec: no command")
		}
		data, err := exec.Command(q.Args[0], q.Args[1:]...).CombinedOutput()
		return Reply{Data: data}, err
	case OpTasks:
		all, err := tasks()
		if err != nil {
			return Reply{}, err
		}
		data, err := json.Marshal(all)
		return Reply{Data: data}, err
	case OpKexec:
		return Reply{}, kexec(q.Path, q.Initrd, q.Params)
	}
	return Reply{}, fmt.Errorf("unknown request %q", q.Op)
}

// drain returns what the kernel said since the last call.
func (a *agent) drain() []string {
	var lines []string
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(int(a.kmsg.Fd()), buf)
		if errors.Is(err, unix.EPIPE) {
			continue // overwritten before it was read
		}
		if err != nil {
			return lines
		}
		// printk(9): "prefix;message", then lines of properties.
		_, msg, _ := strings.Cut(string(buf[:n]), ";")
		msg, _, _ = strings.Cut(msg, "\n")
		lines = append(lines, msg)
	}
}

func readMSR(cpu int, register uint32) (Reply, error) {
	f, err := os.Open(fmt.Sprintf("/dev/cpu/%d/msr", cpu))
	if err != nil {
		return Reply{}, err
	}
	defer f.Close()
	var b [8]byte
	if _, err := f.ReadAt(b[:], int64(register)); err != nil {
		return Reply{}, fmt.Errorf("MSR %#x: %w", register, err)
	}
	return Reply{Value: binary.LittleEndian.Uint64(b[:])}, nil
}

// spin keeps the first n CPUs busy in user mode; 0 ends that.
func (a *agent) spin(n int) {
	if a.stop != nil {
		a.stop.Store(true)
	}
	a.stop = new(atomic.Bool)
	for cpu := range n {
		go func(stop *atomic.Bool) {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			var set unix.CPUSet
			set.Set(cpu)
			if err := unix.SchedSetaffinity(0, &set); err != nil {
				fmt.Fprintln(os.Stderr, "agent: spin:", err)
				return
			}
			for !stop.Load() {
			}
		}(a.stop)
	}
}
