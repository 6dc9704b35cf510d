// SPDX-License-Identifier: MIT

package kvmaccess_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// List the VMs of this host and where each vCPU's system calls go.
func Example() {
	c, err := kvmaccess.New()
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	ctx := context.Background()
	vms, err := c.VMs(ctx)
	if err != nil {
		log.Fatal(err)
	}
	for _, vm := range vms {
		vcpus, err := c.VCPUs(ctx, vm.ID)
		if errors.Is(err, kvmaccess.ErrNoVM) || errors.Is(err, kvmaccess.ErrDying) {
			continue // it ended meanwhile
		}
		if err != nil {
			log.Fatal(err)
		}
		for _, vcpu := range vcpus {
			fmt.Printf("vm %d, vcpu %d: LSTAR %#x\n", vm.ID, vcpu.ID, vcpu.LSTAR)
		}
	}
}
