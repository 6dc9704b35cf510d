// SPDX-License-Identifier: MIT

package inside

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	loops, err := StartSoakers()
	if err != nil {
		t.Fatal(err)
	}
	defer loops.Stop()
	// How long it takes to wake up is the machine's affair, and whether a loop
	// of the lowest priority gets any time: it gets some in the end.
	for length, counted := 50*time.Millisecond, false; !counted; length *= 2 {
		w, err := Window(t.Context(), loops.Count, length)
		if err != nil {
			t.Fatal(err)
		}
		if w.Elapsed < length || length > time.Minute {
			t.Fatalf("in a window of %v: %+v", length, w)
		}
		counted = w.Loops > 0
	}
	ended := errors.New("ended")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(ended)
	if _, err := Window(ctx, loops.Count, time.Hour); !errors.Is(err, ended) {
		t.Errorf("a window that was given up: %v", err)
	}
}
