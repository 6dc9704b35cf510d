// SPDX-License-Identifier: MIT

package guest

// Types are the C types of a kernel.
type Types struct{}
