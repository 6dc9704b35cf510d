// SPDX-License-Identifier: MIT

package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// Defaults of Config.
const (
	DefaultConfig   = "/etc/kvmaccess/kvmaccessd.yaml"
	DefaultStateDir = "/var/lib/kvmaccess"
	DefaultFindings = "findings.jsonl" // in the state directory
	DefaultPeriod   = time.Second
	DefaultRelist   = time.Minute
	DefaultVerify   = 5 * time.Minute
	DefaultKeep     = 100_000
	DefaultText     = 10 * time.Second
)

// Mode says who compares.
type Mode string

const (
	// ModeWatch: the module compares, and the daemon looks when it finds a
	// change.
	ModeWatch Mode = "watch"
	// ModePoll: the daemon reads each period and compares.
	ModePoll Mode = "poll"
)

// Bounds of a period in poll mode, and in watch mode.
const (
	MinPeriod      = time.Millisecond
	MaxPeriod      = 24 * time.Hour
	MinWatchPeriod = kvmaccess.WatchMinPeriod * time.Nanosecond
	MaxWatchPeriod = kvmaccess.WatchMaxPeriod * time.Nanosecond
)

// Config is what the daemon is told: defaults, then the file, then flags.
type Config struct {
	// Mode is ModeWatch or ModePoll. Where the module cannot watch, it is
	// ModePoll.
	Mode Mode `yaml:"mode"`
	// Period at which each VM is checked, MinPeriod to MaxPeriod, in watch mode
	// MinWatchPeriod to MaxWatchPeriod; 0: DefaultPeriod, or as CPUBudget has it.
	Period time.Duration `yaml:"period"`
	// CPUBudget is what monitoring may take of a CPU, in watch mode: periods are
	// chosen by it. 0: they are given.
	CPUBudget Share `yaml:"cpu_budget"`
	// Socket of the API.
	Socket string `yaml:"socket"`
	// StateDir is a directory for what survives a restart.
	StateDir string `yaml:"state_dir"`
	// Findings is the file that findings are appended to, "-" for standard
	// output; "" for DefaultFindings in StateDir.
	Findings string `yaml:"findings"`
	// Symbols is a symbol file (kallsyms or System.map) for all guests that
	// have none of their own; "": none.
	Symbols string `yaml:"symbols"`
	// Relist is how often the VMs are listed anew, in case an event was lost.
	Relist time.Duration `yaml:"relist"`
	// Verify is in how long all that guests' symbols and types were made of is
	// looked at once, a little with each check, 1 s or more: its being
	// overwritten is found by then.
	Verify time.Duration `yaml:"verify"`
	// Text is in how long all of a kernel's code and read-only data is compared
	// once, in watch mode, 1 s or more; 0: it is not. Under CPUBudget it is the
	// shortest that is chosen.
	Text time.Duration `yaml:"text"`
	// Keep is how many findings the API can look back on.
	Keep uint64 `yaml:"keep"`
	// LogLevel is debug, info, warn or error.
	LogLevel slog.Level `yaml:"log_level"`
	// VMs are settings of single VMs, by name or UUID.
	VMs map[string]VMConfig `yaml:"vms"`
}

// VMConfig is what differs for one VM.
type VMConfig struct {
	Period  time.Duration           `yaml:"period"`  // 0: Config.Period
	Symbols string                  `yaml:"symbols"` // "": Config.Symbols
	Ranges  []integrity.MemoryRange `yaml:"ranges"`  // further guest memory to watch; needs symbols if by symbol
}

// Default is the configuration without a file and flags.
func Default() Config {
	return Config{
		Mode:     ModeWatch,
		Socket:   DefaultSocket,
		StateDir: DefaultStateDir,
		Relist:   DefaultRelist,
		Verify:   DefaultVerify,
		Text:     DefaultText,
		Keep:     DefaultKeep,
	}
}

// Load reads a file over c. A missing one is an error only if required.
func (c *Config) Load(path string, required bool) error {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !required {
		return nil
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil && err != io.EOF {
		return fmt.Errorf("configuration %s: %s", path, plain(err))
	}
	if err := dec.Decode(new(Config)); err != io.EOF {
		return fmt.Errorf("configuration %s: it has more than one YAML document", path)
	}
	return nil
}

var yamlTypes = regexp.MustCompile(`field (\S+) not found in type \S+`)

// plain rewords errors of the YAML library that speak of Go types.
func plain(err error) string {
	var bad *yaml.TypeError
	if !errors.As(err, &bad) {
		return strings.TrimPrefix(err.Error(), "yaml: ")
	}
	lines := make([]string, len(bad.Errors))
	for i, line := range bad.Errors {
		line = yamlTypes.ReplaceAllString(line, "there is no setting $1 here")
		line = strings.ReplaceAll(line, "into time.Duration", "as a duration (write it with a unit: 500ms, 1s)")
		lines[i] = line
	}
	return strings.Join(lines, "; ")
}

// Check says what is wrong with the configuration, and fills in what depends
// on other settings.
func (c *Config) Check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	least, most := MinPeriod, MaxPeriod
	switch c.Mode {
	case ModePoll:
	case ModeWatch:
		least, most = MinWatchPeriod, MaxWatchPeriod
	default:
		bad("mode is %q: it must be %s or %s", c.Mode, ModeWatch, ModePoll)
	}
	period := func(what string, p time.Duration) {
		if p < least || p > most {
			bad("%s is %v: in %s mode periods go from %v to %v", what, p, c.Mode, least, most)
		}
	}
	switch {
	case c.CPUBudget != 0 && c.Mode == ModePoll:
		bad("cpu_budget needs mode %s: in poll mode give a period", ModeWatch)
	case c.CPUBudget != 0 && (c.CPUBudget < MinBudget || c.CPUBudget > MaxBudget):
		bad("cpu_budget is %v: it goes from %v to %v of a CPU", c.CPUBudget, MinBudget, MaxBudget)
	case c.CPUBudget != 0 && c.Period != 0:
		bad("cpu_budget is %v, which chooses the period, and period is %v: give one of them", c.CPUBudget, c.Period)
	case c.CPUBudget == 0 && c.Period == 0:
		c.Period = DefaultPeriod
	}
	if c.Period != 0 {
		period("period", c.Period)
	}
	if c.Relist < 100*time.Millisecond {
		bad("relist is %v: it must be 100ms or more", c.Relist)
	}
	if c.Verify < time.Second {
		bad("verify is %v: it must be 1s or more", c.Verify)
	}
	if c.Text != 0 && c.Text < time.Second {
		bad("text is %v: it must be 1s or more, or 0", c.Text)
	}
	if c.Keep == 0 {
		bad("keep is 0: at least one finding must be kept")
	}
	if c.StateDir == "" {
		bad("state_dir is empty: name a directory")
	}
	if c.Socket == "" {
		bad("socket is empty: name a path")
	} else if len(c.Socket) > maxSocketPath {
		bad("socket %s is %d bytes long: a unix socket's path has at most %d", c.Socket, len(c.Socket), maxSocketPath)
	}
	if c.Findings == "" {
		c.Findings = filepath.Join(c.StateDir, DefaultFindings)
	}
	for name, vm := range c.VMs {
		if vm.Period != 0 && c.CPUBudget != 0 {
			bad("cpu_budget is %v, which chooses the periods, and the period of VM %q is %v: give one of them", c.CPUBudget, name, vm.Period)
		} else if vm.Period != 0 {
			period(fmt.Sprintf("period of VM %q", name), vm.Period)
		}
		for i, r := range vm.Ranges {
			if r.Length == 0 || r.Length > kvmaccess.MaxBytes {
				bad("range %d of VM %q is %d bytes long: 1 to %d", i+1, name, r.Length, kvmaccess.MaxBytes)
			}
			if (r.Symbol == "") == (r.Address == 0) {
				bad("range %d of VM %q: give either a symbol or an address", i+1, name)
			}
		}
	}
	return errors.Join(errs...)
}

// maxSocketPath leaves room for the name that the socket is made under, in
// the 107 bytes of unix(7).
const maxSocketPath = 107 - len(socketSuffix)

// SetSymbols takes what --symbols is given: FILE, or VM=FILE for one VM by
// name or UUID.
func (c *Config) SetSymbols(arg string) error {
	name, file, ok := strings.Cut(arg, "=")
	if !ok || strings.Contains(name, "/") {
		c.Symbols = arg
		return nil
	}
	if name == "" || file == "" {
		return fmt.Errorf("%q is neither FILE nor VM=FILE", arg)
	}
	c.change(name, func(vm *VMConfig) { vm.Symbols = file })
	return nil
}

// SetPeriod takes what --period is given: DURATION, or VM=DURATION for one VM
// by name or UUID.
func (c *Config) SetPeriod(arg string) error {
	name, text, ok := strings.Cut(arg, "=")
	if !ok {
		text = arg
	}
	p, err := time.ParseDuration(text)
	if err != nil || ok && name == "" {
		return fmt.Errorf("%q is neither a duration with a unit (500ms, 1s) nor VM=DURATION", arg)
	}
	c.CPUBudget = 0 // which the file has
	if !ok {
		c.Period = p
		return nil
	}
	c.change(name, func(vm *VMConfig) { vm.Period = p })
	return nil
}

// SetBudget takes what --cpu-budget is given, which goes before periods in the
// file.
func (c *Config) SetBudget(arg string) error {
	share, err := ParseShare(arg)
	if err != nil {
		return err
	}
	if share == 0 {
		return fmt.Errorf("%q is nothing: it goes from %v to %v of a CPU", arg, MinBudget, MaxBudget)
	}
	c.CPUBudget, c.Period = share, 0
	for name := range c.VMs {
		c.change(name, func(vm *VMConfig) { vm.Period = 0 })
	}
	return nil
}

func (c *Config) change(name string, set func(*VMConfig)) {
	if c.VMs == nil {
		c.VMs = map[string]VMConfig{}
	}
	vm := c.VMs[name]
	set(&vm)
	c.VMs[name] = vm
}

// vm is the configuration of one VM. Settings for its UUID go before those for
// its name.
func (c *Config) vm(name, uuid string) VMConfig {
	vm := VMConfig{Period: c.Period, Symbols: c.Symbols}
	for _, key := range []string{name, strings.ToLower(uuid)} {
		if key == "" {
			continue
		}
		for id, own := range c.VMs {
			if id != key && (key != strings.ToLower(uuid) || strings.ToLower(id) != key) {
				continue
			}
			if own.Period != 0 {
				vm.Period = own.Period
			}
			if own.Symbols != "" {
				vm.Symbols = own.Symbols
			}
			if own.Ranges != nil {
				vm.Ranges = own.Ranges
			}
		}
	}
	return vm
}
