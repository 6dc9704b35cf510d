// SPDX-License-Identifier: MIT

// Package outside has samples taken on emulated hosts.
package outside

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

const module = "github.com/kvmaccess/kvmaccess"

// programs are what a run needs, by package.
var programs = []string{
	module + "/vm-fixtures/cmd/vmfixture",
	module + "/userspace/cmd/kvmaccess",
	module + "/userspace/cmd/kvmaccessd",
	module + "/bench/cmd/benchinside",
	module + "/bench/cmd/benchcapture",
	module + "/bench/cmd/benchattach",
	module + "/bench/cmd/benchwatch",
	module + "/bench/cmd/benchscale",
	module + "/bench/cmd/benchpeers",
}

// Build builds the programs of a run into a directory, statically: they run in
// an emulated host, too. The working directory is in the checkout.
func Build(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-o", dir + string(filepath.Separator)}, programs...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out.Bytes())
	}
	return nil
}
