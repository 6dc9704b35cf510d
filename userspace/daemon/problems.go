// SPDX-License-Identifier: MIT

package daemon

import (
	"cmp"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// problems is what keeps the daemon from doing all of its work. Each one is
// logged once when it comes and once when it goes.
type problems struct {
	log *slog.Logger
	now func() time.Time

	mu  sync.Mutex
	all map[string]Problem
}

func newProblems(log *slog.Logger) *problems {
	return &problems{log: log, now: time.Now, all: map[string]Problem{}}
}

// set says what is wrong with subject.
func (p *problems) set(subject, message string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, had := p.all[subject]
	if had && old.Message == message {
		return
	}
	next := Problem{Subject: subject, Message: message, Since: p.now()}
	if had {
		next.Since = old.Since
	}
	p.all[subject] = next
	p.log.Error(message, "subject", subject)
}

// clear says that nothing is wrong with subject any more.
func (p *problems) clear(subject string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, had := p.all[subject]
	if !had {
		return
	}
	delete(p.all, subject)
	p.log.Info("resolved: "+old.Message, "subject", subject, "after", p.now().Sub(old.Since).Round(time.Millisecond))
}

func (p *problems) list() []Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]Problem, 0, len(p.all))
	for _, problem := range p.all {
		list = append(list, problem)
	}
	slices.SortFunc(list, func(a, b Problem) int { return cmp.Compare(a.Subject, b.Subject) })
	return list
}
