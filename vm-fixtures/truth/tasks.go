// SPDX-License-Identifier: MIT

package truth

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
)

// tick is the unit of times in /proc (USER_HZ).
const tick = time.Second / 100

// Tasks compares tasks with what /proc had right before and right after they
// were read, since some come and go: each that was there both times must have
// been found, with what did not change in between, and none that was there
// neither time.
func Tasks(before, after []agent.Task, found []guest.Task) Comparison {
	var c Comparison
	key := func(t agent.Task) string { return fmt.Sprint(t.TID, " ", t.Start) }
	first, last := map[string]agent.Task{}, map[string]agent.Task{}
	for _, t := range before {
		first[key(t)] = t
	}
	for _, t := range after {
		last[key(t)] = t
	}
	tasks := map[string]guest.Task{}
	for _, t := range found {
		// What /proc shows is rounded down.
		k := key(agent.Task{TID: t.PID, Start: uint64(t.Start / tick)})
		tasks[k] = t
		_, a := first[k]
		_, b := last[k]
		if !a && !b {
			c.Extra++
			c.differs("found besides: %+v", t)
		}
	}
	for k, was := range first {
		is, ok := last[k]
		if !ok {
			continue
		}
		c.Truth++
		got, ok := tasks[k]
		if !ok {
			c.differs("not found: %+v", is)
			continue
		}
		if diff := sameTask(was, is, got); diff != "" {
			c.differs("%+v, found %+v: %s differs", is, got, diff)
			continue
		}
		c.Equal++
	}
	return c
}

// sameTask names what differs of a task; empty: nothing.
func sameTask(was, is agent.Task, got guest.Task) string {
	name := func(s string) string {
		if strings.HasPrefix(s, "kworker/") {
			// What a worker last worked on, in between too, follows its name.
			s, _, _ = strings.Cut(s, "-")
			s, _, _ = strings.Cut(s, "+")
		}
		return s
	}
	same := func(a, b, got any) bool { return a != b || a == got }
	switch {
	case is.TGID != got.TGID:
		return "TGID"
	case !same(was.PPID, is.PPID, got.PPID):
		return "PPID"
	case name(is.Name) != name(got.Name):
		return "name"
	case !same(was.UID, is.UID, got.UID):
		return "UID"
	case !same(was.EUID, is.EUID, got.EUID):
		return "EUID"
	case !same(was.GID, is.GID, got.GID):
		return "GID"
	case !sameState(was.State, is.State, got.State):
		return "state"
	}
	return ""
}

// sameState says whether a task that was in the first state, and then in the
// second, may be in the third one in between. What sleeps may wake up.
func sameState(was, is, got string) bool {
	const moving = "RSDI"
	if was == is && !strings.Contains(moving, is) {
		return got == is
	}
	return was != is || strings.Contains(moving, got)
}

// Modules compares modules with /proc/modules as root reads it: all that is in
// there.
func Modules(proc []byte, found []guest.Module) (Comparison, error) {
	var c Comparison
	lines := map[string]string{} // by name
	for line := range strings.Lines(string(proc)) {
		f := strings.Fields(line)
		if len(f) < 6 {
			return c, fmt.Errorf("/proc/modules: malformed line %q", line)
		}
		c.Truth++
		lines[f[0]] = strings.Join(f[:6], " ")
	}
	for _, m := range found {
		users := strings.Join(m.Users, ",")
		if m.Exitless {
			users = strings.TrimPrefix(users+",[permanent]", ",")
		}
		switch users {
		case "":
			users = "-"
		default:
			users += ","
		}
		refs := strconv.Itoa(m.Refcount)
		if m.Refcount < 0 {
			refs = "-"
		}
		got := fmt.Sprintf("%s %d %s %s %s 0x%016x", m.Name, m.Size, refs, users, m.State, m.Base)
		want, ok := lines[m.Name]
		switch {
		case !ok:
			c.Extra++
			c.differs("found besides: %s", got)
		case got != want:
			c.differs("%s\nfound %s", want, got)
		default:
			c.Equal++
		}
		delete(lines, m.Name)
	}
	for _, line := range lines {
		c.differs("not found: %s", line)
	}
	return c, nil
}
