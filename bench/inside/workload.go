// SPDX-License-Identifier: MIT

package inside

import (
	"context"
	"fmt"
	"time"

	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// Work lets a guest work, copying and digesting mib MiB by two programs and a
// pipe between them, and returns how long it took.
func Work(ctx context.Context, g *fixture.Guest, mib int) (time.Duration, error) {
	start, err := Monotonic()
	if err != nil {
		return 0, err
	}
	out, err := g.Exec(ctx, "/bin/busybox", "sh", "-c", fmt.Sprintf("/bin/busybox dd if=/dev/zero bs=64k count=%d 2>/dev/null | /bin/busybox md5sum", 16*mib))
	if err != nil {
		return 0, fmt.Errorf("%w: %s", err, out)
	}
	end, err := Monotonic()
	return end - start, err
}
