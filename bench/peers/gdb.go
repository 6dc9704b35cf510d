// SPDX-License-Identifier: MIT

package peers

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
)

// gdb is a connection to QEMU's gdbstub, by GDB's remote serial protocol
// (GDB's manual, appendix E). The guest is stopped from dial on until run.
type gdb struct {
	conn net.Conn
	in   *bufio.Reader
}

func dialGDB(path string) (*gdb, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	g := &gdb{conn: conn, in: bufio.NewReaderSize(conn, 1<<16)}
	if _, err := g.ask("?"); err != nil {
		conn.Close()
		return nil, err
	}
	return g, nil
}

func (g *gdb) send(packet string) error {
	var sum byte
	for i := range len(packet) {
		sum += packet[i]
	}
	_, err := fmt.Fprintf(g.conn, "$%s#%02x", packet, sum)
	return err
}

// receive returns the next packet, and says that it has come.
func (g *gdb) receive() (string, error) {
	for {
		c, err := g.in.ReadByte()
		if err != nil {
			return "", fmt.Errorf("gdbstub: %w", err)
		}
		if c == '$' {
			break
		}
		if c != '+' {
			return "", fmt.Errorf("gdbstub: %q, want a packet", c)
		}
	}
	packet, err := g.in.ReadString('#')
	if err != nil {
		return "", fmt.Errorf("gdbstub: %w", err)
	}
	if _, err := g.in.Discard(2); err != nil {
		return "", fmt.Errorf("gdbstub: %w", err)
	}
	_, err = g.conn.Write([]byte{'+'})
	return packet[:len(packet)-1], err
}

func (g *gdb) ask(packet string) (string, error) {
	if err := g.send(packet); err != nil {
		return "", err
	}
	answer, err := g.receive()
	// That the guest stopped is told once more than it is asked for, after the
	// connection has been made.
	for err == nil && packet != "?" && strings.HasPrefix(answer, "T") {
		answer, err = g.receive()
	}
	if err == nil && len(answer) == 3 && answer[0] == 'E' {
		err = fmt.Errorf("gdbstub: %s: error %s", packet, answer[1:])
	}
	return answer, err
}

// stop stops the guest.
func (g *gdb) stop() error {
	if _, err := g.conn.Write([]byte{3}); err != nil {
		return err
	}
	answer, err := g.receive()
	if err == nil && (answer == "" || answer[0] != 'T' && answer[0] != 'S') {
		err = fmt.Errorf("gdbstub: %q, want that the guest stops", answer)
	}
	return err
}

// run lets it run; the answer is that of the next stop.
func (g *gdb) run() error { return g.send("c") }

// gdbBytes is what one packet of QEMU's may read, in bytes.
const gdbBytes = 1024

// memory reads guest-virtual memory.
func (g *gdb) memory(gva uint64, n int) ([]byte, error) {
	var data []byte
	for n > 0 {
		part := min(n, gdbBytes)
		answer, err := g.ask(fmt.Sprintf("m%x,%x", gva, part))
		if err != nil {
			return nil, err
		}
		bytes, err := hex.DecodeString(answer)
		if err != nil || len(bytes) != part {
			return nil, fmt.Errorf("gdbstub: %d bytes at %#x: %d bytes, %v", part, gva, len(bytes), err)
		}
		data = append(data, bytes...)
		gva += uint64(part)
		n -= part
	}
	return data, nil
}

// close lets the guest go.
func (g *gdb) close() error {
	err := g.stop()
	if err == nil {
		_, err = g.ask("D")
	}
	if end := g.conn.Close(); err == nil {
		err = end
	}
	return err
}
