// SPDX-License-Identifier: MIT

package host

import (
	"errors"
	"strings"
	"testing"
)

func TestContradiction(t *testing.T) {
	// As a 6.1 host under QEMU 10.0 said it.
	const seen = "[  226.269865] BUG: TASK stack guard page was hit at 0000000011937640\r\n" +
		"[  230.177795] unable to execute userspace code (SMEP?) (uid: 0)\r\n" +
		"[  230.177795] BUG: unable to handle page fault for address: ffffffffa28069bf\r\n" +
		"[  230.177795] #PF: supervisor instruction fetch in kernel mode\r\n" +
		"[  230.177795] #PF: error_code(0x0010) - not-present page\r\n" +
		"[  230.177795] PGD 60015067 P4D 60015067 PUD 60016063 PMD 5f0001e1 \r\n" +
		"[  230.177795] Oops: 0010 [#2] PREEMPT SMP NOPTI\r\n"
	for _, tt := range []struct {
		name, old, new string
		want           bool
	}{
		{"seen", "", "", true},
		{"no fault", "unable to handle", "able to handle", false},
		{"a large page that is not present", "5f0001e1", "5f0001e0", false},
		{"a table of small pages", "PMD 5f0001e1 ", "PMD 5f000063 PTE 0", false},
		{"tables end above", " PMD 5f0001e1 ", "", false},
		{"a table above is not present", "PUD 60016063", "PUD 60016062", false},
		{"not the kernel's image", "ffffffffa28069bf", "ffff8bc6cef1fb80", false},
		{"a module", "ffffffffa28069bf", "ffffffffc28069bf", false},
		{"a fault of rights", "(0x0010) - not-present page", "(0x0011) - permissions violation", false},
		{"an error code that says otherwise", "0x0010", "0x0011", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := strings.Replace(seen, tt.old, tt.new, 1)
			if tt.old != "" && text == seen {
				t.Fatal("nothing was replaced")
			}
			err := contradiction([]byte(text))
			if errors.Is(err, errContradiction) != tt.want {
				t.Errorf("%v", err)
			}
			if tt.want && !strings.Contains(err.Error(), "0xffffffffa28069bf") {
				t.Errorf("%v does not say where", err)
			}
		})
	}
}

func TestSilentReset(t *testing.T) {
	const (
		boot = "CPU Reset (CPU 0)\nEAX=00000000 EBX=00000000\n"
		said = "[  105.836491] netlink: 'tests.test': attribute type 2 has an invalid length.\r\n"
	)
	for _, tt := range []struct {
		name, resets, console string
		want                  bool
	}{
		{"silent", boot + "Triple fault\n", said, true},
		{"no triple fault", boot, said, false},
		{"no log", "", said, false},
		{"not silent", boot + "Triple fault\n", said + "[  106.0] BUG: TASK stack guard page was hit at 0000000011937640\r\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := silentReset([]byte(tt.resets), []byte(tt.console)); errors.Is(err, errContradiction) != tt.want {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestStrayWrite(t *testing.T) {
	const (
		said = "[  342.572981] kvm: kvm [1198]: vcpu0, guest rIP: 0xffffffffab296048 Unhandled WRMSR(0xc0010007) = 0xffff\r\n"
		end  = "[  358.543059] Kernel panic - not syncing: corrupted stack end detected inside scheduler\r\n" +
			"[  358.548856] Call Trace:\r\n"
	)
	for _, tt := range []struct {
		name, console    string
		sanitizers, want bool
	}{
		{"seen", said + end, false, true},
		{"with sanitizers", said + end, true, false},
		{"trouble before", said + "[  350.1] BUG: KASAN: stack-out-of-bounds\r\n" + end, false, false},
		{"a stack that grew", said + "[  350.1] BUG: TASK stack guard page was hit\r\n" + end, false, false},
		{"another panic", said + "[  358.5] Kernel panic - not syncing: Fatal exception\r\n", false, false},
		{"none", said, false, false},
	} {
		if err := strayWrite([]byte(tt.console), tt.sanitizers); errors.Is(err, errContradiction) != tt.want {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}
