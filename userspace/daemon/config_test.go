// SPDX-License-Identifier: MIT

package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

func TestConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	text := `
mode: watch
period: 250ms
findings: "-"
log_level: debug
symbols: /a
vms:
  web:
    period: 5ms
    ranges:
      - {name: ops, symbol: my_ops, length: 8}
      - {address: 0xffffffff81000000, length: 4096}
  AAAA-1:
    symbols: /b
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Default()
	if err := c.Load(path, true); err != nil {
		t.Fatal(err)
	}
	for _, arg := range []string{"mail=20ms", "2s"} {
		if err := c.SetPeriod(arg); err != nil {
			t.Error(err)
		}
	}
	for _, arg := range []string{"mail=/m=1", "./x=y"} {
		if err := c.SetSymbols(arg); err != nil {
			t.Error(err)
		}
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	ranges := []integrity.MemoryRange{{Name: "ops", Symbol: "my_ops", Length: 8}, {Address: 0xffffffff81000000, Length: 4096}}
	want := Config{
		Mode: ModeWatch, Period: 2 * time.Second, Socket: DefaultSocket, StateDir: DefaultStateDir, Findings: "-", Symbols: "./x=y",
		Relist: DefaultRelist, Verify: DefaultVerify, Text: DefaultText, Keep: DefaultKeep, LogLevel: slog.LevelDebug,
		VMs: map[string]VMConfig{
			"web": {Period: 5 * time.Millisecond, Ranges: ranges}, "AAAA-1": {Symbols: "/b"},
			"mail": {Period: 20 * time.Millisecond, Symbols: "/m=1"},
		},
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, test := range []struct {
		name, uuid string
		want       VMConfig
	}{
		{"other", "", VMConfig{Period: 2 * time.Second, Symbols: "./x=y"}},
		{"web", "aaaa-1", VMConfig{Period: 5 * time.Millisecond, Symbols: "/b", Ranges: ranges}},
		{"mail", "", VMConfig{Period: 20 * time.Millisecond, Symbols: "/m=1"}},
		{"", "", VMConfig{Period: 2 * time.Second, Symbols: "./x=y"}},
	} {
		if diff := cmp.Diff(test.want, c.vm(test.name, test.uuid)); diff != "" {
			t.Errorf("%s: -want +got:\n%s", test.name, diff)
		}
	}
}

// commented is a setting that is commented out, not prose.
var commented = regexp.MustCompile(`^#([a-z_]+:|  )`)

// The example is right, and what it shows as defaults are.
func TestExampleConfig(t *testing.T) {
	path := filepath.Join("..", "cmd", "kvmaccessd", "kvmaccessd.yaml")
	c := Default()
	if err := c.Load(path, true); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), c); diff != "" {
		t.Errorf("as it is: -default +got:\n%s", diff)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	all := filepath.Join(t.TempDir(), "all.yaml")
	lines := strings.Split(string(text), "\n")
	for i, line := range lines {
		if commented.MatchString(line) {
			lines[i] = line[1:]
		}
	}
	if err := os.WriteFile(all, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Load(all, true); err != nil {
		t.Fatal(err)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	if len(c.VMs) != 2 || c.VMs["web"].Period != 100*time.Millisecond {
		t.Errorf("VMs: %+v", c.VMs)
	}
	c.VMs, c.Symbols = nil, ""
	want := Default()
	if err := want.Check(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Errorf("defaults in comments: -default +got:\n%s", diff)
	}
}

func TestConfigErrors(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"unknown setting":          {"period: 1s\nperiode: 2s\n", "line 2: there is no setting periode here"},
		"unknown setting of VM":    {"vms:\n  web:\n    perod: 1s\n", "line 3: there is no setting perod here"},
		"no unit":                  {"period: often\n", "line 1"},
		"number as period":         {"period: 1\n", "line 1: cannot unmarshal !!int `1` as a duration (write it with a unit: 500ms, 1s)"},
		"period too short":         {"period: 499us\n", "period is 499µs: in watch mode periods go from 500µs to 1h0m0s"},
		"period too short to poll": {"mode: poll\nperiod: 999us\n", "period is 999µs: in poll mode periods go from 1ms to 24h0m0s"},
		"no such mode":             {"mode: guess\n", `mode is "guess": it must be watch or poll`},
		"budget and period":        {"cpu_budget: 0.35%\nperiod: 1s\n", "cpu_budget is 0.35%, which chooses the period, and period is 1s: give one of them"},
		"budget and period of VM":  {"cpu_budget: 0.35%\nvms: {web: {period: 1s}}\n", `period of VM "web" is 1s`},
		"budget in poll mode":      {"cpu_budget: 1%\nmode: poll\n", "needs mode watch"},
		"budget too small":         {"cpu_budget: 0.001%\n", "0.01% to 100%"},
		"budget is no part":        {"cpu_budget: 0.0035\n", "line 1: \"0.0035\" is no part of a CPU: write it with %, as 0.35%"},
		"period of VM too short":   {"vms: {web: {period: 10us}}\n", `period of VM "web" is 10µs`},
		"negative period":          {"period: -1s\n", "period is -1s"},
		"twice":                    {"period: 1s\nperiod: 2s\n", "line 2"},
		"not YAML":                 {"period: [\n", "line 1"},
		"two documents":            {"period: 1s\n---\nperiod: 2s\n", "more than one YAML document"},
		"empty range":              {"vms: {web: {ranges: [{symbol: a}]}}\n", `range 1 of VM "web" is 0 bytes long: 1 to 28672`},
		"range of nothing":         {"vms: {web: {ranges: [{length: 1}]}}\n", "give either a symbol or an address"},
		"level":                    {"log_level: loud\n", "loud"},
		"keep nothing":             {"keep: 0\n", "keep is 0"},
		"relist":                   {"relist: 1ms\n", "relist is 1ms"},
		"text":                     {"text: 10ms\n", "text is 10ms"},
		"verify":                   {"verify: 10ms\n", "verify is 10ms"},
		"socket path":              {"socket: /" + strings.Repeat("x", 120) + "\n", "at most 103"},
		"no socket":                {"socket: ''\n", "socket is empty"},
		"no state":                 {"state_dir: ''\n", "state_dir is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "c.yaml")
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			c := Default()
			err := c.Load(path, true)
			if err == nil {
				err = c.Check()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if err != nil && strings.Contains(err.Error(), "daemon.") {
				t.Errorf("%q speaks of Go types", err)
			}
		})
	}
	c := Default()
	absent := filepath.Join(t.TempDir(), "absent")
	if err := c.Load(absent, false); err != nil {
		t.Errorf("an absent file that nobody asked for: %v", err)
	}
	if err := c.Load(absent, true); err == nil {
		t.Error("an absent file that was asked for is no error")
	}
	for _, arg := range []string{"", "fast", "=1s", "web="} {
		if err := c.SetPeriod(arg); err == nil {
			t.Errorf("SetPeriod(%q) succeeded", arg)
		}
	}
	for _, arg := range []string{"=x", "web="} {
		if err := c.SetSymbols(arg); err == nil {
			t.Errorf("SetSymbols(%q) succeeded", arg)
		}
	}
}
