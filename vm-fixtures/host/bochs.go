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
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// bochs has the processors of Intel that QEMU's emulation has not.
type bochs struct{}

const (
	// bochsSuite is the suite whose Bochs is used: 3.0 of trixie takes two
	// thirds of the time that 2.7 of bookworm does. Kernels do not come up
	// under 3.1 of sid: divide errors in the arithmetic of their clocks.
	bochsSuite = "trixie"
	// bochsCPU is the newest of Bochs' models that all kernels boot on.
	bochsCPU = "corei7_skylake_x"
	// bochsMHz is how many instructions make a microsecond of the host's
	// time. The kernel is told that its time stamp counter, which counts
	// instructions, has this frequency: it would believe in the gigahertz of
	// the model's name otherwise, and a second of idling or of a timeout
	// would take that many instructions.
	bochsMHz = 100
	// bochsMemory is all that this Bochs can have, in MiB.
	bochsMemory = 2048
)

// bochsLine is what a kernel is told so that it gets along with Bochs.
var bochsLine = []string{
	portArg + "/dev/ttyS1",
	fmt.Sprintf("tsc_early_khz=%d", bochsMHz*1000), "tsc=reliable",
	"kvm_intel.enable_apicv=0", // it wants a whole page for a posted-interrupt descriptor
	"noxsave",                  // its XSAVE makes 6.1 warn and 7.2 crash at boot
	"nokaslr",                  // random numbers take long to come by
	"mitigations=off",          // for speed, as
	"cryptomgr.notests",        // this, which is 700 million instructions
	"idle=halt",                // an idle CPU need not watch memory
	"reboot=t",                 // a restart is a triple fault, which ends Bochs
}

func (bochs) machine(ctx context.Context, dir string, root *cache.Root, c Config) (_ *machine, err error) {
	if c.Icount {
		return nil, errors.New("Bochs counts instructions anyway: leave out --icount")
	}
	memory := c.Memory
	if memory == 0 {
		memory = bochsMemory
	}
	if memory > bochsMemory {
		return nil, fmt.Errorf("%d MiB of memory: Bochs has at most %d", memory, bochsMemory)
	}
	tools, tree, err := openTree(ctx, bochsSuite, c.Log)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			tools.Close()
		}
	}()

	iso := filepath.Join(dir, "boot.iso")
	if err := bootISO(ctx, tree, iso, filepath.Join(dir, "iso"), root.Vmlinuz(), filepath.Join(dir, initramfsName), kernelLine(c, bochsLine...)); err != nil {
		return nil, err
	}
	cpu := c.CPU
	if cpu == "" {
		cpu = bochsCPU
	}
	share := filepath.Join(tree, "usr/share")
	rc := []string{
		"config_interface: textconfig",
		"display_library: term",
		"romimage: file=" + filepath.Join(share, "bochs/BIOS-bochs-latest"),
		"vgaromimage: file=" + filepath.Join(share, "vgabios/vgabios.bin"),
		fmt.Sprintf("megs: %d", memory),
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
	rcFile := filepath.Join(dir, "bochsrc")
	if err := os.WriteFile(rcFile, []byte(strings.Join(rc, "\n")+"\n"), 0o644); err != nil {
		return nil, err
	}
	// Debian's Bochs starts in its debugger, and ends there: continue, quit.
	debugger := filepath.Join(dir, "debugger")
	if err := os.WriteFile(debugger, []byte("c\nq\n"), 0o644); err != nil {
		return nil, err
	}
	args := program(tree, "usr/bin/bochs-bin", "-q", "-f", rcFile, "-rc", debugger)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	// Its display wants a terminal to draw on; to read from, none: it would
	// wait there for a millisecond whenever the host's CPUs are idle.
	terminal, err := openTerminal(filepath.Join(dir, "screen"))
	if err != nil {
		return nil, err
	}
	cmd.Stdout = terminal
	cmd.Env = append(os.Environ(),
		"LTDL_LIBRARY_PATH="+filepath.Join(tree, libraries, "bochs/plugins"),
		"BXSHARE="+filepath.Join(share, "bochs"),
		"TERMINFO_DIRS="+filepath.Join(share, "terminfo"), "TERM=xterm")
	return &machine{cmd: cmd, anyExit: true, given: terminal, held: tools}, nil
}

// libraries are where a root has them.
const libraries = "usr/lib/x86_64-linux-gnu"

// program is the command line that runs a program of an unpacked root with
// that root's libraries.
func program(tree, name string, args ...string) []string {
	lib := filepath.Join(tree, libraries)
	return slices.Concat([]string{filepath.Join(lib, "ld-linux-x86-64.so.2"), "--library-path", lib, filepath.Join(tree, name)}, args)
}

// bochsDisk is a disk of the host that knows its name, and whose file is
// left alone.
func bochsDisk(at, name, file, dir string) string {
	return fmt.Sprintf("%s: type=disk, path=%s, mode=volatile, journal=%s, model=%s", at, file, filepath.Join(dir, name+".journal"), name)
}

// bootISO makes a compact disc that boots a kernel.
func bootISO(ctx context.Context, tree, name, dir, kernel, initrd, line string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for to, from := range map[string]string{
		"isolinux.bin": filepath.Join(tree, "usr/lib/ISOLINUX/isolinux.bin"),
		"ldlinux.c32":  filepath.Join(tree, "usr/lib/syslinux/modules/bios/ldlinux.c32"),
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
	args := program(tree, "usr/bin/xorriso", "-as", "mkisofs", "-quiet", "-o", name,
		"-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", dir)
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
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
