// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// CodeAccount is how a guest's kernel code and read-only data are compared.
type CodeAccount struct {
	Pass     time.Duration `json:"pass"`             // in which all is compared once, ns; 0: it is not
	Bytes    uint64        `json:"bytes"`            // of it
	Budget   int           `json:"budget"`           // bytes in a tick
	Passes   uint64        `json:"passes"`           // so far
	Compared uint64        `json:"compared"`         // bytes so far
	Ticks    uint64        `json:"ticks"`            //
	Time     time.Duration `json:"time"`             // of them, ns
	Looks    uint64        `json:"looks"`            // of the daemon at all of it
	Reason   string        `json:"reason,omitempty"` // why it is not compared
}

// codePart is how many ticks a pass over the code takes: a tick is short then,
// and what is between ticks is less than what a pass promises.
const codePart = 100

// codeShare is what of the time the daemon looks at a kernel's code at most, one
// part in this many: a guest can have it looked at anew as often as it likes.
const codeShare = 20

// codeWatch has the module compare a kernel's code, by digests, in a watch of
// its own: so the other one's ticks stay short.
type codeWatch struct {
	guard    *guard
	digester *kvmaccess.Digester
	key      kvmaccess.WatchKey

	// For the keeper's goroutine.
	due       bool      // to be looked at
	notBefore time.Time // then
	unwatched bool      // its page tables are not compared
	list      []integrity.WatchItem
	fresh     bool   // it is not programmed yet
	bytes     uint64 // of its digests
	look      *codeLook
	done      chan error // receives when a look has ended

	mu     sync.Mutex
	pass   time.Duration
	looks  uint64
	reason string
}

func newCodeWatch(w *watches, vm kvmaccess.VMID, log *slog.Logger) *codeWatch {
	c := &codeWatch{guard: newGuard(w, vm, log), due: true, done: make(chan error, 1)}
	_, _ = rand.Read(c.key[:]) // never fails
	c.digester = kvmaccess.NewDigester(c.key)
	return c
}

// close ends the watch, and a look that goes on.
func (c *codeWatch) close() {
	if c.look != nil {
		c.look.cancel()
		<-c.done
		c.look = nil
	}
	c.guard.close()
	c.list, c.due, c.notBefore = nil, true, time.Time{}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pass = 0
}

// told takes what the module says of the code.
func (c *codeWatch) told(log *slog.Logger) {
	events, lost := c.guard.box.take()
	c.due = c.due || lost
	for _, e := range events {
		log.Debug("event", "of", c.guard.what(e), "gpa", e.GPA, "state", e.State, "tick", e.Tick)
		switch e.State {
		case kvmaccess.StateDifferent:
			c.due = true
		case kvmaccess.StateEnded:
			c.due, c.guard.stale = true, true
		}
		// What the host has not in place was compared before and is again when
		// it is there. To read it would bring it back.
	}
}

// say says in what time all code is compared, or why it is not.
func (c *codeWatch) say(log *slog.Logger, pass time.Duration, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if reason != c.reason && reason != "" {
		log.Info(reason)
	}
	c.pass, c.reason = pass, reason
}

// account is how the code is compared, out of the accounts of all watches.
func (c *codeWatch) account(all []kvmaccess.WatchStats) *CodeAccount {
	c.guard.mu.Lock()
	ids, past := c.guard.ids, c.guard.past
	c.guard.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	a := &CodeAccount{Pass: c.pass, Looks: c.looks, Reason: c.reason, Ticks: past.Ticks, Time: past.Time, Passes: past.Passes, Compared: past.Compared}
	for _, id := range ids {
		if s, ok := sameWatch(all, id); ok {
			a.Bytes += s.Digested
			a.Budget += s.Budget
			a.Passes += s.Passes
			a.Compared += s.Compared
			a.Ticks += s.Ticks
			a.Time += s.Time
		}
	}
	return a
}

// codePass is in what time all code of the guest is to be compared once; 0: not
// at all.
func (k *keeper) codePass() time.Duration {
	if k.budget != nil {
		return k.budget.chosen().Text
	}
	return k.text
}

// next is when the code is to be looked at; zero: it is not.
func (c *codeWatch) next() time.Time {
	if !c.due || c.look != nil {
		return time.Time{}
	}
	return c.notBefore
}

// codeLook is a look at the code that goes on.
type codeLook struct {
	*integrity.TextLook
	cancel context.CancelFunc
	begin  time.Time
}

// lookAtCode begins to look at the kernel's code if that is due. What is watched
// beside it does not wait for that.
func (k *keeper) lookAtCode(ctx context.Context) outcome {
	c := k.code
	if k.codePass() == 0 {
		c.close()
		return outcomeNone
	}
	now := time.Now()
	if !c.due || c.look != nil || now.Before(c.notBefore) {
		return k.watchCode(ctx)
	}
	c.due = false
	look, err := k.monitor.StartText(ctx, c.digester)
	if err == nil && look != nil {
		err = roomForCode(k.scratch)
	}
	switch {
	case err != nil:
		c.fail(k.log, err)
		return outcomeNone
	case look == nil:
		return outcomeNone
	}
	running, cancel := context.WithCancel(ctx)
	c.look = &codeLook{look, cancel, now}
	go func() {
		select {
		case c.guard.watches.looks <- struct{}{}:
			err := look.Run(running)
			<-c.guard.watches.looks
			c.done <- err
		case <-running.Done():
			c.done <- running.Err()
		}
	}()
	return outcomeNone
}

// looked takes what a look has seen.
func (k *keeper) looked(ctx context.Context, err error) outcome {
	c := k.code
	look := c.look
	c.look = nil
	look.cancel()
	took := time.Since(look.begin)
	// What is found later may have to wait, for as long as a pass takes at most.
	c.notBefore = time.Now().Add(min(codeShare*took, k.codePass()))
	c.mu.Lock()
	c.looks++
	c.mu.Unlock()
	if err != nil {
		result := k.judge(ctx, err)
		if result == outcomeFailed {
			// All else of the guest is watched as before.
			c.fail(k.log, err)
			return outcomeNone
		}
		return result
	}
	findings, err := k.monitor.FinishText(ctx, look.TextLook)
	if result := k.take(ctx, findings, err); result != outcomeNone {
		return result
	}
	list := k.monitor.WatchText()
	c.list, c.unwatched, c.bytes = list.Items, list.Again != 0, 0
	for i := range c.list {
		c.bytes += uint64(len(c.list[i].Digests)) * kvmaccess.PageSize
	}
	c.fresh = true
	k.log.Debug("looked at the kernel's code", "bytes", c.bytes, "took", took)
	return outcomeNone
}

// fail says why the code is not compared.
func (c *codeWatch) fail(log *slog.Logger, err error) {
	c.guard.close()
	c.list = nil
	c.say(log, 0, err.Error())
	switch {
	case errors.Is(err, integrity.ErrNoText):
	case errors.Is(err, integrity.ErrTextWritable):
		c.due, c.notBefore = true, time.Now().Add(writableAgain)
	default:
		c.due, c.notBefore = true, time.Now().Add(verifyEvery)
	}
}

// watchCode has the module compare the code as it was looked at last.
func (k *keeper) watchCode(ctx context.Context) outcome {
	c, pass := k.code, k.codePass()
	period := min(max(pass/codePart, MinWatchPeriod), MaxWatchPeriod)
	budget := (c.bytes*uint64(period)/uint64(pass) + kvmaccess.PageSize) &^ (kvmaccess.PageSize - 1)
	config := kvmaccess.WatchConfig{Period: period, Budget: int(min(budget, kvmaccess.WatchMaxBudget)), Key: &c.key}
	if len(c.list) == 0 || !c.fresh && !c.guard.stale && c.guard.config == config && len(c.guard.parts) > 0 {
		return outcomeNone
	}
	c.fresh = false
	if err := c.guard.program(ctx, config, c.list, time.Now()); err != nil {
		result := k.judge(ctx, err)
		if result == outcomeFailed {
			c.fail(k.log, fmt.Errorf("the kernel's code is not compared: %w", err))
			return outcomeNone
		}
		return result
	}
	c.say(k.log, pass, "")
	return outcomeNone
}

// writableAgain is how soon a kernel that still boots is looked at again.
const writableAgain = 2 * time.Second

// codeRoom is how many bytes the copies of kernels' code leave free on the disk:
// findings have to have room.
const codeRoom = 64 << 20

// roomForCode says whether there is room for a copy, or already is one.
func roomForCode(f *os.File) error {
	info, err := f.Stat()
	if err != nil || info.Size() > 0 {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); fs.Blocks > 0 && free < codeRoom {
		return fmt.Errorf("the kernel's code is not compared: %s has no room for a copy of it (%d MiB free, %d are to stay so): make room, or start with --text 0", filepath.Dir(f.Name()), free>>20, codeRoom>>20)
	}
	return nil
}

// codeDir is where the copies of kernels' code are, one file for each VM.
func codeDir(stateDir string) string { return filepath.Join(stateDir, "code") }

// codeFile is that of a VM.
func codeFile(stateDir string, id identity) string {
	sum := sha256.Sum256([]byte(id.key()))
	return filepath.Join(codeDir(stateDir), hex.EncodeToString(sum[:16]))
}

// openCode opens the copy of a VM, which may be empty.
func openCode(stateDir string, id identity) (*os.File, error) {
	if err := os.MkdirAll(codeDir(stateDir), 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	f, err := os.OpenFile(codeFile(stateDir, id), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("copy of the kernel's code: %w", err)
	}
	return f, nil
}

// dropCode removes the copies of all VMs but those that are kept.
func dropCode(stateDir string, keep []identity, log *slog.Logger) {
	names := map[string]bool{}
	for _, id := range keep {
		names[filepath.Base(codeFile(stateDir, id))] = true
	}
	entries, err := os.ReadDir(codeDir(stateDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("copies of kernels' code are left", "error", err)
	}
	for _, e := range entries {
		if !names[e.Name()] {
			if err := os.Remove(filepath.Join(codeDir(stateDir), e.Name())); err != nil {
				log.Warn("a copy of a kernel's code is left", "error", err)
			}
		}
	}
}
