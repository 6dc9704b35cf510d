// SPDX-License-Identifier: MIT

package stress

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const testFamily = 0x20

// A request that nothing was done to is well-formed, whatever its kind.
func TestValid(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, k := range kinds {
		m := k.make(r, target{vms: []uint64{7}, vcpus: 2})
		b := m.append(nil, testFamily)
		if size := int(binary.NativeEndian.Uint32(b)); size != len(b) {
			t.Errorf("%s: says %d bytes, has %d", k.name, size, len(b))
		}
		if kind := binary.NativeEndian.Uint16(b[4:]); kind != testFamily {
			t.Errorf("%s: type %#x", k.name, kind)
		}
		if err := checkAttributes(b); err != nil {
			t.Errorf("%s: %v", k.name, err)
		}
	}
}

// The same seed makes the same messages; they are broken in many ways, always
// start on a multiple of four, and always are for the family.
func TestMutate(t *testing.T) {
	stream := func(seed uint64) (all []byte) {
		r := rand.New(rand.NewPCG(seed, 1))
		for range 2000 {
			m := kinds[r.IntN(len(kinds))].make(r, target{vms: []uint64{7, 8}, vcpus: 2})
			m.mutate(r)
			start := len(all)
			all = m.append(all, testFamily)
			if kind := binary.NativeEndian.Uint16(all[start+4:]); start%4 != 0 || kind != testFamily {
				t.Fatalf("a message at %d of type %#x", start, kind)
			}
			if flags := binary.NativeEndian.Uint16(all[start+6:]); flags&unix.NLM_F_REQUEST == 0 {
				t.Fatalf("flags %#x: the kernel would not look at it", flags)
			}
		}
		return all
	}
	if !bytes.Equal(stream(1), stream(1)) {
		t.Error("one seed, two streams")
	}
	if bytes.Equal(stream(1), stream(2)) {
		t.Error("two seeds, one stream")
	}
	r := rand.New(rand.NewPCG(3, 1))
	broken := 0
	for range 2000 {
		m := kinds[r.IntN(len(kinds))].make(r, target{vms: []uint64{7}})
		m.mutate(r)
		if checkAttributes(m.append(nil, testFamily)) != nil {
			broken++
		}
	}
	if broken < 100 || broken > 1900 {
		t.Errorf("%d of 2000 messages have attributes that do not fit", broken)
	}
}

func TestCount(t *testing.T) {
	header := func(size int, kind uint16, payload ...byte) []byte {
		b := make([]byte, unix.SizeofNlMsghdr)
		binary.NativeEndian.PutUint32(b, uint32(size))
		binary.NativeEndian.PutUint16(b[4:], kind)
		return append(b, payload...)
	}
	refusal := header(20, unix.NLMSG_ERROR, 0xea, 0xff, 0xff, 0xff) // -EINVAL
	reply := header(28, testFamily, 1, 1, 0, 0, 8, 0, 2, 0, 1, 2, 3, 4)
	var a answers
	if err := a.count(append(append([]byte(nil), refusal...), reply...)); err != nil {
		t.Fatal(err)
	}
	if a.replies != 1 || a.errs[unix.EINVAL] != 1 {
		t.Errorf("%+v, want one reply and one EINVAL", a)
	}
	for name, b := range map[string][]byte{
		"cut":                refusal[:10],
		"longer than it is":  header(400, testFamily),
		"shorter than it is": header(8, testFamily),
		"a bad attribute":    header(28, testFamily, 1, 1, 0, 0, 99, 0, 2, 0, 1, 2, 3, 4),
	} {
		if a.count(b) == nil {
			t.Errorf("%s: taken for well-formed", name)
		}
	}
}

func TestReport(t *testing.T) {
	r := newReport("part")
	r.Add("rounds", 2)
	r.Add("requests", 5)
	r.Add("rounds", 1)
	r.fail(unix.ENOENT)
	r.fail(unix.ENOENT)
	if got, want := r.String(), "part: 3 rounds, 5 requests, errors ENOENT=2, "; !strings.HasPrefix(got, want) {
		t.Errorf("%q, want %q first", got, want)
	}
}
