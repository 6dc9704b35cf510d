// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"time"
)

// Task is a thread of the guest, as its kernel has it.
type Task struct {
	Address uint64        `json:"address"` // of its task_struct
	PID     int           `json:"pid"`     // in the initial pid namespace, the thread's own
	TGID    int           `json:"tgid"`    // of the process
	PPID    int           `json:"ppid"`    // of the process that is its parent; 0: none
	Comm    string        `json:"comm"`    // task_struct.comm
	Name    string        `json:"name"`    // as /proc shows it: of kernel threads more than Comm
	State   string        `json:"state"`   // one letter, as /proc shows it: R, S, D, T, t, X, Z, P, I
	UID     uint32        `json:"uid"`     // of real_cred, in the initial user namespace
	EUID    uint32        `json:"euid"`
	GID     uint32        `json:"gid"`
	Start   time.Duration `json:"start"` // since boot, CLOCK_BOOTTIME
	Kernel  bool          `json:"kernel,omitempty"`
	Flags   uint32        `json:"flags"` // PF_*
	MM      uint64        `json:"mm,omitempty"`
	Cred    uint64        `json:"cred"` // real_cred; see Cred

	leader  bool
	signal  uint64
	threads uint64 // of the list that the process' threads are on
}

// Leader says whether it is the thread that a process is named after.
func (t *Task) Leader() bool { return t.leader }

// Bounds of what a guest has. There may be as many threads as pids, but a list
// of so many costs a gigabyte, and a hostile guest makes one for nothing.
const (
	maxTasks = 1 << 18
	maxPID   = 1 << 22 // PID_MAX_LIMIT
	maxDepth = 64      // of task groups
)

// Flags of a task (include/linux/sched.h). They have kept their values since
// before 5.10.
const (
	pfWorker  = 0x00000020
	pfKthread = 0x00200000
)

// Bits of a task's state (include/linux/sched.h), the same since 4.14.
const (
	stateUninterruptible = 0x02
	stateReport          = 0x7f
	stateNoload          = 0x400
	stateRTLock          = 0x1000 // since 5.15, "saved" uninterruptible
	stateFrozen          = 0x8000 // since 6.1
)

// stateLetter is what /proc shows (task_state_index).
func stateLetter(state, exit uint64) string {
	all := state | exit
	index := all & stateReport
	switch {
	case state&(stateUninterruptible|stateNoload) == stateUninterruptible|stateNoload:
		index = stateReport + 1
	case state&(stateRTLock|stateFrozen) != 0:
		index = stateUninterruptible
	}
	return string("RSDTtXZPI"[bits.Len64(index)])
}

// taskFields are read of each task.
var taskFields = []string{
	"flags", "exit_state", "mm", "pid", "tgid", "real_parent", "group_leader", "signal",
	"real_cred", "comm", "tasks", "thread_node",
}

// Task reads one task_struct. The error is an *ObjectError.
func (k *Kernel) Task(ctx context.Context, addr uint64) (Task, error) {
	t := Task{Address: addr}
	if k.Types == nil {
		return t, &ObjectError{"task_struct", addr, errors.Join(ErrNoTypes, k.TypesErr)}
	}
	s, err := k.Types.Struct("task_struct")
	if err != nil {
		return t, &ObjectError{"task_struct", addr, err}
	}
	state, start := "__state", "start_boottime" // since 5.14, 5.5
	if !s.Has(state) {
		state = "state"
	}
	if !s.Has(start) {
		start = "real_start_time"
	}
	paths := append([]string{state, start}, taskFields...)
	private := "worker_private" // since 5.17; set_child_tid of kernel threads before
	if !s.Has(private) {
		private = "set_child_tid"
	}
	o, err := k.read(ctx, s, addr, append(paths, private)...)
	if err != nil {
		return t, err
	}
	var errs []error
	number := func(path string) uint64 {
		v, err := o.Uint(path)
		errs = append(errs, err)
		return v
	}
	t.PID, t.TGID = int(int32(number("pid"))), int(int32(number("tgid")))
	t.Flags = uint32(number("flags"))
	t.Kernel = t.Flags&pfKthread != 0
	t.State = stateLetter(number(state), number("exit_state"))
	t.Start = time.Duration(number(start))
	t.MM, t.Cred, t.signal = number("mm"), number("real_cred"), number("signal")
	t.leader = number("group_leader") == addr
	parent := number("real_parent")
	t.Comm, err = o.String("comm")
	errs = append(errs, err)
	t.Name = t.Comm
	if err := errors.Join(errs...); err != nil {
		return t, err
	}
	if err := k.checkTask(&t); err != nil {
		return t, err
	}
	up, err := k.Part(ctx, "task_struct", parent, "tgid")
	if err == nil {
		var v uint64
		v, err = up.Uint("tgid")
		t.PPID = int(int32(v))
	}
	if err != nil {
		return t, fmt.Errorf("parent of pid %d: %w", t.PID, err)
	}
	cred, err := k.Cred(ctx, t.Cred)
	if err != nil {
		return t, fmt.Errorf("credentials of pid %d: %w", t.PID, err)
	}
	t.UID, t.EUID, t.GID = cred.UID, cred.EUID, cred.GID
	if t.Kernel {
		k.nameThread(ctx, &t, number(private))
	}
	return t, nil
}

// checkTask says why something cannot be a task.
func (k *Kernel) checkTask(t *Task) error {
	var err error
	switch {
	case t.PID < 0 || t.PID > maxPID || t.TGID < 0 || t.TGID > maxPID:
		err = fmt.Errorf("not a task: its pid is %d, of process %d", t.PID, t.TGID)
	case t.leader != (t.PID == t.TGID):
		err = fmt.Errorf("not a task: pid %d of process %d, and leader %t", t.PID, t.TGID, t.leader)
	default:
		return nil
	}
	return &ObjectError{"task_struct", t.Address, err}
}

// nameThread gives a kernel thread the name that /proc shows (proc_task_name in
// fs/proc/array.c): workers add what they do last, others have a name of more
// than 15 characters elsewhere. What cannot be read leaves Comm.
func (k *Kernel) nameThread(ctx context.Context, t *Task, private uint64) {
	if t.Flags&pfWorker == 0 {
		o, err := k.Part(ctx, "kthread", private, "full_name")
		if err != nil {
			return
		}
		at, err := o.Pointer("full_name")
		if err != nil || at == 0 {
			return
		}
		if name, err := k.Space.String(ctx, at, 63); err == nil && name != "" {
			t.Name = name
		}
		return
	}
	o, err := k.Part(ctx, "kthread", private, "data")
	if err != nil {
		return
	}
	at, err := o.Pointer("data")
	if err != nil {
		return
	}
	w, err := k.Part(ctx, "worker", at, "pool", "desc", "current_work", "task", "rescue_wq")
	if err != nil {
		return
	}
	k.nameRescuer(ctx, t, w)
	pool, err1 := w.Pointer("pool")
	own, err2 := w.Pointer("task")
	work, err3 := w.Pointer("current_work")
	desc, err4 := w.String("desc")
	if err := errors.Join(err1, err2, err3, err4); err != nil || own != t.Address || pool == 0 || desc == "" {
		return
	}
	sign := "-"
	if work != 0 {
		sign = "+"
	}
	t.Name += sign + desc
}

// nameRescuer completes the name of a worker that is a work queue's reserve:
// since 6.11 that says it is one, and the queue's name no longer fits in comm.
func (k *Kernel) nameRescuer(ctx context.Context, t *Task, worker *Object) {
	const prefix = "kworker/R-"
	queue, err := worker.Pointer("rescue_wq")
	if err != nil || queue == 0 || !strings.HasPrefix(t.Comm, prefix) {
		return
	}
	o, err := k.Part(ctx, "workqueue_struct", queue, "name")
	if err != nil {
		return
	}
	if name, err := o.String("name"); err == nil && name != "" {
		t.Name = prefix + name
	}
}

// Tasks lists all threads by the kernel's list of tasks, which ps and the like
// see: each process' leader, then its threads. The first task of all, pid 0,
// is left out, as in /proc. If the list is damaged the error is an
// *ObjectError, or several, and what could be read is returned all the same.
func (k *Kernel) Tasks(ctx context.Context) ([]Task, error) {
	return settle(ctx, k, (*Kernel).tasks)
}

// settle does a walk again that a running guest changed under it: what is wrong
// with what was read is wrong a second time then. The walk goes over a view in
// which nothing changes any more.
func settle[T any](ctx context.Context, k *Kernel, f func(*Kernel, context.Context) ([]T, error)) ([]T, error) {
	const tries = 3
	for try := 1; ; try++ {
		all, err := f(k.View(), ctx)
		if err == nil || try == tries || ctx.Err() != nil {
			return all, err
		}
	}
}

func (k *Kernel) tasks(ctx context.Context) ([]Task, error) {
	first, err := k.symbol("init_task")
	if err != nil {
		return nil, err
	}
	head, err := k.offset("task_struct", "tasks")
	if err != nil {
		return nil, err
	}
	node, err := k.offset("task_struct", "thread_node")
	if err != nil {
		return nil, err
	}
	list, err := k.offset("signal_struct", "thread_head")
	if err != nil {
		return nil, err
	}
	var all []Task
	var errs []error
	seen := map[uint64]bool{first: true}
	left := maxTasks // of all lists of threads together
	add := func(at uint64) (Task, error) {
		t, err := k.Task(ctx, at)
		if err != nil {
			errs = bounded(errs, err)
			return t, err
		}
		if !seen[at] {
			seen[at] = true
			all = append(all, t)
		}
		return t, nil
	}
	err = k.List(ctx, "task list", first+head, maxTasks, func(at uint64) error {
		leader, err := add(at - head)
		if err != nil {
			return nil // noted; the rest of the list can be read
		}
		err = k.List(ctx, fmt.Sprintf("threads of pid %d", leader.PID), leader.signal+list, left, func(at uint64) error {
			left--
			if at-node == leader.Address {
				return nil
			}
			t, err := add(at - node)
			if err == nil && t.TGID != leader.TGID {
				errs = bounded(errs, &ObjectError{"task_struct", t.Address, fmt.Errorf("pid %d of process %d is a thread of process %d", t.PID, t.TGID, leader.TGID)})
			}
			return nil
		})
		errs = bounded(errs, err)
		return nil
	})
	return all, errors.Join(append(errs, err)...)
}

// bounded adds an error to those that a walk noted; a hostile guest can have
// millions.
func bounded(errs []error, err error) []error {
	const most = 16
	if err == nil || len(errs) >= most {
		return errs
	}
	return append(errs, err)
}

// PIDTable lists all threads by the table through which the kernel finds a pid
// in the initial pid namespace: what signals can be sent to. Errors are as for
// Tasks.
func (k *Kernel) PIDTable(ctx context.Context) ([]Task, error) {
	return settle(ctx, k, (*Kernel).pidTable)
}

func (k *Kernel) pidTable(ctx context.Context) ([]Task, error) {
	ns, err := k.variable(ctx, "init_pid_ns", "pid_namespace")
	if err != nil {
		return nil, err
	}
	idr, err := ns.Addr("idr")
	if err != nil {
		return nil, err
	}
	kind, err := k.Types.EnumValue("pid_type", "PIDTYPE_PID")
	if err != nil {
		return nil, &ObjectError{"pid table", idr, err}
	}
	if kind < 0 || kind > 16 {
		return nil, &ObjectError{"pid table", idr, fmt.Errorf("%w: PIDTYPE_PID is %d", ErrBadTypes, kind)}
	}
	heads := fmt.Sprintf("tasks[%d]", kind)
	node, err := k.offset("task_struct", fmt.Sprintf("pid_links[%d]", kind))
	if err != nil {
		return nil, err
	}
	var all []Task
	var errs []error
	err = k.IDR(ctx, "pid table", idr, maxTasks, func(id, at uint64) error {
		pid, err := k.Part(ctx, "pid", at, heads)
		if err != nil {
			errs = bounded(errs, err)
			return nil
		}
		head, err := pid.Addr(heads)
		if err != nil {
			return err
		}
		// A pid that is only a group's or a session's any more has no task.
		err = k.HList(ctx, fmt.Sprintf("tasks of pid %d", id), head, 1, func(link uint64) error {
			t, err := k.Task(ctx, link-node)
			if err != nil {
				errs = bounded(errs, err)
				return nil
			}
			if uint64(t.PID) != id {
				errs = bounded(errs, &ObjectError{"task_struct", t.Address, fmt.Errorf("it says it has pid %d, and is found by %d", t.PID, id)})
			}
			all = append(all, t)
			return nil
		})
		errs = bounded(errs, err)
		return nil
	})
	return all, errors.Join(append(errs, err)...)
}
