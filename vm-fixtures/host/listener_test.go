// SPDX-License-Identifier: MIT

package host

import (
	"bytes"
	"slices"
	"testing"
)

func TestListener(t *testing.T) {
	for _, tt := range []struct {
		text          string
		heard, passed []string
	}{
		{text: "ok\n"},
		{text: "FAIL\n    guest web1: EOF: " + SilentGuest + "\nQEMU:\n", heard: []string{SilentGuest}},
		{text: SilentGuest[1:] + "\n"},
		{text: "    hostmemory_test.go:608: vCPU 0: " + tripleFaulted + "\n--- FAIL: TestA (1.0s)\n", heard: []string{tripleFaulted}},
		{text: StuckGuest + "\n" + StuckGuest + "\n" + SilentGuest + "\n", heard: []string{StuckGuest, SilentGuest}},
		{text: tripleFaulted[1:] + "\n"},
		{text: "=== RUN   TestA\n--- PASS: TestA (0.01s)\n    --- PASS: TestA/sub (0.00s)\n--- SKIP: TestB (0.00s)\n--- FAIL: TestC (0.00s)\n",
			passed: []string{"TestA", "TestB"}},
		{text: "--- PASS: TestA"},
		{text: "says --- PASS: TestA (0.01s)\n"},
		{text: ""},
	} {
		for _, size := range []int{1, 7, 1000} {
			var b bytes.Buffer
			l := &listener{Writer: &b}
			for rest := tt.text; rest != ""; {
				n := min(size, len(rest))
				if _, err := l.Write([]byte(rest[:n])); err != nil {
					t.Fatal(err)
				}
				rest = rest[n:]
			}
			if !slices.Equal(l.heard, tt.heard) || !slices.Equal(l.passed, tt.passed) || b.String() != tt.text {
				t.Errorf("%q by %d: heard %q, passed %q, wrote %q", tt.text, size, l.heard, l.passed, b.String())
			}
		}
	}
}

func TestWithoutPassed(t *testing.T) {
	for _, tt := range []struct{ args, passed, want []string }{
		{[]string{"demo", "-x"}, nil, []string{"demo", "-x"}},
		{[]string{"t.test", "-test.v=true", "-samples", "40"}, []string{"TestA", "TestB"},
			[]string{"t.test", "-test.skip=^(TestA|TestB)$", "-test.v=true", "-samples", "40"}},
		{[]string{"t.test", "-test.run=^Test", "-test.skip=^TestX$/(y|z)", "-test.v=true"}, []string{"TestA"},
			[]string{"t.test", "-test.skip=^TestX$/(y|z)|^(TestA)$", "-test.run=^Test", "-test.v=true"}},
		{[]string{"t.test", "-test.skip=^(TestA)$"}, []string{"TestB"}, []string{"t.test", "-test.skip=^(TestA)$|^(TestB)$"}},
	} {
		if got := withoutPassed(tt.args, tt.passed); !slices.Equal(got, tt.want) {
			t.Errorf("%q without %q: %q, want %q", tt.args, tt.passed, got, tt.want)
		}
	}
}
