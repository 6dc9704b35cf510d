// SPDX-License-Identifier: MIT

package tinyvm

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// Kind is what the guests of a VMM process do.
type Kind string

// Values of Kind.
const (
	Spinning Kind = "spin"
	Halting  Kind = "halt"
)

// Config is that of a guest of this kind in long mode. Spinning guests cost a
// host CPU each, halting ones nothing.
func (k Kind) Config() (Config, error) {
	switch k {
	case Spinning:
		return Config{Mode: Long, Code: Spin(Long), IRQChip: true}, nil
	case Halting:
		return Config{Mode: Long, Code: Halt(), IRQChip: true}, nil
	}
	return Config{}, fmt.Errorf("no kind of guest is called %q", string(k))
}

// StartGuests starts n guests in this process.
func (k *KVM) StartGuests(kind Kind, n int) (guests []*Guest, err error) {
	c, err := kind.Config()
	if err != nil {
		return nil, err
	}
	for range n {
		g, err := k.NewGuest(c)
		if err == nil {
			guests = append(guests, g)
			err = g.Start(Ignore)
		}
		if err != nil {
			for _, g := range guests {
				err = errors.Join(err, g.Close())
			}
			return nil, err
		}
	}
	return guests, nil
}

// childEnv makes a program that calls Main a VMM: KIND and how many.
const childEnv = "KVMACCESS_TINYVM"

// VMM is a process of this same program that runs guests.
type VMM struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// StartVMM starts a process with n guests and returns once all of them run.
// The program must call Main before anything else.
func StartVMM(kind Kind, n int) (*VMM, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(kind)+" "+strconv.Itoa(n))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		_ = stdin.Close()
		return nil, errors.Join(fmt.Errorf("a VMM with %d guests did not start: %w", n, err), cmd.Wait())
	}
	return &VMM{cmd: cmd, stdin: stdin}, nil
}

// PID is the process id.
func (v *VMM) PID() int { return v.cmd.Process.Pid }

// Stop lets the process stop and destroy its guests, and waits for its end.
func (v *VMM) Stop() error {
	_ = v.stdin.Close()
	return v.cmd.Wait()
}

// Kill kills the process with its guests running, and waits for its end.
func (v *VMM) Kill() error {
	if err := v.cmd.Process.Kill(); err != nil {
		return err
	}
	err := v.cmd.Wait()
	_ = v.stdin.Close()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return nil
	}
	return fmt.Errorf("a killed VMM ended otherwise: %w", err)
}

// Main does nothing, unless this process is to be a VMM: then it is one until
// its standard input ends, and does not return.
func Main() {
	role, ok := os.LookupEnv(childEnv)
	if !ok {
		return
	}
	if err := serve(role); err != nil {
		fmt.Fprintln(os.Stderr, "tinyvm:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(role string) error {
	var kind Kind
	var n int
	if _, err := fmt.Sscan(role, &kind, &n); err != nil {
		return fmt.Errorf("%s=%q: %w", childEnv, role, err)
	}
	k, err := Open()
	if err != nil {
		return err
	}
	guests, err := k.StartGuests(kind, n)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	for _, g := range guests {
		err = errors.Join(err, g.Close())
	}
	return err
}
