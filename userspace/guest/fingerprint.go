// SPDX-License-Identifier: MIT

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"regexp"
	"strings"
	"time"
)

// Fingerprint says which kernel runs, and which run of it this is. What the
// guest does not tell is empty.
type Fingerprint struct {
	Release      string    `json:"release"`                // as uname -r
	Version      string    `json:"version"`                // the banner: "Linux version ..."
	BuildID      string    `json:"build_id,omitempty"`     // GNU build id of vmlinux, hexadecimal
	CommandLine  string    `json:"command_line,omitempty"` // saved_command_line
	BootTime     time.Time `json:"boot_time,omitzero"`     // to the second
	Distribution string    `json:"distribution,omitempty"` // "Debian 6.1.148-1": from the banner
	Symbols      string    `json:"symbols,omitempty"`      // SHA-256 of what the symbols were made of, the same in each boot of this kernel, hexadecimal
}

// Bounds of what is read. COMMAND_LINE_SIZE of x86 is 2048, NEW_UTS_LEN 64.
const (
	longestBanner  = 1024
	longestCommand = 4096
	mostNotes      = 64 << 10
)

const bannerStart = "Linux version "

func (k *Kernel) readFingerprint(ctx context.Context) {
	f := &k.Fingerprint
	if at, ok := k.Image.Lookup("linux_banner"); ok {
		banner, err := k.Space.String(ctx, at, longestBanner)
		switch {
		case err != nil:
			k.doubt(DoubtBanner, "linux_banner cannot be read: %v", err)
		case !strings.HasPrefix(banner, bannerStart):
			k.doubt(DoubtBanner, "linux_banner begins with %q, not %q", clip([]byte(banner)), bannerStart)
		default:
			f.Version = strings.TrimSpace(banner)
			f.Release, _, _ = strings.Cut(banner[len(bannerStart):], " ")
			f.Distribution = distribution(f.Release, f.Version)
		}
	} else {
		k.doubt(DoubtBanner, "the symbols have no linux_banner")
	}
	if notes, ok := k.readBetween(ctx, "__start_notes", "__stop_notes", mostNotes); ok {
		f.BuildID = buildID(notes)
	}
	if at, ok := k.Image.Lookup("saved_command_line"); ok {
		if p, err := k.Space.Pointer(ctx, at); err == nil && p != 0 {
			f.CommandLine, _ = k.Space.String(ctx, p, longestCommand)
		}
	}
}

// readBetween reads what lies between two symbols; false: the symbols or the
// memory are not there, or it is more than most bytes.
func (k *Kernel) readBetween(ctx context.Context, start, stop string, most uint64) ([]byte, bool) {
	x := k.Image.between(start, stop)
	if x.Size() == 0 || x.Size() > most {
		return nil, false
	}
	data := make([]byte, x.Size())
	return data, k.Space.Read(ctx, x.Start, data) == nil
}

// buildID finds the GNU build id among ELF notes (elf(5), NT_GNU_BUILD_ID).
func buildID(notes []byte) string {
	const kind, longest = 3, 64
	for len(notes) >= 12 {
		name, size := uint64(binary.LittleEndian.Uint32(notes)), uint64(binary.LittleEndian.Uint32(notes[4:]))
		first := 12 + (name+3)&^3
		end := first + (size+3)&^3
		if end > uint64(len(notes)) {
			break
		}
		if binary.LittleEndian.Uint32(notes[8:]) == kind && size <= longest && bytes.Equal(notes[12:12+name], []byte("GNU\x00")) {
			return hex.EncodeToString(notes[first : first+size])
		}
		notes = notes[end:]
	}
	return ""
}

// Marks that distributions leave in the banner: their package's version, or
// the compiler's and the build's number.
var (
	debianMark = regexp.MustCompile(`#\S+ (?:[A-Z_]+ )*(Debian \S+)`)
	ubuntuMark = regexp.MustCompile(`#(\d+)(~\S+)?-Ubuntu`)
	otherMarks = regexp.MustCompile(`\((Red Hat|SUSE Linux|Arch Linux|Alpine|Gentoo|Amazon Linux|Oracle)\b`)
	abiMark    = regexp.MustCompile(`^(\d+\.\d+\.\d+-\d+)-`)
)

// distribution tells from release and banner whose kernel it is; empty: they
// do not tell.
func distribution(release, banner string) string {
	if m := debianMark.FindStringSubmatch(banner); m != nil {
		return m[1]
	}
	if m := ubuntuMark.FindStringSubmatch(banner); m != nil {
		if abi := abiMark.FindStringSubmatch(release); abi != nil {
			return "Ubuntu " + abi[1] + "." + m[1] + m[2]
		}
		return "Ubuntu " + release
	}
	if m := otherMarks.FindStringSubmatch(banner); m != nil {
		return m[1] + " " + release
	}
	return ""
}

// readBootTime computes when the guest booted by its own clock, as /proc/stat
// does: the offset of the wall clock less that of the time since boot
// (getboottime64 in kernel/time/timekeeping.c). It needs types.
func (k *Kernel) readBootTime(ctx context.Context) {
	at, ok := k.Image.Lookup("tk_core")
	if !ok {
		at, ok = k.Image.Lookup("timekeeper_data") // an array in newer kernels, of which the first one is meant
	}
	if !ok || k.Types == nil {
		return
	}
	s, err := k.Types.Struct("timekeeper")
	if err != nil {
		return
	}
	realtime, err1 := s.Field("offs_real")
	boot, err2 := s.Field("offs_boot")
	if err1 != nil || err2 != nil {
		return
	}
	// In front of the timekeeper stands a sequence count; of kernels with a
	// struct tk_data the types know where it is.
	first := uint64(8)
	if data, err := k.Types.Struct("tk_data"); err == nil {
		if f, err := data.Field("timekeeper"); err == nil {
			first = uint64(f.Offset)
		}
	}
	a, err1 := k.Space.Uint(ctx, at+first+uint64(realtime.Offset), 8)
	b, err2 := k.Space.Uint(ctx, at+first+uint64(boot.Offset), 8)
	if err1 != nil || err2 != nil {
		return
	}
	// A clock that was never set counts from 1970.
	if since := int64(a) - int64(b); since >= 0 {
		k.Fingerprint.BootTime = time.Unix(0, since).UTC().Truncate(time.Second)
	}
}
