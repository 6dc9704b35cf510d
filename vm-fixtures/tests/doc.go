// SPDX-License-Identifier: MIT

// Package tests holds what can only be tested on a KVM host with running
// guests: the module, and all that stands on it. Its tests have the build tag
// kvmhost and run under "vmfixture run", or "vmfixture here" where the machine
// is a KVM host itself.
package tests
