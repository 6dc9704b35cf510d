// SPDX-License-Identifier: MIT

// Command benchinside takes the samples of a plan on the KVM host that it runs
// on, one that vmfixture booted. It reads the plan from its argument, as JSON,
// and writes what it finds to standard output as lines of JSON.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/kvmaccess/kvmaccess/bench/inside"
	"github.com/kvmaccess/kvmaccess/bench/sample"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "benchinside:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("usage: benchinside PLAN, with the plan as JSON")
	}
	var plan sample.Plan
	decoder := json.NewDecoder(bytes.NewReader([]byte(args[0])))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&plan); err != nil {
		return fmt.Errorf("plan: %w", err)
	}
	out := json.NewEncoder(os.Stdout)
	return inside.Run(ctx, plan, slog.Default(), func(m inside.Message) error { return out.Encode(m) })
}
