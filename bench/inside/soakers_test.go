// SPDX-License-Identifier: MIT

package inside

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	loops, err := startSoakers()
	if err != nil {
		t.Fatal(err)
	}
	defer loops.stop()
	const length = 50 * time.Millisecond
	w, err := loops.window(t.Context(), length)
	if err != nil {
		t.Fatal(err)
	}
	// How long it takes to wake up is the machine's affair.
	if w.Elapsed < length || w.Loops == 0 {
		t.Errorf("%+v", w)
	}
	ended := errors.New("ended")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(ended)
	if _, err := loops.window(ctx, time.Hour); !errors.Is(err, ended) {
		t.Errorf("a window that was given up: %v", err)
	}
}
