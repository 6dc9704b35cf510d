// SPDX-License-Identifier: MIT

package host

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	debugFS      = "/sys/kernel/debug"
	kmemleakFile = debugFS + "/kmemleak"
)

// checkSanitizers is an error if one of the kernel's sanitizers has found
// something that did not show on the console, or if one is off: then a run
// proves nothing.
func checkSanitizers() error {
	if err := unix.Mount("debugfs", debugFS, "debugfs", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s: %w", debugFS, err)
	}
	text, err := os.ReadFile("/proc/lockdep_stats")
	if err != nil {
		return fmt.Errorf("the kernel does not check locks: %w", err)
	}
	if !locksChecked(text) {
		return errors.New("the kernel has given up checking locks: see its console for why, or its log:\n" + lastLog(200))
	}
	leaks, err := findLeaks()
	if err != nil {
		return fmt.Errorf("the kernel does not look for leaks: %w", err)
	}
	if len(leaks) > 0 {
		return fmt.Errorf("memory leaks:\n%s", strings.Join(leaks, "\n"))
	}
	return nil
}

// locksChecked looks for "debug_locks: 1" in /proc/lockdep_stats.
func locksChecked(text []byte) bool {
	return regexp.MustCompile(`(?m)^\s*debug_locks:\s+1$`).Match(text)
}

// findLeaks returns kmemleak's reports that have to do with KvmAccess. An
// object must be found unreferenced twice, as the first time it may have been
// on its way from one place to another.
func findLeaks() ([]string, error) {
	for range 3 {
		if err := os.WriteFile(kmemleakFile, []byte("scan"), 0); err != nil {
			return nil, err
		}
		// It reports nothing younger than five seconds (Documentation/
		// dev-tools/kmemleak.rst in the kernel's source).
		time.Sleep(6 * time.Second)
	}
	text, err := os.ReadFile(kmemleakFile)
	if err != nil {
		return nil, err
	}
	return leaksOf(text, "kvmaccess"), nil
}

// leaksOf are the reports that name a module, in the stack or the thread.
func leaksOf(text []byte, module string) []string {
	var leaks []string
	for _, report := range bytes.Split(text, []byte("unreferenced object "))[1:] {
		if bytes.Contains(report, []byte(module)) {
			leaks = append(leaks, "unreferenced object "+strings.TrimRight(string(report), "\n"))
		}
	}
	return leaks
}

// lastLog is the end of the kernel's log.
func lastLog(lines int) string {
	const readAll = 3 // SYSLOG_ACTION_READ_ALL
	buf := make([]byte, 1<<20)
	n, err := unix.Klogctl(readAll, buf)
	if err != nil {
		return err.Error()
	}
	return tail(buf[:n], lines)
}
