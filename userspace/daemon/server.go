// SPDX-License-Identifier: MIT

package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// socketSuffix is of the name that the socket is made under.
const socketSuffix = ".new"

// server answers the HTTP/JSON API on a unix socket.
type server struct {
	path     string
	watcher  *watcher
	journal  *journal
	problems *problems
	log      *slog.Logger
	started  time.Time
	mode     Mode
	period   time.Duration
	// alive is how often a stream without findings gets a blank line, so that
	// both sides notice when the other is gone.
	alive time.Duration

	listener net.Listener
}

func (s *server) Name() string { return "api" }

// Init makes the socket, which only its owner may connect to. It is made
// under another name first: at no time may others connect.
func (s *server) Init(context.Context) error {
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	switch info, err := os.Lstat(s.path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("socket: %w", err)
	case info.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("socket: %s is there and is no socket: remove it, or name another path", s.path)
	default:
		conn, err := net.Dial("unix", s.path)
		if err == nil {
			conn.Close()
			return fmt.Errorf("socket: another process listens on %s: stop it, or name another path", s.path)
		}
	}
	temporary := s.path + socketSuffix
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("socket: %w", err)
	}
	mask := syscall.Umask(0o177)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	syscall.Umask(mask)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	listener.SetUnlinkOnClose(false)
	if err := os.Rename(temporary, s.path); err != nil {
		listener.Close()
		os.Remove(temporary)
		return fmt.Errorf("socket: %w", err)
	}
	s.listener = listener
	return nil
}

// Shutdown removes the socket.
func (s *server) Shutdown() error {
	if s.listener == nil {
		return nil
	}
	s.listener.Close()
	if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Run answers requests until ctx ends.
func (s *server) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(s.listener)
	if stop() {
		return fmt.Errorf("api: %w", err)
	}
	<-done
	return nil
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h func(http.ResponseWriter, *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				s.refuse(w, r, err)
			}
		})
	}
	handle("GET /v1/health", s.health)
	handle("GET /v1/vms", s.vms)
	handle("GET /v1/stats", s.stats)
	handle("GET /v1/findings", s.findings)
	handle("GET /v1/baselines/{vm}", s.baseline)
	handle("DELETE /v1/baselines/{vm}", s.rebaseline)
	handle("/", func(http.ResponseWriter, *http.Request) error {
		return &APIError{http.StatusNotFound, "there is no such resource or method: GET /v1/health, /v1/vms, /v1/stats, /v1/findings, /v1/baselines/VM; DELETE /v1/baselines/VM"}
	})
	return mux
}

func (s *server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil {
		return
	}
	status := http.StatusInternalServerError
	var refused *APIError
	switch {
	case errors.As(err, &refused):
		status = refused.Status
	case errors.Is(err, errUnknownVM):
		status = http.StatusNotFound
	case errors.Is(err, errAmbiguousVM):
		status = http.StatusConflict
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(struct {
		Error string `json:"error"`
	}{err.Error()})
}

func answer(w http.ResponseWriter, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(text, '\n'))
	return nil
}

func (s *server) health(w http.ResponseWriter, _ *http.Request) error {
	h := Health{Problems: s.problems.list(), PID: os.Getpid(), Started: s.started, Mode: s.mode, Period: s.period, Budget: s.watcher.budgetStatus()}
	h.OK = len(h.Problems) == 0
	s.watcher.mu.Lock()
	h.Module = s.watcher.module
	h.VMs = len(s.watcher.keepers)
	s.watcher.mu.Unlock()
	_, unwritten := s.journal.counts()
	h.Unwritten = int(unwritten)
	return answer(w, h)
}

func (s *server) vms(w http.ResponseWriter, r *http.Request) error {
	vms := []VMStatus{}
	accounts := s.watcher.watchAccounts(r.Context())
	for _, k := range s.watcher.all() {
		vms = append(vms, k.status(accounts))
	}
	return answer(w, vms)
}

func (s *server) stats(w http.ResponseWriter, r *http.Request) error {
	stats, err := s.watcher.stats(r.Context())
	if err != nil {
		return err
	}
	stats.Uptime = time.Since(s.started)
	return answer(w, stats)
}

func (s *server) baseline(w http.ResponseWriter, r *http.Request) error {
	k, err := s.watcher.find(r.PathValue("vm"))
	if err != nil {
		return err
	}
	b := s.journal.guest(k.id).Baseline
	if b == nil {
		return &APIError{http.StatusNotFound, fmt.Sprintf("VM %s has no baseline yet: %s", k.name(), k.status(nil).Reason)}
	}
	return answer(w, b)
}

func (s *server) rebaseline(w http.ResponseWriter, r *http.Request) error {
	k, err := s.watcher.find(r.PathValue("vm"))
	if err != nil {
		return err
	}
	if !k.rebase(r.Context()) {
		return fmt.Errorf("%s: %w", k.name(), errUnknownVM)
	}
	s.log.Info("the baseline is taken anew on request", "vm", k.name())
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// filter selects findings by a request's parameters.
type filter struct {
	vm    string
	after uint64
	since time.Time
}

func parseFilter(r *http.Request) (filter, error) {
	query := r.URL.Query()
	f := filter{vm: query.Get("vm")}
	if text := query.Get("since"); text != "" {
		var err error
		if f.after, err = strconv.ParseUint(text, 10, 64); err != nil {
			if f.since, err = time.Parse(time.RFC3339Nano, text); err != nil {
				return f, &APIError{http.StatusBadRequest, fmt.Sprintf("since=%q is neither a sequence number nor an RFC 3339 time such as 2026-01-31T12:00:00Z", text)}
			}
		}
	}
	return f, nil
}

func (f filter) selects(r Record) bool {
	if r.Time.Before(f.since) {
		return false
	}
	switch f.vm {
	case "", r.VM.Name, strconv.FormatUint(uint64(r.VM.ID), 10):
		return true
	}
	return r.VM.UUID != "" && strings.EqualFold(f.vm, r.VM.UUID)
}

func (s *server) findings(w http.ResponseWriter, r *http.Request) error {
	f, err := parseFilter(r)
	if err != nil {
		return err
	}
	switch follow := r.URL.Query().Get("follow"); follow {
	case "", "0":
	case "1":
		return s.follow(w, r, f)
	default:
		return &APIError{http.StatusBadRequest, fmt.Sprintf("follow=%q: give 1, or leave it out", follow)}
	}
	found := []Record{}
	for {
		records, err := s.journal.after(f.after, batch)
		if err != nil {
			return err
		}
		if len(records) == 0 {
			return answer(w, found)
		}
		for _, record := range records {
			if f.selects(record) {
				found = append(found, record)
			}
		}
		f.after = records[len(records)-1].Seq
	}
}

// follow streams findings, at the pace of the reader.
func (s *server) follow(w http.ResponseWriter, r *http.Request, f filter) error {
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := http.NewResponseController(w)
	encoder := json.NewEncoder(w)
	blank := time.NewTicker(s.alive)
	defer blank.Stop()
	if err := out.Flush(); err != nil {
		return nil
	}
	for {
		changed := s.journal.change()
		records, err := s.journal.after(f.after, batch)
		if err != nil {
			s.log.Error("a stream of findings ends", "error", err)
			return nil
		}
		for _, record := range records {
			if f.selects(record) && encoder.Encode(record) != nil {
				return nil
			}
			f.after = record.Seq
		}
		if len(records) > 0 {
			if out.Flush() != nil {
				return nil
			}
			continue
		}
		select {
		case <-changed:
		case <-blank.C:
			if _, err := w.Write([]byte("\n")); err != nil || out.Flush() != nil {
				return nil
			}
		case <-r.Context().Done():
			return nil
		}
	}
}
