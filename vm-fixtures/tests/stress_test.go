// SPDX-License-Identifier: MIT

//go:build kvmhost

package tests

import (
	"context"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/vm-fixtures/host"
	loads "github.com/kvmaccess/kvmaccess/vm-fixtures/stress"
)

// A short version of each load that "make test-sanitizers" puts the module
// under for long; what needs a kernel of its own is there alone.
func TestStress(t *testing.T) {
	for _, tt := range []struct {
		name string
		run  func(context.Context) (*loads.Report, error)
	}{
		{"fuzz", func(ctx context.Context) (*loads.Report, error) {
			return loads.Fuzz(ctx, loads.FuzzConfig{Messages: 20_000, Seed: 1})
		}},
		{"lifecycle", func(ctx context.Context) (*loads.Report, error) {
			return loads.Lifecycle(ctx, loads.LifecycleConfig{Rounds: 100, Kills: 3, Seed: 1})
		}},
		{"reload", func(ctx context.Context) (*loads.Report, error) {
			return loads.Reload(ctx, loads.ReloadConfig{Rounds: 5, Module: payload(host.ModuleFile)})
		}},
		{"hostile guest", func(ctx context.Context) (*loads.Report, error) {
			return loads.Hostile(ctx, loads.HostileConfig{Duration: 3 * time.Second, Seed: 1})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := tt.run(testContext(t))
			t.Log(r)
			if err != nil {
				t.Error(err)
			}
		})
	}
}
