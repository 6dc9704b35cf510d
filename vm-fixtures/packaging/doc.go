// SPDX-License-Identifier: MIT

// Package packaging tests how KvmAccess gets onto a host: what the module
// needs of a kernel, DKMS, "make install". Its tests with the build tag
// packaging install DKMS and systemd into a copy of a suite's root and use
// them there ("make test-dkms").
package packaging
