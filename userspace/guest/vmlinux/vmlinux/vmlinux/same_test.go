// SPDX-License-Identifier: MIT

package vmlinux

import "testing"

func TestIdle(t *testing.T) {
	tests := []struct {
		name string
		code []byte
		want bool
	}{
		{"nothing", nil, true},
		{"one byte", []byte{0x90}, true},
		{"several", []byte{0x90, 0x66, 0x90, 0x0f, 0x1f, 0x44, 0, 0}, true},
		{"longest", []byte{0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0}, true},
		{"jump over breakpoints", []byte{0xeb, 2, 0xcc, 0xcc, 0x90}, true},
		{"jump over code", []byte{0xeb, 2, 0xcc, 0xfa, 0x90}, false},
		{"jump beyond the end", []byte{0xeb, 3, 0xcc, 0xcc}, false},
		{"jump back", []byte{0xeb, 0xfe}, false},
		{"long jump over breakpoints", []byte{0xe9, 1, 0, 0, 0, 0xcc}, true},
		{"cli", []byte{0x90, 0xfa}, false},
		{"half an instruction", []byte{0x0f, 0x1f, 0x44, 0}, false},
		{"pause", []byte{0xf3, 0x90}, false},
		{"another displacement", []byte{0x0f, 0x1f, 0x44, 0, 1}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := idle(tt.code); got != tt.want {
				t.Errorf("idle(% x) = %v", tt.code, got)
			}
		})
	}
}

func TestSame(t *testing.T) {
	// call, with the distance of the replacement to where it is copied to.
	call := []byte{0xe8, 0x10, 0, 0, 0, 0x90, 0x90, 0x90}
	jump := []byte{0xe9, 0x10, 0, 0, 0, 0x90, 0x90, 0x90}
	tests := []struct {
		name      string
		want, now []byte
		moved     uint32
		same      bool
	}{
		{"equal", []byte{0x0f, 0x01, 0xcb}, []byte{0x0f, 0x01, 0xcb}, 0, true},
		{"one nop for three", []byte{0x90, 0x90, 0x90}, []byte{0x0f, 0x1f, 0x00}, 0, true},
		{"three nops stay", []byte{0x90, 0x90, 0x90}, []byte{0x90, 0x90, 0x90}, 0, true},
		{"code for nops", []byte{0x90, 0x90, 0x90}, []byte{0x0f, 0x01, 0xcb}, 0, false},
		{"nops for code", []byte{0x0f, 0x01, 0xcb}, []byte{0x0f, 0x1f, 0x00}, 0, false},
		{"call moved", call, []byte{0xe8, 0x10, 0x10, 0, 0, 0x0f, 0x1f, 0x00}, 0x1000, true},
		{"call elsewhere", call, []byte{0xe8, 0x11, 0x10, 0, 0, 0x0f, 0x1f, 0x00}, 0x1000, false},
		{"call not moved", call, []byte{0xe8, 0x10, 0x10, 0, 0, 0x0f, 0x1f, 0x00}, 0, false},
		{"jump for call", call, []byte{0xe9, 0x10, 0x10, 0, 0, 0x0f, 0x1f, 0x00}, 0x1000, false},
		{"jump shortened", jump, []byte{0xeb, 0x23, 0xcc, 0xcc, 0xcc, 0x0f, 0x1f, 0x00}, 0x10, true},
		{"jump shortened, nop behind", jump, []byte{0xeb, 0x23, 0x0f, 0x1f, 0x00, 0x0f, 0x1f, 0x00}, 0x10, true},
		{"jump shortened elsewhere", jump, []byte{0xeb, 0x24, 0xcc, 0xcc, 0xcc, 0x0f, 0x1f, 0x00}, 0x10, false},
		{"jump shortened, code behind", jump, []byte{0xeb, 0x23, 0xcc, 0xfa, 0xcc, 0x0f, 0x1f, 0x00}, 0x10, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := same(tt.want, tt.now, tt.moved); got != tt.same {
				t.Errorf("same(% x, % x, %#x) = %v", tt.want, tt.now, tt.moved, got)
			}
		})
	}
}

func TestIndirect(t *testing.T) {
	tests := []struct {
		name string
		code []byte
		op   byte
		reg  int
		want bool
	}{
		{"call *%rax", []byte{0xff, 0xd0, 0x0f, 0x1f, 0x00}, 0xe8, 0, true},
		{"jmp *%rax", []byte{0xff, 0xe0, 0x90, 0x90, 0x90}, 0xe9, 0, true},
		{"jmp *%rax, breakpoints", []byte{0xff, 0xe0, 0xcc, 0xcc, 0xcc}, 0xe9, 0, true},
		{"call *%r11", []byte{0x41, 0xff, 0xd3, 0x66, 0x90}, 0xe8, 11, true},
		{"lfence; call *%rax", []byte{0x0f, 0xae, 0xe8, 0xff, 0xd0}, 0xe8, 0, true},
		{"another register", []byte{0xff, 0xd1, 0x0f, 0x1f, 0x00}, 0xe8, 0, false},
		{"any register", []byte{0xff, 0xd1, 0x0f, 0x1f, 0x00}, 0xe8, -1, true},
		{"jump for call", []byte{0xff, 0xe0, 0x0f, 0x1f, 0x00}, 0xe8, 0, false},
		{"code behind", []byte{0xff, 0xd0, 0xfa, 0x90, 0x90}, 0xe8, 0, false},
		{"through memory", []byte{0xff, 0x10, 0x90, 0x90, 0x90}, 0xe8, 0, false},
		{"cut off", []byte{0x41, 0xff}, 0xe8, 8, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := indirect(tt.code, tt.op, tt.reg); got != tt.want {
				t.Errorf("indirect(% x, %#x, %d) = %v", tt.code, tt.op, tt.reg, got)
			}
		})
	}
}

func FuzzSame(f *testing.F) {
	f.Add([]byte{0xe9, 0x10, 0, 0, 0, 0x90}, []byte{0xeb, 0x23, 0xcc, 0xcc, 0xcc, 0x90}, uint32(0x10))
	f.Fuzz(func(t *testing.T, want, now []byte, moved uint32) {
		n := min(len(want), len(now))
		same(want[:n], now[:n], moved)
		if !same(want[:n], want[:n], 0) {
			t.Errorf("% x is not the same as itself", want[:n])
		}
	})
}
