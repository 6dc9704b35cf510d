// SPDX-License-Identifier: MIT

package host

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// loadKVM loads the KVM module of this machine's processor.
func loadKVM() error {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	flags := strings.Fields(string(text))
	for flag, module := range map[string]string{"svm": "kvm_amd", "vmx": "kvm_intel"} {
		if slices.Contains(flags, flag) {
			if out, err := exec.Command("modprobe", module).CombinedOutput(); err != nil {
				return fmt.Errorf("modprobe %s: %w: %s", module, err, out)
			}
			return nil
		}
	}
	return errors.New("the processor has neither svm nor vmx")
}
