// SPDX-License-Identifier: MIT

// Package integrity finds out from outside whether a guest's kernel is as it
// was and as an honest kernel is.
package integrity

// Check watches one kind of object of a guest.
type Check interface {
	// Name is what findings call the check.
	Name() string
}

// Item is one watched entry of an object.
type Item struct{}

// Checks returns all checks.
func Checks() []Check { return nil }
