// SPDX-License-Identifier: MIT

package cache

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// aptSource is one package archive of this machine.
type aptSource struct {
	uri    string
	suites []string
}

// aptSources reads where this machine itself takes packages from: a fixture
// uses the same archives, so that no address stands in any file.
func aptSources(dir string) ([]aptSource, error) {
	files, err := filepath.Glob(filepath.Join(dir, "sources.list.d", "*"))
	if err != nil {
		return nil, err
	}
	var sources []aptSource
	for _, name := range append([]string{filepath.Join(dir, "sources.list")}, files...) {
		text, err := os.ReadFile(name)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		switch filepath.Ext(name) {
		case ".list":
			sources = append(sources, parseOneLine(string(text))...)
		case ".sources":
			sources = append(sources, parseDeb822(string(text))...)
		}
	}
	return sources, nil
}

// parseOneLine reads sources.list(5)'s one-line style.
func parseOneLine(text string) []aptSource {
	var sources []aptSource
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			_, after, ok := strings.Cut(rest, "]")
			if !ok {
				continue
			}
			rest = after
		}
		if f := strings.Fields(rest); len(f) >= 2 {
			sources = append(sources, aptSource{uri: f[0], suites: f[1:2]})
		}
	}
	return sources
}

// parseDeb822 reads sources.list(5)'s deb822 style.
func parseDeb822(text string) []aptSource {
	var sources []aptSource
	fields := map[string][]string{}
	flush := func() {
		if slices.Contains(fields["types"], "deb") && !slices.Contains(fields["enabled"], "no") {
			for _, uri := range fields["uris"] {
				sources = append(sources, aptSource{uri: uri, suites: fields["suites"]})
			}
		}
		fields = map[string][]string{}
	}
	last := ""
	s := bufio.NewScanner(strings.NewReader(text))
	for s.Scan() {
		line := s.Text()
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
		case strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t"):
			fields[last] = append(fields[last], strings.Fields(line)...)
		default:
			key, value, _ := strings.Cut(line, ":")
			last = strings.ToLower(key)
			fields[last] = append(fields[last], strings.Fields(value)...)
		}
	}
	flush()
	return sources
}

// archiveLines are the package archives of a suite, as apt lines: those of
// this machine's sources that carry its own release, with the suite's name
// in place of it. None: the tool's default is as good as any.
func archiveLines(sources []aptSource, release string, suite Suite) []string {
	find := func(name string) string {
		for _, s := range sources {
			if slices.Contains(s.suites, name) {
				return s.uri
			}
		}
		return ""
	}
	var lines []string
	add := func(machine, wanted string) {
		if uri := find(machine); uri != "" {
			lines = append(lines, fmt.Sprintf("deb %s %s main", uri, wanted))
		}
	}
	add(release, suite.release())
	if len(lines) == 0 {
		return nil
	}
	for _, pocket := range suite.Pockets {
		add(release+pocket, suite.release()+pocket)
	}
	return lines
}

// osRelease returns the machine's release name, "bookworm" for instance.
func osRelease() string {
	text, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return ""
}

// aptOptions are this machine's settings on how packages are fetched
// (proxies, dates, retries), for a nested apt that starts with none.
func aptOptions(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return nil, fmt.Errorf("apt-config dump: %w", err)
	}
	var options []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		key, value, ok := strings.Cut(line, " ")
		if !ok || value == `""` {
			continue
		}
		for _, prefix := range []string{"Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries"} {
			if strings.HasPrefix(key, prefix) {
				options = append(options, "--aptopt="+line)
				break
			}
		}
	}
	return options, nil
}
