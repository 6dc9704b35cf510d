// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// roleEnv makes this binary play a part in its own tests instead of running them.
const roleEnv = "KVMACCESS_TEST_ROLE"

const roleAccess = "access"

func playRole(role string) int {
	var err error
	switch role {
	case roleAccess:
		err = json.NewEncoder(os.Stdout).Encode(tryEverything())
	case roleReader:
		err = playReader()
	case roleWatch:
		err = playWatch()
	default:
		err = fmt.Errorf("unknown role %q", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	return 0
}

// outcome of one request: errno 0 and no family missing means that it worked.
type outcome struct {
	Errno    int
	NoFamily bool
	Message  string
}

func outcomeOf(err error) outcome {
	if err == nil {
		return outcome{}
	}
	o := outcome{Errno: -1, NoFamily: errors.Is(err, os.ErrNotExist), Message: err.Error()}
	var errno unix.Errno
	if errors.As(err, &errno) {
		o.Errno = int(errno)
	}
	return o
}

// tryEverything asks for everything there is as whoever runs it.
func tryEverything() map[string]outcome {
	ctx, cancel := context.WithTimeout(context.Background(), patience*20*time.Second)
	defer cancel()
	results := map[string]outcome{}
	add := func(name string, err error) { results[name] = outcomeOf(err) }
	s, err := kvmaccess.Subscribe(ctx)
	add("subscribe", err)
	if err == nil {
		s.Close()
	}
	c, err := kvmaccess.New()
	if err != nil {
		add("family", err)
		return results
	}
	defer c.Close()
	_, err = c.Info(ctx)
	add("info", err)
	_, err = c.VMs(ctx)
	add("vms", err)
	_, err = c.VM(ctx, 1)
	add("vm", err)
	_, err = c.Memslots(ctx, 1)
	add("memslots", err)
	_, err = c.VCPUs(ctx, 1)
	add("vcpus", err)
	_, err = c.VCPU(ctx, 1, 0)
	add("vcpu", err)
	_, err = c.Table(ctx, 1, 0, kvmaccess.TableIDT)
	add("table", err)
	_, err = c.ReadPhysical(ctx, 1, kvmaccess.Range{Address: 0x1000, Length: 8})
	add("memory", err)
	_, err = c.Stats(ctx)
	add("stats", err)
	_, err = c.Watches(ctx)
	add("watches", err)
	w, err := kvmaccess.NewWatcher()
	if err != nil {
		add("watcher", err)
		return results
	}
	defer w.Close()
	_, err = w.New(ctx, 1, kvmaccess.WatchConfig{Period: time.Second})
	add("watch", err)
	return results
}

func TestNotRoot(t *testing.T) {
	vm := vmOf(t, newClient(t), sharedGuest(t, "web1"))
	t.Logf("VM %d is there to be read", vm.ID)
	root := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 65534, Size: 1}}
	for _, tt := range []struct {
		name string
		attr syscall.SysProcAttr
		// In a network namespace of its own the family is not there at all.
		noFamily bool
	}{
		{name: "nobody", attr: syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}},
		{name: "root of a user namespace", attr: syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER, UidMappings: root, GidMappings: root,
			Credential: &syscall.Credential{},
		}},
		{name: "root of a user and network namespace", attr: syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, UidMappings: root, GidMappings: root,
			Credential: &syscall.Credential{},
		}, noFamily: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(testContext(t), self)
			cmd.Env = append(os.Environ(), roleEnv+"="+roleAccess)
			cmd.SysProcAttr = &tt.attr
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			var results map[string]outcome
			if err := json.Unmarshal(out, &results); err != nil {
				t.Fatal(err)
			}
			if tt.noFamily {
				if len(results) != 2 || !results["family"].NoFamily || !results["subscribe"].NoFamily {
					t.Errorf("the family can be seen: %+v", results)
				}
				return
			}
			if len(results) != 12 {
				t.Errorf("%d results, want 12: %+v", len(results), results)
			}
			for name, o := range results {
				if o.Errno != int(unix.EPERM) {
					t.Errorf("%s: errno %d (%s), want EPERM", name, o.Errno, o.Message)
				}
			}
		})
	}
	// The same as root, so that the refusals above mean something.
	for name, o := range tryEverything() {
		if o.Errno == int(unix.EPERM) || o.NoFamily {
			t.Errorf("%s as root: %+v", name, o)
		}
	}
}
