// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/integrity"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

type memJSON struct {
	VM      kvmaccess.VMID `json:"vm"`
	Name    string         `json:"name"`
	Virtual bool           `json:"virtual"`
	Address integrity.Hex  `json:"address"`
	Length  int            `json:"length"`
	Data    hexBytes       `json:"data"` // hexadecimal digits
}

const (
	memChunk   = 1 << 20 // read and printed at a time
	memMaxJSON = 64 << 20
)

func (a *app) mem() *cobra.Command {
	var (
		vcpu         int
		virtual      bool
		root         string
		asHex, asRaw bool
	)
	cmd := a.oneVM(&cobra.Command{
		Use:   "mem",
		Short: "Show memory of a guest",
		Long: `Show LENGTH bytes of a guest's memory from ADDRESS on: guest-physical, or with
--virtual guest-virtual, by the page tables of a vCPU or by those at --root.
ADDRESS may also be SYMBOL or SYMBOL+OFFSET. Numbers are decimal, or
hexadecimal after 0x; LENGTH may end in K, M or G.`,
		Example: `  kvmaccess mem web1 0x1000 256
  kvmaccess mem web1 0xffffffff81000000 4K --virtual --raw > text
  kvmaccess mem web1 linux_banner 128`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			length, err := parseSize(args[2])
			if err != nil {
				return fmt.Errorf("LENGTH %q: %w", args[2], err)
			}
			rootValue, err := parseRoot(root)
			if err != nil {
				return fmt.Errorf("--root %q: %w", root, err)
			}
			if asRaw && a.out == os.Stdout && isTerminal(os.Stdout) {
				return errors.New("--raw writes bytes as they are, which is nothing for a terminal: send them to a file or a pipe")
			}
			if a.output == "json" && (asRaw || asHex) {
				return errors.New("-o json, --raw and --hex exclude each other")
			}
			if a.output == "json" && length > memMaxJSON {
				return fmt.Errorf("-o json takes up to %s: for more use --raw", bytesText(memMaxJSON))
			}
			return a.withVM(ctx, args[0], func(src source, v vm) error {
				address, symbolic, err := a.parseAddress(ctx, src, v, args[1])
				if err != nil {
					return err
				}
				if address+(length-1) < address {
					return fmt.Errorf("%s at %#x: that passes the end of the address space", plural(length, "byte"), address)
				}
				read, err := a.reader(ctx, src, v, vcpu, rootValue, virtual || symbolic || root != "", symbolic)
				if err != nil {
					return err
				}
				out := memJSON{VM: v.ID, Name: v.Name, Virtual: virtual || symbolic || root != "", Address: integrity.Hex(address)}
				p := make([]byte, min(length, memChunk))
				for length > 0 {
					p = p[:min(length, memChunk)]
					if err := read(address, p); err != nil {
						return fmt.Errorf("%s of %s: %w", rangeText(address, len(p)), v, err)
					}
					switch {
					case a.output == "json":
						out.Data = append(out.Data, p...)
					case asRaw:
						_, err = a.out.Write(p)
					case asHex:
						_, err = fmt.Fprint(a.out, hex.EncodeToString(p))
					default:
						err = hexDump(a.out, address, p)
					}
					if err != nil {
						return err
					}
					address += uint64(len(p))
					length -= uint64(len(p))
				}
				if asHex {
					fmt.Fprintln(a.out)
				}
				if a.output == "json" {
					out.Length = len(out.Data)
					return a.json(out)
				}
				return nil
			})
		},
	}, "ADDRESS", "LENGTH")
	f := cmd.Flags()
	f.BoolVarP(&virtual, "virtual", "v", false, "ADDRESS is guest-virtual")
	f.StringVar(&root, "root", "", "translate by the page tables at this `address`, in the format of CR3; implies --virtual")
	f.BoolVar(&asHex, "hex", false, "hexadecimal digits only")
	f.BoolVar(&asRaw, "raw", false, "the bytes as they are")
	vcpuFlag(cmd, &vcpu, "whose page tables translate (default the first)")
	cmd.MarkFlagsMutuallyExclusive("hex", "raw")
	return cmd
}

func rangeText(address uint64, n int) string {
	return fmt.Sprintf("memory %#x to %#x", address, address+uint64(n-1))
}

// reader returns how to read the memory that the flags ask for. Kernel symbols
// are read by the kernel's page tables unless others are given.
func (a *app) reader(ctx context.Context, src source, v vm, vcpu int, root uint64, virtual, kernel bool) (func(uint64, []byte) error, error) {
	if !virtual {
		mem := src.Memory(v.VM)
		return func(address uint64, p []byte) error { return mem.ReadPhysical(ctx, address, p) }, nil
	}
	c, err := pickVCPU(ctx, src, v, vcpu)
	if err != nil {
		return nil, err
	}
	if mode := guest.ModeOf(&c.Registers); mode.Format == guest.FormatNone && root == 0 {
		return nil, fmt.Errorf("%s vCPU %d has paging off: guest-virtual addresses are guest-physical ones, leave --virtual away", v, c.ID)
	}
	return func(address uint64, p []byte) error {
		if kernel && root == 0 {
			return readKernel(ctx, src, v, c, address, p)
		}
		return readVirtual(ctx, src, v, c, root, address, p)
	}, nil
}

// parseAddress takes a number, or SYMBOL[+OFFSET].
func (a *app) parseAddress(ctx context.Context, src source, v vm, arg string) (address uint64, symbolic bool, err error) {
	n, err := parseNumber(arg, math.MaxUint64)
	if err == nil {
		return n, false, nil
	}
	symbol, offset, _ := strings.Cut(arg, "+")
	if symbol == "" || symbol[0] >= '0' && symbol[0] <= '9' {
		return 0, false, fmt.Errorf("ADDRESS %q: %w, nor a symbol", arg, err)
	}
	image, err := a.image(ctx, src, v, guest.AttachOptions{})
	if err != nil {
		return 0, false, fmt.Errorf("ADDRESS %q: %w", arg, err)
	}
	address, ok := image.Lookup(symbol)
	if !ok {
		return 0, false, fmt.Errorf("ADDRESS %q: the kernel of %s has no symbol %q", arg, v, symbol)
	}
	if offset != "" {
		n, err := parseNumber(offset, math.MaxUint32)
		if err != nil {
			return 0, false, fmt.Errorf("ADDRESS %q: offset: %w", arg, err)
		}
		address += n
	}
	return address, true, nil
}

func parseRoot(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	n, err := parseNumber(s, math.MaxUint64)
	if err == nil && n == 0 {
		err = errors.New("page tables at 0 are those of no vCPU")
	}
	return n, err
}

// parseNumber takes decimal, or hexadecimal after 0x, up to most.
func parseNumber(s string, most uint64) (uint64, error) {
	base, digits := 10, s
	if len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X") {
		base, digits = 16, s[2:]
	}
	n, err := strconv.ParseUint(digits, base, 64)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && n > most:
		return 0, fmt.Errorf("more than %#x", most)
	case err != nil:
		return 0, errors.New("not a number, decimal or hexadecimal after 0x")
	}
	return n, nil
}

// parseSize takes a number of bytes from 1 on, or of KiB, MiB or GiB.
func parseSize(s string) (uint64, error) {
	shift := 0
	if s != "" {
		if i := strings.IndexByte("KMG", s[len(s)-1]&^0x20); i >= 0 {
			shift = 10 * (i + 1)
			s = s[:len(s)-1]
		}
	}
	n, err := parseNumber(s, math.MaxUint64>>shift)
	if err == nil && n == 0 {
		err = errors.New("ask for at least one byte")
	}
	return n << shift, err
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
