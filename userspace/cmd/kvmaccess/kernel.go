// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/kvmaccess/kvmaccess/userspace/guest"
	"github.com/kvmaccess/kvmaccess/userspace/kvmaccess"
)

// readSymbols parses the file that --symbols names; nil without one.
func (a *app) readSymbols() (*guest.Symbols, error) {
	if a.symbols == "" {
		return nil, nil
	}
	f, err := os.Open(a.symbols)
	if err != nil {
		return nil, fmt.Errorf("--symbols: %w", err)
	}
	defer f.Close()
	s, err := guest.ParseSymbols(f)
	if err != nil {
		return nil, fmt.Errorf("--symbols %s: %w", a.symbols, err)
	}
	return s, nil
}

// image finds the symbols of the guest's kernel where it runs: those that
// --symbols names, or else its own, out of its memory.
func (a *app) image(ctx context.Context, src source, v vm, opts guest.AttachOptions) (*guest.Image, error) {
	symbols, err := a.readSymbols()
	switch {
	case err != nil:
		return nil, err
	case symbols != nil:
		return a.fileImage(ctx, src, v, symbols)
	}
	opts.Cache = a.cache
	k, err := guest.Attach(ctx, live{src.Memory(v.VM), src, v.ID}, opts)
	switch {
	case gone(err):
		return nil, err
	case err != nil:
		return nil, &kernelError{v.String(), "no symbols in its memory", err}
	}
	return k.Image, nil
}

// kernelError says why something is not found in the kernel of a guest.
type kernelError struct {
	guest string
	what  string // is not found
	err   error
}

func (e *kernelError) Error() string {
	if e.what == "" {
		return fmt.Sprintf("%s: %v", e.guest, e.err)
	}
	return fmt.Sprintf("%s: %s: %v", e.guest, e.what, e.err)
}

// Unwrap returns the reason.
func (e *kernelError) Unwrap() error { return e.err }

// gone says that it is not the kernel's fault.
func gone(err error) bool {
	return errors.Is(err, kvmaccess.ErrNoVM) || errors.Is(err, kvmaccess.ErrDying) || errors.Is(err, kvmaccess.ErrNoModule) ||
		errors.Is(err, kvmaccess.ErrPermission) || errors.Is(err, kvmaccess.ErrProtected) || errors.Is(err, context.Canceled)
}

// names is the image for what can do without: nil where nothing tells it.
func (a *app) names(ctx context.Context, src source, v vm) (*guest.Image, error) {
	image, err := a.image(ctx, src, v, guest.AttachOptions{NoTypes: true, Early: true})
	var none *kernelError
	if errors.As(err, &none) {
		fmt.Fprintf(a.err, "note: %s\n", printable(explain(err)))
		return nil, nil
	}
	return image, err
}

// fileImage finds where the guest's kernel runs of which the symbols are, from
// one of its vCPUs that is past its boot.
func (a *app) fileImage(ctx context.Context, src source, v vm, symbols *guest.Symbols) (*guest.Image, error) {
	vcpus, err := src.VCPUs(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	err = errors.New("it has no vCPU")
	for _, c := range vcpus {
		var idt kvmaccess.Table
		if idt, err = a.readTable(ctx, src, v, c, kvmaccess.TableIDT); err != nil {
			continue
		}
		var slide guest.Slide
		slide, err = guest.FindSlide(symbols, &c.Registers, guest.ParseIDT(idt.Data, guest.ModeOf(&c.Registers).Long()))
		if err == nil {
			return guest.NewImage(symbols, slide.Value), nil
		}
	}
	return nil, fmt.Errorf("--symbols %s: where the kernel of %s lies cannot be told: %w", a.symbols, v, err)
}

// name describes an address by the image's symbols; "" without any.
func name(image *guest.Image, addr uint64) string {
	if image == nil || addr == 0 {
		return ""
	}
	return image.Name(addr)
}

// readTable reads a descriptor table of a vCPU, from the VMM where a page of
// it is not resident.
func (a *app) readTable(ctx context.Context, src source, v vm, c kvmaccess.VCPU, kind kvmaccess.TableKind) (kvmaccess.Table, error) {
	t, err := src.Table(ctx, v.ID, c.ID, kind)
	if !errors.Is(err, kvmaccess.ErrNotResident) {
		return t, err
	}
	r := c.IDTR
	if kind == kvmaccess.TableGDT {
		r = c.GDTR
	}
	t = kvmaccess.Table{VM: v.ID, VCPU: c.ID, Kind: kind, Base: r.Base, Limit: r.Limit, Condition: c.Condition}
	t.Data = make([]byte, int(r.Limit)+1)
	mode := guest.ModeOf(&c.Registers)
	return t, guest.ReadVirtual(ctx, src.Memory(v.VM), mode, mode.RootOf(c.CR3), r.Base, t.Data)
}

// readVirtual reads guest-virtual memory by a vCPU's page tables, or by those
// at root unless that is 0; from the VMM what is not resident.
func readVirtual(ctx context.Context, src source, v vm, c kvmaccess.VCPU, root, gva uint64, p []byte) error {
	got, err := src.ReadVirtual(ctx, v.ID, c.ID, root, kvmaccess.Range{Address: gva, Length: uint32(len(p))})
	if err == nil && got[0].Err != nil {
		err = got[0].Err
	}
	if err == nil {
		copy(p, got[0].Data)
		return nil
	}
	if !errors.Is(err, kvmaccess.ErrNotResident) {
		return err
	}
	mode := guest.ModeOf(&c.Registers)
	if root == 0 {
		root = c.CR3
	}
	return guest.ReadVirtual(ctx, src.Memory(v.VM), mode, mode.RootOf(root), gva, p)
}

// readKernel reads kernel memory, by whichever page tables of the pair of
// page-table isolation map it.
func readKernel(ctx context.Context, src source, v vm, c kvmaccess.VCPU, gva uint64, p []byte) error {
	mem, mode := src.Memory(v.VM), guest.ModeOf(&c.Registers)
	root, err := guest.KernelRoot(ctx, mem, mode, c.CR3, gva)
	if err != nil {
		return err
	}
	return guest.ReadVirtual(ctx, mem, mode, root, gva, p)
}

// pickVCPU captures the vCPU that --vcpu names, or else the first one.
func pickVCPU(ctx context.Context, src source, v vm, want int) (kvmaccess.VCPU, error) {
	if want >= 0 {
		c, err := src.VCPU(ctx, v.ID, uint32(want))
		if errors.Is(err, kvmaccess.ErrNoVCPU) {
			all, lerr := src.VCPUs(ctx, v.ID)
			if lerr != nil {
				return c, err
			}
			ids := make([]uint32, len(all))
			for i := range all {
				ids[i] = all[i].ID
			}
			return c, fmt.Errorf("%s has no vCPU %d, it has %d", v, want, ids)
		}
		return c, err
	}
	all, err := src.VCPUs(ctx, v.ID)
	if err != nil {
		return kvmaccess.VCPU{}, err
	}
	if len(all) == 0 {
		return kvmaccess.VCPU{}, fmt.Errorf("%s has no vCPU yet", v)
	}
	return all[0], nil
}
