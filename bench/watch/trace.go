// SPDX-License-Identifier: MIT

package watch

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Trace is where the kernel was at which instruction of a timer's interrupt in
// which a watch ticked and no other timer was due, interrupt by interrupt. Each
// number has one trace event's own instructions in it.
type Trace struct {
	Instructions []float64 `json:"instructions"` // of a whole tick that is traced, as Tick's
	Before       []int64   `json:"before"`       // from the interrupt's entry to the timer's function
	Function     []int64   `json:"function"`
	After        []int64   `json:"after"` // from its end to the interrupt's: the timer is set anew
}

// EventsPerTick is how many trace events a tick has.
const EventsPerTick = 4

const tracefs = "/sys/kernel/tracing"

// traceEvents are the events, in the order in which they happen.
var traceEvents = []string{"irq_vectors/local_timer_entry", "timer/hrtimer_expire_entry", "timer/hrtimer_expire_exit", "irq_vectors/local_timer_exit"}

func setTrace(name, value string) error {
	return os.WriteFile(filepath.Join(tracefs, name), []byte(value), 0)
}

// startTrace begins to trace.
func startTrace() error {
	if _, err := os.Stat(filepath.Join(tracefs, "trace")); errors.Is(err, os.ErrNotExist) {
		if err := unix.Mount("tracefs", tracefs, "tracefs", 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", tracefs, err)
		}
	}
	// The time stamp counter, which on the instruction clock counts
	// instructions.
	for _, set := range [][2]string{{"tracing_on", "0"}, {"trace_clock", "x86-tsc"}, {"buffer_size_kb", "4096"}, {"trace", ""}} {
		if err := setTrace(set[0], set[1]); err != nil {
			return err
		}
	}
	for _, e := range traceEvents {
		if err := setTrace("events/"+e+"/enable", "1"); err != nil {
			return err
		}
	}
	return setTrace("tracing_on", "1")
}

// stop ends the tracing and adds what was traced.
func (t *Trace) stop() error {
	errs := []error{setTrace("tracing_on", "0")}
	for _, e := range traceEvents {
		errs = append(errs, setTrace("events/"+e+"/enable", "0"))
	}
	text, err := os.ReadFile(filepath.Join(tracefs, "trace"))
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	return t.add(text)
}

var traceLine = regexp.MustCompile(`\s(\d+): (\w+): (.*)$`)

// add reads the text of a trace.
func (t *Trace) add(text []byte) error {
	var times []int64
	var own bool
	before := len(t.Function)
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		m := traceLine.FindStringSubmatch(lines.Text())
		if m == nil || strings.HasPrefix(lines.Text(), "#") {
			continue
		}
		at, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil {
			return fmt.Errorf("trace: %q: %w", lines.Text(), err)
		}
		switch m[2] {
		case "local_timer_entry":
			times, own = []int64{at}, false
		case "hrtimer_expire_entry":
			times = append(times, at)
			own = own || strings.Contains(m[3], "[kvmaccess]")
		case "hrtimer_expire_exit":
			times = append(times, at)
		case "local_timer_exit":
			if times = append(times, at); own && len(times) == EventsPerTick {
				t.Before = append(t.Before, times[1]-times[0])
				t.Function = append(t.Function, times[2]-times[1])
				t.After = append(t.After, times[3]-times[2])
			}
			times = nil
		}
	}
	if len(t.Function) == before {
		return fmt.Errorf("trace: no tick in %d bytes, which begin %.2000q", len(text), text)
	}
	return nil
}
