// SPDX-License-Identifier: MIT

package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
)

// qmp is a connection to QEMU's machine protocol (docs/interop/qmp-spec of
// QEMU), as far as tests need it: one command at a time, events dropped.
type qmp struct {
	mu   sync.Mutex
	conn net.Conn
	dec  *json.Decoder
}

func dialQMP(ctx context.Context, g *Guest, path string) (*qmp, error) {
	conn, err := g.dial(ctx, path)
	if err != nil {
		return nil, err
	}
	q := &qmp{conn: conn, dec: json.NewDecoder(conn)}
	var greeting struct{ QMP json.RawMessage }
	if err := q.dec.Decode(&greeting); err != nil {
		return nil, fmt.Errorf("QMP greeting: %w", err)
	}
	if _, err := q.execute("qmp_capabilities", nil); err != nil {
		return nil, err
	}
	return q, nil
}

func (q *qmp) execute(command string, arguments any) (json.RawMessage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	if err := json.NewEncoder(q.conn).Encode(request); err != nil {
		return nil, fmt.Errorf("QMP %s: %w", command, err)
	}
	for {
		var reply struct {
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := q.dec.Decode(&reply); err != nil {
			return nil, fmt.Errorf("QMP %s: %w", command, err)
		}
		switch {
		case reply.Error != nil:
			return nil, fmt.Errorf("QMP %s: %s", command, reply.Error.Desc)
		case reply.Return != nil:
			return reply.Return, nil
		}
	}
}

// QMP executes a command of QEMU's machine protocol.
func (g *Guest) QMP(ctx context.Context, command string, arguments any) (json.RawMessage, error) {
	stop := context.AfterFunc(ctx, func() { g.qmp.conn.Close() })
	defer stop()
	return g.qmp.execute(command, arguments)
}

// Monitor executes a line as one would type it at QEMU's own monitor.
func (g *Guest) Monitor(ctx context.Context, line string) (string, error) {
	raw, err := g.QMP(ctx, "human-monitor-command", map[string]string{"command-line": line})
	if err != nil {
		return "", err
	}
	var text string
	err = json.Unmarshal(raw, &text)
	return text, err
}

// Pause stops all vCPUs, Resume lets them run.
func (g *Guest) Pause(ctx context.Context) error {
	_, err := g.QMP(ctx, "stop", nil)
	return err
}

// Resume lets all vCPUs run after Pause.
func (g *Guest) Resume(ctx context.Context) error {
	_, err := g.QMP(ctx, "cont", nil)
	return err
}
