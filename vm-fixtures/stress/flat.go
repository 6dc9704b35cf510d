// SPDX-License-Identifier: MIT

package stress

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// flat compares the host kernel's memory before and after.
type flat struct{ before int64 }

// flatLimit is how many bytes a kernel may have more afterwards: a leak of 8
// bytes in each of a million requests is twice as much.
const flatLimit = 4 << 20

func newFlat(r *Report) (flat, error) {
	start := time.Now()
	n, err := kernelMemory()
	r.Add("s of measuring memory", int64(time.Since(start).Seconds()))
	return flat{n}, err
}

// check is an error if the kernel's memory has grown. Some of what is freed
// is freed late, so that it is given some seconds.
func (f flat) check(r *Report) error {
	var now int64
	for range 10 {
		var err error
		if now, err = kernelMemory(); err != nil {
			return err
		}
		if now-f.before <= flatLimit {
			break
		}
		time.Sleep(time.Second)
	}
	r.Add("KiB more kernel memory", (now-f.before)>>10)
	if now-f.before > flatLimit {
		return fmt.Errorf("the kernel's memory grew from %d to %d KiB", f.before>>10, now>>10)
	}
	return nil
}

// kernelMemory is what the kernel has allocated for itself, in bytes, without
// caches that it would give back.
func kernelMemory() (int64, error) {
	// Dentries and inodes; then what KASAN keeps of freed objects, and slabs
	// without objects.
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0); err != nil {
		return 0, err
	}
	caches, err := filepath.Glob("/sys/kernel/slab/*/shrink")
	if err != nil {
		return 0, err
	}
	for _, c := range caches {
		// A cache may go with its VM.
		if err := os.WriteFile(c, []byte("1"), 0); err != nil && !os.IsNotExist(err) {
			return 0, err
		}
	}
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	var sum int64
	for line := range bytes.Lines(text) {
		f := bytes.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch string(f[0]) {
		case "Slab:", "VmallocUsed:", "PageTables:", "KernelStack:", "Percpu:":
			kib, err := strconv.ParseInt(string(f[1]), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/meminfo: %w", err)
			}
			sum += kib << 10
		}
	}
	return sum, nil
}
