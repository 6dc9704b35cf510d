// SPDX-License-Identifier: MIT

package kvmaccess

import (
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// TestEnumNames: each value of the header's enums has its name here, and text
// gets back to the value.
func TestEnumNames(t *testing.T) {
	kinds := map[string]func(int64) any{
		"VENDOR_":    func(v int64) any { return Vendor(v) },
		"CAP_":       func(v int64) any { return Caps(v) },
		"VM_F_":      func(v int64) any { return VMFlags(v) },
		"CONDITION_": func(v int64) any { return Condition(v) },
		"METHOD_":    func(v int64) any { return Method(v) },
		"VCPU_F_":    func(v int64) any { return VCPUFlags(v) },
		"TABLE_":     func(v int64) any { return TableKind(v) },
	}
	check := func(v any, want string) {
		t.Helper()
		if got := v.(fmt.Stringer).String(); got != want {
			t.Errorf("%T: %q, want %q", v, got, want)
		}
		b, err := v.(encoding.TextMarshaler).MarshalText()
		if err != nil || string(b) != want {
			t.Errorf("%T: text %q, %v", v, b, err)
		}
		back := reflect.New(reflect.TypeOf(v))
		if err := back.Interface().(encoding.TextUnmarshaler).UnmarshalText(b); err != nil || back.Elem().Interface() != v {
			t.Errorf("%T: %q became %v, %v", v, b, back.Elem(), err)
		}
	}
	n := 0
	for _, e := range mustHeader(t).Enums {
		if kind := kinds[e.Prefix]; kind != nil {
			n++
			for _, x := range e.Entries {
				check(kind(x.Value), strings.ToLower(strings.TrimPrefix(x.Name, e.Prefix)))
			}
			check(kind(1<<30), map[bool]string{false: "1073741824", true: "0x40000000"}[e.Flags])
		}
		if e.Prefix == "CMD_" {
			for _, x := range e.Entries[1:] {
				if got, want := enumString(uint32(x.Value), commandNames), strings.ToLower(strings.TrimPrefix(x.Name, "CMD_")); got != want {
					t.Errorf("command %d: %q, want %q", x.Value, got, want)
				}
			}
		}
	}
	if n != len(kinds) {
		t.Errorf("%d enums of %d", n, len(kinds))
	}
	check(VMCreated, "created")
	check(VMDestroyed, "destroyed")
	check(EventKind(0), "0")
	check(Caps(0), "")
	check(CapMemory|CapEvents|1<<8, "memory,events,0x100")
	for _, bad := range []encoding.TextUnmarshaler{new(Vendor), new(Caps)} {
		if err := bad.UnmarshalText([]byte("nonsense")); err == nil {
			t.Errorf("%T took nonsense", bad)
		}
	}
	if b, err := json.Marshal(VCPU{CPU: -1}); err != nil || !strings.Contains(string(b), `"condition":"unknown"`) {
		t.Errorf("%s, %v", b, err)
	}
}
