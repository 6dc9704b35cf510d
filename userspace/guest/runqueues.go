// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"errors"
	"fmt"
)

// Queued is a thread that a CPU runs or is about to.
type Queued struct {
	Task
	CPU int `json:"cpu"`
	// Where it was found, the first place of: "curr", "idle", "stop", "cfs
	// list", "cfs tree", "rt", "deadline", "ext".
	Where string `json:"where"`
}

// RunQueues lists the threads that the CPUs' run queues hold: what really runs,
// whatever other lists say. Each is listed once per CPU. Errors are as for
// Tasks.
func (k *Kernel) RunQueues(ctx context.Context) ([]Queued, error) {
	return settle(ctx, k, (*Kernel).runQueues)
}

func (k *Kernel) runQueues(ctx context.Context) ([]Queued, error) {
	cpus, err := k.OnlineCPUs(ctx)
	if err != nil {
		return nil, err
	}
	var all []Queued
	var errs []error
	// Of all queues together.
	left, groups := maxTasks, maxGroups
	for _, cpu := range cpus {
		q := runQueue{Kernel: k, cpu: cpu, seen: map[uint64]bool{}, left: &left, groups: &groups}
		errs = bounded(errs, q.walk(ctx))
		for _, err := range q.errs {
			errs = bounded(errs, err)
		}
		all = append(all, q.found...)
	}
	return all, errors.Join(errs...)
}

// maxGroups bounds the groups of tasks of one CPU.
const maxGroups = 1 << 14

type runQueue struct {
	*Kernel
	cpu    int
	found  []Queued
	seen   map[uint64]bool
	errs   []error
	left   *int // tasks
	groups *int // of tasks, below those of the CPUs
}

// counted lets f be called until the members of all queues are too many.
func (q *runQueue) counted(f func(uint64) error) func(uint64) error {
	return func(at uint64) error {
		*q.left--
		return f(at)
	}
}

func (q *runQueue) note(err error) { q.errs = bounded(q.errs, err) }

func (q *runQueue) name(what string) string { return fmt.Sprintf("%s of CPU %d", what, q.cpu) }

func (q *runQueue) add(ctx context.Context, at uint64, where string) {
	if q.seen[at] {
		return
	}
	q.seen[at] = true
	t, err := q.Task(ctx, at)
	if err != nil {
		q.note(fmt.Errorf("%s: %w", q.name(where), err))
		return
	}
	q.found = append(q.found, Queued{Task: t, CPU: q.cpu, Where: where})
}

// walk visits every place of a run queue (struct rq in kernel/sched/sched.h)
// where a task can be, of those that this kernel has.
func (q *runQueue) walk(ctx context.Context) error {
	at, err := q.PerCPU(ctx, "runqueues", q.cpu)
	if err != nil {
		return err
	}
	rq, err := q.Object(ctx, "rq", at)
	if err != nil {
		return err
	}
	if rq.Has("cpu") {
		if n, err := rq.Uint("cpu"); err != nil || n != uint64(q.cpu) {
			return errors.Join(err, rq.fail(fmt.Errorf("it says it is of CPU %d, and is found as that of %d", n, q.cpu)))
		}
	}
	// donor is whose time curr spends, since 6.13.
	for _, field := range []string{"curr", "donor", "idle", "stop"} {
		if !rq.Has(field) {
			continue
		}
		task, err := rq.Pointer(field)
		if err != nil {
			q.note(err)
		} else if task != 0 || field == "curr" || field == "idle" {
			q.add(ctx, task, field)
		}
	}
	q.fairList(ctx, rq)
	if fair, err := rq.Addr("cfs"); err != nil {
		q.note(err)
	} else {
		q.fairTree(ctx, fair)
	}
	q.realtime(ctx, rq)
	q.deadline(ctx, rq)
	q.ext(ctx, rq)
	return nil
}

// member walks a list, or other structure, of members of tasks.
func (q *runQueue) member(ctx context.Context, path, where string) (func(uint64) error, bool) {
	offset, err := q.offset("task_struct", path)
	if err != nil {
		q.note(err)
		return nil, false
	}
	return func(node uint64) error { q.add(ctx, node-offset, where); return nil }, true
}

// fairList: all tasks of the fair class, those in groups included.
func (q *runQueue) fairList(ctx context.Context, rq *Object) {
	if !rq.Has("cfs_tasks") { // only with CONFIG_SMP, up to 6.16
		return
	}
	head, err := rq.Addr("cfs_tasks")
	if err != nil {
		q.note(err)
		return
	}
	if f, ok := q.member(ctx, "se.group_node", "cfs list"); ok {
		q.note(q.List(ctx, q.name("cfs_tasks"), head, *q.left, q.counted(f)))
	}
}

// fairTree: the tree by which the fair class picks; groups of tasks have trees
// of their own. The one that runs is in none.
func (q *runQueue) fairTree(ctx context.Context, root uint64) {
	se, err := q.offset("task_struct", "se")
	if err != nil {
		q.note(err)
		return
	}
	node, err := q.offset("sched_entity", "run_node")
	if err != nil {
		q.note(err)
		return
	}
	entity, err := q.Types.Struct("sched_entity")
	if err != nil {
		q.note(&ObjectError{"sched_entity", 0, err})
		return
	}
	grouped := entity.Has("my_q") // CONFIG_FAIR_GROUP_SCHED
	type queue struct {
		at    uint64
		depth int
	}
	seen := map[uint64]bool{root: true}
	for todo := []queue{{root, 0}}; len(todo) > 0; {
		this := todo[0]
		todo = todo[1:]
		cfs, err := q.Part(ctx, "cfs_rq", this.at, "tasks_timeline", "curr")
		if err != nil {
			q.note(err)
			continue
		}
		visit := func(at uint64) error {
			own := uint64(0)
			if grouped {
				e, err := q.read(ctx, entity, at, "my_q")
				if err == nil {
					own, err = e.Pointer("my_q")
				}
				if err != nil {
					q.note(err)
					return nil
				}
			}
			switch {
			case own == 0:
				q.add(ctx, at-se, "cfs tree")
			case seen[own] || this.depth >= maxDepth || *q.groups == 0:
				q.note(&ObjectError{q.name("cfs_rq"), own, ErrCycle})
			default:
				seen[own] = true
				*q.groups--
				todo = append(todo, queue{own, this.depth + 1})
			}
			return nil
		}
		if curr, err := cfs.Pointer("curr"); err != nil {
			q.note(err)
		} else if curr != 0 {
			visit(curr)
		}
		tree, err := cfs.Addr("tasks_timeline")
		if err != nil {
			q.note(err)
			continue
		}
		q.note(q.Tree(ctx, q.name("tasks_timeline"), tree, *q.left, q.counted(func(at uint64) error { return visit(at - node) })))
	}
}

// realtime: a list for each priority. Groups' entities (CONFIG_RT_GROUP_SCHED)
// are no tasks; their own queues hold those.
func (q *runQueue) realtime(ctx context.Context, rq *Object) {
	entity, err := q.Types.Struct("sched_rt_entity")
	if err != nil {
		q.note(&ObjectError{"sched_rt_entity", 0, err})
		return
	}
	link, err := q.offset("sched_rt_entity", "run_list")
	if err != nil {
		q.note(err)
		return
	}
	offset, err := q.offset("task_struct", "rt")
	if err != nil {
		q.note(err)
		return
	}
	first, err := rq.Addr("rt")
	if err != nil {
		q.note(err)
		return
	}
	grouped := entity.Has("my_q")
	seen := map[uint64]bool{first: true}
	for todo := []uint64{first}; len(todo) > 0; {
		this := todo[0]
		todo = todo[1:]
		rt, err := q.Object(ctx, "rt_rq", this)
		if err != nil {
			q.note(err)
			continue
		}
		queues, err := rt.Struct.Field("active.queue")
		if err != nil {
			q.note(rt.fail(err))
			continue
		}
		const mostPriorities = 1024
		for i := range min(queues.Count, mostPriorities) {
			head := rt.Address + uint64(queues.Offset) + uint64(i)*uint64(queues.ElemSize)
			q.note(q.List(ctx, q.name(fmt.Sprintf("rt queue %d", i)), head, *q.left, q.counted(func(node uint64) error {
				at := node - link
				if !grouped {
					q.add(ctx, at-offset, "rt")
					return nil
				}
				own := uint64(0)
				e, err := q.read(ctx, entity, at, "my_q")
				if err == nil {
					own, err = e.Pointer("my_q")
				}
				switch {
				case err != nil:
					q.note(err)
				case own == 0:
					q.add(ctx, at-offset, "rt")
				case seen[own] || *q.groups == 0:
					q.note(&ObjectError{q.name("rt_rq"), own, ErrCycle})
				default:
					seen[own] = true
					*q.groups--
					todo = append(todo, own)
				}
				return nil
			})))
		}
	}
}

// deadline: a tree by deadlines. Since 6.8 it also holds servers, which are no
// tasks but stand for another class.
func (q *runQueue) deadline(ctx context.Context, rq *Object) {
	entity, err := q.Types.Struct("sched_dl_entity")
	if err != nil {
		q.note(&ObjectError{"sched_dl_entity", 0, err})
		return
	}
	node, err := q.offset("sched_dl_entity", "rb_node")
	if err != nil {
		q.note(err)
		return
	}
	offset, err := q.offset("task_struct", "dl")
	if err != nil {
		q.note(err)
		return
	}
	tree, err := rq.Addr("dl.root")
	if err != nil {
		q.note(err)
		return
	}
	servers := entity.Has("dl_server")
	q.note(q.Tree(ctx, q.name("deadline tree"), tree, *q.left, q.counted(func(at uint64) error {
		at -= node
		if servers {
			e, err := q.read(ctx, entity, at, "dl_server")
			if err != nil {
				q.note(err)
				return nil
			}
			if server, err := e.Uint("dl_server"); err != nil || server != 0 {
				q.note(err)
				return nil
			}
		}
		q.add(ctx, at-offset, "deadline")
		return nil
	})))
}

// ext: the tasks of an eBPF scheduler, since 6.12 where it is configured.
func (q *runQueue) ext(ctx context.Context, rq *Object) {
	if !rq.Has("scx.runnable_list") || !q.Types.Has("task_struct", "scx.runnable_node") {
		return
	}
	head, err := rq.Addr("scx.runnable_list")
	if err != nil {
		q.note(err)
		return
	}
	if f, ok := q.member(ctx, "scx.runnable_node", "ext"); ok {
		q.note(q.List(ctx, q.name("scx runnable_list"), head, *q.left, q.counted(f)))
	}
}
