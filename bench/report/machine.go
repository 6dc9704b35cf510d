// SPDX-License-Identifier: MIT

package report

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// Machine is what a run was made on.
type Machine struct {
	Processor string `json:"processor"` // of the machine that emulates
	CPUs      int    `json:"cpus"`      // of it
	System    string `json:"system"`    // of it
	Emulator  string `json:"emulator"`
	Kernel    string `json:"kernel,omitempty"` // of the emulated host and its guest
	Go        string `json:"go"`
	Revision  string `json:"revision"` // of KvmAccess, by git
}

// ThisMachine describes the machine that this runs on, but for the Emulator
// and the Kernel. What cannot be found out is said to be unknown.
func ThisMachine() Machine {
	m := Machine{
		Processor: field("/proc/cpuinfo", "model name", ":"),
		CPUs:      runtime.NumCPU(),
		System:    strings.Trim(field("/etc/os-release", "PRETTY_NAME", "="), `"`),
		Go:        runtime.Version(),
		Revision:  "unknown",
	}
	if out, err := exec.Command("git", "describe", "--always", "--dirty").Output(); err == nil {
		m.Revision = strings.TrimSpace(string(out))
	}
	return m
}

// field is the value of the first line "key SEPARATOR value" of a file.
func field(file, key, separator string) string {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Sprintf("unknown (%v)", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), separator); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}
