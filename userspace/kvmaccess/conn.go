// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// A reply has at most MaxBytes of data and MaxRanges headers, and the
	// kernel keeps a dump's messages below 32 KiB.
	bufferSize = 64 << 10

	nlHeader   = 16 // struct nlmsghdr
	genlHeader = 4  // struct genlmsghdr
)

// netlinkConfig: replies go to one buffer of known size instead of being
// peeked at first. CapAcknowledge must stay off: netlink finds the extended
// acknowledgement behind the whole request.
func netlinkConfig() *netlink.Config {
	return &netlink.Config{Strict: true, MessageBufferSize: bufferSize}
}

// socket is what a conn needs of *genetlink.Conn.
type socket interface {
	Execute(genetlink.Message, uint16, netlink.HeaderFlags) ([]genetlink.Message, error)
	Send(genetlink.Message, uint16, netlink.HeaderFlags) (netlink.Message, error)
	Receive() ([]genetlink.Message, []netlink.Message, error)
	SetDeadline(time.Time) error
	Close() error
}

// conn is one netlink socket, used by one request at a time. A request is
// written by request and the attribute methods, and carried out by do or dump.
//
// The library dials, resolves and dumps. The one-reply requests of each
// monitoring period go through its descriptor directly: the kernel answers
// them before send returns, so that the goroutine which the library starts for
// each system call, and its copies, would be half of the cost.
type conn struct {
	g   socket
	raw syscall.RawConn // nil: none, as in tests
	seq uint32

	family uint16
	op     uint8
	vm     VMID
	req    []byte // whole message; length and sequence are filled in when sent
	buf    []byte // reply; nil without raw
	broken bool   // a reply may still be on its way: use no more
}

func newConn(g *genetlink.Conn) (*conn, error) {
	raw, err := g.SyscallConn()
	switch {
	case err == nil:
		return newRawConn(g, raw), nil
	case isNotSupported(err):
		return &conn{g: g}, nil
	}
	return nil, err
}

func newRawConn(g socket, raw syscall.RawConn) *conn {
	return &conn{g: g, raw: raw, buf: make([]byte, bufferSize)}
}

// isNotSupported: the library keeps its error for a socket without a
// descriptor to itself, but for the text.
func isNotSupported(err error) bool {
	var op *netlink.OpError
	return errors.As(err, &op) && op.Op == "syscall-conn"
}

// request begins a request.
func (q *conn) request(family uint16, op uint8, vm VMID) {
	q.family, q.op, q.vm = family, op, vm
	q.req = append(q.req[:0], make([]byte, nlHeader+genlHeader)...)
	binary.NativeEndian.PutUint16(q.req[4:], family)
	binary.NativeEndian.PutUint16(q.req[6:], uint16(netlink.Request))
	q.req[nlHeader] = op
	q.req[nlHeader+1] = genlVersion
}

func (q *conn) u32(typ uint16, v uint32) { q.req = appendU32(q.req, typ, v) }
func (q *conn) u64(typ uint16, v uint64) { q.req = appendU64(q.req, typ, v) }
func (q *conn) rng(typ uint16, r Range)  { q.req = appendRange(q.req, typ, r) }
func (q *conn) message() genetlink.Message {
	return genetlink.Message{
		Header: genetlink.Header{Command: q.op, Version: genlVersion},
		Data:   q.req[nlHeader+genlHeader:],
	}
}

// do sends the request and returns the attributes of its one reply, which are
// valid until the next request.
func (q *conn) do(ctx context.Context) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, q.canceled(err)
	}
	if q.raw != nil {
		return q.doRaw(ctx)
	}
	stop := q.watch(ctx)
	msgs, err := q.g.Execute(q.message(), q.family, netlink.Request)
	if !stop() {
		return nil, q.canceled(ctx.Err())
	}
	if err != nil {
		return nil, q.failed(err)
	}
	if len(msgs) != 1 {
		q.broken = true
		return nil, wireError("%d replies to %s", len(msgs), q.name())
	}
	if msgs[0].Header.Command != q.op {
		return nil, wireError("reply of command %d to %s", msgs[0].Header.Command, q.name())
	}
	return msgs[0].Data, nil
}

// dump sends the request as a dump and hands the attributes of each message to
// each. It reports whether the objects changed meanwhile, so that what was
// read may be incomplete.
func (q *conn) dump(ctx context.Context, each func([]byte) error) (changed bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, q.canceled(err)
	}
	stop := q.watch(ctx)
	defer func() {
		if !stop() {
			changed, err = false, q.canceled(ctx.Err())
		}
	}()

	sent, err := q.g.Send(q.message(), q.family, netlink.Request|netlink.Dump)
	if err != nil {
		return false, q.failed(err)
	}
	gmsgs, nmsgs, err := q.g.Receive()
	if err != nil {
		return false, q.failed(err)
	}
	if err := netlink.Validate(sent, nmsgs); err != nil {
		return false, q.failed(err)
	}
	for i, m := range gmsgs {
		if nmsgs[i].Header.Flags&netlink.DumpInterrupted != 0 {
			return true, nil
		}
		if m.Header.Command != q.op {
			return false, wireError("message of command %d in the dump of %s", m.Header.Command, q.name())
		}
		if err := each(m.Data); err != nil {
			return false, err
		}
	}
	return false, nil
}

// doRaw is do on the socket's descriptor.
func (q *conn) doRaw(ctx context.Context) ([]byte, error) {
	q.seq++
	binary.NativeEndian.PutUint32(q.req, uint32(len(q.req)))
	binary.NativeEndian.PutUint32(q.req[8:], q.seq)

	var (
		n    int
		err  error
		stop func() bool
	)
	perr := q.raw.Write(func(fd uintptr) bool {
		n, err = transfer(unix.SYS_WRITE, fd, q.req)
		return err != unix.EAGAIN
	})
	if perr != nil || err != nil {
		return nil, q.failed(errors.Join(perr, err))
	}
	perr = q.raw.Read(func(fd uintptr) bool {
		n, err = transfer(unix.SYS_READ, fd, q.buf)
		if err != unix.EAGAIN {
			return true
		}
		if stop == nil {
			stop = q.watch(ctx)
		}
		return false
	})
	if stop != nil && !stop() {
		return nil, q.canceled(ctx.Err())
	}
	if perr != nil || err != nil {
		return nil, q.failed(errors.Join(perr, err))
	}
	return q.reply(q.buf[:n])
}

// transfer is write(2) or read(2), of which the Go scheduler is not told.
// Neither call waits for long; and a call that it is told of wakes its monitor
// thread if the process was idle just before, as it is at each period, which
// takes more than the call itself.
func transfer(trap, fd uintptr, b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// reply checks the headers of a reply and returns its attributes.
func (q *conn) reply(b []byte) ([]byte, error) {
	if len(b) < nlHeader {
		q.broken = true
		return nil, wireError("%d bytes are no netlink message", len(b))
	}
	length := binary.NativeEndian.Uint32(b)
	typ := binary.NativeEndian.Uint16(b[4:])
	flags := netlink.HeaderFlags(binary.NativeEndian.Uint16(b[6:]))
	if seq := binary.NativeEndian.Uint32(b[8:]); seq != q.seq {
		q.broken = true
		return nil, wireError("reply to message %d, asked %d", seq, q.seq)
	}
	if length < nlHeader || uint64(length) > uint64(len(b)) {
		q.broken = true
		return nil, wireError("message of %d bytes in %d", length, len(b))
	}
	b = b[nlHeader:length]
	if netlink.HeaderType(typ) == netlink.Error {
		return nil, q.refused(b, flags)
	}
	if typ != q.family || flags&netlink.Multi != 0 {
		q.broken = true
		return nil, wireError("message of type %d, flags %v to %s", typ, flags, q.name())
	}
	if len(b) < genlHeader {
		return nil, wireError("%d bytes are no generic netlink message", len(b))
	}
	if b[0] != q.op {
		return nil, wireError("reply of command %d to %s", b[0], q.name())
	}
	return b[genlHeader:], nil
}

// refused turns the body of a netlink error message (errno, header and, unless
// it is capped, payload of the request, then the extended acknowledgement)
// into an error.
func (q *conn) refused(b []byte, flags netlink.HeaderFlags) error {
	if len(b) < 4+nlHeader {
		return wireError("%d bytes are no netlink error", len(b))
	}
	errno := -int64(int32(binary.NativeEndian.Uint32(b)))
	if errno <= 0 || errno > maxErrno {
		return wireError("netlink error %d to %s", -errno, q.name())
	}
	e := &Error{Op: q.name(), VM: q.vm, Errno: unix.Errno(errno)}
	if flags&netlink.AcknowledgeTLVs == 0 {
		return e
	}
	skip := uint64(4 + nlHeader)
	if flags&netlink.Capped == 0 {
		skip = 4 + uint64(binary.NativeEndian.Uint32(b[4:]))
	}
	if skip > uint64(len(b)) {
		return e
	}
	a := attrs{set: "acknowledgement", b: b[min((skip+3)&^3, uint64(len(b))):]}
	for a.next() {
		if a.typ == unix.NLMSGERR_ATTR_MSG {
			e.Message = a.text()
		}
	}
	return e
}

// failed turns an error of the transport into one of this package.
func (q *conn) failed(err error) error {
	var op *netlink.OpError
	var errno unix.Errno
	if errors.As(err, &op) && op.Sequence != 0 && errors.As(op.Err, &errno) {
		return &Error{Op: q.name(), VM: q.vm, Errno: errno, Message: op.Message}
	}
	// The kernel did not answer this request, or not all of it.
	q.broken = true
	if errors.As(err, &errno) {
		return &Error{Op: q.name(), VM: q.vm, Errno: errno}
	}
	return fmt.Errorf("kvmaccess: %s: %w", q.name(), err)
}

func (q *conn) canceled(err error) error {
	return fmt.Errorf("kvmaccess: %s: %w", q.name(), err)
}

func (q *conn) name() string { return enumString(uint32(q.op), commandNames) }

// watch makes ctx's end interrupt the socket until stop is called. A stop that
// returns false came too late: the socket is of no more use then.
func (q *conn) watch(ctx context.Context) (stop func() bool) {
	if ctx.Done() == nil {
		return func() bool { return true }
	}
	release := context.AfterFunc(ctx, func() { _ = q.g.SetDeadline(time.Unix(1, 0)) })
	return func() bool {
		if release() {
			return true
		}
		q.broken = true
		return false
	}
}
