// SPDX-License-Identifier: MIT

package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/cache"
)

// Here runs the command on this very machine, with the payload that an
// emulated host would be given, and returns its exit code. The machine must
// be able to load Config.Module and to run guests: the command finds out.
func Here(ctx context.Context, c Config) (code int, err error) {
	if c.Module == "" {
		return 0, errors.New("which kvmaccess.ko to use is not said: 'make kmod' builds one for this kernel")
	}
	suite, err := cache.SuiteNamed(c.Suite)
	if err != nil {
		return 0, err
	}
	root, err := cache.Open(ctx, suite, c.Log)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	dir, err := os.MkdirTemp("", "kvmaccess-here-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := stage(ctx, dir, root, c); err != nil {
		return 0, err
	}
	out := c.Out
	if out == "" {
		out = filepath.Join(dir, "out")
	}
	if out, err = filepath.Abs(out); err != nil {
		return 0, err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return 0, err
	}

	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	if err := os.Setenv("PATH", Path(dir)); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	cmd.Env = append(append(os.Environ(), Env+"="+dir, OutEnv+"="+out), c.Env...)
	cmd.Stdout, cmd.Stderr = c.Stdout, c.Stderr
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", c.Args[0], errors.Join(err, ctx.Err()))
	}
	return 0, nil
}
