// SPDX-License-Identifier: MIT

package stress

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// debugFS is where the kernel has its fault injection (Documentation/
// fault-injection/fault-injection.rst in its source).
const debugFS = "/sys/kernel/debug"

// prepareFaults lets allocations fail that may wait, and those of more than
// one page, whenever that is asked for; it is silent about each.
func prepareFaults() error {
	if err := mountDebugFS(); err != nil {
		return err
	}
	if _, err := os.Stat(debugFS + "/failslab"); err != nil {
		return fmt.Errorf("this kernel cannot let allocations fail (CONFIG_FAILSLAB): use the suite sanitizers: %w", err)
	}
	return errors.Join(
		set("failslab/ignore-gfp-wait", "N"), set("failslab/verbose", "0"),
		set("fail_page_alloc/ignore-gfp-wait", "N"), set("fail_page_alloc/verbose", "0"),
		set("fail_page_alloc/min-order", "1"),
	)
}

func mountDebugFS() error {
	if _, err := os.Stat(debugFS + "/kvm"); err == nil {
		return nil
	}
	if err := unix.Mount("debugfs", debugFS, "debugfs", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s: %w", debugFS, err)
	}
	return nil
}

func set(name, value string) error {
	return os.WriteFile(filepath.Join(debugFS, name), []byte(value), 0)
}

// nth lets the n-th allocation of the calling goroutine's thread fail, once:
// /proc/PID/task/TID/fail-nth.
type nth struct {
	file *os.File
	gc   int
}

// newNth ties the goroutine to its thread until close.
func newNth() (*nth, error) {
	runtime.LockOSThread()
	f, err := os.OpenFile("/proc/thread-self/fail-nth", os.O_RDWR, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	// Go's runtime takes it badly if its own memory cannot be had.
	return &nth{f, debug.SetGCPercent(-1)}, nil
}

func (f *nth) close() error {
	debug.SetGCPercent(f.gc)
	runtime.UnlockOSThread()
	return f.file.Close()
}

// do calls what is to fail, and reports whether an allocation did: if there
// were fewer than n, none did.
func (f *nth) do(n int, what func() error) (failed bool, err error) {
	if _, err := f.file.WriteAt([]byte(strconv.Itoa(n)), 0); err != nil {
		return false, err
	}
	result := what()
	var b [16]byte
	k, err := f.file.ReadAt(b[:], 0)
	if k == 0 {
		return false, fmt.Errorf("fail-nth: %w", err)
	}
	left := strings.TrimRight(string(b[:k]), "\n\x00")
	if left != "0" {
		if _, err := f.file.WriteAt([]byte("0"), 0); err != nil {
			return false, err
		}
	}
	return left == "0", result
}

// quiet keeps the kernel from telling the console of allocations that failed,
// with traces that a healthy one never prints. Errors are printed still, and
// a report of the lock checker ends the run by /proc/lockdep_stats.
func quiet() (restore func() error, err error) {
	const name = "/proc/sys/kernel/printk"
	before, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return func() error { return os.WriteFile(name, before, 0) }, os.WriteFile(name, []byte("4"), 0)
}

// failAtRandom lets a share of the allocations fail that the loaded module
// asks for in whatever context, until stopped.
func failAtRandom(percent int) (stop func() error, err error) {
	address, err := os.ReadFile("/sys/module/kvmaccess/sections/.text")
	if err != nil {
		return nil, err
	}
	size, err := os.ReadFile("/sys/module/kvmaccess/coresize")
	if err != nil {
		return nil, err
	}
	start, err := strconv.ParseUint(strings.TrimSpace(string(address)), 0, 64)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(size)), 0, 64)
	if err != nil {
		return nil, err
	}
	stop = func() error {
		return errors.Join(set("failslab/probability", "0"),
			set("failslab/require-start", "0"), set("failslab/require-end", fmt.Sprint(uint64(1<<64-1))))
	}
	err = errors.Join(
		set("failslab/task-filter", "N"), set("failslab/interval", "1"), set("failslab/times", "-1"),
		set("failslab/space", "0"), set("failslab/stacktrace-depth", "32"),
		set("failslab/require-start", fmt.Sprintf("%#x", start)), set("failslab/require-end", fmt.Sprintf("%#x", start+n)),
		set("failslab/probability", strconv.Itoa(percent)),
	)
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	return stop, nil
}
