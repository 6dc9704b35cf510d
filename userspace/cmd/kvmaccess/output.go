// SPDX-License-Identifier: MIT

package main

import (
	"encoding"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strings"
	"text/tabwriter"

	"github.com/kvmaccess/kvmaccess/userspace/integrity"
)

// json prints a value for programs. Addresses and registers are strings of
// hexadecimal digits: programs that hold numbers as floating point would lose
// their low bits.
func (a *app) json(v any) error {
	e := json.NewEncoder(a.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints columns for people.
type table struct {
	w   *tabwriter.Writer
	err error
}

func (a *app) table(head ...any) *table {
	t := &table{w: tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)}
	if len(head) > 0 {
		t.row(head...)
	}
	return t
}

func (t *table) row(cells ...any) {
	texts := make([]string, len(cells))
	last := 0
	for i, c := range cells {
		if texts[i] = printable(fmt.Sprint(c)); texts[i] != "" {
			last = i + 1
		}
	}
	t.print(strings.Join(texts[:last], "\t") + "\n")
}

func (t *table) print(s string) {
	if t.err == nil {
		_, t.err = io.WriteString(t.w, s)
	}
}

func (t *table) flush() error {
	if t.err != nil {
		return t.err
	}
	return t.w.Flush()
}

// printable keeps what a guest or VMM is free to choose from driving the
// terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// plural is a number of things.
func plural[T int | uint64](n T, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return fmt.Sprintf("%d %s", n, thing)
}

// dash stands for an empty cell.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// bytesText is a size for people.
func bytesText(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	i := 0
	rest := uint64(0)
	for n >= 1024 && i < len(units)-1 {
		n, rest = n/1024, n%1024
		i++
	}
	if tenths := rest * 10 / 1024; tenths > 0 && n < 100 {
		return fmt.Sprintf("%d.%d %s", n, tenths, units[i])
	}
	return fmt.Sprintf("%d %s", n, units[i])
}

// hexDump writes data as at address, 16 bytes a line.
func hexDump(w io.Writer, address uint64, data []byte) error {
	for len(data) > 0 {
		line := data[:min(16, len(data))]
		var sb strings.Builder
		fmt.Fprintf(&sb, "%016x ", address)
		for i := range 16 {
			if i == 8 {
				sb.WriteByte(' ')
			}
			if i < len(line) {
				fmt.Fprintf(&sb, " %02x", line[i])
			} else {
				sb.WriteString("   ")
			}
		}
		sb.WriteString("  |")
		for _, b := range line {
			if b < ' ' || b > '~' {
				b = '.'
			}
			sb.WriteByte(b)
		}
		sb.WriteString("|\n")
		if _, err := io.WriteString(w, sb.String()); err != nil {
			return err
		}
		data = data[len(line):]
		address += uint64(len(line))
	}
	return nil
}

// hexBytes are bytes that JSON shows as hexadecimal digits.
type hexBytes []byte

func (b hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(b)), nil }

// hexed is a struct, or a slice of structs, of which JSON shows each 64-bit
// number without sign, but for a size, as integrity.Hex; structs in it likewise.
type hexed struct{ v any }

func (h hexed) MarshalJSON() ([]byte, error) {
	var sb strings.Builder
	if err := writeHexed(&sb, reflect.ValueOf(h.v)); err != nil {
		return nil, err
	}
	return []byte(sb.String()), nil
}

func writeHexed(sb *strings.Builder, v reflect.Value) error {
	if v.Kind() == reflect.Slice {
		sb.WriteByte('[')
		for i := range v.Len() {
			if i > 0 {
				sb.WriteByte(',')
			}
			if err := writeHexed(sb, v.Index(i)); err != nil {
				return err
			}
		}
		sb.WriteByte(']')
		return nil
	}
	sb.WriteByte('{')
	if err := writeFields(sb, v, true); err != nil {
		return err
	}
	sb.WriteByte('}')
	return nil
}

// writeFields writes the fields of a struct, and as they were its own those of
// structs that it embeds without a name.
func writeFields(sb *strings.Builder, v reflect.Value, first bool) error {
	for i := range v.NumField() {
		field, f := v.Type().Field(i), v.Field(i)
		name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
		if !field.IsExported() || strings.Contains(options, "omit") && f.IsZero() {
			continue
		}
		if field.Anonymous && name == "" {
			if err := writeFields(sb, f, first); err != nil {
				return err
			}
			first = false
			continue
		}
		if !first {
			sb.WriteByte(',')
		}
		first = false
		fmt.Fprintf(sb, "%q:", name)
		value := f.Interface()
		_, text := value.(encoding.TextMarshaler)
		if !text && (f.Kind() == reflect.Struct || f.Kind() == reflect.Slice && f.Type().Elem().Kind() == reflect.Struct) {
			if err := writeHexed(sb, f); err != nil {
				return err
			}
			continue
		}
		if n, ok := value.(uint64); ok && name != "size" {
			value = integrity.Hex(n)
		}
		b, err := json.Marshal(value)
		if err != nil {
			return err
		}
		sb.Write(b)
	}
	return nil
}
