// SPDX-License-Identifier: MIT

package vmlinux

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
)

// recorded is a guest of testdata: of its text, and of its kernel's file, there
// is one part.
type recorded struct {
	*guest.Kernel
	file *File
}

// recordedGuests are those, and the tables by which each one's text changed:
// Debian's kernels 5.10, 6.1, 6.12 on an AMD processor that needs a return
// thunk, and 7.2.
var recordedGuests = map[string][]guest.Table{
	"debian11":       {TableAlternative, TableLock, TableParavirt, TableReturn, guest.TableFtrace, guest.TableStaticKey, guest.TableStaticCall, guest.TableDispatcher},
	"debian12":       {TableAlternative, TableLock, TableParavirt, TableReturn, guest.TableFtrace, guest.TableFtraceCall, guest.TableKprobe, guest.TableStaticKey, guest.TableStaticCall},
	"debian13-milan": {TableAlternative, TableEndbr, TableLock, TableReturn, TableConstant, guest.TableFtrace, guest.TableFtraceCall, guest.TableStaticKey, guest.TableStaticCall},
	"sid":            {TableAlternative, TableEndbr, TableLock, TableReturn, TableConstant, guest.TableFtrace, guest.TableStaticKey, guest.TableStaticCall},
}

func unpack(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func load(t testing.TB, name string) *recorded {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".snapshot"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := guest.ReadSnapshot(f)
	if err != nil {
		t.Fatal(err)
	}
	types, err := guest.ParseTypes(unpack(t, name+".btf.gz"), nil)
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := guest.ParseSymbols(bytes.NewReader(unpack(t, name+".kallsyms.gz")))
	if err != nil {
		t.Fatal(err)
	}
	number := func(key string) uint64 {
		v, err := strconv.ParseUint(s.Notes[key], 0, 64)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	const part = 256 << 10
	r := &recorded{Kernel: &guest.Kernel{
		Space: &guest.Space{Memory: s.Pages, Mode: guest.ModeOf(&s.CPUs[0].Registers), Root: number("root")},
		Image: guest.NewImage(symbols, 0),
		Types: types,
		Text:  guest.Extent{Start: number("text"), End: number("text") + part},
	}}
	r.Fingerprint.BuildID = s.Notes["build-id"]
	if err := json.Unmarshal([]byte(s.Notes["bases"]), &r.Bases); err != nil {
		t.Fatal(err)
	}
	if r.file, err = Parse(unpack(t, name+".vmlinux.gz")); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestChangesAreExplained(t *testing.T) {
	for name, tables := range recordedGuests {
		t.Run(name, func(t *testing.T) {
			r := load(t, name)
			if r.Bases.Text == 0 {
				t.Error("the kernel was not moved")
			}
			changes, err := r.file.Changes(t.Context(), r.Kernel)
			if err != nil {
				t.Fatal(err)
			}
			counts := map[guest.Table]int{}
			for _, c := range changes {
				if c.Why == nil {
					t.Errorf("%v (%s)", c, r.Image.Name(c.Address))
					continue
				}
				counts[c.Why.Table]++
			}
			for _, table := range tables {
				if counts[table] == 0 {
					t.Errorf("no change by the table %s: %v", table, counts)
				}
			}
			t.Log(counts)
		})
	}
}

// changed is memory of which some bytes are not as they were.
type changed struct {
	guest.Memory
	bytes map[uint64]byte // what to change, by address
}

func (c changed) ReadPhysical(ctx context.Context, gpa uint64, p []byte) error {
	if err := c.Memory.ReadPhysical(ctx, gpa, p); err != nil {
		return err
	}
	for at, x := range c.bytes {
		if at >= gpa && at-gpa < uint64(len(p)) {
			p[at-gpa] ^= x
		}
	}
	return nil
}

// TestOtherChangesAreNot changes bytes anywhere, and near where the kernel did.
func TestOtherChangesAreNot(t *testing.T) {
	for name := range recordedGuests {
		t.Run(name, func(t *testing.T) {
			r := load(t, name)
			ctx := t.Context()
			changes, err := r.file.Changes(ctx, r.Kernel)
			if err != nil {
				t.Fatal(err)
			}
			before, err := r.file.moved(r.Bases.Text)
			if err != nil {
				t.Fatal(err)
			}
			file := before.at(r.Text.Start-r.Bases.Text, int(r.Text.Size()))
			now, err := r.CopyText(ctx, r.Text)
			if err != nil {
				t.Fatal(err)
			}
			rnd := rand.New(rand.NewPCG(5, 6))
			w := changed{r.Space.Memory, map[uint64]byte{}}
			var evil []uint64
			for i := range 400 {
				at := rnd.Uint64N(r.Text.Size())
				if i%2 == 1 {
					c := changes[rnd.IntN(len(changes))]
					at = c.Address - r.Text.Start + uint64(rnd.IntN(len(c.New)+4))
				}
				x := byte(1 + rnd.IntN(255))
				if at >= r.Text.Size() || now.Data[at]^x == file[at] {
					continue // as in the file: what is left of that the kernel's own tables tell
				}
				tr, err := guest.Translate(ctx, r.Space.Memory, r.Space.Mode, r.Space.Root, r.Text.Start+at)
				if err != nil {
					t.Fatal(err)
				}
				w.bytes[tr.GPA] = x
				evil = append(evil, r.Text.Start+at)
			}
			k := *r.Kernel
			k.Space = &guest.Space{Memory: w, Mode: r.Space.Mode, Root: r.Space.Root}
			found, err := r.file.Changes(ctx, &k)
			if err != nil {
				t.Fatal(err)
			}
			for _, at := range evil {
				i := slices.IndexFunc(found, func(c guest.TextChange) bool { return c.Address <= at && at-c.Address < uint64(len(c.New)) })
				if i < 0 {
					t.Errorf("%#x was changed, which is not told", at)
				} else if found[i].Why != nil {
					t.Errorf("%#x was changed, which is explained: %v", at, found[i])
				}
			}
		})
	}
}

func TestChangesOfOtherKernels(t *testing.T) {
	a, b := load(t, "debian12"), load(t, "sid")
	if _, err := a.file.Changes(t.Context(), b.Kernel); !errors.Is(err, ErrOtherKernel) {
		t.Errorf("the file of another kernel: %v", err)
	}
	a.Fingerprint.BuildID = ""
	a.Text.End += 4096
	if _, err := a.file.Changes(t.Context(), a.Kernel); err == nil {
		t.Error("text that is not in the file was compared")
	}
	a = load(t, "debian12")
	a.Types = nil
	if _, err := a.file.Changes(t.Context(), a.Kernel); !errors.Is(err, guest.ErrNoTypes) {
		t.Errorf("a kernel without types: %v", err)
	}
}
