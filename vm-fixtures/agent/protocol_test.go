// SPDX-License-Identifier: MIT

package agent

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
)

// answer plays a guest that answers one request.
func answer(t *testing.T, p Reply) (client net.Conn, got chan Request) {
	t.Helper()
	client, server := net.Pipe()
	t.Cleanup(func() { client.Close(); server.Close() })
	got = make(chan Request, 1)
	go func() {
		var q Request
		data, err := read(bufio.NewReader(server), &q, func() int { return q.Size })
		if err != nil {
			t.Error(err)
		}
		q.Data = data
		got <- q
		p.Size = len(p.Data)
		if err := write(server, p, p.Data); err != nil {
			t.Error(err)
		}
	}()
	return client, got
}

func TestAsk(t *testing.T) {
	sent := Request{Op: OpWrite, Path: "/x", Data: []byte("a\nb\x00")}
	client, got := answer(t, Reply{Data: []byte("\n\n{}"), Log: []string{"one"}})
	p, err := Ask(client, bufio.NewReader(client), sent)
	if err != nil {
		t.Fatal(err)
	}
	if q := <-got; q.Op != sent.Op || q.Path != sent.Path || !bytes.Equal(q.Data, sent.Data) {
		t.Errorf("the guest got %+v", q)
	}
	if string(p.Data) != "\n\n{}" || len(p.Log) != 1 {
		t.Errorf("reply %+v", p)
	}
}

func TestAskError(t *testing.T) {
	client, _ := answer(t, Reply{Error: "no such file"})
	if _, err := Ask(client, bufio.NewReader(client), Request{Op: OpRead}); err == nil || err.Error() != "no such file" {
		t.Errorf("%v, want the guest's own words", err)
	}
}

func TestReadMalformed(t *testing.T) {
	for _, text := range []string{"", "{", "{}", "nonsense\n", `{"size":-1}` + "\n", `{"size":99999999999}` + "\n", `{"size":5}` + "\nabc"} {
		var p Reply
		if _, err := read(bufio.NewReader(strings.NewReader(text)), &p, func() int { return p.Size }); err == nil {
			t.Errorf("%q is taken for a message", text)
		}
	}
	var p Reply
	if _, err := read(bufio.NewReader(io.LimitReader(strings.NewReader("{}\n"), 3)), &p, func() int { return p.Size }); err != nil {
		t.Error(err)
	}
}
