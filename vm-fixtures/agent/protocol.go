// SPDX-License-Identifier: MIT

// Package agent is the first process of a guest: it does inside the guest
// what its owner asks for, over a virtio port, and nothing by itself.
package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Port is the name of the virtio port that requests come through.
const Port = "kvmaccess.agent"

// Init is the agent's name in a guest's initramfs: a guest's kernel starts it
// by "rdinit=".
const Init = "/agent"

// Serves is what the agent writes on the guest's console once in each boot:
// what it is asked before may not reach it.
const Serves = "agent: serves"

// Op is what a guest can be asked to do.
type Op string

const (
	OpPing   Op = "ping"   // reply: Log holds the kernel's release
	OpRead   Op = "read"   // Path: reply's Data is the file's content, read to its end
	OpWrite  Op = "write"  // Path, Data
	OpInsmod Op = "insmod" // Path, Params: reply's Log is what the kernel said meanwhile
	OpRmmod  Op = "rmmod"  // Name: the same
	OpMSR    Op = "msr"    // CPU, Register: reply's Value
	OpSpin   Op = "spin"   // Count: that many threads spin, each on a CPU of its own; 0 ends them
	OpExec   Op = "exec"   // Args: reply's Data is the command's output
	OpTasks  Op = "tasks"  // reply's Data is a JSON array of Task
	OpKexec  Op = "kexec"  // Path, Initrd, Params: boots that kernel; no reply, its agent answers the next request
)

// Request is one line of JSON, followed by Size bytes of Data.
type Request struct {
	Op       Op       `json:"op"`
	Path     string   `json:"path,omitempty"`
	Params   string   `json:"params,omitempty"`
	Initrd   string   `json:"initrd,omitempty"`
	Name     string   `json:"name,omitempty"`
	Args     []string `json:"args,omitempty"`
	CPU      int      `json:"cpu,omitempty"`
	Register uint32   `json:"register,omitempty"`
	Count    int      `json:"count,omitempty"`
	Size     int      `json:"size,omitempty"`
	Data     []byte   `json:"-"`
}

// Reply is one line of JSON, followed by Size bytes of Data.
type Reply struct {
	Error string   `json:"error,omitempty"`
	Log   []string `json:"log,omitempty"`
	Value uint64   `json:"value,omitempty"`
	Size  int      `json:"size,omitempty"`
	Data  []byte   `json:"-"`
}

// maxData bounds what one message may carry, in bytes.
const maxData = 64 << 20

func write(w io.Writer, head any, data []byte) error {
	line, err := json.Marshal(head)
	if err != nil {
		return err
	}
	_, err = w.Write(append(append(line, '\n'), data...))
	return err
}

func read(r *bufio.Reader, head any, size func() int) ([]byte, error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(line, head); err != nil {
		return nil, fmt.Errorf("malformed message %.80q: %w", line, err)
	}
	n := size()
	if n < 0 || n > maxData {
		return nil, fmt.Errorf("message of %d bytes", n)
	}
	data := make([]byte, n)
	_, err = io.ReadFull(r, data)
	return data, err
}

// Ask sends a request and waits for its reply. What the guest answered as an
// error is one.
func Ask(w io.Writer, r *bufio.Reader, q Request) (Reply, error) {
	q.Size = len(q.Data)
	if err := write(w, q, q.Data); err != nil {
		return Reply{}, err
	}
	var p Reply
	data, err := read(r, &p, func() int { return p.Size })
	if err != nil {
		return Reply{}, err
	}
	p.Data = data
	if p.Error != "" {
		return p, errors.New(p.Error)
	}
	return p, nil
}
