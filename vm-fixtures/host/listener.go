// SPDX-License-Identifier: MIT

package host

import (
	"bytes"
	"io"
	"regexp"
	"slices"
	"strings"
)

// emulators are what a command says where the emulator is at fault.
var emulators = []string{SilentGuest, StuckGuest, tripleFaulted}

// listener follows the lines that are written to another.
type listener struct {
	io.Writer
	line   []byte   // that has not ended
	heard  []string // emulators
	passed []string // tests of a Go program, skipped ones included
}

// verdict is what "go test -v" says of a test that has no parent and did not fail.
var verdict = regexp.MustCompile(`^--- (?:PASS|SKIP): (\w+) \(`)

func (l *listener) Write(p []byte) (int, error) {
	for rest := p; ; {
		line, after, ended := bytes.Cut(rest, []byte("\n"))
		l.line = append(l.line, line...)
		if !ended {
			break
		}
		l.hear(string(l.line))
		l.line, rest = l.line[:0], after
	}
	return l.Writer.Write(p)
}

func (l *listener) hear(line string) {
	for _, s := range emulators {
		if strings.Contains(line, s) && !slices.Contains(l.heard, s) {
			l.heard = append(l.heard, s)
		}
	}
	if m := verdict.FindStringSubmatch(line); m != nil {
		l.passed = append(l.passed, m[1])
	}
}

// skip is the option of Go's test programs for those to be left out.
const skip = "-test.skip="

// withoutPassed is a test program's command line with some more tests left out.
func withoutPassed(args, passed []string) []string {
	if len(passed) == 0 {
		return args
	}
	var kept, skipped []string
	for _, a := range args[1:] {
		if s, ok := strings.CutPrefix(a, skip); ok {
			skipped = []string{s} // the last one counts
		} else {
			kept = append(kept, a)
		}
	}
	skipped = append(skipped, "^("+strings.Join(passed, "|")+")$")
	return slices.Concat(args[:1], []string{skip + strings.Join(skipped, "|")}, kept)
}
