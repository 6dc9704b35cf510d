// SPDX-License-Identifier: MIT

package agent

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// kexec boots a kernel out of files, in place of the running one. It returns
// only if that fails.
func kexec(kernel, initrd, line string) error {
	k, err := os.Open(kernel)
	if err != nil {
		return err
	}
	i, err := os.Open(initrd)
	if err != nil {
		return errors.Join(err, k.Close())
	}
	err = unix.KexecFileLoad(int(k.Fd()), int(i.Fd()), line, 0)
	if err := errors.Join(err, k.Close(), i.Close()); err != nil {
		return os.NewSyscallError("kexec_file_load", err)
	}
	return os.NewSyscallError("reboot", unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC))
}
