// SPDX-License-Identifier: MIT

package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// bochs has the processors of Intel that QEMU's emulation has not.
type bochs struct{}

const (
	// bochsCPU is the newest of Bochs' models that all kernels boot on.
	bochsCPU = "corei7_skylake_x"
	// bochsMHz is how many instructions make a microsecond of the host's
	// time. The kernel is told that its time stamp counter, which counts
	// instructions, has this frequency: it would believe in the gigahertz of
	// the model's name otherwise, and a second of idling or of a timeout
	// would take that many instructions.
	bochsMHz = 100
)

func (bochs) machine(ctx context.Context, dir string, root *cache.Root, c Config) (*machine, error) {
	if c.Icount {
		return nil, errors.New("Bochs counts instructions anyway: leave out --icount")
	}
	iso := filepath.Join(dir, "boot.iso")
	if err := bootISO(ctx, iso, filepath.Join(dir, "iso"), root.Vmlinuz(), filepath.Join(dir, initramfsName), kernelLine(c,
		portArg+"/dev/ttyS1",
		fmt.Sprintf("tsc_early_khz=%d", bochsMHz*1000), "tsc=reliable",
		"nokaslr", "mitigations=off", "noxsave", "reboot=t")); err != nil {
		return nil, err
	}
	cpu := c.CPU
	if cpu == "" {
		cpu = bochsCPU
	}
	rc := []string{
		"config_interface: textconfig",
		"display_library: term",
		"romimage: file=/usr/share/bochs/BIOS-bochs-latest",
		"vgaromimage: file=/usr/share/vgabios/vgabios.bin",
		fmt.Sprintf("megs: %d", c.Memory),
		fmt.Sprintf("cpu: model=%s, count=%d, ips=%d, reset_on_triple_fault=0", cpu, c.CPUs, bochsMHz*1_000_000),
		"clock: sync=none",
		"ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
		"ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15",
		bochsDisk("ata0-master", rootDisk, root.Image(), dir),
		bochsDisk("ata0-slave", payloadDisk, filepath.Join(dir, payloadName), dir),
		"ata1-master: type=cdrom, path=" + iso + ", status=inserted",
		"boot: cdrom",
		"com1: enabled=1, mode=file, dev=" + filepath.Join(dir, consoleName),
		"com2: enabled=1, mode=file, dev=" + filepath.Join(dir, portName),
		"log: " + filepath.Join(dir, "bochs.log"),
		"panic: action=fatal", "error: action=ignore", "info: action=ignore", "debug: action=ignore",
		"sound: waveoutdrv=dummy",
		"speaker: enabled=0",
	}
	if err := os.WriteFile(filepath.Join(dir, "bochsrc"), []byte(strings.Join(rc, "\n")+"\n"), 0o644); err != nil {
		return nil, err
	}
	// Debian's Bochs starts in its debugger: continue.
	if err := os.WriteFile(filepath.Join(dir, "continue"), []byte("c\n"), 0o644); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "bochs", "-q", "-f", filepath.Join(dir, "bochsrc"), "-rc", filepath.Join(dir, "continue"))
	// Its display wants a terminal.
	terminal, err := openTerminal(filepath.Join(dir, "screen"))
	if err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout = terminal, terminal
	cmd.Env = append(os.Environ(), "TERM=xterm")
	return &machine{cmd: cmd, anyExit: true, owned: terminal}, nil
}

// bochsDisk is a disk of the host that knows its name, and whose file is
// left alone.
func bochsDisk(at, name, file, dir string) string {
	return fmt.Sprintf("%s: type=disk, path=%s, mode=volatile, journal=%s, model=%s", at, file, filepath.Join(dir, name+".journal"), name)
}

// bootISO makes a compact disc that boots a kernel.
func bootISO(ctx context.Context, name, dir, kernel, initrd, line string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for to, from := range map[string]string{
		"isolinux.bin": "/usr/lib/ISOLINUX/isolinux.bin",
		"ldlinux.c32":  "/usr/lib/syslinux/modules/bios/ldlinux.c32",
		"vmlinuz":      kernel,
		"initrd":       initrd,
	} {
		if err := CopyFile(filepath.Join(dir, to), from); err != nil {
			return err
		}
	}
	config := "DEFAULT host\nPROMPT 0\nLABEL host\nKERNEL vmlinuz\nINITRD initrd\nAPPEND " + line + "\n"
	if err := os.WriteFile(filepath.Join(dir, "isolinux.cfg"), []byte(config), 0o644); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "xorriso", "-as", "mkisofs", "-quiet", "-o", name,
		"-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("xorriso: %w: %s", err, out)
	}
	return os.RemoveAll(dir)
}

// openTerminal returns one end of a pseudo-terminal; what is written to it goes
// to a file.
func openTerminal(file string) (*os.File, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	n, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 25, Col: 80})
	}
	if err != nil {
		return nil, errors.Join(err, master.Close())
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, errors.Join(err, master.Close())
	}
	out, err := os.Create(file)
	if err != nil {
		return nil, errors.Join(err, slave.Close(), master.Close())
	}
	go func() {
		io.Copy(out, master) // until the last of the other end is closed
		out.Close()
		master.Close()
	}()
	return slave, nil
}
