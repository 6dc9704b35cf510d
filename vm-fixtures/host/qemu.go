// SPDX-License-Identifier: MIT

package host

import (
	"context"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// qemu has AMD's processors.
type qemu struct{}

func (qemu) machine(ctx context.Context, dir string, root *cache.Root, c Config) (*machine, error) {
	cpu := c.CPU
	if cpu == "" {
		cpu = DefaultCPU
	}
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "pc", "-cpu", cpu, "-m", strconv.Itoa(c.Memory)}
	if c.Icount {
		args = append(args, "-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1")
	} else {
		args = append(args, "-accel", "tcg,thread=multi", "-smp", strconv.Itoa(c.CPUs))
	}
	disk := func(name, file string) []string {
		return []string{
			"-drive", "if=none,format=raw,readonly=on,id=" + name + ",file=" + file,
			"-device", "virtio-blk-pci,drive=" + name + ",serial=" + name,
		}
	}
	args = append(args, disk(rootDisk, root.Image())...)
	args = append(args, disk(payloadDisk, filepath.Join(dir, payloadName))...)
	args = append(args,
		"-kernel", root.Vmlinuz(), "-initrd", filepath.Join(dir, initramfsName), "-append", kernelLine(c),
		"-serial", "file:"+filepath.Join(dir, consoleName),
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=host,path="+filepath.Join(dir, portName),
		"-device", "virtserialport,chardev=host,name="+Port,
	)
	return &machine{cmd: exec.CommandContext(ctx, "qemu-system-x86_64", args...)}, nil
}
