// SPDX-License-Identifier: MIT

//go:build kvmhost && guests

package tests

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	fixture "github.com/kvmaccess/kvmaccess/vm-fixtures/guest"
)

// As TestAttach, with guests of every kernel there is, page tables isolated or
// not and of 4 or 5 levels, and with one processor or several.
func TestAttachKernels(t *testing.T) {
	kernels, err := fixture.Kernels()
	if err != nil {
		t.Fatal(err)
	}
	if len(kernels) == 0 {
		t.Fatal("no kernels besides the host's own: use 'vmfixture run --guest'")
	}
	if !openKVM(t).HasLA57() {
		t.Fatal("the host's processor has no 5-level paging: boot it with 'vmfixture run --cpu max'")
	}
	c := newClient(t)
	for _, kernel := range kernels {
		for _, way := range []struct {
			name, line, cpu string
			cpus            int
			format          guest.Format
			spin            bool
		}{
			{"pti, 4 levels, 1 CPU", "pti=on", "host,la57=off", 1, guest.Format4Level, true},
			{"no pti, 4 levels, 4 CPUs", "nopti", "host,la57=off", 4, guest.Format4Level, false},
			{"pti, 5 levels, 4 CPUs", "pti=on", "host", 4, guest.Format5Level, true},
			{"no pti, 5 levels, 1 CPU", "nopti", "host", 1, guest.Format5Level, false},
		} {
			t.Run(kernel+", "+way.name, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
				defer cancel()
				g, err := fixture.Start(ctx, fixture.Config{Name: "stock", Kernel: kernel, CPUs: way.cpus, Append: way.line, CPU: way.cpu})
				if err != nil {
					t.Fatal(err)
				}
				defer func() {
					if err := g.Kill(); err != nil {
						t.Error(err)
					}
				}()
				src := live(t, c, vmOf(t, c, g))
				wanted := anyway
				if way.spin {
					if err := g.Spin(ctx, way.cpus); err != nil {
						t.Fatal(err)
					}
					wanted = inUserMode
				}
				k := attached(t, src, way.name, wanted)
				if way.spin {
					if err := g.Spin(ctx, 0); err != nil {
						t.Fatal(err)
					}
				}
				isHonest(t, k)
				format := way.format
				if kernel == "5.10" { // Debian's is built without CONFIG_X86_5LEVEL
					format = guest.Format4Level
				}
				if k.Space.Mode.Format != format || len(k.CPUs) != way.cpus || k.Bases.Text == 0 {
					t.Errorf("%v, %d vCPUs, text moved by %#x; want %v, %d vCPUs, moved", k.Space.Mode.Format, len(k.CPUs), k.Bases.Text, format, way.cpus)
				}
				info, err := g.Read(ctx, "/proc/cpuinfo")
				if err != nil {
					t.Fatal(err)
				}
				if five := bytes.Contains(info, []byte(" la57")); five != (format == guest.Format5Level) {
					t.Errorf("the guest says that it has 5 levels: %t; its page tables are %v", five, format)
				}
				for i := range k.CPUs {
					if isolated := k.CPUs[i].CR3&0x1000 != 0; way.spin && !isolated {
						t.Errorf("vCPU %d was in user mode with CR3 %#x: page tables are not isolated", i, k.CPUs[i].CR3)
					}
				}
				sameSymbols(t, g, k)
				sameTypes(t, g, k, 8)
				sameObjects(t, g, k)
			})
		}
	}
}
