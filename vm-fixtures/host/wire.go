// SPDX-License-Identifier: MIT

package host

import (
	"os"
	"time"
)

// Port is the name of the virtio port that records come out of a host by.
const Port = "kvmaccess.host"

// portArg, on the kernel's command line, names the device that they come out
// by instead.
const portArg = "kvmaccess.port="

// The disks of a host, by the name that each gives itself.
const (
	rootDisk    = "root"
	payloadDisk = "payload"
)

// Payload is where a host finds what it was given, Out where it leaves files
// for the outside.
const (
	Payload = "/payload"
	Out     = "/out"
)

// specName is the file in the payload that says what to run.
const specName = "run.json"

// spec is what the first process of a host is to run.
type spec struct {
	Args []string `json:"args"`
	Env  []string `json:"env"`
	// Sanitizers says that the kernel has them: they must be on at the end,
	// and have found nothing.
	Sanitizers bool `json:"sanitizers,omitempty"`
	// Pulse says that the host tells now and then that it lives.
	Pulse bool `json:"pulse,omitempty"`
}

// pulse is how often a host says that it lives, by its own clock.
const pulse = 10 * time.Second

// record is a line of JSON on the port.
type record struct {
	Kind string      `json:"kind"` // a kind* constant
	Name string      `json:"name,omitempty"`
	Mode os.FileMode `json:"mode,omitempty"`
	Data []byte      `json:"data,omitempty"`
	Code int         `json:"code,omitempty"`
}

const (
	kindReady  = "ready"  // the command starts
	kindPulse  = "pulse"  // it goes on
	kindStdout = "stdout" // Data is a piece of it
	kindStderr = "stderr"
	kindFile   = "file"  // Data is appended to the file Name below Out, which is made with Mode
	kindError  = "error" // Data says why the host itself failed
	kindDone   = "done"  // the command ended with Code; nothing follows
)
