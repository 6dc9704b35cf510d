// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// header is a struct nlmsghdr.
func header(length int, typ uint16, flags netlink.HeaderFlags, seq uint32) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(length))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, uint16(flags))
	b = binary.NativeEndian.AppendUint32(b, seq)
	return binary.NativeEndian.AppendUint32(b, 0)
}

// reply is a whole message as the kernel sends it.
func reply(family uint16, cmd uint8, seq uint32, attrs []byte) []byte {
	return join(header(nlHeader+genlHeader+len(attrs), family, 0, seq), []byte{cmd, genlVersion, 0, 0}, attrs)
}

// refusal is an error message; the request that it quotes has 8 bytes of
// attributes, unless it is capped.
func refusal(seq uint32, errno unix.Errno, msg string, flags netlink.HeaderFlags) []byte {
	quoted := join(header(nlHeader+genlHeader+8, 21, netlink.Request, seq))
	if flags&netlink.Capped == 0 {
		quoted = append(quoted, make([]byte, genlHeader+8)...)
	}
	body := join(binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno))), quoted)
	if msg != "" {
		flags |= netlink.AcknowledgeTLVs
		body = join(body, u32(unix.NLMSGERR_ATTR_OFFS, 20), text(unix.NLMSGERR_ATTR_MSG, msg))
	}
	return join(header(nlHeader+len(body), uint16(netlink.Error), flags, seq), body)
}

// newFakeKernel returns a conn whose descriptor is one end of a socket pair.
// answer gets each request and returns the replies, each a datagram.
func newFakeKernel(t testing.TB, answer func(req []byte, seq uint32) [][]byte) *conn {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "client"), os.NewFile(uintptr(fds[1]), "kernel")
	var wg sync.WaitGroup
	t.Cleanup(func() {
		ours.Close()
		theirs.Close()
		wg.Wait()
	})
	wg.Go(func() {
		buf := make([]byte, bufferSize)
		for {
			n, err := theirs.Read(buf)
			if err != nil || n < nlHeader {
				return
			}
			for _, r := range answer(buf[:n], binary.NativeEndian.Uint32(buf[8:])) {
				if _, err := theirs.Write(r); err != nil {
					return
				}
			}
		}
	})
	raw, err := ours.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return newRawConn(fakeSocket{f: ours}, raw)
}

// fakeSocket has the deadlines of a file, and nothing else.
type fakeSocket struct {
	socket
	f *os.File
}

func (s fakeSocket) SetDeadline(t time.Time) error { return s.f.SetDeadline(t) }
func (s fakeSocket) Close() error                  { return s.f.Close() }

func TestConnReply(t *testing.T) {
	const family = 21
	attrs := u32(aInfoVendor, 1)
	good := func(seq uint32) []byte { return reply(family, cmdInfo, seq, attrs) }
	for _, tt := range []struct {
		name   string
		answer func(seq uint32) []byte
		err    string
		broken bool
	}{
		{"good", good, "", false},
		{"large", func(seq uint32) []byte { return reply(family, cmdInfo, seq, attr(1, make([]byte, 60000))) }, "", false},
		{"larger than the buffer", func(seq uint32) []byte { return reply(family, cmdInfo, seq, make([]byte, bufferSize)) }, "message of", true},
		{"short", func(uint32) []byte { return make([]byte, 15) }, "15 bytes are no netlink message", true},
		{"no genetlink header", func(seq uint32) []byte { return header(nlHeader, family, 0, seq) }, "0 bytes are no generic netlink message", false},
		{"another sequence", func(seq uint32) []byte { return good(seq + 1) }, "reply to message", true},
		{"another family", func(seq uint32) []byte { return reply(family+1, cmdInfo, seq, attrs) }, "type 22", true},
		{"another command", func(seq uint32) []byte { return reply(family, cmdStats, seq, attrs) }, "reply of command 7", false},
		{"multipart", func(seq uint32) []byte { return join(header(nlHeader+4, family, netlink.Multi, seq), make([]byte, 4)) }, "multi", true},
		{"length beyond the end", func(seq uint32) []byte { return join(header(99, family, 0, seq), make([]byte, 4)) }, "99 bytes in 20", true},
		{"acknowledgement without an errno", func(seq uint32) []byte { return refusal(seq, 0, "", 0) }, "netlink error 0", false},
		{"short error", func(seq uint32) []byte { return header(nlHeader, uint16(netlink.Error), 0, seq) }, "no netlink error", false},
		{"refused", func(seq uint32) []byte { return refusal(seq, unix.EPERM, "", 0) }, "CAP_SYS_ADMIN", false},
		{"refused with a reason", func(seq uint32) []byte { return refusal(seq, unix.EINVAL, "the LENGTH of a RANGE is 0", 0) }, "info: the LENGTH of a RANGE is 0 (EINVAL)", false},
		{"refused with a reason, capped", func(seq uint32) []byte { return refusal(seq, unix.EINVAL, "no", netlink.Capped) }, "info: no (EINVAL)", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := newFakeKernel(t, func(req []byte, seq uint32) [][]byte { return [][]byte{tt.answer(seq)} })
			q.request(family, cmdInfo, 0)
			b, err := q.do(t.Context())
			switch {
			case tt.err == "" && err != nil:
				t.Fatal(err)
			case tt.err == "" && len(b) == 0:
				t.Error("no attributes")
			case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
				t.Errorf("error %v, want one with %q", err, tt.err)
			}
			if q.broken != tt.broken {
				t.Errorf("broken = %v, want %v", q.broken, tt.broken)
			}
		})
	}
}

func TestConnCancel(t *testing.T) {
	q := newFakeKernel(t, func([]byte, uint32) [][]byte { return nil })
	q.request(21, cmdInfo, 0)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := q.do(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want a deadline", err)
	}
	if !q.broken {
		t.Error("a reply is on its way to a socket that is used again")
	}
	if _, err := q.do(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v with an ended context", err)
	}
}

func TestConnClosed(t *testing.T) {
	q := newFakeKernel(t, func([]byte, uint32) [][]byte { return nil })
	_ = q.g.Close()
	q.request(21, cmdInfo, 0)
	if _, err := q.do(t.Context()); err == nil || !q.broken {
		t.Errorf("error %v, broken %v", err, q.broken)
	}
}

// TestConnKernel speaks to the family of generic netlink itself, which every
// kernel has, on a real socket.
func TestConnKernel(t *testing.T) {
	g, err := genetlink.Dial(netlinkConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	q, err := newConn(g)
	if err != nil {
		t.Fatal(err)
	}
	if q.raw == nil {
		t.Fatal("no descriptor")
	}
	for i := range 3 {
		q.request(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, 0)
		q.req = append(q.req, text(unix.CTRL_ATTR_FAMILY_NAME, "no such thing")...)
		var e *Error
		if _, err := q.do(t.Context()); !errors.As(err, &e) || e.Errno != unix.ENOENT {
			t.Fatalf("request %d for an unknown family: %v", i, err)
		}
	}
	// A name that is too long breaks the policy, which has an explanation.
	q.request(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, 0)
	q.req = append(q.req, text(unix.CTRL_ATTR_FAMILY_NAME, strings.Repeat("x", 100))...)
	var e *Error
	if _, err := q.do(t.Context()); !errors.As(err, &e) || e.Message == "" {
		t.Errorf("a name of 100 bytes: %v, want an explanation", err)
	} else {
		t.Log(err)
	}
	// The reply to a request for a family has another command: it is refused,
	// but not its successor.
	q.request(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETFAMILY, 0)
	q.req = append(q.req, text(unix.CTRL_ATTR_FAMILY_NAME, "nlctrl")...)
	if _, err := q.do(t.Context()); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("reply of command %d", unix.CTRL_CMD_NEWFAMILY)) {
		t.Errorf("error %v", err)
	}
	// The policy of nlctrl comes as a dump of the same command.
	q.request(unix.GENL_ID_CTRL, unix.CTRL_CMD_GETPOLICY, 0)
	q.req = append(q.req, text(unix.CTRL_ATTR_FAMILY_NAME, "nlctrl")...)
	n := 0
	changed, err := q.dump(t.Context(), func(b []byte) error {
		for a := (attrs{set: "policy", b: b}); a.next(); {
			n++
		}
		return nil
	})
	if err != nil || changed || n == 0 {
		t.Errorf("dump: %d attributes, changed %v, %v", n, changed, err)
	}
	if q.broken {
		t.Error("the socket was given up")
	}
}
