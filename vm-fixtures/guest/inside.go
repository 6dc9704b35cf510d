// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

func lockThread() { runtime.LockOSThread() }

// Symbols is the guest's own symbol list (/proc/kallsyms).
func (g *Guest) Symbols(ctx context.Context) ([]byte, error) {
	return g.Read(ctx, "/proc/kallsyms")
}

// WriteSymbols stores the guest's own symbol list in a file.
func (g *Guest) WriteSymbols(ctx context.Context, name string) error {
	text, err := g.Symbols(ctx)
	if err != nil {
		return err
	}
	return os.WriteFile(name, text, 0o644)
}

// Exec runs a command inside; busybox knows most.
func (g *Guest) Exec(ctx context.Context, args ...string) (string, error) {
	p, err := g.Ask(ctx, agent.Request{Op: agent.OpExec, Args: args})
	return string(p.Data), err
}

// MSR reads a model-specific register by the guest's own driver.
func (g *Guest) MSR(ctx context.Context, cpu int, register uint32) (uint64, error) {
	p, err := g.Ask(ctx, agent.Request{Op: agent.OpMSR, CPU: cpu, Register: register})
	return p.Value, err
}

// Tasks are all threads there are in the guest, as its /proc has them.
func (g *Guest) Tasks(ctx context.Context) ([]agent.Task, error) {
	p, err := g.Ask(ctx, agent.Request{Op: agent.OpTasks})
	if err != nil {
		return nil, err
	}
	var all []agent.Task
	err = json.Unmarshal(p.Data, &all)
	return all, err
}

// Read is the content of one of the guest's files.
func (g *Guest) Read(ctx context.Context, name string) ([]byte, error) {
	p, err := g.Ask(ctx, agent.Request{Op: agent.OpRead, Path: name})
	return p.Data, err
}

// Write makes the content of one of the guest's files, which is created, data.
func (g *Guest) Write(ctx context.Context, name string, data []byte) error {
	_, err := g.Ask(ctx, agent.Request{Op: agent.OpWrite, Path: name, Data: data})
	return err
}

// Spin keeps the guest's first n CPUs busy in user mode; 0 ends that.
func (g *Guest) Spin(ctx context.Context, n int) error {
	_, err := g.Ask(ctx, agent.Request{Op: agent.OpSpin, Count: n})
	return err
}

// Change is one thing that an attack changed.
type Change struct {
	Object string `json:"object"` // "sys_call_table", "idt", "gdt", "lstar", "cr0", "cr4"
	CPU    int    `json:"cpu"`    // -1: the same on all
	Entry  int    `json:"entry"`  // -1: none
	Old    uint64 `json:"-"`      // a handler's address, a register, the first 8 bytes of a descriptor
	New    uint64 `json:"-"`
}

// parseChange reads what an attack says; ok is false for any other line.
func parseChange(line string) (c Change, ok bool, err error) {
	_, text, ok := strings.Cut(line, "attack: ")
	if !ok {
		return c, false, nil
	}
	said := struct {
		*Change
		Old, New string
	}{Change: &c}
	if err := json.Unmarshal([]byte(text), &said); err != nil {
		return c, true, err
	}
	if c.Old, err = strconv.ParseUint(said.Old, 0, 64); err != nil {
		return c, true, err
	}
	c.New, err = strconv.ParseUint(said.New, 0, 64)
	return c, true, err
}

// Attack loads an attack module, with parameters as insmod takes them, and
// returns what it says it changed.
func (g *Guest) Attack(ctx context.Context, name, params string) ([]Change, error) {
	p, err := g.Ask(ctx, agent.Request{Op: agent.OpInsmod, Path: path.Join(host.AttackDir, name+".ko"), Params: params})
	if err != nil {
		return nil, err
	}
	var changes []Change
	for _, line := range p.Log {
		c, ok, err := parseChange(line)
		if err != nil {
			return nil, fmt.Errorf("guest %s: %s says %q: %w", g.Name, name, line, err)
		}
		if ok {
			changes = append(changes, c)
		}
	}
	if len(changes) == 0 {
		return nil, fmt.Errorf("guest %s: %s loaded, but says nothing: %q", g.Name, name, p.Log)
	}
	return changes, nil
}

// EndAttack unloads an attack module, which restores what it changed.
func (g *Guest) EndAttack(ctx context.Context, name string) error {
	_, err := g.Ask(ctx, agent.Request{Op: agent.OpRmmod, Name: name})
	return err
}

// CPU is what the guest's own kernel sees of one of its processors.
type CPU struct {
	CPU         int    `json:"cpu"`
	GDTBase     uint64 `json:"gdt_base"`
	GDTLimit    uint16 `json:"gdt_limit"`
	IDTBase     uint64 `json:"idt_base"`
	IDTLimit    uint16 `json:"idt_limit"`
	CR0         uint64 `json:"cr0"`
	CR2         uint64 `json:"cr2"`
	CR3         uint64 `json:"cr3"`
	CR4         uint64 `json:"cr4"`
	CR8         uint64 `json:"cr8"`
	DR0         uint64 `json:"dr0"`
	DR1         uint64 `json:"dr1"`
	DR2         uint64 `json:"dr2"`
	DR3         uint64 `json:"dr3"`
	DR6         uint64 `json:"dr6"`
	DR7         uint64 `json:"dr7"`
	CS          uint16 `json:"cs"`
	DS          uint16 `json:"ds"`
	ES          uint16 `json:"es"`
	FS          uint16 `json:"fs"`
	GS          uint16 `json:"gs"`
	SS          uint16 `json:"ss"`
	TR          uint16 `json:"tr"`
	LDT         uint16 `json:"ldt"`
	EFER        uint64 `json:"efer"`
	STAR        uint64 `json:"star"`
	LSTAR       uint64 `json:"lstar"`
	CSTAR       uint64 `json:"cstar"`
	SFMASK      uint64 `json:"sfmask"`
	SysenterCS  uint64 `json:"sysenter_cs"`
	SysenterESP uint64 `json:"sysenter_esp"`
	SysenterEIP uint64 `json:"sysenter_eip"`
	FSBase      uint64 `json:"fs_base"`
	GSBase      uint64 `json:"gs_base"`
	KernelGS    uint64 `json:"kernel_gs_base"`
	PAT         uint64 `json:"pat"`
	GDT         Bytes  `json:"gdt"`
	IDT         Bytes  `json:"idt"`
}

// Bytes are written in JSON as hexadecimal digits.
type Bytes []byte

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(text []byte) (err error) {
	*b, err = hex.AppendDecode(nil, text)
	return err
}

// Pages is memory of known content: byte i is i*167 + 13.
type Pages struct {
	GVA  uint64 `json:"gva"`
	GPA  uint64 `json:"gpa"`
	Size uint64 `json:"size"` // bytes
	Hole uint64 `json:"hole"` // a kernel address that nothing is mapped at
}

// Content is what lies in the pages.
func (p Pages) Content() []byte {
	b := make([]byte, p.Size)
	for i := range b {
		b[i] = byte(i*167 + 13)
	}
	return b
}

const probeDir = "/sys/kernel/debug/probe"

// LoadProbe loads the module that CPUs, Pages, Hold and Poke need.
func (g *Guest) LoadProbe(ctx context.Context) error {
	if _, err := g.Exec(ctx, "/bin/busybox", "mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"); err != nil {
		return err
	}
	_, err := g.Ask(ctx, agent.Request{Op: agent.OpInsmod, Path: path.Join(host.AttackDir, "probe.ko")})
	return err
}

// CPUs returns what the guest's kernel sees of its processors now.
func (g *Guest) CPUs(ctx context.Context) ([]CPU, error) {
	p, err := g.Ask(ctx, agent.Request{Op: agent.OpRead, Path: probeDir + "/cpus"})
	if err != nil {
		return nil, err
	}
	var cpus []CPU
	for d := json.NewDecoder(bytes.NewReader(p.Data)); d.More(); {
		var c CPU
		if err := d.Decode(&c); err != nil {
			return nil, fmt.Errorf("guest %s: %w", g.Name, err)
		}
		cpus = append(cpus, c)
	}
	return cpus, nil
}

// Pages returns where in the guest memory of known content lies.
func (g *Guest) Pages(ctx context.Context) (Pages, error) {
	p, err := g.Ask(ctx, agent.Request{Op: agent.OpRead, Path: probeDir + "/memory"})
	if err != nil {
		return Pages{}, err
	}
	var pages Pages
	err = json.Unmarshal(p.Data, &pages)
	return pages, err
}

// Hold lets a kernel thread spin on a CPU with R8 to R15 holding their
// number's last digit sixteen times over; -1 ends that.
func (g *Guest) Hold(ctx context.Context, cpu int) error {
	_, err := g.Ask(ctx, agent.Request{Op: agent.OpWrite, Path: probeDir + "/hold", Data: []byte(strconv.Itoa(cpu))})
	return err
}

// Poke lets the guest's kernel overwrite its own memory, write-protected or
// not, which must be mapped.
func (g *Guest) Poke(ctx context.Context, gva uint64, data []byte) error {
	return g.Write(ctx, probeDir+"/poke", append(binary.LittleEndian.AppendUint64(nil, gva), data...))
}
