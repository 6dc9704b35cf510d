// SPDX-License-Identifier: MIT

package stress

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/genetlink"
	"golang.org/x/sys/unix"
)

// Numbers of kmod/uapi/kvmaccess.h: what is sent here no client would send.
const (
	cmdInfo       = 1
	cmdVMGet      = 2
	cmdMemslotGet = 3
	cmdVCPUGet    = 4
	cmdTableGet   = 5
	cmdMemRead    = 6
	cmdStats      = 7
	cmdWatchNew   = 10
	cmdWatchAdd   = 11
	cmdWatchDel   = 12
	cmdWatchGet   = 13
	cmdLast       = 14

	aVMID = 2 // of every set but RANGE

	aMemslotAS, aMemslotSlot   = 3, 4
	aVCPUID                    = 3
	aTableVCPU, aTableKind     = 3, 4
	aTableOffset, aTableLength = 5, 6
	aMemVCPU, aMemRoot         = 3, 4
	aMemRange                  = 5
	aRangeAddress, aRangeLen   = 2, 3

	aWatchID, aWatchVMID, aWatchPeriod        = 2, 3, 4
	aWatchBudget, aWatchKey                   = 5, 6
	aWatchItem, aWatchCookie                  = 7, 8
	aItemCookie, aItemKind, aItemGPA          = 2, 3, 4
	aItemData, aItemValue, aItemMask          = 5, 6, 7
	aItemRegister, aItemVCPU                  = 8, 9
	kindBytes, kindEntry, kindDigest, kindReg = 1, 2, 3, 4
	lastRegister                              = 24
)

const headerLen = unix.SizeofNlMsghdr + 4 // with struct genlmsghdr

// family is the module's, as generic netlink numbers it.
type family struct {
	id    uint16
	group uint32 // multicast group "vm"
}

func findFamily() (family, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return family{}, err
	}
	defer c.Close()
	f, err := c.GetFamily("kvmaccess")
	if err != nil {
		return family{}, fmt.Errorf("the family kvmaccess: %w", err)
	}
	if len(f.Groups) != 1 {
		return family{}, fmt.Errorf("the family has %d multicast groups, want one", len(f.Groups))
	}
	return family{id: f.ID, group: f.Groups[0].ID}, nil
}

// socket is generic netlink without any care.
type socket struct {
	fd  int
	buf []byte
}

func newSocket() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, err
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &socket{fd: fd, buf: make([]byte, 128<<10)}, nil
}

func (s *socket) close() error { return unix.Close(s.fd) }

// send sends bytes as they are.
func (s *socket) send(b []byte) error {
	_, err := unix.Write(s.fd, b)
	return err
}

// answers are counts of what came back.
type answers struct {
	replies int64                // messages of the family
	errs    map[unix.Errno]int64 // refusals, 0 for an acknowledgment
	lost    int64                // how often the socket's buffer was full
	watches []uint64             // that the socket has, or had
}

// maxWatches is how many watches a socket of Fuzz has before it ends one for
// each that it makes.
const maxWatches = 8

// drain takes all that there is to receive; a dump goes on meanwhile.
func (s *socket) drain(a *answers) error {
	for {
		n, _, err := unix.Recvfrom(s.fd, s.buf, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			a.lost++
			continue
		case err != nil:
			return err
		}
		if err := a.count(s.buf[:n]); err != nil {
			return err
		}
	}
}

// count looks into a datagram. What the kernel sends has to be well-formed.
func (a *answers) count(b []byte) error {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return fmt.Errorf("%d bytes behind the last message", len(b))
		}
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return fmt.Errorf("a message of %d bytes in %d", size, len(b))
		}
		switch kind := binary.NativeEndian.Uint16(b[4:]); {
		case kind == unix.NLMSG_ERROR || kind == unix.NLMSG_DONE:
			if size < unix.SizeofNlMsghdr+4 {
				return fmt.Errorf("an answer of %d bytes", size)
			}
			errno := -int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))
			// The end of a dump says how far its last part got.
			if errno > 0 || kind == unix.NLMSG_ERROR {
				if a.errs == nil {
					a.errs = map[unix.Errno]int64{}
				}
				a.errs[unix.Errno(max(errno, 0))]++
			}
		case kind >= unix.NLMSG_MIN_TYPE:
			if err := checkAttributes(b[:size]); err != nil {
				return err
			}
			a.replies++
			a.note(b[:size])
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return nil
}

// note keeps the id of a watch that was made; it is the first attribute.
func (a *answers) note(b []byte) {
	if b[unix.SizeofNlMsghdr] == cmdWatchNew && len(b) >= headerLen+16 {
		// Aligned to 8 bytes by an attribute of padding before it, or not.
		at := headerLen + unix.SizeofNlAttr
		if binary.NativeEndian.Uint16(b[headerLen+2:]) != aWatchID {
			at += unix.SizeofNlAttr
		}
		a.watches = append(a.watches, binary.NativeEndian.Uint64(b[at:]))
	}
}

// checkAttributes is an error if a reply's attributes do not fill it.
func checkAttributes(b []byte) error {
	if len(b) < headerLen {
		return fmt.Errorf("a reply of %d bytes", len(b))
	}
	for rest := b[headerLen:]; len(rest) > 0; {
		if len(rest) < unix.SizeofNlAttr {
			return fmt.Errorf("%d bytes behind the last attribute of a reply", len(rest))
		}
		size := int(binary.NativeEndian.Uint16(rest))
		if size < unix.SizeofNlAttr || size > len(rest) {
			return fmt.Errorf("an attribute of %d bytes in %d of a reply", size, len(rest))
		}
		rest = rest[min(len(rest), (size+3)&^3):]
	}
	return nil
}

func (r *Report) addAnswers(a *answers) {
	r.Add("replies", a.replies)
	if a.lost > 0 {
		r.Add("times a full buffer", a.lost)
	}
	for errno, n := range a.errs {
		name := unix.ErrnoName(errno)
		switch {
		case errno == 0:
			name = "acknowledged"
		case name == "":
			name = fmt.Sprint(uint32(errno))
		}
		r.failed(name, n)
	}
}
