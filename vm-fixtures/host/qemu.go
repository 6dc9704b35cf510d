// SPDX-License-Identifier: MIT

package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// qemu has AMD's processors.
type qemu struct{}

// qemuSuite is the suite whose QEMU emulates all hosts, whatever theirs is.
const qemuSuite = "trixie"

// timerArgs: the timer of a host that others keep busy is late, which Linux
// takes for a broken one.
const timerArgs = "no_timer_check"

// qemuMemory is what hosts have unless they are to have another size, in MiB.
const qemuMemory = 2560

func (qemu) machine(ctx context.Context, dir string, root *cache.Root, c Config) (*machine, error) {
	memory := c.Memory
	if memory == 0 {
		memory = qemuMemory
	}
	cpu := c.CPU
	if cpu == "" {
		cpu = DefaultCPU
	}
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "pc", "-cpu", cpu, "-m", strconv.Itoa(memory)}
	if c.Icount {
		args = append(args, "-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1")
	} else {
		args = append(args, "-accel", "tcg,thread=multi", "-smp", strconv.Itoa(c.CPUs))
	}
	args = append(args, "-d", "cpu_reset", "-D", filepath.Join(dir, resetsName))
	disk := func(name, file string) []string {
		return []string{
			"-drive", "if=none,format=raw,readonly=on,id=" + name + ",file=" + file,
			"-device", "virtio-blk-pci,drive=" + name + ",serial=" + name,
		}
	}
	args = append(args, disk(rootDisk, root.Image())...)
	args = append(args, disk(payloadDisk, filepath.Join(dir, payloadName))...)
	args = append(args,
		"-kernel", root.Vmlinuz(), "-initrd", filepath.Join(dir, initramfsName), "-append", kernelLine(c, timerArgs),
		"-serial", "file:"+filepath.Join(dir, consoleName),
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=host,path="+filepath.Join(dir, portName),
		"-device", "virtserialport,chardev=host,name="+Port,
	)
	q, err := OpenQEMU(ctx, c.Log)
	if err != nil {
		return nil, err
	}
	return &machine{cmd: q.Command(ctx, args...), held: q}, nil
}

// QEMU is the one in the cache, which runs on any machine.
type QEMU struct {
	root *cache.Root
	tree string
}

// OpenQEMU opens it, and makes it if it is not there.
func OpenQEMU(ctx context.Context, log *slog.Logger) (*QEMU, error) {
	root, tree, err := openTree(ctx, qemuSuite, log)
	if err != nil {
		return nil, err
	}
	return &QEMU{root, tree}, nil
}

// Command runs it with its own files.
func (q *QEMU) Command(ctx context.Context, args ...string) *exec.Cmd {
	args = slices.Concat([]string{"-L", filepath.Join(q.tree, "usr/share/qemu"), "-L", filepath.Join(q.tree, "usr/share/seabios")}, args)
	args = program(q.tree, "usr/bin/qemu-system-x86_64", args...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "QEMU_MODULE_DIR="+filepath.Join(q.tree, libraries, "qemu"))
	return cmd
}

// Close lets others make it anew.
func (q *QEMU) Close() error { return q.root.Close() }

// QEMUVersion is what the QEMU that emulates hosts says it is.
func QEMUVersion(ctx context.Context, log *slog.Logger) (string, error) {
	home, tree, err := openTree(ctx, qemuSuite, log)
	if err != nil {
		return "", err
	}
	defer home.Close()
	args := program(tree, "usr/bin/qemu-system-x86_64", "--version")
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", quote(args), err)
	}
	version, _, _ := strings.Cut(string(out), "\n")
	return version, nil
}

// openTree opens the root of a suite and returns it unpacked as well.
func openTree(ctx context.Context, name string, log *slog.Logger) (*cache.Root, string, error) {
	suite, err := cache.SuiteNamed(name)
	if err != nil {
		return nil, "", err
	}
	root, err := cache.Open(ctx, suite, log)
	if err != nil {
		return nil, "", err
	}
	tree, err := root.Tree(ctx)
	if err != nil {
		return nil, "", errors.Join(err, root.Close())
	}
	return root, tree, nil
}
