// SPDX-License-Identifier: MIT

package host

import "path/filepath"

// InstallDir is the directory of a payload with what "make install" needs
// besides the programs and the module, as it lies in the checkout.
const InstallDir = "install"

var installFiles = []string{
	"Makefile", "kmod/dkms.sh", "kmod/modules-load.conf",
	"userspace/cmd/kvmaccessd/kvmaccessd.service",
}

// stageInstall fills InstallDir of the payload in dir from the checkout top.
func stageInstall(dir, top string) error {
	for _, name := range installFiles {
		if err := CopyFile(filepath.Join(dir, InstallDir, name), filepath.Join(top, name)); err != nil {
			return err
		}
	}
	return nil
}
