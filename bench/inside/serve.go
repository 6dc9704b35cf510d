// SPDX-License-Identifier: MIT

package inside

import (
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/boot"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// Line is a line of JSON that Serve writes: a sign of life or, the last of all,
// the result.
type Line struct {
	At     string          `json:"at,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// OnHost reports whether this program runs on a host that vmfixture booted.
func OnHost() bool { return os.Getenv(host.Env) != "" }

// LoadModule loads the module that the host was given.
func LoadModule() error {
	return boot.LoadModule(filepath.Join(os.Getenv(host.Env), host.ModuleFile), "")
}

// Serve measures on this very host and writes the result to standard output for
// outside.Measure. The measurement says alive now and then, or it is taken for
// one that stands still.
func Serve[T any](measure func(alive func(at string)) (T, error)) error {
	out := json.NewEncoder(os.Stdout)
	var failed error
	result, err := measure(func(at string) {
		if err := out.Encode(Line{At: at}); err != nil && failed == nil {
			failed = err
		}
	})
	if err != nil {
		return err
	}
	if failed != nil {
		return failed
	}
	text, err := json.Marshal(result)
	if err != nil {
		return err
	}
	return out.Encode(Line{Result: text})
}
