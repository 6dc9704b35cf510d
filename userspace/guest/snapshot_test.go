// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

func someSnapshot() *Snapshot {
	s := &Snapshot{
		VM:    kvmaccess.VM{ID: 3, PID: 42, VCPUs: 1, Memory: 1 << 27},
		CPUs:  []kvmaccess.VCPU{{VM: 3, ID: 1, Condition: kvmaccess.ConditionHalted, Registers: kvmaccess.Registers{CR0: CR0PE | CR0PG, CR3: 0x2000, CR4: CR4PAE, EFER: EFERLMA, LSTAR: 0xffffffff81000000}}},
		Pages: Pages{},
		Notes: map[string]string{"guest": "made up"},
	}
	put64(s.Pages, 0x2000, 0x3000|rw)
	put64(s.Pages, 0x3000, 0x4000|rw)
	put64(s.Pages, 0x4000, 0x200000|rw|ps)
	s.Pages.WritePhysical(0x200100, []byte("hello"))
	return s
}

func TestSnapshot(t *testing.T) {
	want := someSnapshot()
	var file bytes.Buffer
	if err := want.Write(&file); err != nil {
		t.Fatal(err)
	}
	got, err := ReadSnapshot(bytes.NewReader(file.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestSnapshotDamaged(t *testing.T) {
	var file bytes.Buffer
	if err := someSnapshot().Write(&file); err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(file.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	pack := func(p []byte) []byte {
		var out bytes.Buffer
		z := gzip.NewWriter(&out)
		z.Write(p)
		z.Close()
		return out.Bytes()
	}
	for name, p := range map[string][]byte{
		"empty":                 nil,
		"not compressed, cut":   plain[:len(plain)/2],
		"something else":        []byte("KvmAccess is none"),
		"cut":                   file.Bytes()[:file.Len()/2],
		"cut at a page":         pack(plain[:len(plain)-4104]),
		"other version":         pack([]byte(strings.Replace(string(plain), "snapshot 1", "snapshot 9", 1))),
		"huge header":           pack(append([]byte(snapshotMagic), 0xff, 0xff, 0xff, 0xff)),
		"bad header":            pack(append([]byte(snapshotMagic), 2, 0, 0, 0, '[', ']')),
		"trailing":              pack(append(bytes.Clone(plain), 1)),
		"page twice":            pack(bytes.Replace(plain, append(le(0x3000), le(0x4000|rw)...), append(le(0x2000), le(0x4000|rw)...), 1)),
		"address not of a page": pack(bytes.Replace(plain, append(le(0x3000), le(0x4000|rw)...), append(le(0x3001), le(0x4000|rw)...), 1)),
	} {
		if s, err := ReadSnapshot(bytes.NewReader(p)); err == nil || err.Error() == "" {
			t.Errorf("%s: %+v, no error", name, s)
		}
	}
	if got, err := ReadSnapshot(bytes.NewReader(plain)); err != nil || !cmp.Equal(got, someSnapshot()) {
		t.Errorf("not compressed: %v, %v", got, err)
	}
	if _, err := ReadSnapshot(bytes.NewReader(file.Bytes()[:file.Len()/2])); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut off: %v", err)
	}
}

func TestMachine(t *testing.T) {
	ctx := context.Background()
	m := someSnapshot().Machine()
	if _, err := m.VCPUs(ctx, 4); !errors.Is(err, kvmaccess.ErrNoVM) {
		t.Errorf("another VM: %v", err)
	}
	if _, err := m.VCPU(ctx, 3, 0); !errors.Is(err, kvmaccess.ErrNoVCPU) {
		t.Errorf("another vCPU: %v", err)
	}
	out, err := m.ReadVirtual(ctx, 3, 1, 0,
		kvmaccess.Range{Address: 0x100, Length: 5},
		kvmaccess.Range{Address: 0x40000000, Length: 1},
		kvmaccess.Range{Address: 1 << 47, Length: 1},
		kvmaccess.Range{Address: 0x100, Length: 0},
		kvmaccess.Range{Address: 0x1000, Length: 1})
	if err != nil {
		t.Fatal(err)
	}
	if string(out[0].Data) != "hello" || out[0].Err != nil {
		t.Errorf("%q, %v", out[0].Data, out[0].Err)
	}
	for i, want := range []error{nil, kvmaccess.ErrNotMapped, kvmaccess.ErrInvalid, kvmaccess.ErrInvalid, kvmaccess.ErrNoMemslot} {
		if !errors.Is(out[i].Err, want) {
			t.Errorf("range %d: %v, want %v", i, out[i].Err, want)
		}
	}
	out, err = m.ReadPhysical(ctx, 3, kvmaccess.Range{Address: 0x200100, Length: 5})
	if err != nil || string(out[0].Data) != "hello" {
		t.Errorf("%v, %v", out, err)
	}
}

func TestRecorder(t *testing.T) {
	ctx := context.Background()
	s := someSnapshot()
	r := NewRecorder(s.Pages)
	p := make([]byte, 5)
	if err := ReadVirtual(ctx, r, Mode{Format: Format4Level}, 0x2000, 0x100, p); err != nil {
		t.Fatal(err)
	}
	s.Pages.WritePhysical(0x200100, []byte("later"))
	if err := ReadVirtual(ctx, r.Pages, Mode{Format: Format4Level}, 0x2000, 0x100, p); err != nil || string(p) != "hello" {
		t.Errorf("%q, %v", p, err)
	}
	if len(r.Pages) != 4 {
		t.Errorf("%d pages", len(r.Pages))
	}
	if err := r.ReadPhysical(ctx, 0x9000, p); !errors.Is(err, kvmaccess.ErrNoMemslot) {
		t.Errorf("%v", err)
	}
}

func FuzzReadSnapshot(f *testing.F) {
	var file bytes.Buffer
	if err := someSnapshot().Write(&file); err != nil {
		f.Fatal(err)
	}
	f.Add(file.Bytes())
	f.Add([]byte{0x1f, 0x8b})
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ReadSnapshot(bytes.NewReader(data))
		if (s == nil) == (err == nil) {
			t.Fatalf("%v, %v", s, err)
		}
	})
}
