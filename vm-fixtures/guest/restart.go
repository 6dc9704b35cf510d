// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/agent"
	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
)

// Reset lets the guest's machine begin anew, as its reset button does, and
// returns while it boots. Booted waits until it has.
func (g *Guest) Reset(ctx context.Context) error {
	if _, err := g.QMP(ctx, "set-action", map[string]string{"reboot": "reset"}); err != nil {
		return err
	}
	for _, command := range []string{"stop", "system_reset", "cont"} {
		if _, err := g.QMP(ctx, command, nil); err != nil {
			return err
		}
	}
	return nil
}

// Kexec lets the guest's kernel boot the suite's own one, with the same command
// line and more, and returns once the new one's agent serves.
func (g *Guest) Kexec(ctx context.Context, more string) error {
	const kernel, initrd = "/vmlinuz", "/initramfs.cpio"
	for to, from := range map[string]string{kernel: host.GuestKernel, initrd: host.GuestInitramfs} {
		content, err := os.ReadFile(filepath.Join(os.Getenv(host.Env), from))
		if err != nil {
			return err
		}
		if err := g.Write(ctx, to, content); err != nil {
			return err
		}
	}
	line, err := g.Read(ctx, "/proc/cmdline")
	if err != nil {
		return err
	}
	boots := g.boots()
	g.mu.Lock()
	defer g.mu.Unlock()
	request, err := json.Marshal(agent.Request{Op: agent.OpKexec, Path: kernel, Initrd: initrd, Params: strings.TrimSpace(string(line)) + " " + more})
	if err != nil {
		return err
	}
	if _, err := g.conn.Write(append(request, '\n')); err != nil {
		return err
	}
	defer g.conn.SetReadDeadline(time.Time{})
	for g.boots() == boots {
		// The agent answers only if it failed.
		if err := g.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			return err
		}
		answer, err := g.reply.ReadString('\n')
		if err == nil {
			return fmt.Errorf("guest %s: kexec: %s", g.Name, strings.TrimSpace(answer))
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return g.failed(err)
		}
		if ctx.Err() != nil {
			return g.failed(ctx.Err())
		}
	}
	return nil
}

// boots counts how often the guest's agent began to serve.
func (g *Guest) boots() int { return strings.Count(g.Console(), agent.Serves) }

// Booted waits until the guest's agent has begun to serve n times, the first
// boot included, and answers.
func (g *Guest) Booted(ctx context.Context, n int) error {
	for g.boots() < n {
		select {
		case <-g.exit:
			return g.failed(errors.New("QEMU ended"))
		case <-ctx.Done():
			return g.failed(ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
	return g.Up(ctx)
}
