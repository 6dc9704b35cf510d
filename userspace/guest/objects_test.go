// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// recorded is a guest out of testdata/objects, with what its own /proc said.
type recorded struct {
	*Kernel
	pages   Pages
	release string
	before  map[int]procTask
	after   map[int]procTask
	modules map[string]string // lines of /proc/modules
}

// procTask is what /proc said of a thread.
type procTask struct {
	tgid, ppid     int
	name, state    string
	uid, euid, gid string
	start          string // clock ticks of 10 ms
	flags          string
}

var recordedNames = []string{"debian11", "debian12", "debian13", "sid"}

func unpack(t testing.TB, name string) []byte {
	t.Helper()
	p, err := os.ReadFile("testdata/objects/" + name)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(p))
	if err != nil {
		t.Fatal(err)
	}
	p, err = io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func loadRecorded(t testing.TB, name string) *recorded {
	t.Helper()
	file, err := os.Open("testdata/objects/" + name + ".snapshot")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s, err := ReadSnapshot(file)
	if err != nil {
		t.Fatal(err)
	}
	root, err := strconv.ParseUint(s.Notes["root"], 0, 64)
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := ParseSymbols(bytes.NewReader(unpack(t, name+".kallsyms.gz")))
	if err != nil {
		t.Fatal(err)
	}
	types, err := ParseTypes(unpack(t, name+".btf.gz"), nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &recorded{pages: s.Pages, release: s.Notes["release"], before: parseProc(t, s.Notes["ps"]), after: parseProc(t, s.Notes["ps-after"]), modules: map[string]string{}}
	r.Kernel = &Kernel{
		Space: &Space{Memory: s.Pages, Mode: ModeOf(&s.CPUs[0].Registers), Root: root},
		Image: NewImage(symbols, 0),
		Types: types,
		CPUs:  s.CPUs,
	}
	for line := range strings.Lines(s.Notes["modules"]) {
		name, _, _ := strings.Cut(line, " ")
		r.modules[name] = strings.TrimSpace(line)
	}
	return r
}

func parseProc(t testing.TB, text string) map[int]procTask {
	t.Helper()
	all := map[int]procTask{}
	for i, line := range strings.Split(strings.TrimSpace(text), "\n") {
		f := strings.Split(line, "\t")
		if i == 0 {
			continue
		}
		if len(f) != 10 {
			t.Fatalf("line %d has %d columns: %q", i+1, len(f), line)
		}
		number := func(s string) int {
			n, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		all[number(f[1])] = procTask{number(f[0]), number(f[2]), f[3], f[4], f[5], f[6], f[7], f[8], f[9]}
	}
	return all
}

// write changes the guest's memory, of which each page is only its own.
func (r *recorded) write(t testing.TB, gva uint64, v uint64) {
	t.Helper()
	tr, err := Translate(t.Context(), r.Space.Memory, r.Space.Mode, r.Space.Root, gva)
	if err != nil {
		t.Fatal(err)
	}
	put64(r.pages, tr.GPA, v)
}

func (r *recorded) word(t testing.TB, gva uint64) uint64 {
	t.Helper()
	v, err := r.Space.Pointer(t.Context(), gva)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (r *recorded) at(t testing.TB, typeName, path string) uint64 {
	t.Helper()
	n, err := r.offset(typeName, path)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func forEachRecorded(t *testing.T, f func(t *testing.T, r *recorded)) {
	for _, name := range recordedNames {
		t.Run(name, func(t *testing.T) { f(t, loadRecorded(t, name)) })
	}
}

// TestTasksLikeProc compares each thread with what /proc of the guest said of
// it before and after its memory was dumped: one of both must be it, and none
// must lack. What changes from one moment to the next may have done so in
// between: the name of a worker, which says what it does, and the state of the
// program that read /proc.
func TestTasksLikeProc(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		for name, list := range map[string]func(context.Context) ([]Task, error){"list": r.Tasks, "pid table": r.PIDTable} {
			tasks, err := list(t.Context())
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			found := map[int]bool{}
			moved := 0
			for _, task := range tasks {
				if found[task.PID] {
					t.Errorf("%s: pid %d twice", name, task.PID)
				}
				found[task.PID] = true
				if task.Leader() != (task.PID == task.TGID) {
					t.Errorf("%s: pid %d: leader %t", name, task.PID, task.Leader())
				}
				got := procTask{task.TGID, task.PPID, task.Name, task.State, fmt.Sprint(task.UID), fmt.Sprint(task.EUID), fmt.Sprint(task.GID),
					fmt.Sprint(int64(task.Start / (10 * time.Millisecond))), fmt.Sprint(task.Flags)}
				a, ok1 := r.before[task.PID]
				b, ok2 := r.after[task.PID]
				switch {
				case !ok1 && !ok2:
					t.Errorf("%s: %+v is not in /proc", name, got)
				case ok1 && got == a, ok2 && got == b:
				default:
					want := a
					if !ok1 {
						want = b
					}
					if moved++; strings.HasPrefix(got.name, "kworker/") {
						want.name, got.name = worker(want.name), worker(got.name)
					}
					if got.state == b.state || a.state == "R" {
						want.state = got.state
					}
					if got.flags == b.flags {
						want.flags = got.flags
					}
					if diff := cmp.Diff(want, got, cmp.AllowUnexported(procTask{})); diff != "" {
						t.Errorf("%s: pid %d (-/proc +memory):\n%s", name, task.PID, diff)
					}
				}
			}
			for pid, task := range r.before {
				if _, ok := r.after[pid]; ok && !found[pid] {
					t.Errorf("%s: pid %d is missing: %+v", name, pid, task)
				}
			}
			if moved > 4 {
				t.Errorf("%s: %d threads differ", name, moved)
			}
			if len(tasks) < 50 {
				t.Errorf("%s: %d threads", name, len(tasks))
			}
		}
	})
}

func worker(name string) string {
	if i := strings.IndexAny(name, "-+"); i >= 0 && !strings.HasPrefix(name, "kworker/R-") {
		return name[:i]
	}
	return name
}

func TestRunQueues(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		tasks, err := r.PIDTable(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		known := map[uint64]bool{}
		for _, task := range tasks {
			known[task.Address] = true
		}
		queued, err := r.RunQueues(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		first := map[int]string{}
		idle := map[int]bool{}
		for _, q := range queued {
			if first[q.CPU] == "" {
				first[q.CPU] = q.Where
			}
			swapper := q.PID == 0 && q.Comm == fmt.Sprintf("swapper/%d", q.CPU)
			idle[q.CPU] = idle[q.CPU] || swapper
			if !swapper && !known[q.Address] {
				t.Errorf("%+v is in no list", q)
			}
		}
		online, err := r.OnlineCPUs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(online) != len(r.CPUs) {
			t.Errorf("CPUs %v, of %d vCPUs", online, len(r.CPUs))
		}
		for _, cpu := range online {
			if first[cpu] != "curr" || !idle[cpu] {
				t.Errorf("CPU %d: first %q, idle %t", cpu, first[cpu], idle[cpu])
			}
		}
	})
}

// TestRunQueuesBusy: in this guest each CPU runs a program, in user mode under
// page-table isolation.
func TestRunQueuesBusy(t *testing.T) {
	r := loadRecorded(t, "sid")
	queued, err := r.RunQueues(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	busy := map[int]bool{}
	for _, q := range queued {
		if q.Where == "curr" && q.State == "R" && !q.Kernel && q.MM != 0 && q.PID != 0 {
			busy[q.CPU] = true
		}
	}
	if len(busy) != len(r.CPUs) {
		t.Errorf("programs on CPUs %v of %d: %+v", slices.Sorted(maps.Keys(busy)), len(r.CPUs), queued)
	}
}

func moduleViews(r *recorded) map[string]func(context.Context) ([]Module, error) {
	return map[string]func(context.Context) ([]Module, error){
		"list": r.Modules, "tree": r.ModuleTree, "kset": r.ModuleKset, "areas": r.ModuleAreas,
	}
}

func moduleLine(m Module) string {
	users := "-"
	if len(m.Users) > 0 {
		users = strings.Join(m.Users, ",") + ","
	}
	return fmt.Sprintf("%s %d %d %s %s 0x%016x", m.Name, m.Size, m.Refcount, users, m.State, m.Base)
}

// TestModulesLikeProc compares each module with its line of /proc/modules.
func TestModulesLikeProc(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		for name, list := range moduleViews(r) {
			modules, err := list(t.Context())
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got := map[string]string{}
			for _, m := range modules {
				got[m.Name] = moduleLine(m)
				for _, part := range m.Memory {
					if part.Size() == 0 || part.Start%4096 != 0 {
						t.Errorf("%s: %s has %s at %#x..%#x", name, m.Name, part.Kind, part.Start, part.End)
					}
				}
				if !m.Contains(m.Base) || !m.Contains(m.Address) || m.Contains(0) {
					t.Errorf("%s: %s at %#x, struct at %#x: %+v", name, m.Name, m.Base, m.Address, m.Memory)
				}
			}
			want := maps.Clone(r.modules)
			for name, line := range want { // but its taints
				want[name], _, _ = strings.Cut(line, " (")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-/proc/modules +memory):\n%s", name, diff)
			}
		}
	})
}

func TestCreds(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		tasks, err := r.Tasks(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		others := 0
		for _, task := range tasks {
			objective, subjective, err := r.TaskCreds(t.Context(), task.Address)
			if err != nil {
				t.Fatal(err)
			}
			if objective.Address != task.Cred || subjective != objective {
				t.Errorf("pid %d: %+v, %+v", task.PID, objective, subjective)
			}
			if objective.UserNS == 0 || objective.Usage <= 0 {
				t.Errorf("pid %d: %+v", task.PID, objective)
			}
			if objective.EUID == 0 {
				if full := objective.CapBounding; full == 0 || objective.CapEffective != full || objective.CapPermitted != full {
					t.Errorf("pid %d is root's: %+v", task.PID, objective)
				}
				continue
			}
			others++
			if objective.CapEffective != 0 {
				t.Errorf("pid %d is user %d's: %+v", task.PID, objective.EUID, objective)
			}
		}
		want := 0
		for _, task := range r.after {
			if task.euid != "0" {
				want++
			}
		}
		if others != want {
			t.Errorf("%d threads are not root's, %d in /proc", others, want)
		}
	})
}

func TestCPUTables(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		check := func(vcpus bool) {
			t.Helper()
			tables, err := r.CPUTables(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			seen := map[int]bool{}
			for _, c := range tables {
				seen[c.VCPU] = true
				if !c.GDT.Fits() || !c.TSS.Fits() || c.SP0.Address != c.SP0.Want {
					t.Errorf("CPU %d: %+v", c.CPU, c)
				}
				if (len(c.GDT.Want) == 2 && len(c.TSS.Want) == 1) != vcpus {
					t.Errorf("CPU %d: GDT wanted at %#x, TSS at %#x", c.CPU, c.GDT.Want, c.TSS.Want)
				}
				if d := c.GDTs[8]; !d.TSS() || vcpus && d.Base != c.TSS.Base {
					t.Errorf("CPU %d: TSS descriptor %v, TSS at %#x", c.CPU, d, c.TSS.Base)
				}
				for i, s := range c.IST {
					if s.Address != s.Want || (s.Want != 0) != (i < len(istNames)) {
						t.Errorf("CPU %d: IST %d %+v", c.CPU, i+1, s)
					}
				}
			}
			if vcpus && len(seen) != len(r.CPUs) || !vcpus && !seen[-1] {
				t.Errorf("vCPUs %v", seen)
			}
		}
		check(true)
		r.CPUs = nil
		// Without registers the tables are found by the kernel's variables.
		check(false)
	})
}

func TestInterrupts(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		for vcpu := -1; vcpu < len(r.CPUs); vcpu++ {
			table, vectors, err := r.Interrupts(t.Context(), vcpu)
			if err != nil {
				t.Fatal(err)
			}
			if !table.Fits() || len(vectors) != 256 {
				t.Errorf("vCPU %d: %+v, %d gates", vcpu, table, len(vectors))
			}
			for _, vector := range []int{0, 1, 2, 3, 6, 8, 13, 14, 0x80, 0xfd} {
				v := vectors[vector]
				if !r.Image.Is(v.Handler, v.Want...) || !slices.Contains(v.Want, v.Symbol) {
					t.Errorf("vCPU %d: gate %d leads to %s, not one of %v", vcpu, vector, v.Symbol, v.Want)
				}
			}
		}
	})
}

func TestSyscallTables(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		tables, err := r.SyscallTables(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		dispatchers, err := r.Dispatchers(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, table := range append(tables, dispatchers...) {
			if table.Name != "sys_call_table" && table.Name != "x64_sys_call" {
				continue
			}
			if len(table.Calls) < 440 {
				t.Errorf("%s: %d calls", table.Name, len(table.Calls))
			}
			for nr, want := range map[int]string{0: "__x64_sys_read", 1: "__x64_sys_write", 39: "__x64_sys_getpid", 59: "__x64_sys_execve", 217: "__x64_sys_getdents64", 435: "__x64_sys_clone3"} {
				if got := table.Calls[nr]; !r.Image.Is(got.Handler, want) || got.Symbol == "" || got.Number != nr {
					t.Errorf("%s: %d is %+v, not %s", table.Name, nr, got, want)
				}
			}
		}
		// Kernels that have both have them agree.
		for _, d := range dispatchers {
			if d.Name != "x64_sys_call" {
				continue
			}
			for i, call := range tables[0].Calls {
				if d.Calls[i] != call {
					t.Errorf("%s: %+v, the table %+v", d.Name, d.Calls[i], call)
				}
			}
		}
		if old := strings.HasPrefix(r.release, "5.10"); old == (len(dispatchers) > 0) {
			t.Errorf("%d dispatchers", len(dispatchers))
		}
	})
}

func TestEntries(t *testing.T) {
	r := loadRecorded(t, "debian12")
	if _, err := r.Entries(0); !errors.Is(err, ErrNoMSRs) {
		t.Errorf("a dump without model-specific registers: %v", err)
	}
	if _, err := r.Entries(len(r.CPUs)); err == nil || errors.Is(err, ErrNoMSRs) {
		t.Errorf("no such vCPU: %v", err)
	}
	symbol := func(name string) uint64 {
		at, ok := r.Image.Lookup(name)
		if !ok {
			t.Fatal(name)
		}
		return at
	}
	cpu := &r.CPUs[0]
	cpu.STAR = 0x23001000000000
	for _, c := range []struct {
		name                 string
		lstar, cstar, enter  uint64
		lstarOK, cOK, enterK bool
	}{
		{"honest", symbol("entry_SYSCALL_64"), symbol("entry_SYSCALL_compat"), symbol("entry_SYSENTER_compat"), true, true, true},
		{"AMD", symbol("entry_SYSCALL_64"), symbol("entry_SYSCALL_compat"), symbol("entry_SYSENTER_compat") & 0xffffffff, true, true, true},
		{"64-bit only", symbol("entry_SYSCALL_64"), 0, 0, true, true, true},
		{"no entry", 0, 0, 0, false, true, true},
		{"hooked", symbol("entry_SYSCALL_64") + 1, symbol("asm_exc_page_fault"), 0xffffffffc0000000, false, false, false},
	} {
		cpu.LSTAR, cpu.CSTAR, cpu.SysenterEIP = c.lstar, c.cstar, c.enter
		all, err := r.Entries(0)
		if err != nil {
			t.Fatal(err)
		}
		got := []bool{all[0].Fits, all[1].Fits, all[2].Fits}
		if want := []bool{c.lstarOK, c.cOK, c.enterK}; !slices.Equal(got, want) {
			t.Errorf("%s: fits %v, want %v: %+v", c.name, got, want, all)
		}
		if c.name == "AMD" && all[2].Symbol != "entry_SYSENTER_compat" {
			t.Errorf("%s: %+v", c.name, all[2])
		}
	}
}

// pids of tasks.
func pids[T any](tasks []T, pid func(T) int) []int {
	var all []int
	for _, task := range tasks {
		all = append(all, pid(task))
	}
	slices.Sort(all)
	return all
}

func taskPID(t Task) int { return t.PID }

// TestHiddenTask takes a process off the task list, as rootkits do: the pid
// table still has it.
func TestHiddenTask(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		all, err := r.Tasks(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(t Task) bool { return !t.Kernel && t.Leader() && t.PID != 1 })
		if i < 0 { // only init: a kernel thread does as well
			i = len(all) / 2
		}
		hidden := all[i]
		node := hidden.Address + r.at(t, "task_struct", "tasks")
		next, prev := r.word(t, node), r.word(t, node+8)
		r.write(t, prev, next)
		r.write(t, next+8, prev)
		list, err := r.Tasks(t.Context())
		if err != nil {
			t.Errorf("a list that is whole again: %v", err)
		}
		table, err := r.PIDTable(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(pids(list, taskPID), hidden.PID) || !slices.Contains(pids(table, taskPID), hidden.PID) {
			t.Errorf("pid %d: list %v, table %v", hidden.PID, pids(list, taskPID), pids(table, taskPID))
		}
		if len(table) != len(all) {
			t.Errorf("%d tasks by the table, %d before", len(table), len(all))
		}
	})
}

// TestHiddenModule takes a module off the list, and then out of sysfs.
func TestHiddenModule(t *testing.T) {
	forEachRecorded(t, func(t *testing.T, r *recorded) {
		all, err := r.Modules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		hidden := all[1]
		unlink := func(node uint64) {
			next, prev := r.word(t, node), r.word(t, node+8)
			r.write(t, prev, next)
			r.write(t, next+8, prev)
		}
		unlink(hidden.Address + r.at(t, "module", "list"))
		unlink(hidden.Address + r.at(t, "module", "mkobj.kobj.entry"))
		for name, list := range moduleViews(r) {
			found, err := list(t.Context())
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			has := slices.ContainsFunc(found, func(m Module) bool { return m.Name == hidden.Name })
			if want := name == "tree" || name == "areas"; has != want {
				t.Errorf("%s: hidden module found %t, want %t", name, has, want)
			}
		}
	})
}

// TestDamagedObjects: an error names what is damaged, and the rest is read.
func TestDamagedObjects(t *testing.T) {
	type damage struct {
		name   string
		do     func(t *testing.T, r *recorded, all []Task)
		object string // in the error
		want   error
		least  int // per cent of the tasks of the list that are still found
	}
	// The links of the task so many per cent down the list.
	tasks := func(r *recorded, t *testing.T, i int, all []Task) uint64 {
		leaders := slices.DeleteFunc(slices.Clone(all), func(t Task) bool { return !t.Leader() })
		return leaders[len(leaders)*i/100].Address + r.at(t, "task_struct", "tasks")
	}
	for _, d := range []damage{
		{"a link back that lies", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, tasks(r, t, 50, all)+8, tasks(r, t, 3, all))
		}, "task list", ErrBackLink, 100},
		{"a cycle", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, tasks(r, t, 50, all), tasks(r, t, 10, all))
		}, "task list", ErrCycle, 20},
		{"a link to itself", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, tasks(r, t, 50, all), tasks(r, t, 50, all))
		}, "task list", ErrCycle, 20},
		{"a link to nothing", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, tasks(r, t, 50, all), 0)
		}, "task list", ErrNull, 20},
		{"a link to a program", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, tasks(r, t, 50, all), 0x7fff00001000)
		}, "task list", ErrNotKernel, 20},
		{"a link that is not aligned", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, tasks(r, t, 50, all), tasks(r, t, 51, all)+3)
		}, "task list", ErrUnaligned, 20},
		{"a link to where nothing is", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, tasks(r, t, 50, all), 0xffffc8fffffff000)
		}, "task list", ErrNotPresent, 20},
		{"a task without credentials", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, all[len(all)/3].Address+r.at(t, "task_struct", "real_cred"), 0)
		}, "cred", ErrNull, 95},
		{"a task without a parent", func(t *testing.T, r *recorded, all []Task) {
			r.write(t, all[len(all)/3].Address+r.at(t, "task_struct", "real_parent"), 0x1234)
		}, "task_struct", ErrNotKernel, 95},
		{"threads in a cycle", func(t *testing.T, r *recorded, all []Task) {
			for _, task := range all {
				if !task.Leader() {
					at := task.Address + r.at(t, "task_struct", "thread_node")
					r.write(t, at, at)
					return
				}
			}
			t.Fatal("no threads")
		}, "threads of pid", ErrCycle, 50},
	} {
		t.Run(d.name, func(t *testing.T) {
			r := loadRecorded(t, "debian12")
			all, err := r.Tasks(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			d.do(t, r, all)
			list, err := r.Tasks(t.Context())
			if !errors.Is(err, d.want) {
				t.Errorf("error %v, want %v", err, d.want)
			}
			var object *ObjectError
			if !errors.As(err, &object) || !strings.Contains(err.Error(), d.object) {
				t.Errorf("error %v does not name %q", err, d.object)
			}
			if 100*len(list) < d.least*len(all) || len(list) > len(all) {
				t.Errorf("%d of %d tasks", len(list), len(all))
			}
			if table, err := r.PIDTable(t.Context()); len(table) < len(all)-1 {
				t.Errorf("%d of %d tasks by the pid table: %v", len(table), len(all), err)
			}
		})
	}
}

// TestDamagedPIDTable: the same for the pid table.
func TestDamagedPIDTable(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, r *recorded, head uint64, node uint64)
		want error
	}{
		{"a node in itself", func(t *testing.T, r *recorded, head, node uint64) {
			r.write(t, node+r.at(t, "xa_node", "slots"), node|2)
		}, ErrCycle},
		{"a pointer to a program", func(t *testing.T, r *recorded, head, node uint64) {
			child := r.word(t, node+r.at(t, "xa_node", "slots")) &^ 3
			r.write(t, child+r.at(t, "xa_node", "slots")+8*5, 0x7f0000001000)
		}, ErrNotKernel},
		{"a node that says it is elsewhere", func(t *testing.T, r *recorded, head, node uint64) {
			child := r.word(t, node+r.at(t, "xa_node", "slots")) &^ 3
			r.write(t, child+r.at(t, "xa_node", "parent"), node+64)
		}, ErrBackLink},
		{"a node that is not there", func(t *testing.T, r *recorded, head, node uint64) {
			r.write(t, node+r.at(t, "xa_node", "slots")+8, 0xffffc8fffffff000|2)
		}, ErrNotPresent},
		{"a pid that is another", func(t *testing.T, r *recorded, head, node uint64) {
			child := r.word(t, node+r.at(t, "xa_node", "slots")) &^ 3
			slots := child + r.at(t, "xa_node", "slots")
			r.write(t, slots+8*5, r.word(t, slots+8*6))
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := loadRecorded(t, "debian12")
			all, err := r.PIDTable(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			ns, err := r.symbol("init_pid_ns")
			if err != nil {
				t.Fatal(err)
			}
			head := ns + r.at(t, "pid_namespace", "idr") + r.at(t, "idr", "idr_rt") + r.at(t, "xarray", "xa_head")
			c.do(t, r, head, r.word(t, head)&^3)
			table, err := r.PIDTable(t.Context())
			var object *ObjectError
			if !errors.As(err, &object) || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if len(table) < len(all)-64 {
				t.Errorf("%d of %d tasks", len(table), len(all))
			}
			if _, err := r.Tasks(t.Context()); err != nil {
				t.Errorf("the task list: %v", err)
			}
		})
	}
}

func TestNoTypes(t *testing.T) {
	r := loadRecorded(t, "debian12")
	r.Types, r.TypesErr = nil, ErrNoTypes
	_, err1 := r.Tasks(t.Context())
	_, err2 := r.PIDTable(t.Context())
	_, err3 := r.RunQueues(t.Context())
	_, err4 := r.Modules(t.Context())
	_, err5 := r.Object(t.Context(), "cred", 0xffff888000000000)
	_, err6 := r.CPUTables(t.Context())
	_, err7 := r.ModuleTypes(t.Context(), &Module{Name: "loop"})
	for i, err := range []error{err1, err2, err3, err4, err5, err6, err7} {
		if !errors.Is(err, ErrNoTypes) {
			t.Errorf("%d: %v", i+1, err)
		}
	}
	// What needs none goes on.
	if _, vectors, err := r.Interrupts(t.Context(), 0); err != nil || len(vectors) != 256 {
		t.Errorf("%d gates, %v", len(vectors), err)
	}
	if tables, err := r.SyscallTables(t.Context()); err != nil || len(tables) == 0 {
		t.Errorf("%d tables, %v", len(tables), err)
	}
}

// FuzzObjects changes words of real guests' memory at will: every walk ends,
// and an error names its object.
func FuzzObjects(f *testing.F) {
	var guests []*recorded
	walks := objectWalks()
	for i, name := range recordedNames {
		guests = append(guests, loadRecorded(f, name))
		for j := range walks {
			f.Add(byte(i), byte(j), []byte("\x01\x02\x10\x00\xff\xff\x88\x88\x05\x01\x20\x03"))
			f.Add(byte(i), byte(j), []byte{})
		}
	}
	f.Fuzz(func(t *testing.T, which, walk byte, data []byte) {
		r := guests[int(which)%len(guests)]
		frames := slices.Sorted(maps.Keys(r.pages))
		// Each change: a page, a word in it, and another word of the guest that
		// is put there.
		pages := Pages(maps.Clone(r.pages))
		own := map[uint64]bool{}
		for ; len(data) >= 6 && len(own) < 32; data = data[6:] {
			frame := frames[(int(data[0])|int(data[1])<<8)%len(frames)]
			word := (int(data[2]) | int(data[3])<<8) % 512 * 8
			if !own[frame] {
				page := *pages[frame]
				pages[frame], own[frame] = &page, true
			}
			from := r.pages[frames[(int(data[4])*31+int(data[5]))%len(frames)]]
			copy(pages[frame][word:word+8], from[(word+8*int(data[5]))%4096:])
		}
		k := *r.Kernel
		k.Space = &Space{Memory: pages, Mode: r.Space.Mode, Root: r.Space.Root}
		n, err := walks[int(walk)%len(walks)](k.View(), t.Context())
		if n > maxTasks {
			t.Errorf("%d objects", n)
		}
		if err := named(err); err != nil {
			t.Errorf("an error does not name its object: %v", err)
		}
	})
}

// objectWalks are all there are; each says how much it found.
func objectWalks() []func(*Kernel, context.Context) (int, error) {
	type walk = func(*Kernel, context.Context) (int, error)
	return []walk{
		func(k *Kernel, ctx context.Context) (int, error) { all, err := k.tasks(ctx); return len(all), err },
		func(k *Kernel, ctx context.Context) (int, error) { all, err := k.pidTable(ctx); return len(all), err },
		func(k *Kernel, ctx context.Context) (int, error) { all, err := k.runQueues(ctx); return len(all), err },
		func(k *Kernel, ctx context.Context) (int, error) { all, err := k.Modules(ctx); return len(all), err },
		func(k *Kernel, ctx context.Context) (int, error) { all, err := k.ModuleTree(ctx); return len(all), err },
		func(k *Kernel, ctx context.Context) (int, error) { all, err := k.ModuleKset(ctx); return len(all), err },
		func(k *Kernel, ctx context.Context) (int, error) {
			all, err := k.moduleAreas(ctx)
			return len(all), err
		},
		func(k *Kernel, ctx context.Context) (int, error) { all, err := k.CPUTables(ctx); return len(all), err },
		func(k *Kernel, ctx context.Context) (int, error) {
			all, err := k.ImpliedVCPUs(ctx)
			return len(all), err
		},
		func(k *Kernel, ctx context.Context) (int, error) {
			all, err := k.SyscallTables(ctx)
			return len(all), err
		},
		func(k *Kernel, ctx context.Context) (int, error) {
			all, err := k.Dispatchers(ctx)
			return len(all), err
		},
		func(k *Kernel, ctx context.Context) (int, error) {
			_, all, err := k.Interrupts(ctx, 0)
			return len(all), err
		},
		func(k *Kernel, ctx context.Context) (int, error) {
			first, err := k.symbol("init_task")
			if err != nil {
				return 0, err
			}
			_, _, err = k.TaskCreds(ctx, first)
			return 1, err
		},
	}
}

// TestDamagedModules: errors name what is damaged, and the other views go on.
func TestDamagedModules(t *testing.T) {
	for _, c := range []struct {
		name string
		view string
		do   func(t *testing.T, r *recorded, m []Module)
		want error
		lost int // modules of the view that are not found any more, at most
	}{
		{"list in a cycle", "list", func(t *testing.T, r *recorded, m []Module) {
			at := r.at(t, "module", "list")
			r.write(t, m[len(m)-2].Address+at, m[len(m)-3].Address+at)
		}, ErrCycle, 1},
		{"a name of junk", "list", func(t *testing.T, r *recorded, m []Module) {
			r.write(t, m[len(m)/2].Address+r.at(t, "module", "name"), 0x01020304)
		}, errAny, 1},
		{"a state of junk", "list", func(t *testing.T, r *recorded, m []Module) {
			r.write(t, m[len(m)/2].Address+r.at(t, "module", "state"), 0xdddddddd)
		}, errAny, 1},
		{"users in a cycle", "list", func(t *testing.T, r *recorded, m []Module) {
			for _, m := range m {
				if len(m.Users) > 1 {
					at := m.Address + r.at(t, "module", "source_list")
					first := r.word(t, at)
					r.write(t, first, first)
					return
				}
			}
			t.Fatal("no module has users")
		}, ErrCycle, 0},
		{"tree in a cycle", "tree", func(t *testing.T, r *recorded, m []Module) {
			root, err := r.symbol("mod_tree")
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range []string{"0", "1"} {
				top := r.word(t, root+r.at(t, "mod_tree_root", "root.tree["+i+"]"))
				r.write(t, r.word(t, top+16)+8, top) // to the right of what is left of it
			}
		}, ErrCycle, maxModules},
		{"sysfs leads to a program", "kset", func(t *testing.T, r *recorded, m []Module) {
			r.write(t, m[len(m)/2].Address+r.at(t, "module", "mkobj.kobj.entry"), 0x400000)
		}, ErrNotKernel, maxModules},
		{"sysfs names what is none", "kset", func(t *testing.T, r *recorded, m []Module) {
			r.write(t, m[len(m)/2].Address+r.at(t, "module", "mkobj.mod"), m[len(m)/2].Address+8)
		}, errAny, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := loadRecorded(t, "debian11")
			all, err := r.Modules(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			c.do(t, r, all)
			for name, list := range moduleViews(r) {
				found, err := list(t.Context())
				if name != c.view {
					if len(found) < len(all)-1 {
						t.Errorf("%s: %d of %d modules: %v", name, len(found), len(all), err)
					}
					continue
				}
				if object := new(ObjectError); !errors.As(err, &object) || c.want != errAny && !errors.Is(err, c.want) {
					t.Errorf("error %v, want %v", err, c.want)
				}
				if len(found) < len(all)-c.lost || len(found) > len(all) {
					t.Errorf("%d of %d modules", len(found), len(all))
				}
			}
		})
	}
}

// TestDamagedRunQueues: the same for run queues.
func TestDamagedRunQueues(t *testing.T) {
	for _, c := range []struct {
		name, path string
		value      func(t *testing.T, r *recorded, rq uint64) uint64
		want       error
	}{
		{"a running task that is none", "curr", func(t *testing.T, r *recorded, rq uint64) uint64 { return rq }, errAny},
		{"a running task of a program", "curr", func(t *testing.T, r *recorded, rq uint64) uint64 { return 0x5000 }, ErrNotKernel},
		{"no idle task", "idle", func(t *testing.T, r *recorded, rq uint64) uint64 { return 0 }, ErrNull},
		{"a list that does not return", "cfs_tasks.next", func(t *testing.T, r *recorded, rq uint64) uint64 { return rq + r.at(t, "rq", "rt.active.queue") }, ErrBackLink},
		{"a queue in itself", "rt.active.queue[50].next", func(t *testing.T, r *recorded, rq uint64) uint64 {
			other := rq + r.at(t, "rq", "rt.active.queue[51]")
			return other
		}, ErrCycle},
		{"a group in itself", "cfs.curr", func(t *testing.T, r *recorded, rq uint64) uint64 {
			// An entity whose own queue is the one that it is in.
			at := rq + r.at(t, "rq", "cfs.removed")
			r.write(t, at+r.at(t, "sched_entity", "my_q"), rq+r.at(t, "rq", "cfs"))
			return at
		}, ErrCycle},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := loadRecorded(t, "debian12")
			all, err := r.RunQueues(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			rq, err := r.PerCPU(t.Context(), "runqueues", 0)
			if err != nil {
				t.Fatal(err)
			}
			r.write(t, rq+r.at(t, "rq", c.path), c.value(t, r, rq))
			got, err := r.RunQueues(t.Context())
			if object := new(ObjectError); !errors.As(err, &object) || c.want != errAny && !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			if len(got) < len(all)-1 {
				t.Errorf("%d of %d: %+v", len(got), len(all), got)
			}
		})
	}
}

// TestModuleTypes finds the BTF of a module where the kernel keeps it.
func TestModuleTypes(t *testing.T) {
	base, err := ParseTypes(unpack(t, "debian12.btf.gz"), nil)
	if err != nil {
		t.Fatal(err)
	}
	own := uint32(len(base.graph.strings))
	list := base.graph.named("list_head")[0]
	split := rawBTF(u32(own, btfStruct<<24|1, 16, own+4, uint32(list), 0), []byte("mod\x00link\x00"))
	const (
		b         = flatBase
		here, two = 0x2800, 0x3800 // modules
	)
	memory := words(map[uint64]uint64{
		0: b + 0x100, 8: b + 0x200, // btf_modules
		0x100: b + 0x200, 0x108: b, 0x110: b + here, 0x118: b + 0x400,
		0x200: b, 0x208: b + 0x100, 0x210: b + two, 0x218: b + 0x600,
		0x400: b + 0x1000, 0x450: uint64(len(split)), // struct btf: data, data_size
		0x600: b + 0x1000, 0x650: 1 << 30,
	})
	copy(memory[0x1000:], split)
	copy(memory[here+24:], "the_mod\x00")
	k := flat(t, memory)
	k.Types = base
	if f, err := base.structField("btf", "data_size"); err != nil || f.Offset != 0x50 {
		t.Fatalf("%+v, %v", f, err)
	}
	var symbols symbolList
	symbols.add(Symbol{Name: "btf_modules", Address: b, Type: 'd'})
	k.Image = NewImage(symbols.symbols(true), 0)
	types, err := k.ModuleTypes(t.Context(), &Module{Name: "mod", Address: b + here})
	if err != nil {
		t.Fatal(err)
	}
	if f, err := types.structField("mod", "link.prev"); err != nil || f.Offset != 8 || f.Type() != "struct list_head *" {
		t.Errorf("%+v, %v", f, err)
	}
	if _, err := k.ModuleTypes(t.Context(), &Module{Name: "huge", Address: b + two}); !errors.Is(err, ErrBadTypes) {
		t.Errorf("BTF of 1 GiB: %v", err)
	}
	if _, err := k.ModuleTypes(t.Context(), &Module{Name: "other", Address: b + 0x2000}); !errors.Is(err, ErrNoTypes) {
		t.Errorf("a module without BTF: %v", err)
	}
	if types, module, err := k.FindTypes(t.Context(), "struct task_struct"); err != nil || types != k.Types || module != "" {
		t.Errorf("the kernel's: %v, %q, %v", types, module, err)
	}
	size, err := k.offset("module", "core_layout.size")
	if err != nil {
		t.Fatal(err)
	}
	at, err := k.offset("module", "core_layout.base")
	if err != nil {
		t.Fatal(err)
	}
	k.Space.Memory.(Pages).WritePhysical(0x100000+here+at, le(b))
	k.Space.Memory.(Pages).WritePhysical(0x100000+here+size, le(4096))
	if types, module, err := k.FindTypes(t.Context(), "mod"); err != nil || module != "the_mod" || types.Len() != 1 {
		t.Errorf("a module's: %v, %q, %v", types, module, err)
	}
	if types, _, err := k.FindTypes(t.Context(), "nothing"); types != nil || !errors.Is(err, ErrNoType) || !errors.Is(err, ErrBadTypes) {
		t.Errorf("nobody's, and one module is damaged: %v, %v", types, err)
	}
}
