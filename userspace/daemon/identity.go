// SPDX-License-Identifier: MIT

package daemon

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// identity tells a VM from all others through restarts of the daemon and of
// the module. A VM that is started again is another one: its VMM is another
// process.
type identity struct {
	Boot  string `json:"boot"` // of the host: /proc/sys/kernel/random/boot_id
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // of the VMM, clock ticks after boot
	// Index counts the VMs of one VMM, by id; nearly always 0.
	Index int    `json:"index"`
	Name  string `json:"name"`
	UUID  string `json:"uuid"`
}

// key is the identity as one string.
func (i identity) key() string {
	return fmt.Sprintf("%s/%d/%d/%d/%s/%s", i.Boot, i.PID, i.Start, i.Index, i.UUID, i.Name)
}

// alive says whether the VMM still runs.
func (i identity) alive(boot string, identify func(int) (kvmaccess.VMM, error)) bool {
	if i.Boot != boot {
		return false
	}
	vmm, err := identify(i.PID)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	return vmm.Start == i.Start
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("which boot of the host this is: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
