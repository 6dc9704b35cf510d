// SPDX-License-Identifier: MIT

package inside

import (
	"encoding/json"
	"errors"
	"io"
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

// warm reads the programs that the host was given, so that none of their pages is
// fetched amid a measurement: to wait for a disk takes as long as the machine
// that emulates it does, and until the next timer by the clock of a host that
// idles meanwhile.
func warm() error {
	files, err := os.ReadDir(os.Getenv(host.Env))
	if err != nil {
		return err
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
			continue
		}
		program, err := os.Open(filepath.Join(os.Getenv(host.Env), f.Name()))
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, program)
		if err := errors.Join(err, program.Close()); err != nil {
			return err
		}
	}
	return nil
}

// Serve measures on this very host and writes the result to standard output for
// outside.Measure. The measurement says alive now and then, or it is taken for
// one that stands still.
func Serve[T any](measure func(alive func(at string)) (T, error)) error {
	out := json.NewEncoder(os.Stdout)
	if err := warm(); err != nil {
		return err
	}
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
