// SPDX-License-Identifier: MIT

package tinyvm

import "testing"

// The numbers carry the sizes of the structures; they are what a C program
// that includes linux/kvm.h has.
func TestRequests(t *testing.T) {
	for _, tt := range []struct {
		r    request
		want uintptr
	}{
		{createVM, 0xae01},
		{getSupportedCPUID, 0xc008ae05},
		{setMemoryRegion, 0x4020ae46},
		{setIdentityMap, 0x4008ae48},
		{run, 0xae80},
		{getRegs, 0x8090ae81},
		{setRegs, 0x4090ae82},
		{getSRegs, 0x8138ae83},
		{setSRegs, 0x4138ae84},
		{getMSRs, 0xc008ae88},
		{setMSRs, 0x4008ae89},
		{setCPUID, 0x4008ae90},
		{setMPState, 0x4004ae99},
		{getVCPUEvents, 0x8040ae9f},
		{setVCPUEvents, 0x4040aea0},
		{getDebugRegs, 0x8080aea1},
		{setDebugRegs, 0x4080aea2},
		{signalMSI, 0x4020aea5},
		{raiseSMI, 0xaeb7},
	} {
		if tt.r.nr != tt.want {
			t.Errorf("%s is %#x, want %#x", tt.r.name, tt.r.nr, tt.want)
		}
	}
}
