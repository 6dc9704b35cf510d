// SPDX-License-Identifier: MIT

package peers

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// stub answers as QEMU's gdbstub does, with memory that holds its addresses'
// lowest bytes, and tells once more than it is asked that the guest stopped.
func stub(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		say := func(packet string) {
			var sum byte
			for i := range len(packet) {
				sum += packet[i]
			}
			fmt.Fprintf(conn, "$%s#%02x", packet, sum)
		}
		for {
			c, err := in.ReadByte()
			if err != nil {
				return
			}
			switch c {
			case '+':
				continue
			case 3:
				say("T02thread:01;")
				continue
			}
			packet, err := in.ReadString('#')
			if err != nil {
				return
			}
			in.Discard(2)
			conn.Write([]byte{'+'})
			var at uint64
			var n int
			switch {
			case packet == "?#":
				say("T05thread:01;")
				say("T02thread:01;")
			case packet == "g#":
				say(strings.Repeat("00", 200))
			case packet == "D#":
				say("OK")
			case packet == "c#":
			default:
				if _, err := fmt.Sscanf(packet, "m%x,%x#", &at, &n); err != nil || at == 0 {
					say("E14")
					continue
				}
				data := make([]byte, n)
				for i := range data {
					data[i] = byte(at) + byte(i)
				}
				say(fmt.Sprintf("%x", data))
			}
		}
	}()
}

func TestGDB(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gdb")
	stub(t, path)
	g, err := dialGDB(path)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := g.run(); err != nil {
			t.Fatal(err)
		}
		if err := g.stop(); err != nil {
			t.Fatal(err)
		}
		if registers, err := g.ask("g"); err != nil || len(registers) != 400 {
			t.Errorf("registers %q, %v", registers, err)
		}
		got, err := g.memory(0x1003, 2500)
		want := make([]byte, 2500)
		for i := range want {
			want[i] = byte(3 + i)
		}
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("memory: %v", err)
		}
	}
	if _, err := g.memory(0, 8); err == nil || !strings.Contains(err.Error(), "error 14") {
		t.Errorf("memory that is not there: %v", err)
	}
	if err := g.run(); err != nil {
		t.Fatal(err)
	}
	if err := g.close(); err != nil {
		t.Error(err)
	}
}

func TestSummarize(t *testing.T) {
	row := func(peer string, cost float64) Row {
		return Row{Peer: peer, Looks: 10, Instructions: []float64{cost}, Without: []int64{1000}, With: []int64{1010}}
	}
	held := row(GDBStub, 300000)
	held.Held = []int64{100000}
	run := &Run{Rows: []Row{row(QMPSave, 1000000), row(QMPPrint, 2000000), held, row(Readv, 500000), row(Poll, 100000), row(Watch, 7000)},
		Objects: []Size{{"GDT", 128}}, Bytes: 128}
	s, err := Summarize(run)
	if err != nil {
		t.Fatal(err)
	}
	if s.QMPCostRatio != 0.007 || !s.Met() || s.Costs[2].HeldS != 0.0001 {
		t.Errorf("%+v", s)
	}
	dir := t.TempDir()
	if err := s.Write(dir, run); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil || !strings.Contains(string(text), "costs **1/143**") {
		t.Errorf("%v\n%s", err, text)
	}
	if _, err := Summarize(&Run{Rows: run.Rows[2:]}); err == nil {
		t.Error("without QMP there is nothing to compare with")
	}
}
