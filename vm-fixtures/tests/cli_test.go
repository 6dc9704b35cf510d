// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/monitor"
)

// cli runs kvmaccess and returns what it prints and its exit code.
func cli(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return runCLI(t, exec.CommandContext(testContext(t), "kvmaccess", args...))
}

func runCLI(t *testing.T, cmd *exec.Cmd) (stdout, stderr string, code int) {
	t.Helper()
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	var exit *exec.ExitError
	if e := cmd.Run(); errors.As(e, &exit) && exit.Exited() {
		code = exit.ExitCode()
	} else if e != nil {
		t.Fatalf("%v: %v: %s", cmd.Args, e, err.String())
	}
	return out.String(), err.String(), code
}

func TestCLI(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	sharedGuest(t, "db1")
	symbols := symbolFile(t, web)
	pages, err := web.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	version, err := web.Ask(ctx, agent.Request{Op: agent.OpRead, Path: "/proc/version"})
	if err != nil {
		t.Fatal(err)
	}
	osrelease, err := web.Read(ctx, "/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	release := strings.TrimSpace(string(osrelease))
	none := filepath.Join(t.TempDir(), "no socket")
	for _, tt := range []struct {
		args []string
		want []string
		raw  string // no table and no JSON, but this
	}{
		{args: []string{"vms"}, want: []string{"web1", "db1", sharedConfigs["web1"].UUID, fmt.Sprint(web.PID)}},
		{args: []string{"regs", "web1", "-s", symbols}, want: []string{"entry_SYSCALL_64"}},
		{args: []string{"regs", sharedConfigs["db1"].UUID, "--vcpu", "0"}},
		{args: []string{"gdt", "web1"}},
		{args: []string{"idt", "web1"}, want: []string{"asm_exc_page_fault"}},
		{args: []string{"syscalls", "web1"}, want: []string{"__x64_sys_getdents64"}},
		{args: []string{"check", "web1"}, want: []string{"web1: no findings"}},
		{args: []string{"idt", "web1", "-s", symbols}, want: []string{"asm_exc_page_fault"}},
		{args: []string{"syscalls", "web1", "-s", symbols}, want: []string{"__x64_sys_getdents64"}},
		{args: []string{"guest", "web1"}, want: []string{release, strings.TrimSpace(string(version.Data)), "process_vm_readv"}},
		{args: []string{"ps", "web1"}, want: []string{"agent", "[kthreadd]"}},
		{args: []string{"modules", "web1"}, want: []string{"probe"}},
		{args: []string{"symbols", "web1", "sys_call_table"}, want: []string{fmt.Sprintf("%016x", symbol(t, web, "sys_call_table"))}},
		{args: []string{"symbols", "web1", fmt.Sprintf("%#x", symbol(t, web, "sys_call_table")+8)}, want: []string{"sys_call_table+0x8"}},
		{args: []string{"types", "web1", "list_head"}, want: []string{"struct list_head {", "struct list_head *prev;"}},
		{args: []string{"check", "-s", symbols}, want: []string{"web1", "db1"}},
		{args: []string{"stats", "--socket", none}, want: []string{"vcpu_get"}},
		{args: []string{"version"}, want: []string{"0.1"}},
		{args: []string{"mem", "web1", fmt.Sprintf("%#x", pages.GPA), "8K", "--raw"}, raw: string(pages.Content())},
		{args: []string{"mem", "web1", fmt.Sprintf("%#x", pages.GVA), "8K", "--raw", "--virtual"}, raw: string(pages.Content())},
		{args: []string{"mem", "web1", "linux_banner", fmt.Sprint(len(version.Data)), "--raw", "--virtual", "-s", symbols}, raw: string(version.Data)},
		{args: []string{"mem", "web1", fmt.Sprintf("%#x", pages.GPA), "64"}, want: []string{"0d b4 5b 02"}},
	} {
		stdout, stderr, code := cli(t, tt.args...)
		if code != 0 || stderr != "" || stdout == "" {
			t.Errorf("kvmaccess %v: exit code %d, stderr %q, stdout %q", tt.args, code, stderr, stdout)
			continue
		}
		if tt.raw != "" {
			if stdout != tt.raw {
				t.Errorf("kvmaccess %v: %d bytes that are not what the guest has", tt.args, len(stdout))
			}
			continue
		}
		for _, w := range tt.want {
			if !strings.Contains(stdout, w) {
				t.Errorf("kvmaccess %v: no %q in\n%s", tt.args, w, stdout)
			}
		}
		stdout, stderr, code = cli(t, append(tt.args, "-o", "json")...)
		if code != 0 || !json.Valid([]byte(stdout)) {
			t.Errorf("kvmaccess %v -o json: exit code %d, %s, not JSON: %.200q", tt.args, code, stderr, stdout)
		}
	}
}

func TestCLIErrors(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	pages, err := web.Pages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	gpa := fmt.Sprintf("%#x", pages.GPA)
	none := filepath.Join(t.TempDir(), "none")
	for _, tt := range []struct {
		args []string
		want string // what is said, in part
	}{
		{[]string{"regs", "nobody"}, "nobody"},
		{[]string{"regs", "999999"}, "999999"},
		{[]string{"regs", "web1", "--vcpu", "7"}, "vCPU"},
		{[]string{"idt", "web1", "--vcpu", "7"}, "vCPU"},
		{[]string{"syscalls", "web1", "-s", none}, none},
		{[]string{"mem", "web1", "0x10000000000", "16"}, "memslot"},
		{[]string{"mem", "web1", gpa, "0"}, "at least"},
		{[]string{"mem", "web1", gpa, "much"}, "much"},
		{[]string{"mem", "web1", "0x4000000000000000", "16", "--virtual"}, "canonical"},
		{[]string{"mem", "web1", fmt.Sprintf("%#x", pages.Hole), "16", "--virtual"}, "map"},
		{[]string{"watch", "--socket", none}, "kvmaccessd"},
		{[]string{"vms", "-o", "xml"}, "json"},
		{[]string{"frobnicate"}, "frobnicate"},
	} {
		stdout, stderr, code := cli(t, tt.args...)
		if code != 1 || stdout != "" || !strings.Contains(stderr, tt.want) || strings.Contains(stderr, "goroutine") {
			t.Errorf("kvmaccess %v: exit code %d, want 1; %q, want %q; prints %.80q", tt.args, code, stderr, tt.want, stdout)
		}
		t.Logf("%v: %s", tt.args, strings.TrimSpace(stderr))
	}

	t.Run("not root", func(t *testing.T) {
		cmd := exec.CommandContext(ctx, "kvmaccess", "vms")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if _, stderr, code := runCLI(t, cmd); code != 1 || !strings.Contains(stderr, "root") && !strings.Contains(stderr, "CAP_SYS_ADMIN") {
			t.Errorf("exit code %d, %q", code, stderr)
		}
	})
	t.Run("module absent", func(t *testing.T) {
		if err := unloadModule(5 * time.Second); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := loadModule(); err != nil {
				t.Fatal(err)
			}
		}()
		if _, stderr, code := cli(t, "vms"); code != 1 || !strings.Contains(stderr, "modprobe kvmaccess") {
			t.Errorf("exit code %d, %q", code, stderr)
		}
	})
}

// watch follows what the daemon finds; check finds it without the daemon.
func TestCLIFindings(t *testing.T) {
	ctx := testContext(t)
	web := sharedGuest(t, "web1")
	sharedGuest(t, "db1")
	symbols := symbolFile(t, web)
	d := startDaemon(t, t.TempDir(), "--period", "200ms", "--symbols", symbols)
	watching(t, d, "web1", "db1")

	watch := exec.CommandContext(ctx, "kvmaccess", "watch", "web1", "-n", "1", "-o", "json", "--socket", monitor.Socket(d.Dir))
	var followed, complaints bytes.Buffer
	watch.Stdout, watch.Stderr = &followed, &complaints
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	changes, err := web.Attack(ctx, "syscall_redirect", "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := web.EndAttack(ctx, "syscall_redirect"); err != nil {
			t.Error(err)
		}
	}()
	if err := watch.Wait(); err != nil {
		t.Fatalf("kvmaccess watch: %v: %s", err, complaints.String())
	}
	var finding struct{ Object, Kind, Message string }
	if err := json.Unmarshal(followed.Bytes(), &finding); err != nil {
		t.Fatalf("%q: %v", followed.String(), err)
	}
	if finding.Object != changes[0].Object || finding.Kind != "changed" || !strings.Contains(finding.Message, "web1") {
		t.Errorf("kvmaccess watch: %s", followed.String())
	}

	stdout, _, code := cli(t, "check", "web1", "-s", symbols)
	if code != 2 || !strings.Contains(stdout, "getdents64") {
		t.Errorf("kvmaccess check web1: exit code %d, want 2: %s", code, stdout)
	}
	if stdout, stderr, code := cli(t, "check", "db1", "-s", symbols); code != 0 {
		t.Errorf("kvmaccess check db1: exit code %d, want 0: %s%s", code, stdout, stderr)
	}
	if stdout, stderr, code := cli(t, "stats", "--socket", monitor.Socket(d.Dir)); code != 0 || !strings.Contains(stdout, "daemon") {
		t.Errorf("kvmaccess stats: exit code %d: %s%s", code, stdout, stderr)
	}
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
}
